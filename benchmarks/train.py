"""What contrastive training costs: the views alone, a whole step, and two runs side by side.

    python benchmarks/train.py [--encoder small] [--batch 256] [--size 32] [--rounds 20]

- The views of a batch: `hcl.views.augment`, kornia (drawn per image) and torchvision's transforms
  of one PIL image at a time, all from 8-bit pictures to normalised float32. The released code blurs
  with OpenCV, torchvision in another way: a row without blur bounds what a faster blur could save.
- A step: two views, forward, HCL and its gradient, backward, Adam. Ours draws its views from one
  tensor in memory; the same is also fed by a DataLoader over PIL pictures, without worker
  processes, so that the comparison is per core.
- Side by side: one process with two threads against two processes with one thread each, which is
  what `hcl sweep --workers 2` does on two cores. This is wall clock: the machine must be idle.

Everybody runs once in a round, so drift of the machine hits all alike. The time is the processor
time of one thread, or with a GPU the wall clock between synchronisations. The pictures are
CIFAR-10's where HCL_DATA has them, else random. kornia has a row where `make bench` installed it.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as t
from tqdm import tqdm

from hcl import memory, vision
from hcl.atomic import whole_or_nothing
from hcl.losses import ContrastiveLoss
from hcl.provenance import provenance
from hcl.runs import Run
from hcl.train import Model, batches, optimizers_of, projection_head
from hcl.views import SIMCLR, augment

OURS, LOADER = "ours", "PIL through a DataLoader"
GROWN = 0.4  # of the training: growing views are half-way between their sides
PARTS = ("augmentation", "forward", "loss", "backward", "optimiser")
TEAMS = {"one process, two threads": (2,), "two processes, one thread each": (1, 1)}
FIELDS = {
    "microseconds": "median time of a picture: in `augmentation` one view, else its part of a step",
    "images_per_second": "how many of these a second",
    "ratio": "median over rounds of its time divided by the first row's; _q1, _q3: quartiles",
    "loader_ratio": f"the same, divided by the time of {LOADER}",
    "shares": "of a step; loss: with its gradient, backward: of encoder and head",
    "first_call_seconds": "wall clock of the first call, compilation included",
    "skipped": "why there is no time",
}
Entrant = Callable[..., Any]
Clock = Callable[[], float]
Rows = dict[str, dict[str, Any]]  # by implementation


def pictures(n: int, size: int, device: torch.device) -> vision.Images:
    """So many pictures in memory, of CIFAR-10 or random."""
    options: dict[str, Any] = {"n_train": n, "n_test": 1, "size": size, "statistics": "released"}
    try:
        return vision.load("cifar10", device=device, **options)
    except FileNotFoundError:
        x = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, device=device)
        mean, std = torch.tensor(vision.RELEASED, device=device)[:, :, None, None]
        new = {"name": "random", "x_train": x, "mean": mean, "std": std, "augmentation": SIMCLR}
        return replace(vision.load("digits"), **new)


def kornia_views(data: vision.Images) -> Callable[[Tensor], Tensor]:
    """kornia's transforms of (B, 3, H, W) uint8; ImportError where it is not installed."""
    from kornia import augmentation as k

    transforms = k.AugmentationSequential(
        k.RandomResizedCrop(tuple(data.x_train.shape[2:]), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
        k.RandomHorizontalFlip(p=0.5), k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        k.RandomGrayscale(p=0.2), k.RandomGaussianBlur((3, 3), (0.1, 2.0), p=0.5),
        k.Normalize(data.mean.flatten(), data.std.flatten()),
        data_keys=["input"], same_on_batch=False,
    )  # fmt: skip
    return lambda x: transforms(x.float() / 255)


def pil_views(data: vision.Images, *, blur: bool = True) -> Callable[[list[np.ndarray]], Tensor]:
    """The released code's transforms of one picture (H, W, 3) after the other, to (B, 3, H, W)."""
    blurs = [t.RandomApply([t.GaussianBlur(3, (0.1, 2.0))], 0.5)] if blur else []
    transform = t.Compose([
        t.RandomResizedCrop(data.x_train.shape[-1]), t.RandomHorizontalFlip(0.5),
        t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), t.RandomGrayscale(0.2), *blurs,
        t.ToTensor(), t.Normalize(data.mean.flatten().tolist(), data.std.flatten().tolist()),
    ])  # fmt: skip
    return lambda images: torch.stack([transform(Image.fromarray(image)) for image in images])


