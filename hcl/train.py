"""The trainer: one loop for any modality.

data -> two views -> encoder -> projection head -> loss -> Adam; then the probes, then a Record.
Every epoch draws from a generator of its own, seeded by (seed, epoch), so a run that was killed
continues from its last checkpoint exactly as if nothing had happened (on a CPU: with as many
threads, for the order of a sum decides its last digit).
"""

import inspect
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hcl import geometry, losses, probe, runs, sphere, vision
from hcl.atomic import whole_or_nothing
from hcl.provenance import code_fingerprint, provenance
from hcl.runs import Record, Run

LOADERS: dict[str, Callable[..., Any]] = {"sphere": sphere.load}  # other names: hcl.vision's


class Data(Protocol):
    """What a modality hands to the trainer; rows are samples, tensors are on the device.

    ``x_train`` is all that contrastive training may see (label -1: none); the probes fit on
    ``x_probe`` and are judged on ``x_test``. ``views`` draws a positive pair for every row of x,
    ``inputs`` is what the encoder sees of a row when nothing is random.
    """

    name: str
    classes: tuple[str, ...]
    x_train: Tensor
    y_train: Tensor
    x_probe: Tensor
    y_probe: Tensor
    x_test: Tensor
    y_test: Tensor

    def views(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...

    def inputs(self, x: Tensor) -> Tensor: ...

    def encoder(self, name: str) -> nn.Module: ...


class Model(nn.Module):
    """Encoder and projection head: ``model(x)`` is the (B, out_dim) embedding the loss sees.

    The probes use ``model.encoder(x)``, as the papers do. Without a head (encoder "raw") the
    embedding is the encoder's output.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def projection_head(in_dim: int, *, hidden_dim: int = 512, out_dim: int = 128) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear, (B, in_dim) to (B, out_dim); the losses normalise.

    Source: Robinson et al. 2021, released image code (512 and 128, no bias in the first layer).

    >>> projection_head(64)(torch.zeros(4, 64)).shape
    torch.Size([4, 128])
    """
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim),
    )


def load_data(run: Run, device: torch.device | str = "cpu") -> Data:
    """The data of a Run; what is drawn at random is drawn with the Run's seed.

    Raises: ValueError: an option the loader does not have; FileNotFoundError: the set is missing
    (the message says how to get it).
    """
    load = LOADERS.get(run.data, vision.load)
    options = set(inspect.signature(load).parameters) - {"name", "root", "device", "seed"}
    if unknown := set(run.data_args) - options:
        raise ValueError(
            f"data_args {sorted(unknown)}: {run.data!r} takes {', '.join(sorted(options))}"
        )
    return load(run.data, device=device, seed=run.seed, **run.data_args)


