"""The trainer: one loop for any modality.

data -> two views -> encoder -> projection head -> loss -> optimiser; then probes, then a Record.
Every epoch draws from a generator of its own, seeded by (seed, epoch), so a run that was killed
continues from its last checkpoint exactly as if nothing had happened (on a CPU: with as many
threads, for the order of a sum decides its last digit).
"""

import inspect
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hcl import crossval, graphs, memory, runs, sentences, sphere, vision
from hcl.atomic import whole_or_nothing
from hcl.graphs.sets import TU
from hcl.imagesets import SOURCES
from hcl.measure import measure, watched
from hcl.methods import ARGUMENTS, INFOGRAPH, NEIGHBOURS
from hcl.muon import Muon
from hcl.objective import Mates as Mates
from hcl.objective import Objective, steps
from hcl.objective import batches as batches
from hcl.provenance import code_fingerprint, provenance
from hcl.run import Run
from hcl.runs import Record

LOADERS: dict[str, Callable[..., Any]] = {  # other names: hcl.vision's
    "sphere": sphere.load,
    "graphs": graphs.load_families,
    **dict.fromkeys(TU, graphs.load),
    "pydoc": sentences.load,
}
BOOKS = "books/"  # and the name of a folder of plain-text books


class Data(Protocol):
    """What a modality hands to the trainer; rows are samples, tensors are on the device.

    ``x_train`` is all that contrastive training may see (label -1: none); the probes fit on
    ``x_probe`` and are judged on ``x_test``. ``views`` draws a positive pair for every row of x, or
    of x and the row of ``mate`` beside it; ``inputs`` is what the encoder sees of a row when
    nothing is random. ``mate`` is asked for by positives="class" alone, options of ``encoder`` by
    ``encoder_args`` alone, and a method ``grown(share)``, of data with views as large as they are
    after that share of the training, by sides="growing" alone.
    """

    name: str
    classes: tuple[str, ...]
    x_train: Tensor
    y_train: Tensor
    x_probe: Tensor
    y_probe: Tensor
    x_test: Tensor
    y_test: Tensor

    def views(
        self, x: Tensor, generator: torch.Generator, mate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def inputs(self, x: Tensor) -> Tensor: ...

    def encoder(self, name: str, **options: Any) -> nn.Module: ...


class OutOfTime(TimeoutError):
    """The deadline came first; a checkpoint lets the next call continue."""


class Model(nn.Module):
    """Encoder and projection head: ``model(x)`` is the (B, out_dim) embedding the loss sees.

    The probes use ``model.encoder(x)``, as the papers do. Without a head (encoder "raw") the
    embedding is the encoder's output. A classifier of that output is there for cross-entropy.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, classifier: nn.Module | None = None):
        super().__init__()
        self.encoder, self.head, self.classifier = encoder, head, classifier

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

    Raises: ValueError: unknown data, or an option the loader does not have; FileNotFoundError: the
    set is missing (the message says how to get it).
    """
    name, load = run.data, LOADERS.get(run.data, vision.load)
    if name.startswith(BOOKS):
        name, load = name.removeprefix(BOOKS), sentences.load
        if not name or name != Path(name).name:
            raise ValueError(f"data={run.data!r}: {BOOKS} and the name of one folder of the data")
    elif name not in (known := [*LOADERS, *SOURCES]):
        raise ValueError(f"data={name!r}: choose one of {', '.join(known)}, {BOOKS}FOLDER")
    options = set(inspect.signature(load).parameters)
    options -= {"name", "root", "device", "seed"}
    if load is vision.load:
        options -= {"augmentation"}  # not a number or a word
    if unknown := set(run.data_args) - options:
        raise ValueError(
            f"data_args {sorted(unknown)}: {run.data!r} takes {', '.join(sorted(options))}"
        )
    args = dict(run.data_args)
    if run.protocol == "released" and "statistics" in options:
        args = {"statistics": "released", **args}
        if run.data == "stl10":
            args = {"view_size": 32, **args}
    try:
        return load(name, device=device, seed=run.seed, **args)
    except ValueError as error:
        if args == run.data_args:
            raise
        raise ValueError(f"protocol='released' on {run.data}: {error}") from error


def build_model(run: Run, data: Data) -> Model:
    """Freshly initialised encoder and head; the same seed gives the same weights."""
    options = [name for name in inspect.signature(data.encoder).parameters if name != "name"]
    if unknown := set(run.encoder_args) - set(options):
        raise ValueError(
            f"encoder_args {sorted(unknown)}: {run.data!r} takes {', '.join(options) or 'none'}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        try:
            encoder = data.encoder(run.encoder, **run.encoder_args)
        except TypeError as error:
            raise ValueError(f"encoder_args={dict(run.encoder_args)}: {error}") from error
        if run.encoder == "raw":
            return Model(encoder, nn.Identity())
        width = int(encoder.out_dim)  # type: ignore[arg-type]
        if run.method == INFOGRAPH:
            return Model(encoder, graphs.Heads(width))
        head: nn.Module = nn.Identity()
        if run.head == "mlp":
            head = projection_head(width, hidden_dim=run.hidden_dim, out_dim=run.out_dim)
        classifier = nn.Linear(width, len(data.classes)) if run.cross_entropy else None
    return Model(encoder, head, classifier)


def train(
    run: Run,
    *,
    store: Path | None = None,
    device: str | None = None,
    embeddings: int = 0,
    weights: bool = False,
    compile: bool = False,
    checkpoint_every: float = 60.0,
    deadline: float = math.inf,
    progress: bool = True,
) -> Record:
    """Train a Run, measure it, store its Record and hand it back.

    Args:
        device: "cuda" where there is one, else "cpu". compile: torch.compile the model, on a GPU
            with CUDA graphs and whichever convolutions are quickest there, so no longer the same
            to the last digit each time; the Record's provenance says so.
        embeddings: keep the unit embeddings of so many test points (float16) with the Record.
        weights: keep those of the encoder beside the Record, in a file ``.pt`` that git ignores.
        checkpoint_every: seconds between checkpoints, written at ends of epochs; a later call with
            the same Run continues from the last one. It is removed when the Record is stored.
        deadline: in seconds of time.time(); an epoch that would end later is not begun.

    Raises:
        ValueError: a batch larger than the training data, options the data does not have, labels
            missing where the Run needs them, or a checkpoint that is not of this Run and code.
        FloatingPointError: the loss became NaN or infinite.
        OutOfTime: the deadline came first; the checkpoint stays.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_data(run, where)
    _check_data(run, data)
    if compile and run.cross_entropy:
        raise ValueError(f"compile: does not go with cross_entropy={run.cross_entropy}")
    if compile and isinstance(data, graphs.Graphs):
        raise ValueError(f"compile: {run.data} has graphs, whose batches are of many sizes")
    memory.keep()
    model = build_model(run, data)
    if run.start:
        try:
            began = encoder_weights(
                run.starts_from(), store=store, device=device, deadline=deadline, progress=progress
            )
        except ValueError as error:
            raise ValueError(f"start={dict(run.start)}: {error}") from error
        model.encoder.load_state_dict(began)
    model = model.to(where).to(memory_format=torch.channels_last)
    made = provenance(where)  # now: nothing that could fail is left for after the training
    checkpoint = runs.path_of(run, store=store).with_suffix(".checkpoint")
    with torch.backends.cudnn.flags(deterministic=not compile, benchmark=compile):
        seconds, history, loss = fit(
            run, model, data, checkpoint, compile=compile, checkpoint_every=checkpoint_every,
            deadline=deadline, progress=progress,
        )  # fmt: skip
        metrics, arrays = measure(run, model, data, embeddings)
    if run.epochs:
        metrics = {"loss": loss, **metrics}
    seen = run.epochs * min(steps(run, len(data.x_train)) * run.batch, len(data.x_train))
    cost = {
        "seconds": round(seconds, 3),
        "images_per_second": round(seen / seconds, 1) if seconds else 0.0,
        "peak_memory_bytes": _peak_memory(where),
    }
    if compile:
        made |= {"compiled": True}
    record = Record(run=run, metrics=metrics, history=history, cost=cost, provenance=made)
    if weights:
        with whole_or_nothing(weights_path(run, store=store)) as part, part.open("wb") as file:
            torch.save({"made_by": _made_by(run), "encoder": model.encoder.state_dict()}, file)
    if not (weights and runs.path_of(run, store=store).exists()):  # a Record stays as it is
        record = runs.save(record, store=store, arrays=arrays)
    checkpoint.unlink(missing_ok=True)
    return record


def weights_path(run: Run, *, store: Path | None = None) -> Path:
    """The file of a Run's trained encoder, whether it exists or not."""
    return runs.path_of(run, store=store).with_suffix(".pt")


def encoder_weights(
    run: Run,
    *,
    store: Path | None = None,
    device: str | None = None,
    deadline: float = math.inf,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The state of a Run's trained encoder: what is kept beside its Record, else it is trained now.

    Raises: as :func:`train`.
    """
    path = weights_path(run, store=store)
    for last in (False, True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["made_by"] == _made_by(run):
                found: dict[str, Tensor] = state["encoder"]
                return found
        except Exception:  # none, or whatever damaged bytes lead torch.load to: made again
            if last:
                raise
        train(run, store=store, device=device, weights=True, deadline=deadline, progress=progress)
    raise AssertionError(path)


def _check_data(run: Run, data: Data) -> None:
    """Refuse, before anything is trained, what the data cannot give."""
    if run.epochs and run.batch > len(data.x_train):
        raise ValueError(f"batch={run.batch}: {run.data} has {len(data.x_train)} training samples")
    if run.method == INFOGRAPH and not isinstance(data, graphs.Graphs):
        raise ValueError(f"method='infograph': compares nodes with graphs, and {run.data} has none")
    if run.queue and isinstance(data, graphs.Graphs):
        raise ValueError(
            f"queue={run.queue}: goes with pictures and points, not with graphs, use 0"
        )
    if run.method in NEIGHBOURS and not isinstance(data, sentences.Sentences):
        raise ValueError(f"method={run.method!r}: compares neighbours, and {run.data} has no texts")
    needs = {
        f"method={run.method!r}": "labels" in ARGUMENTS[run.method],
        f"cross_entropy={run.cross_entropy}": bool(run.cross_entropy),
        f"positives={run.positives!r}": run.positives == "class",
        f"watch={run.watch!r}": run.watch == "losses",
    }
    without = int((data.y_train < 0).sum())
    for what, needed in needs.items():
        if needed and without and run.epochs:
            raise ValueError(
                f"{what}: needs a label for every training sample; {without} of {run.data}'s "
                f"{len(data.y_train)} have none (data_args labelled=True leaves them out)"
            )
    with_labels = [what for what, needed in needs.items() if needed and "watch" not in what]
    if with_labels and run.epochs and isinstance(data, graphs.Graphs) and data.cross_validated:
        raise ValueError(
            f"{with_labels[0]}: trains on the labels that the probe is then tested on; hold graphs "
            "out of the training, e.g. data_args held_out=0.3"
        )
    if isinstance(data, graphs.Graphs):
        _check_graphs(data)
    if isinstance(data, sentences.Sentences):
        _check_sentences(run, data)
    if run.sides == "growing" and not hasattr(data, "grown"):
        raise ValueError(f"sides='growing': {run.data} has no pictures whose views could grow")
    if run.sides == "growing" and run.encoder == "mlp":
        raise ValueError("sides='growing': encoder 'mlp' reads views of one size only, use 'fixed'")


def _check_sentences(run: Run, data: sentences.Sentences) -> None:
    """What asks for classes, and neighbours for the retrieval to find."""
    if run.cross_entropy or run.probe != "fast":
        raise ValueError(
            f"cross_entropy={run.cross_entropy}, probe={run.probe!r}: {run.data} has books and no "
            "classes, use 0 and 'fast'"
        )
    for part, books in (("training", data.y_train), ("last", data.y_test)):
        if not (books[1:] == books[:-1]).any():
            raise ValueError(
                f"data={run.data!r}: no two sentences of its {part} books are neighbours"
            )


def _check_graphs(data: graphs.Graphs) -> None:
    """What the probes will need of the labels: members in every fold, and pairs of both sorts."""
    crossval.check_classes(
        data.y_train.cpu().numpy(), crossval.FOLDS if data.cross_validated else 2
    )
    counts = data.y_test.unique(return_counts=True)[1]
    if len(counts) < 2 or counts.max() < 2:
        raise ValueError(
            f"held_out leaves {len(data.y_test)} graphs of {len(counts)} class(es) to test on: two "
            "classes, one of them twice, would do"
        )


def fit(
    run: Run,
    model: Model,
    data: Data,
    checkpoint: Path,
    *,
    compile: bool = False,
    checkpoint_every: float = 60.0,
    deadline: float = math.inf,
    progress: bool = True,
) -> tuple[float, list[dict[str, float]], float]:
    """The loop. Returns seconds, the evaluated epochs' history, and the last epoch's mean loss.

    Raises: as :func:`train`.
    """
    x, device = data.x_train, data.x_train.device
    n_steps = steps(run, len(x))
    optimizers, schedulers = optimizers_of(run, model, n_steps, fused=device.type == "cuda")
    objective = Objective(run, model, data, compile=compile)
    parts = (model, *optimizers, *schedulers, *objective.parts())
    done = _resume(run, checkpoint, *parts)
    if run.eval_every and run.epochs and not done["history"]:
        done["history"].append({"epoch": 0, **watched(run, model, data)})
    started = saved = time.perf_counter()

    def keep() -> None:
        seconds = done["seconds"] + time.perf_counter() - started
        state = {**done, "seconds": seconds, "longest": longest}
        _checkpoint(run, checkpoint, state, *parts)

    longest = done.pop("longest", 0.0)  # seconds of an epoch so far
    with tqdm(
        total=run.epochs * n_steps, initial=done["epoch"] * n_steps, disable=not progress,
        desc=f"{run.study}/{run.digest}", unit="step", leave=False,
    ) as bar:  # fmt: skip
        for epoch in range(done["epoch"] + 1, run.epochs + 1):
            if time.time() + longest > deadline:
                keep()
                raise OutOfTime(f"epoch {epoch} of {run} would end after the deadline")
            began = time.time()
            objective.begin(epoch)
            generator = torch.Generator(device).manual_seed(run.seed * 1_000_003 + epoch)
            model.train()
            total = torch.zeros((), device=device)  # summed on the device: no wait at each step
            for rows in objective.batches(generator):
                loss = objective(rows, generator)
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                for scheduler in schedulers:
                    scheduler.step()
                objective.after_step()
                total += loss.detach()
                bar.update()
            done["epoch"], done["loss"] = epoch, (total / n_steps).item()
            if not math.isfinite(done["loss"]):
                raise FloatingPointError(f"loss {done['loss']} in epoch {epoch} of {run}")
            bar.set_postfix(epoch=epoch, loss=f"{done['loss']:.3f}")
            if run.eval_every and epoch % run.eval_every == 0:
                row = {"epoch": epoch, "loss": done["loss"], **watched(run, model, data)}
                done["history"].append(row)
            longest = max(longest, time.time() - began)
            now = time.perf_counter()
            last = epoch == run.epochs and now - started >= checkpoint_every
            if now - saved >= checkpoint_every or last:
                keep()
                saved = time.perf_counter()
    return done["seconds"] + time.perf_counter() - started, done["history"], done["loss"]


MUON_LR = 20  # times the learning rate of Adam: 0.02 where that is 0.001


def optimizers_of(
    run: Run, model: Model, steps: int, *, fused: bool
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:  # encoder "raw": nothing will be stepped
        parameters = [nn.Parameter(torch.zeros(1))]
    found: list[torch.optim.Optimizer] = []
    if run.optimizer == "muon" and (wide := [p for p in parameters if p.ndim > 1]):
        found.append(Muon(wide, lr=MUON_LR * run.lr, weight_decay=run.weight_decay))
        parameters = [p for p in parameters if p.ndim <= 1]
    adam = torch.optim.Adam(parameters, lr=run.lr, weight_decay=run.weight_decay, fused=fused)
    found.append(adam)
    return found, [_schedule(run, optimizer, max(1, run.epochs * steps)) for optimizer in found]


def _schedule(
    run: Run, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedules = torch.optim.lr_scheduler
    if run.schedule == "cosine":
        return schedules.CosineAnnealingLR(optimizer, steps)
    if run.schedule == "triangle":  # up for a fifth of the training, then down to nothing
        rise = max(1, steps // 5)
        return schedules.LambdaLR(
            optimizer, lambda s: min((s + 1) / rise, (steps - s) / max(1, steps - rise))
        )
    return schedules.ConstantLR(optimizer, factor=1.0)


def _checkpoint(run: Run, path: Path, done: dict[str, Any], *parts: Any) -> None:
    state = {"made_by": _made_by(run), "done": done, "parts": [p.state_dict() for p in parts]}
    with whole_or_nothing(path) as part, part.open("wb") as file:
        torch.save(state, file)


def _resume(run: Run, path: Path, *parts: Any) -> dict[str, Any]:
    """Load the checkpoint of this very Run, code and torch; without one, begin at the beginning.

    In the cache study, that of other code or torch is passed over; elsewhere it may be hours of
    work, and is refused.
    """
    fresh: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "loss": math.nan, "history": []}
    if not path.exists():
        return fresh
    remedy = "delete it to start over"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_by = list(state["made_by"])
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise ValueError(f"{path}: checkpoint is damaged ({error}); {remedy}") from error
    for mine, its, what in zip(_made_by(run), made_by, ("run", "code", "torch"), strict=True):
        if mine != its and run.study == runs.CACHE_STUDY:
            return fresh
        if mine != its:
            raise ValueError(
                f"{path}: checkpoint of another {what} ({its}, not {mine}); finish it with that "
                f"one, or {remedy}"
            )
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return state["done"]


def _made_by(run: Run) -> list[str]:
    return [run.digest, code_fingerprint(), str(torch.__version__)]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