def as_arrays(x: Tensor) -> list[np.ndarray]:
    return list(x.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def from_loader(data: vision.Images, batch: int) -> Iterator[Tensor]:
    """Two views of random pictures, (2B, 3, H, W), through a DataLoader; without end."""
    views, x = pil_views(data), data.x_train
    loader: DataLoader[Tensor] = DataLoader(
        as_arrays(x), batch, shuffle=True, pin_memory=x.is_cuda,  # type: ignore[arg-type]
        collate_fn=lambda images: views(images + images),
    )  # fmt: skip
    while True:
        yield from (found.to(x.device, non_blocking=True) for found in loader)


def from_memory(data: vision.Images, batch: int) -> Iterator[Tensor]:
    """The same as the trainer draws them."""
    x = data.x_train
    generator = torch.Generator(x.device).manual_seed(0)
    while True:
        for rows in batches(len(x), batch, generator):
            yield torch.cat(data.views(x[rows], generator))


class Step:
    """One training step with a model and optimiser of its own."""

    def __init__(
        self, feed: Callable[[vision.Images, int], Iterator[Tensor]], data: vision.Images,
        args: argparse.Namespace, *, bfloat16: bool = False, compiled: bool = False,
        optimizer: str = "adam",
    ):  # fmt: skip
        device, cuda = data.x_train.device, data.x_train.is_cuda
        torch.manual_seed(0)
        net = data.encoder(args.encoder)
        model = Model(net, projection_head(net.out_dim)).to(device)  # type: ignore[arg-type]
        self.model = model.to(memory_format=torch.channels_last)
        self.forward = torch.compile(model) if compiled else model
        run = Run(data=data.name, encoder=args.encoder, optimizer=optimizer, epochs=1)
        self.optimizers, _ = optimizers_of(run, model, 1, fused=cuda)
        self.views, self.loss = feed(data, args.batch), ContrastiveLoss("hard")
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    def __call__(self, mark: Callable[[], object] = lambda: None) -> None:
        """One step; `mark` is called at the end of each of its `PARTS`."""
        views = next(self.views)
        mark()
        with self.autocast:
            z = self.forward(views)
        mark()
        apart = z.detach().requires_grad_()  # tells the loss's gradient from the encoder's
        self.loss(*apart.chunk(2)).backward()
        mark()
        self.model.zero_grad(set_to_none=True)
        z.backward(apart.grad)
        mark()
        for optimizer in self.optimizers:
            optimizer.step()
        mark()

    def marks(self) -> list[float]:
        """The time at the beginning of a step and at the end of each of its parts."""
        found = [now()]
        self(lambda: found.append(now()))
        return found


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def race(entrants: dict[str, Entrant], rounds: int, clock: Clock) -> pd.DataFrame:
    """Seconds of everybody (columns) in every round; the order is drawn anew for each round."""
    order, shuffle = list(entrants), random.Random(0).shuffle
    times = pd.DataFrame(np.nan, range(rounds), order)
    for round_ in tqdm(times.index, desc="rounds", leave=False):
        shuffle(order)
        for name in order:
            start = clock()
            entrants[name]()
            times.loc[round_, name] = clock() - start
    return times


def summary(times: pd.DataFrame, count: int) -> Rows:
    """Medians of the time of one of `count` pictures, and of the ratios of times."""
    middle = times.median() / count
    found = pd.DataFrame({"microseconds": middle * 1e6, "images_per_second": 1 / middle})
    for ratio, base in (("ratio", times.columns[0]), ("loader_ratio", LOADER)):
        if base in times:
            ratios = times.div(times[base], axis=0)
            for end, q in (("", 0.5), ("_q1", 0.25), ("_q3", 0.75)):
                found[ratio + end] = ratios.quantile(q)
    return found.to_dict("index")  # type: ignore[return-value]


def shares(step: Step, rounds: int) -> dict[str, float]:
    """What part of a step each of its parts takes, from the medians over rounds."""
    marks = [step.marks() for _ in tqdm(range(rounds), desc="shares", leave=False)]
    middle = np.median(np.diff(marks), axis=0)
    return dict(zip(PARTS, (middle / middle.sum()).tolist(), strict=True))


def compare(
    makers: Mapping[str, Callable[[], Entrant]], count: int, rounds: int, clock: Clock = now
) -> Rows:
    """Everybody's row; a call is about `count` pictures. Who is not installed makes ImportError."""
    entrants: dict[str, Entrant] = {}
    rows: Rows = {}
    for name, make in tqdm(makers.items(), desc="first calls", leave=False):
        start = time.perf_counter()
        try:
            entrant = make()
        except ImportError as error:
            rows[name] = {"skipped": str(error)}
            continue
        entrant()
        rows[name] = {"first_call_seconds": time.perf_counter() - start}
        entrants[name] = entrant
        entrant()  # what is left of warming up
    for name, found in summary(race(entrants, rounds, clock), count).items():
        rows[name] |= found
        if isinstance(step := entrants[name], Step):
            rows[name]["shares"] = shares(step, rounds)
    return rows


def augmentation(data: vision.Images, args: argparse.Namespace) -> Rows:
    """Everybody who makes a view of every picture of a batch."""
    x = data.x_train[: args.batch]
    images, generator = as_arrays(x), torch.Generator(x.device).manual_seed(0)
    makers: dict[str, Callable[[], Entrant]] = {
        OURS: lambda: lambda: augment(x, SIMCLR, generator).sub_(data.mean).div_(data.std),
        "kornia": lambda: partial(kornia_views(data), x),
        "PIL": lambda: partial(pil_views(data), images),
        "PIL without blur": lambda: partial(pil_views(data, blur=False), images),
    }
    return compare(makers, args.batch, args.rounds)


def steps(data: vision.Images, args: argparse.Namespace) -> Rows:
    """Every way to make a training step."""
    ours = partial(Step, from_memory, data, args)
    makers = {OURS: ours, LOADER: partial(Step, from_loader, data, args)}
    makers["ours, bfloat16"] = partial(ours, bfloat16=True)
    makers["ours, Muon"] = partial(ours, optimizer="muon")
    makers["ours, growing views"] = partial(Step, from_memory, data.grown(GROWN), args)
    if args.compile:
        torch.compiler.config.force_disable_caches = True  # a first call compiles
        makers["ours, compiled"] = partial(ours, compiled=True)
        makers["ours, bfloat16, compiled"] = partial(ours, bfloat16=True, compiled=True)
    return compare(makers, args.batch, args.rounds)


def side_by_side(args: argparse.Namespace) -> Rows:
    """Two steps of one process with two threads, and one each of two processes with one thread."""
    with ExitStack() as stack:
        makers = {name: partial(team, threads, args, stack) for name, threads in TEAMS.items()}
        return compare(makers, 2 * args.batch, args.rounds, time.perf_counter)


def team(threads: tuple[int, ...], args: argparse.Namespace, stack: ExitStack) -> Entrant:
    """Start a process with so many threads for each number; a call is two steps of all together."""
    options = [f"--{name}={getattr(args, name)}" for name in ("encoder", "batch", "size")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    commands = [[sys.executable, __file__, f"--worker={n}", *options] for n in threads]
    workers = [stack.enter_context(subprocess.Popen(c, **pipes)) for c in commands]

    turns = workers * (2 // len(workers))

    def two_steps() -> None:
        for worker in turns:
            print("step", file=worker.stdin, flush=True)
        said = [worker.stdout.readline() for worker in turns]  # type: ignore[union-attr]
        if not all(said):
            raise RuntimeError("a process that was started beside this one has ended")

    return two_steps


def work(args: argparse.Namespace) -> None:
    """One step for every line that is read, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(args.worker)
    memory.keep()
    step = Step(from_memory, pictures(4 * args.batch, args.size, torch.device("cpu")), args)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="small", choices=("small", "resnet18", "resnet50"))
    for name, default in (("batch", 256), ("size", 32), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    for name, least in (("batch", 2), ("size", 8), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: must be {least} or more")
    return args


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    if args.worker:
        return work(args)
    torch.set_num_threads(1)
    memory.keep()  # for everybody here, as the trainer does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, on_cpu = pictures(4 * args.batch, args.size, device), device.type == "cpu"
    setting = {name: getattr(args, name) for name in ("encoder", "batch", "size", "rounds")}
    setting |= {"pictures": data.name, "loss": "HCL", "loader_workers": 0}
    setting["clock"] = "processor time of one thread" if on_cpu else "wall"
    rows = {"augmentation": augmentation(data, args), "step": steps(data, args)}
    rows["side_by_side"] = side_by_side(args) if on_cpu else {}
    body = {"setting": setting, "fields": FIELDS, **rows, "provenance": provenance(device)}
    peers = [d for d in metadata.distributions() if d.name in ("kornia", "pillow")]
    body["versions"] = {d.name: d.version for d in peers}
    with whole_or_nothing(args.out) as part:
        part.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
    columns = ["microseconds", "ratio", "ratio_q1", "ratio_q3", "loader_ratio", "skipped"]
    for group, found in rows.items():
        table = pd.DataFrame(found).T.reindex(columns=columns).dropna(axis=1, how="all")
        print(f"\n{group}\n{table.to_string(na_rep='')}")


if __name__ == "__main__":
    main()
