"""What the losses refuse, at the call: the argument, its value, and what would do instead."""

import math
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor

from hcl.rowstats import Engine, Precision

UNLABELLED = -1


def batch(
    z1: Tensor, z2: Tensor | None, t: float | Tensor, labels: Tensor | None,
    unlabelled: str, among: Any,
) -> None:  # fmt: skip
    """Embeddings, labels and the options that every loss has.

    Values of tensors are looked at on a CPU only: on another device that would wait for it.
    """
    embeddings("z1", z1)
    if z2 is None and among["cross_modal"]:
        raise ValueError("z2=None: cross_modal needs two views")
    if z2 is None and labels is None:
        raise ValueError("z2=None: one view has positives only where there are labels")
    if z2 is not None:
        embeddings("z2", z2)
        if z1.shape != z2.shape:
            raise ValueError(
                f"z1 {tuple(z1.shape)}, z2 {tuple(z2.shape)}: both must be (B, d), of one shape"
            )
        same("z2", z2, z1)
    temperature(t)
    choice("unlabelled", unlabelled, ("negative", "ignore"))
    options(among)
    if labels is not None:
        check_labels(labels, z1)
    queue, synthetic = among["queue"], among["synthetic"]
    if queue is not None:
        embeddings("queue", queue)
        same("queue", queue, z1)
        if queue.shape[1] != z1.shape[1] or not len(queue):
            raise ValueError(f"queue {tuple(queue.shape)}: must be (K, {z1.shape[1]}), K >= 1")
    if synthetic is not None:
        embeddings("synthetic", synthetic, ndim=3)
        same("synthetic", synthetic, z1)
        n, d = len(z1) * (1 if z2 is None else 2), z1.shape[1]
        if (len(synthetic), synthetic.shape[2]) != (n, d) or not synthetic.shape[1]:
            raise ValueError(
                f"synthetic {tuple(synthetic.shape)}: must be ({n}, S, {d}), S >= 1, for the rows "
                "of z1, then of z2"
            )


def options(among: Any) -> None:
    """Those that every loss has, as far as they can be judged without a batch."""
    known = {
        "normalize": (True, False), "cross_modal": (True, False), "queue": None, "synthetic": None,
        "gather": (False, "averaged", "summed"), "engine": get_args(Engine),
        "precision": (None, *get_args(Precision)),
    }  # fmt: skip
    for name, value in among.items():
        if name not in known:
            raise TypeError(f"unknown option {name!r}: choose of {', '.join(known)}")
        allowed = known[name]
        if allowed is not None:
            choice(name, value, allowed)


def enough(rows: int, labels: Tensor | None, among: Any) -> None:
    """A batch, of all processes together, in which there can be negatives."""
    if not rows:
        raise ValueError("z1: no rows; a batch needs at least 2 (with labels, 1)")
    if rows < 2 and labels is None and among["queue"] is None and among["synthetic"] is None:
        raise ValueError(f"z1, z2: {rows} row(s) leave no negatives; a batch needs at least 2")


def embeddings(name: str, z: Any, ndim: int = 2) -> None:
    """A floating point tensor of ``ndim`` dimensions, without NaN and infinity."""
    if not (isinstance(z, Tensor) and z.is_floating_point()):
        raise TypeError(f"{name}: must be a floating point tensor, not {kind(z)}")
    if z.ndim != ndim or not z.shape[-1]:
        shape = "(B, d)" if ndim == 2 else "(2B, S, d)"
        raise ValueError(f"{name} {tuple(z.shape)}: must be {shape}, d >= 1")
    if z.device.type == "cpu" and not _finite(z):
        rows = (~torch.isfinite(z).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"{name}: NaN or infinity in row(s) {rows[:5]}; it must be finite")


def same(name: str, z: Tensor, z1: Tensor) -> None:
    """Device and dtype of z1."""
    if z.device != z1.device:
        raise ValueError(f"{name} is on {z.device}, z1 on {z1.device}: they must share a device")
    if z.dtype != z1.dtype:
        raise TypeError(f"{name} is {z.dtype}, z1 {z1.dtype}: they must share a dtype")


def given(labels: Any) -> None:
    """Labels at all, for a loss that cannot do without."""
    if labels is None:
        raise ValueError("labels=None: must be a (B,) tensor of integers, -1 for unlabelled images")


def check_labels(labels: Any, z1: Tensor) -> None:
    """(B,) integers, -1 for none."""
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole:
        raise TypeError(f"labels: must be a tensor of integers, not {kind(labels)}")
    if labels.shape != (len(z1),):
        raise ValueError(
            f"labels {tuple(labels.shape)}: must be ({len(z1)},), a label for each row of z1"
        )
    if labels.device != z1.device:
        raise ValueError(f"labels are on {labels.device}, z1 on {z1.device}: they must share one")
    if labels.device.type == "cpu" and len(labels) and int(labels.min()) < UNLABELLED:
        raise ValueError(f"labels: {int(labels.min())} among them; 0 or more, or -1 for none")


def number(name: str, value: Any, wanted: str, *, above: float = -math.inf) -> None:
    """A finite number above a bound."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: must be a number; {wanted}")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be finite; {wanted}")
    if not float(value) > above:
        raise ValueError(f"{name}={value}: {wanted}")


def temperature(value: Any) -> float:
    """A positive number, or a tensor of one; of a GPU's tensor it waits for the device."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"temperature: a tensor must hold one floating point number, not {kind(value)} "
                f"of shape {tuple(value.shape)}"
            )
        value = value.item()
    number("temperature", value, "must be positive (the papers use 0.5)", above=0)
    return float(value)


def choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """One of the known values."""
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")


def tilt(beta: Any, tau_plus: Any = 0.0) -> None:
    """Hardness and class prior."""
    number("beta", beta, "hardness must be 0 or more (the papers use 0.5 to 2)")
    number("tau_plus", tau_plus, "a class prior in [0, 1) (10 even classes: 0.1)")
    if beta < 0:
        raise ValueError(f"beta={beta}: hardness must be 0 or more (the papers use 0.5 to 2)")
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus={tau_plus}: a class prior in [0, 1) (10 even classes: 0.1)")


def _finite(z: Tensor) -> bool:
    """A finite sum has finite terms, and is quicker to look at than each of them."""
    return math.isfinite(z.detach().sum(dtype=torch.float32).item()) or bool(
        torch.isfinite(z).all()
    )


def kind(z: object) -> str:
    """What it is, for a message."""
    return f"a tensor of {z.dtype}" if isinstance(z, Tensor) else type(z).__name__
