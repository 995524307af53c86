r"""Row log-sum-exps over an anchor's negatives, in two passes and O(N d) memory.

Every loss of :mod:`hcl.losses` needs its scores :math:`s_{ij} = \langle x_i, y_j\rangle / t` only
through a few statistics of each row,

.. math:: L_{k,i} = \log \sum_{j \in \mathcal N_i} e^{k s_{ij}}, \qquad
          \frac{\partial L_{k,i}}{\partial s_{ij}} = k\, e^{k s_{ij} - L_{k,i}} .

The forward pass streams over tiles of s and keeps the sums. The backward pass streams again, makes
each tile anew and turns it into

.. math:: H_{ij} = \sum_k k \big( G_{k,i}\, e^{k s_{ij} - L_{k,i}}
          + G'_{k,j}\, e^{k s_{ij} - L'_{k,j}} \big), \qquad
          \partial x = H y / t, \quad \partial y = H^\top x / t,

with G and G' the gradients that arrive at the statistics of the rows and of the columns. Where the
anchors are the candidates, s and H are symmetric and half of the tiles will do.

Rows come sorted by group (an image, or a label) and negatives are the candidates of other groups:
so only tiles near the diagonal need a mask. The passes themselves are in :mod:`hcl.tiles` (torch,
any device) and :mod:`hcl.kernels` (Triton, for a GPU).
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hcl import tiles
from hcl.tiles import SAFE, Arrived, Scores

Engine = Literal["auto", "tiled", "triton"]
Precision = Literal["highest", "high", "medium"]


def logsumexps(
    x: Tensor,
    y: Tensor | None,
    own: Tensor,
    other: Tensor | None,
    *,
    powers: tuple[float, ...],
    scale: float,
    bound: float,
    columns: bool = False,
    engine: Engine = "auto",
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-sum-exps of ``k * scale * <x_i, y_j>`` over the candidates j of other groups, per k.

    Args:
        x: (n, d) anchors, floating point.
        y: (m, d) candidates of the same dtype; None where they are the anchors.
        own: (n,) int64 group of each anchor, ascending, at most 2^24 in absolute value.
        other: (m,) the same for the candidates; None with y.
        scale: factor of the inner products, 1 / t.
        powers: the K factors k > 0, e.g. (1 + beta, beta).
        bound: no smaller than any \|scale <x_i, y_j>\|; infinity if unknown. Small ones are faster.
        columns: also the statistics of the columns over their rows; y must be given.
        engine: "tiled" (torch), "triton", or "auto": the latter on a GPU that has it.
        precision: of float32 products, in the words of torch.set_float32_matmul_precision; None
            is torch's setting. In "tiled" it is set for the whole process while a pass runs.

    Returns:
        (K, n), and (K, m) or None; float64 where the device has it, since the rounding of a
        float32 log-sum-exp of size 30 would be a relative error of 1e-6 in the gradient.
        -inf, whose gradient is zero, where an anchor has no negatives.

    Raises:
        ValueError: an engine or precision that does not exist, or not here.

    Source: our derivation, in the docstring of this module.

    >>> x = torch.eye(4)
    >>> rows, _ = logsumexps(
    ...     x, None, torch.tensor([0, 0, 1, 1]), None, powers=(1.0,), scale=1.0, bound=1.0
    ... )
    >>> rows.exp()  # two negatives each, whose scores are 0
    tensor([[2., 2., 2., 2.]], dtype=torch.float64)
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(get_args(Engine))}")
    if precision not in (None, *get_args(Precision)):
        raise ValueError(f"precision={precision!r}: one of {', '.join(get_args(Precision))}, None")
    bounded = max(powers) * bound < SAFE
    settings = (tuple(map(float, powers)), float(scale), bounded, engine, columns, precision)
    rows, cols = _LogSumExps.apply(x, y, own, other, settings)
    return rows, cols if columns else None


def by_strips(
    function: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    *values: Tensor,
    scale: float,
    strips: Sequence[tuple[slice, slice]] | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Any statistic of the rows of the scores, one strip of rows at a time, in torch.

    ``function(s, rows, cols, *values)`` gets the scores s (r, c) of a strip, the slices of its rows
    and columns, and the strip's part of each of ``values``; it returns (r, ...). The backward pass
    calls it once more, under autograd, so it must give the same result twice. Gradients reach x, y
    and ``values``, not what else the function uses.

    Args:
        x, y: (n, d) anchors and (m, d) candidates.
        values: (n, ...) tensors with a row for each anchor.
        scale: the scores are ``scale * x @ y.T``.
        strips: slices of all rows in turn, each with the columns that it needs; by default all
            columns, and as many rows as make about a megabyte of scores.
        precision: as in :func:`logsumexps`.

    Returns: (n, ...). Memory: O((n + m) d) and a few strips.

    >>> x = torch.eye(3)
    >>> by_strips(lambda s, rows, cols: s.sum(dim=1), x, x, scale=2.0)
    tensor([2., 2., 2.])
    """
    if strips is None:
        strips = [(i, slice(0, len(y))) for i in tiles.strips(x, y)]
    settings = function, strips or [(slice(0, 0), slice(0, len(y)))], scale, precision
    found: Tensor = _Strips.apply(settings, x, y, *values)
    return found


