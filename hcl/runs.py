"""A Run is one frozen configuration; a Record is what training it produced; the store keeps them.

One JSON file a run, ``data/runs/<study>/<digest>.json``, written whole or not at all. ``get`` hands
out the Record of a Run and trains it first if it has to, so a notebook is a view of the store.
The study called ``quick`` is a cache: a Record there that other code or another torch made is made
again. Records of every other study are kept as they were recorded.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hcl import checks, losses, project_root
from hcl.atomic import whole_or_nothing
from hcl.graphs import infograph
from hcl.losses import ContrastiveLoss, anneal_beta
from hcl.provenance import code_fingerprint

CACHE_STUDY = "quick"
INFOGRAPH = "infograph"  # the one method that is not of hcl.losses
ARGUMENTS = {**losses.ARGUMENTS, INFOGRAPH: infograph.ARGUMENTS}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a training run; an impossible value is refused here.

    A loss parameter that the method does not have is set to 0 or off (``nt_xent`` has neither
    beta nor tau_plus, ``debiased`` no beta, and neither weights nor annealing), so equal runs have
    equal digests.

    Args:
        study: folder of the store, lower case letters, digits and dashes.
        data, data_args: name of the data and its loader's options.
        encoder, encoder_args: a name the data offers, and options of it; "raw" (with epochs=0)
            measures the input itself.
        method, temperature, beta, tau_plus, detach_weights, debias, clamp: see :mod:`hcl.losses`;
            "infograph", which compares nodes with graphs, :mod:`hcl.graphs.infograph`.
        hardening: "exponential" tilts by beta; "threshold" leaves out the negatives whose cosine is
            below ``threshold``, and has no beta.
        Q: weight on the negatives: "released" (their number in the batch), "negatives" (those of
            other labels), or a number as text.
        positives: "views" of one sample, or "class": the second view is of a random sample of the
            same label, the negatives stay as they are (the released code's true positives).
        queue, momentum: keys of a MoCo queue instead of the batch as negatives, 0 for none, and
            the momentum of the encoder that makes them; see :mod:`hcl.moco`.
        anneal, anneal_steps: "none", "paper" or "released", see :func:`hcl.losses.anneal_beta`.
        protocol: "sound", or "released" to repeat the released image code, whatever separate_views
            and probe say: two passes, its linear probe, kNN votes at the loss's temperature, its
            annealing, and its pixel statistics for every set of pictures. (Its two GPUs, each with
            BatchNorm statistics of half a batch, are not repeated.) For "infograph", the released
            graph code: its sums, tau_plus 0.5, no weight decay, one order of the graphs.
        separate_views: encode the two views in two passes, each with BatchNorm statistics of its
            own, instead of one.
        epochs: 0 measures the untrained encoder. batch: anchors' images a step, 2 * batch views.
        optimizer, lr, weight_decay, schedule: "adam", or "muon" for the matrices and filters with
            Adam for the rest; the learning rate "constant", "cosine" or "triangle".
        sides: "fixed", or "growing": views of three quarters of the side at first.
        hidden_dim, out_dim: width of the projection head's two layers.
        precision: "float32", or "bfloat16" for autocast.
        probe: "fast" or "released", see :mod:`hcl.probe`.
        eval_every: kNN accuracy before training and every so many epochs; 0 for the end alone.
        watch: "losses" adds the four losses and Assumption 1 of :mod:`hcl.ordering` to that,
            "collapse" the geometry of the class means, :mod:`hcl.collapse`.
        seed: initialisation, batches, views, and the data where they are drawn.
        normalize: where the loss compares embeddings: on the unit "sphere", in the unit "ball"
            (a row is divided by its length where that is above 1), or "none", as they are; these
            two without tau_plus and queue. watch="collapse" looks at the same embeddings; whatever
            else is measured is of unit rows.
        sign: of "infograph": "hard" weighs the most similar negatives most, "easy" the least
            similar; "own" is "easy" where the protocol is the released one, "hard" elsewhere.

    Raises: ValueError naming the field, its value and what would do.

    >>> Run(data="sphere", encoder="mlp", method="hard", beta=1, epochs=1).beta
    1.0
    """

    study: str = CACHE_STUDY
    data: str
    data_args: Mapping[str, int | float | str] = field(default_factory=dict)
    encoder: str
    method: str = "hard"
    temperature: float = 0.5
    beta: float = 1.0
    tau_plus: float = 0.1
    detach_weights: bool = False
    anneal: str = "none"
    epochs: int
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-6
    schedule: str = "constant"
    hidden_dim: int = 512
    out_dim: int = 128
    precision: str = "float32"
    probe: str = "fast"
    eval_every: int = 0
    seed: int = 0
    # Younger fields: at these defaults they leave the digests of older Records as they are.
    encoder_args: Mapping[str, int | float | str] = field(default_factory=dict)
    hardening: str = "exponential"
    threshold: float = 0.0
    debias: str = "released"
    clamp: str = "scaled"
    Q: str = "released"
    positives: str = "views"
    queue: int = 0
    momentum: float = 0.99
    anneal_steps: int = 9
    protocol: str = "sound"
    separate_views: bool = False
    optimizer: str = "adam"
    sides: str = "fixed"
    watch: str = "none"
    normalize: str = "sphere"
    sign: str = "own"

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, f.type, getattr(self, f.name)))
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.study):
            raise ValueError(f"study={self.study!r}: lower case letters, digits and dashes only")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be positive (the papers use 0.001)")
        if self.encoder == "raw" and self.epochs > 0:
            raise ValueError(f"epochs={self.epochs}: encoder 'raw' has nothing to train, use 0")
        if self.method == INFOGRAPH:
            self._check_infograph()
        else:
            ContrastiveLoss(self.method, **self.loss_args())  # refuses what the loss would refuse
        self._check_queue()
        for name, value in self._absent().items():
            object.__setattr__(self, name, value)
        if self.normalize != "sphere" and self.tau_plus:
            raise ValueError(
                f"normalize={self.normalize!r}: goes with tau_plus=0, not {self.tau_plus}; the "
                "floor of the negatives is that of unit rows"
            )
        if self.anneal != "none" and self.epochs:
            try:
                beta_in_epoch(self, 1)
            except ValueError as error:  # steps=…
                raise ValueError(f"anneal_{error}") from None

    def _check_queue(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be in [0, 1) (MoCo uses 0.999)")
        if not self.queue:
            return
        if self.method not in QUEUED:
            raise ValueError(f"queue={self.queue}: goes with the methods {', '.join(QUEUED)}")
        for name in ("hardening", "debias", "clamp", "Q", "detach_weights", "separate_views",
                     "normalize"):  # fmt: skip
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"queue={self.queue}: {name}={getattr(self, name)!r} does not go with it, "
                    f"leave it {default!r}"
                )

    def _check_infograph(self) -> None:
        checks.tilt(self.beta, self.tau_plus)
        for name in ("positives", "watch"):
            if getattr(self, name) != (default := type(self).__dataclass_fields__[name].default):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: does not go with method='infograph', leave "
                    f"it {default!r}"
                )

    def _absent(self) -> dict[str, Any]:
        """Fields that decide nothing here, at the value that says so."""
        has = ARGUMENTS[self.method]
        absent = {name: off for name, off in _OFF.items() if name not in has}
        if "threshold" not in has:
            absent |= {"hardening": "exponential"}
        if absent.get("hardening", self.hardening) == "threshold":
            absent |= {"beta": 0.0, "detach_weights": False}
        if not absent.get("beta", self.beta):
            absent |= {"anneal": "none", "detach_weights": False}
        if isinstance(weight := self._weight(), float) and "Q" in has:
            absent |= {"Q": repr(weight).removesuffix(".0")}
        if "threshold" in absent or self.hardening == "exponential":
            absent |= {"threshold": 0.0}
        if absent.get("anneal", self.anneal) == "none":
            absent |= {"anneal_steps": 9}
        if not self.queue:
            absent |= {"momentum": 0.99}
        absent |= self._absent_graphs(absent.get("beta", self.beta))
        if self.protocol == "released":
            two = not self.queue and self.method != INFOGRAPH
            absent |= {"separate_views": two, "probe": "released"}
            if absent.get("anneal", self.anneal) == "paper":
                absent |= {"anneal": "released"}
        return absent

    def _absent_graphs(self, beta: float) -> dict[str, Any]:
        """What InfoGraph does not have, and what other methods do not have of it."""
        if self.method != INFOGRAPH:
            return {"sign": "own"}
        released = self.protocol == "released"
        own = "easy" if released else "hard"
        sign = (own if self.sign == "own" else self.sign) if beta else "own"
        names = ("temperature", "hidden_dim", "out_dim", "separate_views", "normalize")
        absent = {name: type(self).__dataclass_fields__[name].default for name in names}
        if released:
            absent |= {"tau_plus": 0.5, "weight_decay": 0.0, "detach_weights": False}
        return absent | {"sign": sign}

    def loss_args(self) -> dict[str, Any]:
        """The keyword arguments of :class:`hcl.losses.ContrastiveLoss`."""
        names = ("temperature", "beta", "tau_plus", "detach_weights", "debias", "clamp")
        threshold = self.threshold if self.hardening == "threshold" else None
        return {k: getattr(self, k) for k in names} | {"threshold": threshold, "Q": self._weight()}

    def _weight(self) -> float | str | None:
        if self.Q in ("released", "negatives"):
            return None if self.Q == "released" else self.Q
        try:
            return float(self.Q)
        except ValueError:
            raise ValueError(
                f"Q={self.Q!r}: choose 'released', 'negatives', or a number as text"
            ) from None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the fields but the study."""
        kept = {k: v for k, v in asdict(self).items() if k not in _YOUNGER or v != _YOUNGER[k]}
        del kept["study"]
        return _sha(kept)[:12]


def beta_in_epoch(run: Run, epoch: int) -> float:
    """Hardness of a Run in an epoch, annealed where the Run says so."""
    if run.anneal == "none":
        return run.beta
    return anneal_beta(run.beta, epoch, run.epochs, steps=run.anneal_steps, schedule=run.anneal)  # type: ignore[arg-type]


QUEUED = ("nt_xent", "debiased", "hard")
_CHOICES = {
    "method": tuple(ARGUMENTS),
    "hardening": ("exponential", "threshold"),
    "positives": ("views", "class"),
    "anneal": ("none", "paper", "released"),
    "protocol": ("sound", "released"),
    "optimizer": ("adam", "muon"),
    "schedule": ("constant", "cosine", "triangle"),
    "sides": ("fixed", "growing"),
    "precision": ("float32", "bfloat16"),
    "probe": ("fast", "released"),
    "watch": ("none", "losses", "collapse"),
    "normalize": ("sphere", "ball", "none"),
    "sign": ("own", "hard", "easy"),
}
_LEAST = {
    "epochs": 0, "batch": 2, "weight_decay": 0, "hidden_dim": 1, "out_dim": 1, "eval_every": 0,
    "seed": 0, "queue": 0,
}  # fmt: skip
_OFF: dict[str, Any] = {  # of a loss that does not have them
    "beta": 0.0, "tau_plus": 0.0, "detach_weights": False, "threshold": 0.0, "debias": "released",
    "clamp": "scaled", "Q": "released",
}  # fmt: skip
_YOUNGER: dict[str, Any] = {
    f.name: {} if f.name == "encoder_args" else f.default
    for f in fields(Run)[[f.name for f in fields(Run)].index("encoder_args") :]
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a Run produced.

    Args:
        run: the configuration.
        metrics: final values; accuracies in [0, 1].
        history: one row per evaluated epoch: epoch (0 before training), loss, knn, and what
            ``watch`` adds.
        cost: seconds of training, images_per_second, peak_memory_bytes of the process or GPU.
        provenance: commit, clean tree or not, versions, device, threads, date, code fingerprint.
        kept: of the test embeddings beside it, how many rows of how many, and their SHA-256.
    """

    run: Run
    metrics: dict[str, float]
    history: list[dict[str, float]]
    cost: dict[str, float]
    provenance: dict[str, Any]
    kept: dict[str, Any] | None = None
    path: Path | None = field(default=None, compare=False)

    def embeddings(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept test embeddings: z (m, d) float32 of unit rows, and labels (m,) int64.

        Raises: FileNotFoundError: none were kept with this Record; RecordError: the file beside
        it is not the one that was recorded.
        """
        beside = self.path.with_suffix(".npz") if self.path else None
        if beside is None or self.kept is None or not beside.exists():
            raise FileNotFoundError(
                f"Record {self.run.digest} of study {self.run.study} keeps no embeddings; a run "
                "that is trained by get(run, embeddings=1000) does"
            )
        if _file_sha(beside) != self.kept["sha256"]:
            raise RecordError(f"{beside} was changed after it was recorded: restore it from git")
        with np.load(beside) as arrays:
            return arrays["z"].astype(np.float32), arrays["labels"].astype(np.int64)


class RecordError(ValueError):
    """A Record's file that cannot be trusted: truncated, edited, or of an unknown layout."""


class MissingRecord(LookupError):
    """The store has no Record of a Run; the message says which command makes it."""


def store_root() -> Path:
    """Folder of the recorded runs: $HCL_RUNS, or data/runs of the project."""
    return Path(os.environ.get("HCL_RUNS") or project_root() / "data" / "runs")


def path_of(run: Run, *, store: Path | None = None) -> Path:
    """The file of a Run's Record, whether it exists or not."""
    return (store or store_root()) / run.study / f"{run.digest}.json"


def get(
    run: Run,
    *,
    store: Path | None = None,
    missing: Literal["train", "refuse"] = "train",
    embeddings: int = 0,
    progress: bool = True,
    device: str | None = None,
    compile: bool = False,
    deadline: float = math.inf,
) -> Record:
    """The Record of a Run, from the store if it is there, else trained now and stored.

    Args: embeddings: keep those of so many test points beside the Record, when it is trained now
    (a recorded Record is handed out as it was recorded; in the cache study, one with fewer is made
    again); missing: "refuse" raises instead of training; device, compile, deadline: see
    :func:`hcl.train.train`.

    Raises: MissingRecord: not recorded and ``missing="refuse"``; RecordError: a recorded file is
    damaged (never overwritten, except in the cache study).
    """
    record = _usable(run, path_of(run, store=store))
    if record and (run.study != CACHE_STUDY or _keeps(record, embeddings)):
        return record
    if missing == "refuse":
        raise MissingRecord(
            f"no Record of {run}: `hcl sweep book/profiles/{run.study}.yml` trains its study"
        )
    from hcl.train import train  # heavy, and train itself stores its Records here

    return train(
        run, store=store, embeddings=embeddings, progress=progress, device=device, compile=compile,
        deadline=deadline,
    )  # fmt: skip


def _keeps(record: Record, embeddings: int) -> bool:
    kept = record.kept or {"rows": 0, "of": 1}
    return bool(kept["rows"] >= min(embeddings, kept["of"]))


def _usable(run: Run, path: Path) -> Record | None:
    """The stored Record, or None where it has to be made (again)."""
    if not path.exists():
        return None
    if run.study != CACHE_STUDY:
        return read(path)
    try:
        record = read(path)
    except RecordError:
        return None
    same = all(
        record.provenance.get(k) == v
        for k, v in (("code", code_fingerprint()), ("torch", str(torch.__version__)))
    )
    return record if same else None


def save(
    record: Record, *, store: Path | None = None, arrays: Mapping[str, Any] | None = None
) -> Record:
    """Write a Record (and its arrays) whole or not at all; hands back the Record as it is stored.

    Args: arrays: z (m, d) and labels (m,) to keep beside it, and ``of``, how many there were.

    Raises: OSError: the disk is full or not writable; what was recorded before is untouched.
    """
    path = path_of(record.run, store=store)
    beside = path.with_suffix(".npz")
    if not arrays:
        record = replace(record, kept=None, path=path)
        with whole_or_nothing(path) as part:
            part.write_text(_text(record))
        beside.unlink(missing_ok=True)  # of an earlier Record
        return record
    with whole_or_nothing(beside) as arrays_part, whole_or_nothing(path) as part:
        with arrays_part.open("wb") as file:
            np.savez_compressed(file, z=arrays["z"], labels=arrays["labels"])
        kept = {"rows": len(arrays["z"]), "of": int(arrays["of"]), "sha256": _file_sha(arrays_part)}
        record = replace(record, kept=kept, path=path)
        part.write_text(_text(record))
    return record


def _text(record: Record) -> str:
    body = _body(record)
    return json.dumps({**body, "checksum": _sha(body)}, indent=1, allow_nan=False) + "\n"


def _file_sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> Record:
    """A Record from its file.

    Raises: RecordError: truncated, edited by hand (its checksum disagrees), or misplaced.
    """
    remedy = "restore it from git, or delete it and train the run again"
    try:
        body = json.loads(path.read_text())
        checksum = body.pop("checksum")
        run = Run(**body["run"])
        record = Record(**{**body, "run": run, "path": path})
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is truncated or no JSON ({error}): {remedy}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{path} is no Record of this version ({error!r}): {remedy}") from error
    if checksum != _sha(body):
        raise RecordError(f"{path} was changed after it was recorded (checksum): {remedy}")
    if (path.parent.name, path.stem) != (run.study, run.digest):
        raise RecordError(
            f"{path} holds the Record of run {run.digest} of study {run.study}: {remedy}"
        )
    return record


def records(study: str | None = None, *, store: Path | None = None) -> list[Record]:
    """Every Record of a study, or of all, oldest first. Raises RecordError on a damaged one."""
    found = [read(path) for path in _files(study, store)]
    return sorted(found, key=lambda r: r.provenance["date"])


def verify(*, store: Path | None = None) -> list[str]:
    """What is wrong with the store, a line each; empty when every Record can be trusted."""
    problems = []
    for path in _files(None, store):
        try:
            record = read(path)
            if record.kept:
                record.embeddings()
        except (RecordError, FileNotFoundError) as error:
            problems.append(str(error))
    return problems


def _files(study: str | None, store: Path | None) -> list[Path]:
    return sorted((store or store_root()).glob(f"{study or '*'}/*.json"))


def _typed(name: str, kind: Any, value: Any) -> Any:
    """The value as its field's type; an int will do for a float, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float):
        value += 0.0  # -0.0 is 0.0, with one digest
    if kind in (str, int, float, bool):
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError(
                f"{name}={value!r}: must be a {'finite ' * (kind is float)}{kind.__name__}"
            )
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: must be a mapping of the loader's options")
    for key, option in value.items():
        plain = type(option) in (int, str, bool) or (
            type(option) is float and math.isfinite(option)
        )
        if not (isinstance(key, str) and plain):
            raise ValueError(f"{name}={dict(value)!r}: names with an int, finite float or str each")
    return dict(value)


def _body(record: Record) -> dict[str, Any]:
    return {
        k: asdict(v) if isinstance(v, Run) else v for k, v in vars(record).items() if k != "path"
    }


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
