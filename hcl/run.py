"""A Run: one frozen configuration, everything that decides a training run.

What it produced is a Record, and is kept in :mod:`hcl.runs`; what a method is, says
:mod:`hcl.methods`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from hcl import checks, losses, methods, synthetic
from hcl.losses import ContrastiveLoss, anneal_beta
from hcl.methods import ARGUMENTS, CROSS_ENTROPY, INFOGRAPH

CACHE_STUDY = "quick"


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
        method: one of :mod:`hcl.methods`, which also says which of the fields each one has.
        method_args: options of the method itself, as the ``alpha`` of "bayesian"; what is not given
            is at its default.
        temperature, beta, tau_plus, detach_weights, debias, clamp: see :mod:`hcl.losses`.
        synthetic: mixtures of the hardest negatives as further negatives: ``hardest``, ``between``,
            ``with_anchor`` as in :func:`hcl.synthetic.mixtures`, and ``after``, so many epochs
            without them first (0).
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
        head: "mlp" is that head, "none" lets the loss compare the encoder's output.
        cross_entropy: share c of the cross-entropy of a linear classifier on the encoder's output,
            in [0, 1): the loss is (1 - c) times the method's, plus c times this one, over the same
            views. Method "cross_entropy" is this one alone.
        start: fields of the Run whose encoder this one starts from; that Run has this one's data
            (but all ``shots``), encoder and seed, and defaults elsewhere. Empty: a new encoder.
        precision: "float32", or "bfloat16" for autocast.
        probe: "fast" or "released", see :mod:`hcl.probe`.
        eval_every: kNN accuracy before training and every so many epochs; 0 for the end alone.
        watch: "losses" adds the four losses and Assumption 1 of :mod:`hcl.ordering` to that,
            "collapse" the geometry of the class means, :mod:`hcl.collapse`.
        seed: initialisation, batches, views, and the data where they are drawn.
        normalize: where the loss compares embeddings: on the unit "sphere", in the unit "ball"
            (a row is divided by its length where that is above 1), or "none", as they are; these
            two without queue and, but for losses of neighbours, without tau_plus. watch="collapse"
            looks at the same embeddings; whatever else is measured is of unit rows.
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
    method_args: Mapping[str, int | float | str] = field(default_factory=dict)
    synthetic: Mapping[str, int] = field(default_factory=dict)
    head: str = "mlp"
    cross_entropy: float = 0.0
    start: Mapping[str, int | float | str] = field(default_factory=dict)

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
        self._check_method()
        self._check_queue()
        self._check_synthetic()
        self._check_labels()
        for name, value in self._absent().items():
            object.__setattr__(self, name, value)
        if self.normalize != "sphere" and self.tau_plus and self.method not in methods.NEIGHBOURS:
            raise ValueError(
                f"normalize={self.normalize!r}: goes with tau_plus=0, not {self.tau_plus}; the "
                "floor of the negatives is that of unit rows"
            )
        if self.anneal != "none" and self.epochs:
            try:
                beta_in_epoch(self, 1)
            except ValueError as error:  # steps=…
                raise ValueError(f"anneal_{error}") from None

    def _check_method(self) -> None:
        """Refuse what the loss would refuse."""
        with self._naming("method_args"):
            own = methods.options(self.method, self.method_args)
        object.__setattr__(self, "method_args", own)
        if self.method in losses.METHODS:
            ContrastiveLoss(self.method, **self.loss_args())
        else:
            checks.temperature(self.temperature)
            checks.tilt(self.beta, self.tau_plus)
        if self.method == INFOGRAPH:
            self._check_defaults("method='infograph'", ("positives", "watch", "head", "start"))
        if self.method in methods.WEIGHTED:
            self._check_defaults(f"method={self.method!r}", ("normalize",))
        if self.method in methods.NEIGHBOURS:
            names = ("positives", "watch", "protocol", "separate_views", "sides")
            self._check_defaults(f"method={self.method!r}", names)
            if self.batch < 4:
                raise ValueError(
                    f"batch={self.batch}: 4 or more would do; a sentence and its two neighbours "
                    "are no negatives"
                )

    def _check_synthetic(self) -> None:
        if not self.synthetic:
            return
        given = {"between": 0, "with_anchor": 0, "after": 0, **self.synthetic}
        with self._naming("synthetic"):
            without_labels = [m for m in losses.METHODS if "labels" not in ARGUMENTS[m]]
            if self.method not in without_labels:
                raise ValueError(f"goes with the methods {', '.join(without_labels)}")
            self._check_defaults("synthetic", ("normalize", "queue"))
            names = {"hardest", "between", "with_anchor", "after"}
            if set(given) != names or any(type(v) is not int or v < 0 for v in given.values()):
                raise ValueError(
                    f"takes {', '.join(sorted(names))}, hardest at least, of 0 or more"
                )
            synthetic.check(**{k: v for k, v in given.items() if k != "after"})
            if given["hardest"] > (most := 2 * self.batch - 2):
                raise ValueError(f"an anchor has {most} negatives in a batch of {self.batch}")
            if given["after"] and given["after"] >= self.epochs:
                raise ValueError(f"after must be below the {self.epochs} epochs")
        object.__setattr__(self, "synthetic", given)

    def _check_labels(self) -> None:
        """What cross-entropy and a given encoder need."""
        if self.method == CROSS_ENTROPY and 0 <= self.cross_entropy <= 1:
            object.__setattr__(self, "cross_entropy", 1.0)
        elif not 0 <= self.cross_entropy < 1:
            raise ValueError(
                f"cross_entropy={self.cross_entropy}: must be in [0, 1); method='cross_entropy' is "
                "cross-entropy alone"
            )
        if self.cross_entropy:
            names = ("queue", "positives", "sides")
            self._check_defaults(f"cross_entropy={self.cross_entropy}", names)
            if self.method not in (*losses.METHODS, *methods.WEIGHTED, CROSS_ENTROPY):
                raise ValueError(
                    f"cross_entropy={self.cross_entropy}: does not go with method={self.method!r}"
                )
        if self.start:
            self.starts_from()
            kinds = {f.name: f.type for f in fields(self)}
            typed = {name: _typed(name, kinds[name], v) for name, v in self.start.items()}
            object.__setattr__(self, "start", typed)

    def starts_from(self) -> "Run":
        """The Run whose encoder this one starts from.

        Raises: ValueError: ``start`` is empty, or such a Run is refused.
        """
        data_args = {k: v for k, v in self.data_args.items() if k != "shots"}
        names = ("study", "data", "encoder", "encoder_args", "seed")
        same: dict[str, Any] = {name: getattr(self, name) for name in names}
        with self._naming("start"):
            if not set(self.start) <= _STARTS or not self.start.get("epochs"):
                raise ValueError(
                    f"takes {', '.join(sorted(_STARTS))}, epochs of 1 or more at least"
                )
            return Run(data_args=data_args, **{**same, **self.start})

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Name the field that a refusal is of."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}={getattr(self, name)!r}: {error}") from None

    def _check_defaults(self, because: str, names: Iterable[str]) -> None:
        """Refuse fields that are not at their defaults."""
        for name in names:
            if (value := getattr(self, name)) != (default := _default(name)):
                raise ValueError(
                    f"{name}={value!r}: does not go with {because}, leave it {default!r}"
                )

    def _check_queue(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be in [0, 1) (MoCo uses 0.999)")
        if not self.queue:
            return
        if self.method not in QUEUED:
            raise ValueError(f"queue={self.queue}: goes with the methods {', '.join(QUEUED)}")
        names = ("hardening", "debias", "clamp", "Q", "detach_weights", "separate_views",
                 "normalize", "head")  # fmt: skip
        self._check_defaults(f"queue={self.queue}", names)
        if self.encoder == TWO_OUTPUTS:
            raise ValueError(f"queue={self.queue}: does not go with encoder={TWO_OUTPUTS!r}")

    def _absent(self) -> dict[str, Any]:
        """Fields that decide nothing here, at the value that says so."""
        has = ARGUMENTS[self.method]
        absent = {name: off for name, off in _OFF.items() if name not in has}
        if "threshold" not in has:
            absent |= {"hardening": "exponential"}
        if absent.get("hardening", self.hardening) == "threshold":
            absent |= {"beta": 0.0, "detach_weights": False}
        if not absent.get("beta", self.beta):
            absent |= {"anneal": "none"}
            if "beta" in has:  # its weights are all alike
                absent |= {"detach_weights": False}
        if isinstance(weight := self._weight(), float) and "Q" in has:
            absent |= {"Q": repr(weight).removesuffix(".0")}
        if "threshold" in absent or self.hardening == "exponential":
            absent |= {"threshold": 0.0}
        if absent.get("anneal", self.anneal) == "none":
            absent |= {"anneal_steps": 9}
        if not self.queue:
            absent |= {"momentum": 0.99}
        absent |= self._absent_graphs(absent.get("beta", self.beta))
        absent |= self._absent_head()
        if self.protocol == "released":
            two = not self.queue and methods.has_two_views(self.method)
            absent |= {"separate_views": two, "probe": "released"}
            if absent.get("anneal", self.anneal) == "paper":
                absent |= {"anneal": "released"}
        return absent

    def _absent_head(self) -> dict[str, Any]:
        """What is not there without a projection head, or without a contrast."""
        names: tuple[str, ...] = ()
        absent = {}
        if self.encoder == TWO_OUTPUTS:  # which the loss compares as they are
            absent["head"] = "none"
        if self.method == CROSS_ENTROPY:
            absent["head"] = "none"
            names = ("temperature", "normalize")
        if absent.get("head", self.head) == "none":
            names += ("hidden_dim", "out_dim")
        return absent | {name: _default(name) for name in names}

    def _absent_graphs(self, beta: float) -> dict[str, Any]:
        """What InfoGraph does not have, and what other methods do not have of it."""
        if self.method != INFOGRAPH:
            return {"sign": "own"}
        released = self.protocol == "released"
        own = "easy" if released else "hard"
        sign = (own if self.sign == "own" else self.sign) if beta else "own"
        names = ("temperature", "hidden_dim", "out_dim", "separate_views", "normalize")
        absent = {name: _default(name) for name in names}
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
        return sha(kept)[:12]


def beta_in_epoch(run: Run, epoch: int) -> float:
    """Hardness of a Run in an epoch, annealed where the Run says so."""
    if run.anneal == "none":
        return run.beta
    return anneal_beta(run.beta, epoch, run.epochs, steps=run.anneal_steps, schedule=run.anneal)  # type: ignore[arg-type]


def _default(name: str) -> Any:
    f = Run.__dataclass_fields__[name]
    return {} if f.default is MISSING else f.default


TWO_OUTPUTS = "quickthoughts"
QUEUED = ("nt_xent", "debiased", "hard")
_STARTS = {"method", "temperature", "beta", "tau_plus", "detach_weights", "epochs",
           "batch", "lr", "weight_decay", "schedule", "optimizer", "precision"}  # fmt: skip
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
    "head": ("mlp", "none"),
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
    f.name: _default(f.name)
    for f in fields(Run)[[f.name for f in fields(Run)].index("encoder_args") :]
}


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


def sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