class _LogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, own: Tensor, other: Tensor | None, settings: Any
    ) -> tuple[Tensor, Tensor]:
        columns, precision = settings[-2:]
        passes = _passes(x, y, own, other, settings)
        with _plain(x, precision):
            rows, cols = passes.forward(columns=columns)
        cols = rows.new_empty(0) if cols is None else cols
        ctx.save_for_backward(x, y, own, other, rows, cols, *passes.kept.values())
        ctx.settings, ctx.kept = settings, list(passes.kept)
        if not columns:
            ctx.mark_non_differentiable(cols)
        return rows, cols

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, own, other, rows, cols, *kept = ctx.saved_tensors
        powers, scale, _, _, columns, precision = ctx.settings
        if torch.is_grad_enabled():  # a second derivative is wanted: the formula itself, O(N^2)

            def formula(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
                return _dense(_scores(x, y, own, other, scale, powers), columns)

            return *differentiable(formula, (x, y), grads[: 1 + columns]), None, None, None
        row, col = Arrived(rows, grads[0]), Arrived(cols, grads[1]) if columns else None
        passes = _passes(x, y, own, other, ctx.settings)
        passes.kept = dict(zip(ctx.kept, kept, strict=True))
        with _plain(x, precision):
            dx, dy = passes.backward(row, col, wanted=ctx.needs_input_grad[:2])
        return (
            None if dx is None else dx.to(x.dtype),
            None if dy is None or y is None else dy.to(y.dtype),
            None, None, None,
        )  # fmt: skip


class _Strips(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Any, x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, *values)
        ctx.settings = settings
        with _plain(x, settings[-1]):
            return _over(settings, x, y, *values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        function, strips, scale, precision = ctx.settings
        if torch.is_grad_enabled():
            with _plain(inputs[0], precision):
                found = differentiable(partial(_over, ctx.settings), inputs, (grad,))
            return None, *found
        wanted = ctx.needs_input_grad[1:]
        total = [torch.zeros_like(v) if w else None for v, w in zip(inputs, wanted, strict=True)]
        for i, j in strips:
            at = (i, j, *[i] * (len(inputs) - 2))
            with torch.enable_grad(), _plain(inputs[0], precision):
                parts = [
                    v.detach()[k].requires_grad_(w)
                    for v, k, w in zip(inputs, at, wanted, strict=True)
                ]
                made = function(scale * parts[0] @ parts[1].T, i, j, *parts[2:])
                leaves = [part for part in parts if part.requires_grad]
                grads = iter(torch.autograd.grad(made, leaves, grad[i], allow_unused=True))
            for whole, k in zip(total, at, strict=True):
                if whole is not None and (part := next(grads)) is not None:
                    whole[k] += part
        return None, *total


def _over(settings: Any, x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
    function, strips, scale, _ = settings
    pieces = (function(scale * x[i] @ y[j].T, i, j, *(v[i] for v in values)) for i, j in strips)
    if torch.is_grad_enabled():
        return torch.cat(list(pieces))
    first = next(pieces)
    whole = first.new_empty(len(x), *first.shape[1:])
    whole[strips[0][0]] = first
    for (i, _), piece in zip(strips[1:], pieces, strict=True):
        whole[i] = piece  # small tensors kept between large ones would fragment the memory
    return whole


# Pieces -------------------------------------------------------------------------------------------


def _scores(
    x: Tensor, y: Tensor | None, own: Tensor, other: Tensor | None, scale: float, powers: Any
) -> Scores:
    if y is None or other is None:
        return Scores(x, x, own, own, scale, powers, symmetric=True)
    return Scores(x, y, own, other, scale, powers, symmetric=False)


@contextmanager
def _plain(x: Tensor, precision: Precision | None) -> Iterator[None]:
    """No autocast, and products of the precision asked for; nothing to do is the usual case."""
    with ExitStack() as stack:
        if torch.is_autocast_enabled(x.device.type):
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if precision is not None:  # of the whole process: one thread at a time
            stack.enter_context(_ONE_PRECISION)
            stack.callback(torch.set_float32_matmul_precision, _torch_precision())
            torch.set_float32_matmul_precision(precision)
        yield


_ONE_PRECISION = threading.RLock()


def _torch_precision() -> str:
    """What torch is set to, in the words of either of its two settings."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one is in use, and torch refuses to mix them
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def _dense(scores: Scores, columns: bool) -> tuple[Tensor, ...]:
    """The statistics as autograd understands them to any order, with the matrix in memory."""
    x, y, own, other, scale, powers, _ = scores
    excluded = own[:, None] == other
    with torch.autocast(x.device.type, enabled=False):
        s = (scale * x.to(tiles.wide(x)) @ y.to(tiles.wide(y)).T).masked_fill(excluded, -math.inf)
        made = []
        for dim in (1, 0)[: 1 + columns]:
            alone = excluded.all(dim=dim, keepdim=True)  # -inf throughout would give NaN
            sums = [(k * s.masked_fill(alone, 0.0)).logsumexp(dim=dim) for k in powers]
            made.append(torch.stack(sums).masked_fill(alone.flatten(), -math.inf))
    return tuple(made)


def differentiable(function: Callable[..., Any], inputs: Any, grads: Any) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` that can be differentiated again, as autograd makes them.

    Each input is taken for itself, even where two of them are one tensor.
    """
    with torch.enable_grad():
        parts = [None if v is None else v.view_as(v) for v in inputs]
        made = function(*parts)
    wanted = [v for v in parts if v is not None and v.requires_grad]
    found = iter(torch.autograd.grad(made, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if v is not None and v.requires_grad else None for v in parts]


def _passes(x: Tensor, y: Tensor | None, own: Tensor, other: Tensor | None, settings: Any) -> Any:
    """The two passes as the device does them."""
    powers, scale, bounded, engine, _, precision = settings
    if engine == "triton" or (engine == "auto" and x.is_cuda):
        from hcl import kernels  # needs Triton, which torch brings along on Linux alone

        some = len(x) and (y is None or len(y))
        fits = x.dtype != torch.float64 and x.shape[1] <= 1024 and kernels.available(x.device)
        if fits and some:
            scores = _scores(x, y, own.int(), None if other is None else other.int(), scale, powers)
            return _Kernels(scores, bounded, precision or _torch_precision())
        if engine == "triton" and not fits:
            raise ValueError(
                f"engine='triton': not for {x.dtype} rows of {x.shape[1]} on {x.device}; it needs "
                "Triton, a CUDA device of capability 8.0 or more, no float64, and d <= 1024"
            )
    if x.dtype.itemsize == 2:  # neither sums nor groups fit into 16 bits
        x, y = x.float(), None if y is None else y.float()
    scores = _scores(x, y, own, other, scale, powers)
    return tiles.Tiles(scores) if bounded else tiles.Shifted(scores)


class _Kernels:
    """The passes of :mod:`hcl.kernels`, which know rows and columns but no autograd."""

    def __init__(self, scores: Scores, bounded: bool, precision: str):
        self.scores, self.kept = scores, dict[tuple[int, int], Tensor]()
        self.same: dict[str, Any] = {
            "scale": scores.scale, "powers": scores.powers, "bounded": bounded,
            "precision": precision,
        }  # fmt: skip

    def forward(self, *, columns: bool) -> tuple[Tensor, Tensor | None]:
        from hcl import kernels

        x, y, own, other, *_, symmetric = self.scores
        return kernels.forward(x, y, own, other, symmetric=symmetric, columns=columns, **self.same)

    def backward(
        self, row: Arrived | None, col: Arrived | None, *, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        x, y, own, other, *_, symmetric = self.scores
        if symmetric:
            return self._gradient(x, y, own, other, row, row), None
        dx = self._gradient(x, y, own, other, row, col) if wanted[0] else None
        return dx, self._gradient(y, x, other, own, col, row) if wanted[1] else None

    def _gradient(
        self, x: Tensor, y: Tensor, own: Tensor, other: Tensor,
        row: Arrived | None, col: Arrived | None,
    ) -> Tensor:  # fmt: skip
        from hcl import kernels

        arrived: dict[str, Any] = {
            f"{side}_{name}": None if value is None else getattr(value, name)
            for side, value in (("row", row), ("col", col))
            for name in ("lse", "grad")
        }
        return kernels.backward(x, y, own, other, **arrived, **self.same)