def build_model(run: Run, data: Data) -> Model:
    """Freshly initialised encoder and head; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        encoder = data.encoder(run.encoder)
        if run.encoder == "raw":
            return Model(encoder, nn.Identity())
        width = int(encoder.out_dim)  # type: ignore[arg-type]
        head = projection_head(width, hidden_dim=run.hidden_dim, out_dim=run.out_dim)
    return Model(encoder, head)


def train(
    run: Run,
    *,
    store: Path | None = None,
    device: str | None = None,
    embeddings: int = 0,
    compile: bool = False,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> Record:
    """Train a Run, measure it, store its Record and hand it back.

    Args:
        device: "cuda" where there is one, else "cpu". compile: torch.compile the model.
        embeddings: keep the unit embeddings of so many test points (float16) with the Record.
        checkpoint_every: seconds between checkpoints, written at ends of epochs; a later call with
            the same Run continues from the last one. It is removed when the Record is stored.

    Raises:
        ValueError: a batch larger than the training data, or options the data does not have.
        FloatingPointError: the loss became NaN or infinite.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_data(run, where)
    if run.epochs and run.batch > len(data.x_train):
        raise ValueError(f"batch={run.batch}: {run.data} has {len(data.x_train)} training samples")
    model = build_model(run, data).to(where).to(memory_format=torch.channels_last)
    made = provenance(where)  # now: nothing that could fail is left for after the training
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        seconds, history, loss = fit(
            run, model, data, runs.path_of(run, store=store).with_suffix(".checkpoint"),
            compile=compile, checkpoint_every=checkpoint_every, progress=progress,
        )  # fmt: skip
        metrics, arrays = measure(run, model, data, embeddings)
    if run.epochs:
        metrics = {"loss": loss, **metrics}
    seen = run.epochs * (len(data.x_train) // run.batch) * run.batch
    cost = {
        "seconds": round(seconds, 3),
        "images_per_second": round(seen / seconds, 1) if seconds else 0.0,
        "peak_memory_bytes": _peak_memory(where),
    }
    record = Record(run=run, metrics=metrics, history=history, cost=cost, provenance=made)
    record = runs.save(record, store=store, arrays=arrays)
    runs.path_of(run, store=store).with_suffix(".checkpoint").unlink(missing_ok=True)
    return record


def fit(
    run: Run,
    model: Model,
    data: Data,
    checkpoint: Path,
    *,
    compile: bool = False,
    checkpoint_every: float = 60.0,
    progress: bool = True,
) -> tuple[float, list[dict[str, float]], float]:
    """The loop. Returns seconds, the evaluated epochs' history, and the last epoch's mean loss."""
    x, device = data.x_train, data.x_train.device
    loss_fn = losses.ContrastiveLoss(run.method, **run.loss_args())
    steps = len(x) // run.batch
    optimizer, scheduler = _optimizer(run, model, steps, fused=device.type == "cuda")
    done = _resume(run, checkpoint, model, optimizer, scheduler)
    started = saved = time.perf_counter()
    forward = torch.compile(model) if compile else model
    with tqdm(
        total=run.epochs * steps, initial=done["epoch"] * steps, disable=not progress,
        desc=f"{run.study}/{run.digest}", unit="step", leave=False,
    ) as bar:  # fmt: skip
        for epoch in range(done["epoch"] + 1, run.epochs + 1):
            loss_fn.beta = beta_in_epoch(run, epoch)
            generator = torch.Generator(device).manual_seed(run.seed * 1_000_003 + epoch)
            model.train()
            total = torch.zeros((), device=device)  # summed on the device: no wait at each step
            for rows in batches(len(x), run.batch, generator):
                v1, v2 = data.views(x[rows], generator)
                with torch.autocast(device.type, torch.bfloat16, run.precision == "bfloat16"):
                    z1, z2 = forward(torch.cat([v1, v2])).chunk(2)  # (B, out_dim) each
                loss = _finite(loss_fn, z1, z2, epoch, run)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.detach()
                bar.update()
            done["epoch"], done["loss"] = epoch, (total / steps).item()
            if not math.isfinite(done["loss"]):
                raise FloatingPointError(f"loss {done['loss']} in epoch {epoch} of {run}")
            bar.set_postfix(epoch=epoch, loss=f"{done['loss']:.3f}")
            if run.eval_every and epoch % run.eval_every == 0:
                done["history"].append(
                    {"epoch": epoch, "loss": done["loss"], "knn": _accuracy(model, data)["knn"]}
                )
            now = time.perf_counter()
            last = epoch == run.epochs and now - started >= checkpoint_every
            if now - saved >= checkpoint_every or last:
                state = {**done, "seconds": done["seconds"] + now - started}
                _checkpoint(run, checkpoint, state, model, optimizer, scheduler)
                saved = time.perf_counter()
    return done["seconds"] + time.perf_counter() - started, done["history"], done["loss"]


def _finite(loss_fn: nn.Module, z1: Tensor, z2: Tensor, epoch: int, run: Run) -> Tensor:
    try:
        return loss_fn(z1, z2)
    except ValueError as error:  # what the losses say of embeddings that are not finite
        raise FloatingPointError(f"training diverged in epoch {epoch} of {run}: {error}") from error


def beta_in_epoch(run: Run, epoch: int) -> float:
    """Hardness of a Run in an epoch, annealed where the Run says so."""
    if run.anneal == "none":
        return run.beta
    return losses.anneal_beta(run.beta, epoch, run.epochs, schedule=run.anneal)  # type: ignore[arg-type]


def batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices of an epoch's shuffled batches; the last incomplete one is dropped."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    yield from order[: n // batch * batch].split(batch)


def measure(
    run: Run, model: Model, data: Data, embeddings: int = 0
) -> tuple[dict[str, float], dict[str, Any]]:
    """The final metrics, and the test embeddings to keep with the Record."""
    generator = torch.Generator(data.x_test.device).manual_seed(run.seed)
    metrics = _accuracy(model, data, linear=run.probe == "fast")
    z1, z2 = (_embed(model, view) for view in data.views(data.x_test, generator))
    z = _embed(model, data.inputs(data.x_test))
    edges, same, different = geometry.similarity_histograms(z, data.y_test)
    metrics |= {
        "alignment": float(geometry.alignment(z1, z2)),
        "uniformity": float(geometry.uniformity(z)),
        "overlap": float(geometry.overlap(same, different, edges)),
        "clamp_share": _clamp_share(run, z1, z2),
    }
    if run.probe == "released":  # last: it moves the encoder's BatchNorm statistics
        metrics["linear"] = probe.linear_probe_released(model.encoder, data, generator=generator)
    kept = slice(0, min(embeddings, len(z)))
    labels = data.y_test[kept].cpu().numpy()
    arrays = {"z": z[kept].half().cpu().numpy(), "labels": labels, "of": len(z)}
    return metrics, arrays if embeddings else {}


def _accuracy(model: Model, data: Data, *, linear: bool = False) -> dict[str, float]:
    train_h = probe.features(model.encoder, data.x_probe, data.inputs)
    test_h = probe.features(model.encoder, data.x_test, data.inputs)
    found = {"knn": probe.knn(train_h, data.y_probe, test_h, data.y_test)}
    if linear:
        found["linear"] = probe.linear_probe(train_h, data.y_probe, test_h, data.y_test)
    return found


def _embed(model: Model, inputs: Tensor) -> Tensor:
    return F.normalize(probe.features(model, inputs, lambda x: x), dim=1)


def _clamp_share(run: Run, z1: Tensor, z2: Tensor) -> float:
    """Mean over test batches of the training's size."""
    args: dict[str, Any] = {k: getattr(run, k) for k in ("temperature", "beta", "tau_plus")}
    size = min(run.batch, len(z1))
    pairs = list(zip(z1.split(size), z2.split(size), strict=True))
    shares = [losses.clamp_share(a, b, **args) for a, b in pairs if len(a) == size]
    return sum(shares) / len(shares)


def _optimizer(
    run: Run, model: Model, steps: int, *, fused: bool
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:  # encoder "raw": nothing will be stepped
        parameters = [nn.Parameter(torch.zeros(1))]
    adam = torch.optim.Adam(parameters, lr=run.lr, weight_decay=run.weight_decay, fused=fused)
    if run.schedule == "cosine":
        return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, run.epochs * steps))
    return adam, torch.optim.lr_scheduler.ConstantLR(adam, factor=1.0)


def _checkpoint(run: Run, path: Path, done: dict[str, Any], *parts: Any) -> None:
    state = {"made_by": _made_by(run), "done": done, "parts": [p.state_dict() for p in parts]}
    with whole_or_nothing(path) as part, part.open("wb") as file:
        torch.save(state, file)


def _resume(run: Run, path: Path, *parts: Any) -> dict[str, Any]:
    """Load the checkpoint of this very Run, code and torch; otherwise begin at the beginning."""
    fresh: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "loss": math.nan, "history": []}
    if not path.exists():
        return fresh
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise ValueError(
            f"{path}: checkpoint is damaged ({error}); delete it to start over"
        ) from error
    if state["made_by"] != _made_by(run):
        return fresh
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return state["done"]


def _made_by(run: Run) -> list[str]:
    return [run.digest, code_fingerprint(), str(torch.__version__)]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
