"""Every rank's embeddings on every rank: a batch split over devices keeps all its negatives.

Under ``torchrun`` each rank computes the losses of its own anchors against the candidates of all:

    everyone = gather(z1, z2, labels)
    own = slice(everyone.start, everyone.start + len(z1))
    share = (losses of the anchors z1[own], z2[own] of everyone).sum() / (2 * len(everyone.z1))
    print(total(share))  # the mean over the whole batch, the same on every rank

A row's gradient is that of the SUM of all ranks' losses, whichever rank used the row, so with these
shares the parameters' gradients add up, over the ranks, to those of the whole batch's mean.
DistributedDataParallel averages them instead: multiply the share by the number of ranks there.

Forwards and backwards, all ranks must take part. One without rows does so with a loss of zero that
still depends on what it gathered, such as ``everyone.z1[own].sum()``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda", "xpu", "another")


class Gathered(NamedTuple):
    """Rows of all ranks, in rank order; this rank's own are ``z1[start : start + B_r]``."""

    z1: Tensor  # (B, d)
    z2: Tensor  # (B, d)
    labels: Tensor | None  # (B,) int64
    start: int


def gather(
    z1: Tensor,
    z2: Tensor,
    labels: Tensor | None = None,
    *,
    check: Callable[[], None] | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Gathered:
    """All ranks' rows, in rank order, on every rank; the gradient returns to the row's owner.

    Without a process group, or in one of a single rank, the input comes back as it is. Otherwise
    the ranks first tell each other what they hold, so that input that does not fit is an error on
    all of them and none waits. Memory is O(B d) a rank. It can be differentiated twice. Gradients
    of 16 bits are summed in float32 and rounded once.

    Args:
        z1, z2: (B_r, d) float16, bfloat16, float32 or float64. B_r may differ between ranks, and be
            zero on some; d, dtype and kind of device may not differ.
        labels: (B_r,) integers, on all ranks or on none.
        check: looks at this rank's own input and raises what is wrong with it.
        group: a process group of torch.distributed; None is the default one.

    Returns:
        z1, z2 (B, d), B being the sum of all B_r; labels (B,) int64 or None; the first own row.

    Raises:
        ValueError, TypeError: this rank's own input is refused, by ``check`` or here.
        ValueError: another rank refused its input; or, on all ranks, saying who has what: they
            disagree (also in whether gradients are enabled), or none has a row.
        RuntimeError: a rank died, or did not come within the group's timeout. Gloo notices a death
            at once. NCCL alone does not, and ends the process after its timeout; in a group
            "cpu:gloo,cuda:nccl" the ranks introduce themselves over gloo.

    Source: our reading of a batch over many devices; the papers' code runs in one process.

    >>> gather(torch.zeros(2, 3), torch.ones(2, 3)).start
    0
    """
    ranks = _ranks(group)
    refusal, mine = None, _Header()
    try:
        if check is not None:
            check()
        mine = _header(z1, z2, labels, group)
    except Exception as error:  # whatever it is, the others must hear of it first
        refusal = error
    try:
        headers = [mine] if len(ranks) == 1 else _exchange(mine, z1, group)
    finally:
        if refusal is not None:
            raise refusal
    if len(ranks) == 1:
        return Gathered(z1, z2, labels, 0)
    _agree(headers, ranks)

    rows = [h.rows for h in headers]
    most, n = max(rows), len(z1)
    # asks for a gradient on all ranks if the input does on one: then all take part in the backward
    joint = torch.empty(0, requires_grad=mine.gradients == 1 and any(h.trained for h in headers))
    padded = z1.new_zeros(2, most, z1.shape[1])
    padded[0, :n], padded[1, :n] = z1, z2  # no cat or stack: autocast would have a say in those
    blocks = _Collective.apply(padded, joint, True, group).unflatten(0, (len(ranks), 2))
    both = [z.flatten(0, 1) for z in blocks.unbind(1)]  # (ranks * most, d) each
    if labels is not None:
        labels = F.pad(labels.to(z1.device, torch.int64), (0, most - n))
        labels = _all_gather(labels, "labels", group)  # (ranks * most,)
    if min(rows) < most:
        places = torch.arange(len(ranks) * most).view(-1, most)
        kept = torch.cat([p[:b] for p, b in zip(places, rows, strict=True)]).to(z1.device)  # (B,)
        both = [z.index_select(0, kept) for z in both]
        labels = None if labels is None else labels[kept]
    return Gathered(both[0], both[1], labels, sum(rows[: dist.get_rank(group)]))


def total(value: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Sum of a scalar over the ranks, the same bits on each; its gradient is the local one.

    ``total(share).backward()`` therefore does what ``share.backward()`` does.

    Raises: ValueError: not a floating point scalar. RuntimeError: as :func:`gather`.
    Source: our reading.

    >>> total(torch.tensor(1.5))
    tensor(1.5000)
    """
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 0):
        kind = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"value ({kind}): must be a floating point tensor of shape ()")
    _check_device("value", value, group)
    return value if len(_ranks(group)) == 1 else _Total.apply(value, group)


# What the ranks tell each other before any data travels ------------------------------------------


def size(group: "dist.ProcessGroup | None" = None) -> int:
    """How many ranks there are, 1 without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if ready else 1


class _Header(NamedTuple):
    accepted: int = 0
    rows: int = 0
    trained: int = 0  # the rows ask for a gradient
    d: int = 0
    dtype: int = 0
    device: int = 0
    labels: int = 0
    gradients: int = 0


def _header(z1: Tensor, z2: Tensor, labels: Tensor | None, group: Any) -> _Header:
    for name, z in (("z1", z1), ("z2", z2)):
        if not (isinstance(z, Tensor) and z.dtype in DTYPES):
            kind = f"a tensor of {z.dtype}" if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"{name}: {kind}; must be a tensor of float16, bfloat16, 32 or 64")
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 {tuple(z1.shape)}, z2 {tuple(z2.shape)}: both must be (B, d)")
    if z1.dtype != z2.dtype or z1.device != z2.device:
        pair = f"z1 {z1.dtype} on {z1.device}, z2 {z2.dtype} on {z2.device}"
        raise ValueError(f"{pair}: they must share dtype and device")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            raise TypeError("labels: must be a tensor of integers, or None")
        if labels.shape != z1.shape[:1]:
            raise ValueError(f"labels {tuple(labels.shape)}: must be ({len(z1)},), one a row of z1")
    _check_device("z1", z1, group)
    device = z1.device.type if z1.device.type in DEVICES else "another"
    return _Header(
        1, len(z1), z1.requires_grad or z2.requires_grad, z1.shape[1], DTYPES.index(z1.dtype),
        DEVICES.index(device), labels is not None, torch.is_grad_enabled(),
    )  # fmt: skip


def _exchange(mine: _Header, z1: object, group: Any) -> list[_Header]:
    """The headers of all ranks, over the CPU if the group can: a GPU need not be waited for."""
    kinds = _backends(group)
    device = torch.device("cpu" if "cpu" in kinds else next(iter(kinds)))
    if isinstance(z1, Tensor) and z1.device.type == device.type:
        device = z1.device
    headers = _all_gather(torch.tensor(mine, dtype=torch.int64, device=device), "sizes", group)
    return [_Header(*h) for h in headers.view(-1, len(mine)).tolist()]


def _agree(headers: Sequence[_Header], ranks: Sequence[int]) -> None:
    """Raises, alike on all ranks, what makes these headers no one batch."""

    def who(values: Sequence[object], value: object) -> str:
        return ", ".join(str(r) for r, v in zip(ranks, values, strict=True) if v == value)

    accepted = [h.accepted for h in headers]
    if not all(accepted):
        raise ValueError(f"rank {who(accepted, 0)} refused its input: see the error raised there")
    same: dict[str, list[Any]] = {
        "d": [h.d for h in headers],
        "dtype": [DTYPES[h.dtype] for h in headers],
        "device": [DEVICES[h.device] for h in headers],
        "labels": ["given" if h.labels else None for h in headers],
        "gradients": ["enabled" if h.gradients else "disabled" for h in headers],
    }
    for name, found in same.items():
        if len(set(found)) > 1:
            parts = "; ".join(f"{v} on rank {who(found, v)}" for v in dict.fromkeys(found))
            raise ValueError(f"{name}: {parts}; all ranks must have the same")
    if not any(h.rows for h in headers):
        raise ValueError(f"z1, z2: none of the {len(ranks)} ranks has a row; at least one must")


# Collectives that know their gradient and explain their failure -----------------------------------


class _Collective(Function):
    """x (n, ...) of all ranks, (ranks * n, ...); or its transpose, a rank's n rows of the sum.

    ``joint`` has no data. The result asks for a gradient if it does, so that all ranks' backward
    passes, the second one too, hold the same collectives even where a rank's x asks for none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, joint: Tensor, gathers: bool, group: Any) -> Tensor:
        ctx.save_for_backward(joint)
        ctx.gathers, ctx.group = gathers, group
        return _all_gather(x, "embeddings", group) if gathers else _own_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = _Collective.apply(grad, *ctx.saved_tensors, not ctx.gathers, ctx.group)
        return x, None, None, None


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        summed = value.to(torch.float64, copy=True)
        with _explained("adding up the losses", group):
            dist.all_reduce(summed, group=group)
        return summed.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def _all_gather(x: Tensor, what: str, group: Any) -> Tensor:
    out = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
    with _explained(f"gathering the {what}", group):
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _own_sum(x: Tensor, group: Any) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    summed = x.to(wide, copy=True, memory_format=torch.contiguous_format)
    own = summed.unflatten(0, (dist.get_world_size(group), -1))[dist.get_rank(group)]
    with _explained("gathering the gradients", group):
        if _backends(group)[x.device.type] == "nccl":
            own = torch.empty_like(own)
            dist.reduce_scatter_tensor(own, summed, group=group)
        else:
            dist.all_reduce(summed, group=group)
    return own.to(x.dtype, copy=True)  # a copy lets go of the other ranks' rows


@contextmanager
def _explained(doing: str, group: Any) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()}: {doing} of {dist.get_world_size(group)} ranks failed: another"
            " rank has died or stopped, or did not come here in time; first look at its output"
        ) from error


def _ranks(group: Any) -> list[int]:
    """Global ranks of the group's members; [0] where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return [0]
    if dist.get_rank(group) < 0:
        raise ValueError(f"group: rank {dist.get_rank()} is not in it; only its members may gather")
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def _backends(group: Any) -> dict[str, str]:
    """Kinds of device and their backend, such as {"cpu": "gloo", "cuda": "nccl"}."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def _check_device(name: str, x: Tensor, group: Any) -> None:
    if len(_ranks(group)) > 1 and x.device.type not in (able := _backends(group)):
        raise ValueError(f"{name} is on {x.device}; the process group is for {', '.join(able)}")
