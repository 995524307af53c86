"""What a loss costs: ours, the released HCL code, dense formulas and other libraries, in turn.

    python benchmarks/loss.py [--sizes 512 1024 ... 65536] [--rounds 7] [--dim 128] [--quick]

Forward and backward of one loss on N = 2B embeddings. Every implementation runs once in a round, so
drift of the machine hits all alike, and what counts is the ratio of its time to ours in the same
round (median and quartiles). On a CPU the time is the processor time of one thread, on a GPU the
wall clock between synchronisations. Peak memory is what a call needs beyond its inputs, on a CPU
in a process of its own. Loss and gradient are compared with a float64 reference.

The other libraries have no HCL: what they compute is plain NT-Xent or a relative of it, which is
easier. A row says which loss it is, and gives its ratio to our NT-Xent too. To have them all:

    pip install --no-deps lightly pytorch-metric-learning solo-learn inf-cl

The result is printed and written to benchmarks/loss.json with its provenance. ``--quick`` is two
small sizes and one round, to see that it runs; it writes only where ``--out`` says.
"""

import argparse
import ctypes
import json
import math
import random
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hcl.losses
from hcl.atomic import whole_or_nothing
from hcl.provenance import provenance

SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
TEMPERATURE, TAU_PLUS, CLASSES = 0.5, 0.1, 10
CHECKED_UP_TO = 8192  # float64 takes its time
TIMED_UP_TO = 8192  # the others and the variants, on a CPU; beyond it two rounds of two losses
WEIGHED_UP_TO = 16384
BEYOND = (("ours", "HCL"), ("ours", "NT-Xent"))
IN_QUICK = (("ours", "HCL"), ("released", "HCL"))  # what the quick form weighs
PML = "pytorch-metric-learning"
PEERS = ("lightly", "solo-learn", PML, "inf-cl", "triton")
LOSSES = {
    "HCL": "beta = 1, tau_plus = 0.1: two row sums over the negatives, and the debiasing",
    "HCL beta=0.5": "the same with another hardness",
    "HCL beta=0.7": "the same with a hardness that is no multiple of one half",
    "HCL bfloat16": "HCL on embeddings cast to bfloat16, compared with float64 before the cast",
    "NT-Xent": "one row sum, no weights and no debiasing: easier than HCL",
    "Debiased": "one row sum and the debiasing: easier than HCL",
    "Decoupled": "NT-Xent without the positive in the denominator: easier than HCL",
    "InfoNCE": "NT-Xent with the anchor itself among its negatives: easier than HCL",
    "SupCon": f"NT-Xent over all positives of {CLASSES} even classes",
    "H-SCL": f"HCL's weights for every positive of {CLASSES} even classes",
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # z1, z2 (B, d), labels (B,) to a scalar
# e^s of the negatives (R, N - 2) and of the positive (R,) to the losses (R,) of R anchors
Anchors = Callable[[Tensor, Tensor], Tensor]


# HCL as others would write it ---------------------------------------------------------------------


def released(z1: Tensor, z2: Tensor, labels: Tensor | None = None, *, beta: float = 1.0) -> Tensor:
    """The released image criterion, from its description: exponentials, a mask made at every call.

    Embeddings are normalised here, as the released model does before the loss.
    """
    b, t = len(z1), TEMPERATURE
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    allowed = torch.ones(b, 2 * b, dtype=torch.bool)
    for i in range(b):
        allowed[i, i] = False
        allowed[i, i + b] = False
    allowed = torch.cat([allowed, allowed]).to(z.device)
    u = torch.exp(z @ z.T / t).masked_select(allowed).view(2 * b, -1)  # (N, N - 2)
    p = torch.exp((z[:b] * z[b:]).sum(dim=1) / t)
    p = torch.cat([p, p])  # (N,)
    negatives = 2 * b - 2
    weight = (beta * u.log()).exp()
    r = (weight * u).sum(dim=1) / weight.mean(dim=1)
    ng = (r - TAU_PLUS * negatives * p) / (1 - TAU_PLUS)
    ng = ng.clamp(min=negatives * math.exp(-1 / t))
    return -torch.log(p / (p + ng)).mean()


def dense(z1: Tensor, z2: Tensor, labels: Tensor | None = None, *, beta: float = 1.0) -> Tensor:
    """The same loss as one would write it with care: two log-sum-exps of the N x N scores."""
    b, t = len(z1), TEMPERATURE
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    p = (z[:b] * z[b:]).sum(dim=1).repeat(2) / t
    excluded = torch.zeros(2 * b, 2 * b, dtype=torch.bool, device=z.device)
    for diagonal in (0, b, -b):
        excluded.diagonal(diagonal).fill_(True)
    s = (z / t @ z.T).masked_fill_(excluded, -math.inf)
    negatives = 2 * b - 2
    log_r = math.log(negatives) + ((1 + beta) * s).logsumexp(dim=1) - (beta * s).logsumexp(dim=1)
    ng = (log_r.exp() - TAU_PLUS * negatives * p.exp()) / (1 - TAU_PLUS)
    ng = ng.clamp(min=negatives * math.exp(-1 / t))
    return F.softplus(ng.log() - p).mean()


# What is compared ---------------------------------------------------------------------------------


def hcl_anchors(u: Tensor, p: Tensor, *, beta: float, tau_plus: float) -> Tensor:
    """The papers' formula; NT-Xent and the debiased loss are its beta = 0."""
    negatives, weight = u.shape[1], u**beta
    r = (weight * u).sum(dim=1) / weight.mean(dim=1)
    ng = (r - tau_plus * negatives * p) / (1 - tau_plus)
    return torch.log1p(ng.clamp(min=negatives * math.exp(-1 / TEMPERATURE)) / p)


def decoupled_anchors(u: Tensor, p: Tensor) -> Tensor:
    return u.sum(dim=1).log() - p.log()


def infonce_anchors(u: Tensor, p: Tensor) -> Tensor:
    return torch.log1p((u.sum(dim=1) + math.exp(1 / TEMPERATURE)) / p)


HCL = {beta: partial(hcl_anchors, beta=beta, tau_plus=TAU_PLUS) for beta in (0.0, 0.5, 0.7, 1.0)}
NT_XENT = partial(hcl_anchors, beta=0.0, tau_plus=0.0)


def ours(name: str, dtype: torch.dtype = torch.float32, **options: float) -> Callable[[], Loss]:
    def make() -> Loss:
        function = getattr(hcl.losses, name, None)
        if function is None:
            raise ImportError(f"hcl.losses has no {name}")
        loss = partial(function, temperature=TEMPERATURE, **options)
        if name in ("supcon", "hard_scl"):
            return loss
        return lambda z1, z2, labels: loss(z1.to(dtype), z2.to(dtype))

    return make


def compiled() -> Loss:
    torch.compiler.reset()  # every size is compiled for itself
    return torch.compile(dense, dynamic=False)


def lightly(name: str) -> Loss:
    from lightly import loss

    function = getattr(loss, name)(temperature=TEMPERATURE)
    return lambda z1, z2, labels: function(z1, z2)


def solo_learn() -> Loss:
    # The package asks for pytorch-lightning 1.x when imported; this file of it needs torch alone.
    path = metadata.distribution("solo-learn").locate_file("solo/losses/simclr.py")
    function = runpy.run_path(str(path))["simclr_loss_func"]
    return lambda z1, z2, labels: function(z1, z2, temperature=TEMPERATURE)


def metric_learning(name: str) -> Loss:
    from pytorch_metric_learning import losses

    function = losses.SelfSupervisedLoss(getattr(losses, name)(temperature=TEMPERATURE))
    return lambda z1, z2, labels: function(z1, z2)


def inf_cl() -> Loss:
    if not torch.cuda.is_available():
        raise ImportError("inf-cl needs CUDA")
    from inf_cl import cal_flash_loss

    def loss(z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        partner = torch.arange(len(z), device=z.device).roll(len(z1))
        return cal_flash_loss(z, z, partner, 1 / TEMPERATURE, head_dim=z.shape[1]).mean()

    return loss


class Contender(NamedTuple):
    """An implementation of a loss; ``make`` raises ImportError where it is not installed."""

    implementation: str
    loss: str
    make: Callable[[], Loss]
    anchors: Anchors | None = None
    squares: float = 0.0  # peak memory in N x N matrices of float32, measured at N = 4096
    cubes: float = 0.0


CONTENDERS = [
    Contender("ours", "HCL", ours("hard", beta=1.0, tau_plus=TAU_PLUS), HCL[1.0]),
    Contender("ours", "HCL beta=0.5", ours("hard", beta=0.5, tau_plus=TAU_PLUS), HCL[0.5]),
    Contender("ours", "HCL beta=0.7", ours("hard", beta=0.7, tau_plus=TAU_PLUS), HCL[0.7]),
    Contender("ours", "HCL bfloat16", ours("hard", torch.bfloat16, tau_plus=TAU_PLUS), HCL[1.0]),
    Contender("ours", "NT-Xent", ours("nt_xent"), NT_XENT),
    Contender("ours", "Debiased", ours("debiased", tau_plus=TAU_PLUS), HCL[0.0]),
    Contender("ours", "SupCon", ours("supcon")),
    Contender("ours", "H-SCL", ours("hard_scl")),
    Contender("released", "HCL", lambda: released, HCL[1.0], squares=6.9),
    Contender("dense", "HCL", lambda: dense, HCL[1.0], squares=5.4),
    Contender("compiled", "HCL", compiled, HCL[1.0], squares=1.4),
    Contender("lightly NTXentLoss", "NT-Xent", partial(lightly, "NTXentLoss"), NT_XENT, 4.7),
    Contender("lightly DCLLoss", "Decoupled", partial(lightly, "DCLLoss"), decoupled_anchors, 5.4),
    Contender("solo-learn simclr_loss_func", "NT-Xent", solo_learn, NT_XENT, squares=6.6),
    Contender(f"{PML} SupConLoss", "NT-Xent", partial(metric_learning, "SupConLoss"), NT_XENT, 12),
    Contender(
        f"{PML} NTXentLoss", "NT-Xent", partial(metric_learning, "NTXentLoss"), NT_XENT, cubes=4.3
    ),
    Contender("inf-cl cal_flash_loss", "InfoNCE", inf_cl, infonce_anchors),
]  # fmt: skip


# Measuring ----------------------------------------------------------------------------------------


class Batch(NamedTuple):
    z1: Tensor
    z2: Tensor
    labels: Tensor


def batch(views: int, dim: int, device: torch.device) -> Batch:
    """Random pairs, cosine about 0.8 between partners, not normalised."""
    g = torch.Generator().manual_seed(views)
    b = views // 2
    base = torch.randn(b, dim, generator=g)
    z1, z2 = (
        (base + 0.5 * torch.randn(b, dim, generator=g)).to(device).requires_grad_()
        for _ in range(2)
    )
    return Batch(z1, z2, (torch.randperm(b, generator=g) % CLASSES).to(device))


def step(loss: Loss, data: Batch) -> tuple[Tensor, Tensor]:
    """The loss and its gradient (N, d)."""
    value = loss(*data)
    return value.detach(), torch.cat(torch.autograd.grad(value, (data.z1, data.z2)))


def reference(anchors: Anchors, data: Batch, rows: int = 512) -> tuple[Tensor, Tensor]:
    """The loss and its gradient (N, d) in float64, some rows of the scores at a time."""
    z = torch.cat([data.z1, data.z2]).detach().double().requires_grad_()
    n = len(z)
    total = z.new_zeros(())
    for strip in torch.arange(n, device=z.device).split(rows):
        unit = F.normalize(z, dim=1)
        partner = (strip + n // 2) % n
        u = torch.exp(unit[strip] @ unit.T / TEMPERATURE)  # (R, N)
        keep = torch.ones_like(u, dtype=torch.bool)
        keep.scatter_(1, torch.stack([strip, partner], dim=1), False)
        p = u.gather(1, partner[:, None]).squeeze(1)
        value = anchors(u[keep].view(len(strip), n - 2), p).sum() / n
        value.backward()
        total += value.detach()
    assert z.grad is not None
    return total, z.grad


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def seconds(loss: Loss, data: Batch, repeats: int = 1) -> float:
    """Mean time of a forward and backward pass."""
    cuda = data.z1.is_cuda
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    for _ in range(repeats):
        step(loss, data)
    if cuda:
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def race(entrants: dict[Any, Loss], data: Batch, rounds: int, least: float) -> dict[Any, Any]:
    """Seconds of every entrant in every round (rounds,); one measurement lasts ``least`` or more.

    The order changes from round to round, so nobody always runs after the same neighbour.
    """
    repeats = {
        c: max(1, math.ceil(least / max(seconds(f, data), 1e-9))) if least else 1
        for c, f in entrants.items()
    }
    order, shuffle = list(entrants), random.Random(0).shuffle
    times: dict[Any, list[float]] = {c: [] for c in entrants}
    for _ in tqdm(range(rounds), desc=f"N={2 * len(data.z1)} rounds", leave=False):
        shuffle(order)
        for c in order:
            times[c].append(seconds(entrants[c], data, repeats[c]))
    return {c: np.array(t) for c, t in times.items()}


def available_bytes(device: torch.device) -> float:
    """What may be asked for now: free memory of the GPU, or what Linux says is available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else math.inf


def too_large(contender: Contender, views: int, available: float) -> str | None:
    """Why the size is not tried: it needs more than 0.6 of the memory there is."""
    needed = 4 * (contender.squares * views**2 + contender.cubes * views**3)
    if needed <= 0.6 * available:
        return None
    return f"needs about {needed / 2**30:.3g} GiB, of {available / 2**30:.3g} GiB available"


def weigh(contender: Contender, views: int, dim: int, device: torch.device) -> int:
    """Bytes that one call needs beyond its inputs, at its peak. On a CPU: call it in a new process.

    Linux's own mark of the highest resident size is read and reset. ``ru_maxrss`` would not do: a
    child begins with the value of its parent.
    """
    data, small = batch(views, dim, device), batch(8, dim, device)
    loss = contender.make()
    cuda = device.type == "cuda"
    step(loss, data if cuda or contender.implementation == "compiled" else small)  # warm up
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(loss, data)
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # what the warm-up left would be used again and hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")
    before = _highest_resident()
    step(loss, data)
    return _highest_resident() - before


def _highest_resident() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise OSError("/proc/self/status has no VmHWM on this system")
    return int(found[1]) * 1024


def weigh_apart(contender: Contender, views: int, args: argparse.Namespace) -> int:
    """:func:`weigh` on a CPU, in a process that has done nothing else.

    Raises: RuntimeError: the process failed, with the last line it said.
    """
    name = f"{contender.implementation}/{contender.loss}"
    words = ["--weigh", name, "--sizes", views, "--dim", args.dim, "--precision", args.precision]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"ended with {done.returncode}")
    return int(done.stdout.split()[-1])


# One size and all of them -------------------------------------------------------------------------


def measure(views: int, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row for every contender at N = ``views``; the fields are explained in ``FIELDS``."""
    data = batch(views, args.dim, device)
    beyond = device.type == "cpu" and views > TIMED_UP_TO
    warm = batch(64, args.dim, device) if beyond else data
    check = not beyond and views <= CHECKED_UP_TO
    wanted = cache(partial(reference, data=data))
    rows, entrants = {}, {}
    for c in tqdm(CONTENDERS, desc=f"N={views} first calls", leave=False):
        known = {"views": views, "implementation": c.implementation, "loss": c.loss}
        rows[c] = {**dict.fromkeys(FIELDS), **known}
        reason = _untimed(c, views, args, device)
        if not reason:
            loss, found = _first(c, warm)
            if loss is None:
                reason = found
            else:
                entrants[c] = loss
                if c.anchors and check:
                    rows[c] |= _errors(found, wanted(c.anchors))
        rows[c]["time_skipped"] = reason
    rounds = min(args.rounds, 2) if beyond else args.rounds
    times = race(entrants, data, rounds, least=0.0 if args.quick or beyond else 0.05)
    for c, taken in times.items():
        rows[c] |= _ratios(taken, times)
    for c in tqdm(CONTENDERS, desc=f"N={views} memory", leave=False):
        failed = None if beyond else rows[c]["time_skipped"]
        rows[c] |= _memory(c, views, failed, args, device)
    return list(rows.values())


FIELDS = {
    "views": "N = 2B embeddings in the loss",
    "implementation": "ours, released, dense, compiled, or a library and its function",
    "loss": "which loss it computes, a key of `losses`",
    "rounds": "how often it was timed",
    "seconds": "median time of forward and backward",
    "ratio": "median over rounds of its time divided by that of our HCL in the same round",
    "ratio_q1": "first quartile",
    "ratio_q3": "third quartile",
    "nt_xent_ratio": "the same against our NT-Xent",
    "nt_xent_ratio_q1": "first quartile",
    "nt_xent_ratio_q3": "third quartile",
    "time_skipped": "why there is no time",
    "peak_bytes": "peak memory beyond the inputs, gradient included",
    "memory_skipped": "why there is no memory",
    "loss_error": "relative error of the loss against float64; null: not checked or not finite",
    "gradient_error": "relative error of the gradient (Frobenius norm) against float64",
}


def _first(c: Contender, data: Batch) -> tuple[Loss | None, Any]:
    """The loss and what its first call gave, or None and why there is none.

    Whatever goes wrong in another library is recorded; our own errors are raised.
    """
    try:
        loss = c.make()
        return loss, step(loss, data)
    except Exception as error:
        if c.implementation == "ours" and not isinstance(error, ImportError):
            raise
        return None, _said(error)


def _errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float | None]:
    errors = {}
    for name, ours, wanted in zip(("loss", "gradient"), found, exact, strict=True):
        error = relative(ours, wanted)
        errors[f"{name}_error"] = error if math.isfinite(error) else None
    return errors


def _untimed(
    c: Contender, views: int, args: argparse.Namespace, device: torch.device
) -> str | None:
    if args.quick and c.implementation == "compiled":
        return "not in the quick form"
    return _limit(c, views, TIMED_UP_TO, device)


def _limit(c: Contender, views: int, most: int, device: torch.device) -> str | None:
    if device.type == "cpu" and views > most and (c.implementation, c.loss) not in BEYOND:
        return f"on a CPU only up to N = {most}"
    return too_large(c, views, available_bytes(device))


def _memory(
    c: Contender, views: int, failed: str | None, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Peak memory, or why there is none."""
    reason = failed or _limit(c, views, WEIGHED_UP_TO, device)
    shown = (c.implementation, c.loss) in IN_QUICK and views == max(args.sizes)
    if args.quick and not shown:
        reason = reason or "not in the quick form"
    if reason:
        return {"memory_skipped": reason}
    try:
        if device.type == "cpu":
            return {"peak_bytes": weigh_apart(c, views, args)}
        return {"peak_bytes": weigh(c, views, args.dim, device)}
    except Exception as error:
        return {"memory_skipped": _said(error)}


def _ratios(taken: np.ndarray, times: dict[Contender, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": len(taken), "seconds": float(np.median(taken))}
    for name, loss in (("ratio", "HCL"), ("nt_xent_ratio", "NT-Xent")):
        base = next(t for c, t in times.items() if (c.implementation, c.loss) == ("ours", loss))
        low, middle, high = np.quantile(taken / base, [0.25, 0.5, 0.75]).tolist()
        found |= {name: middle, f"{name}_q1": low, f"{name}_q3": high}
    return found


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, ImportError) else f"{type(error).__name__}: {lines[0]}"


def versions() -> dict[str, str | None]:
    """Of the libraries that are compared; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PEERS)
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="N = 2B views, even")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--precision", default="highest", choices=("highest", "high", "medium"),
        help="torch's precision of float32 matrix products",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="N = 64 and 128, one round")
    parser.add_argument("--out", type=Path, help="where the JSON goes (benchmarks/loss.json)")
    parser.add_argument("--weigh", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.sizes = args.sizes or ([64, 128] if args.quick else SIZES)
    args.rounds = args.rounds if args.rounds is not None else (1 if args.quick else 7)
    for size in args.sizes:
        if size < 4 or size % 2:
            parser.error(f"--sizes {size}: N is the number of views, two a pair: even, 4 or more")
    for name in ("rounds", "dim"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be 1 or more")
    if args.out is None and not args.quick:
        args.out = Path(__file__).with_suffix(".json")
    return args


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(args.precision)
    if args.weigh:
        named = {f"{c.implementation}/{c.loss}": c for c in CONTENDERS}
        if args.weigh not in named:
            sys.exit(f"--weigh {args.weigh}: choose one of {', '.join(named)}")
        print(weigh(named[args.weigh], args.sizes[0], args.dim, torch.device("cpu")))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for views in args.sizes for row in measure(views, args, device)]
    setting = {name: getattr(args, name) for name in ("sizes", "rounds", "dim", "precision")}
    setting |= {"temperature": TEMPERATURE, "tau_plus": TAU_PLUS, "classes": CLASSES}
    setting["clock"] = "wall" if device.type == "cuda" else "processor time of one thread"
    body = {
        "setting": setting, "losses": LOSSES, "fields": FIELDS, "rows": rows,
        "provenance": provenance(device), "versions": versions(),
    }  # fmt: skip
    if args.out:
        with whole_or_nothing(args.out) as part:
            part.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, for the terminal."""
    lines = [f"{'N':>7}  {'implementation, loss':46}{'ms':>9}{'ratio':>9}{'MiB':>9}{'error':>9}"]
    for row in rows:
        name = f"{row['implementation']}, {row['loss']}"
        scaled = (("seconds", 1e3), ("ratio", 1), ("peak_bytes", 2**-20), ("gradient_error", 1))
        cells = ["" if row[f] is None else f"{row[f] * scale:.3g}" for f, scale in scaled]
        said = "".join(f"{cell:>9}" for cell in cells)
        lines.append(f"{row['views']:7}  {name:46}{said}  {row['time_skipped'] or ''}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
