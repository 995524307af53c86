r"""The two streaming passes of :mod:`hcl.rowstats` in plain torch, on any device.

:class:`Tiles` sums :math:`e^{k s_{ij}}` over tiles that stay in the cache, then makes each tile
again and multiplies it into the gradient; of a symmetric matrix it visits the upper triangle. It
shifts nothing, so it needs :math:`|k s| <` ``SAFE``; :class:`Shifted` needs nothing and is slower.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAFE = 40.0  # float32 holds the sum of a million e^40, and e^-40 to full precision
TILE = {"cpu": (256, 1024), "cuda": (2048, 2048)}  # rows, columns
STRIP = {"cpu": 1 << 18, "cuda": 1 << 24}  # scores in a strip of whole rows
LEAST = 16  # rows of a strip, however wide: each adds to the gradient of all its columns
KEEP = 1 << 23  # elements of the first tiles that stay for the backward pass: 32 MiB


class Scores(NamedTuple):
    """:math:`s_{ij} = ` scale :math:`\\langle x_i, y_j\\rangle`, and who is no negative of whom."""

    x: Tensor  # (n, d) anchors
    y: Tensor  # (m, d) candidates
    own: Tensor  # (n,) int64 group of each anchor, ascending
    other: Tensor  # (m,) int64 group of each candidate, ascending; no negatives of their own group
    scale: float
    powers: tuple[float, ...]  # (K,) the factors k
    symmetric: bool  # y is x


class Arrived(NamedTuple):
    """Log-sum-exps of rows or columns, (K, n), and the gradient that arrives at them, (K, n)."""

    lse: Tensor
    grad: Tensor


class Tiles:
    """The passes as plain sums, for :math:`|k s| <` ``SAFE``."""

    def __init__(self, scores: Scores):
        self.scores = scores
        x, y, own, other, scale, powers, self.symmetric = scores
        self.height, self.width = TILE["cuda" if x.is_cuda else "cpu"]
        self.own = own.to(x.dtype)
        self.other = self.own if self.symmetric else other.to(x.dtype)
        self.bands = _bands(own, other, self.height)
        self.rising = sorted(range(len(powers)), key=powers.__getitem__)
        rising = [0.0, *sorted(powers)]
        self.steps = [high - low for low, high in itertools.pairwise(rising)]
        # One exponential if all steps are multiples of 1 or 1/2; products of it are cheaper.
        self.base = 1.0 if all(step % 1 == 0 for step in self.steps) else 0.5
        self.one = all(step % 0.5 == 0 for step in self.steps) and rising[-1] <= 6 * self.base
        self.factor = scale * math.log2(math.e) * (self.base if self.one else 1.0)
        self.room = KEEP
        self.kept: dict[tuple[int, int], Tensor] = {}  # by the tile's first row and column
        size = min(self.height, len(x)) * min(self.width, len(y))
        self.space = [x.new_empty(size) for _ in range(3)]

    def forward(self, *, columns: bool) -> tuple[Tensor, Tensor | None]:
        """Log-sum-exps of the rows (K, n), and of the columns (K, m) if asked for."""
        x, y, powers = self.scores.x, self.scores.y, self.scores.powers
        rows = torch.zeros(len(powers), len(x), dtype=wide(x), device=x.device)
        cols = rows if self.symmetric else rows.new_zeros(len(powers), len(y))
        both = self.symmetric or columns
        for i, j, mirrored in self._tiles():
            e = None
            for step, k in enumerate(self.rising):
                e = self._times(e, step)
                rows[k, i].add_(e.sum(dim=1))
                if both and mirrored < e.shape[1]:
                    cols[k, j.start + mirrored : j.stop].add_(e[:, mirrored:].sum(dim=0))
        return rows.log(), cols.log() if columns else None

    def backward(
        self, row: Arrived | None, col: Arrived | None, *, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x (n, d) and y (m, d) as wanted; all of it in x's if y is x."""
        x, y, scale = self.scores.x, self.scores.y, self.scores.scale
        self.room = 0  # what is made from here on is needed once
        by_row = _coefficients(row, self.scores)
        by_col = by_row if self.symmetric else _coefficients(col, self.scores)
        dx = torch.zeros_like(x) if wanted[0] else None
        dy = dx if self.symmetric else torch.zeros_like(y) if wanted[1] else None
        for i, j, mirrored in self._tiles():
            h = None
            for step, k in reversed(list(enumerate(self.rising))):  # Horner, highest power first
                h = self._plus(h, by_row[k], by_col[k])
                h = self._times(h, step)
            assert h is not None  # (r, c), the matrix H in the docstring of rowstats
            if dx is not None:
                dx[i].addmm_(h, y[j], alpha=scale)
            if dy is not None and mirrored < h.shape[1]:
                dy[j][mirrored:].addmm_(h[:, mirrored:].T, x[i], alpha=scale)
        return dx, None if self.symmetric else dy

    def _tiles(self) -> Iterator[tuple[slice, slice, int]]:
        """Rows, columns, and how many of these columns come first that are the rows themselves."""
        n, m = len(self.scores.x), len(self.scores.y)
        for top in range(0, n, self.height):
            i = slice(top, min(top + self.height, n))
            for left in range(top if self.symmetric else 0, m, self.width):
                j = slice(left, min(left + self.width, m))
                self.at, self.shape = (i, j), (i.stop - i.start, j.stop - j.start)
                self._score(i, j)
                yield i, j, max(0, min(i.stop, j.stop) - left) if self.symmetric else 0

    def _score(self, i: slice, j: slice) -> None:
        """Scores in powers of two, whose exponential is fastest; the exponential if one will do."""
        known = self.kept.get((i.start, j.start))
        if known is not None:
            self.s = known
            return
        keep = self.shape[0] * self.shape[1] <= self.room
        space = None if keep else self._buffer(0)
        self.s = torch.mm(self.scores.x[i] * self.factor, self.scores.y[j].T, out=space)
        if self.one:
            self.s.exp2_()
        self._mask(i, j)
        if keep:
            self.kept[i.start, j.start] = self.s
            self.room -= self.s.numel()

    def _times(self, e: Tensor | None, step: int) -> Tensor:
        """e (1 if None) times the exponential of this step between the rising powers."""
        out = self._buffer(1)
        if self.one:
            for _ in range(round(self.steps[step] / self.base)):
                e = self.s if e is None else torch.mul(e, self.s, out=out)
            assert e is not None
            return e
        if e is None:
            return torch.mul(self.s, self.steps[step], out=out).exp2_()
        return e.mul_(torch.mul(self.s, self.steps[step], out=self._buffer(2)).exp2_())

    def _plus(self, h: Tensor | None, by_row: Tensor | None, by_col: Tensor | None) -> Tensor:
        """h (0 if None) plus a number for each row and one for each column."""
        parts = [] if by_row is None else [by_row[self.at[0], None]]
        parts += [] if by_col is None else [by_col[self.at[1]]]
        if h is None and len(parts) == 2:
            return torch.add(parts[0], parts[1], out=self._buffer(1))
        h = self._buffer(1).zero_() if h is None else h
        for part in parts:
            h.add_(part)
        return h

    def _mask(self, i: slice, j: slice) -> None:
        """An exponential of zero where the candidate is of the anchor's group."""
        low, high = self.bands[i.start // self.height]
        low, high = max(low, j.start), min(high, j.stop)
        if low >= high:
            return
        part = self.s[:, low - j.start : high - j.start]
        own, other = self.own[i, None], self.other[low:high]
        if self.one:  # numbers of the tile's type are compared and multiplied fastest
            differs = self.space[1][: part.numel()].view(part.shape)
            part.mul_(torch.ne(own, other, out=differs))
        else:
            part.masked_fill_(own == other, -math.inf)

    def _buffer(self, which: int) -> Tensor:
        return self.space[which][: self.shape[0] * self.shape[1]].view(self.shape)


class Shifted:
    """The passes for scores of any size: whole rows in float64, shifted by their log-sum-exp."""

    def __init__(self, scores: Scores):
        self.scores, self.kept = scores, dict[tuple[int, int], Tensor]()

    def forward(self, *, columns: bool) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Tiles.forward`."""
        x, y, own, other, scale, powers, symmetric = self.scores
        rows = torch.empty(len(powers), len(x), dtype=wide(x), device=x.device)
        for i in strips(x, y):
            s = self._strip(i)
            for k, power in enumerate(powers):
                rows[k, i] = (power * s).logsumexp(dim=1)
        if not columns:
            return rows, None
        turned = Scores(y, x, other, own, scale, powers, symmetric)
        return rows, Shifted(turned).forward(columns=False)[0]

    def backward(
        self, row: Arrived | None, col: Arrived | None, *, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """As :meth:`Tiles.backward`."""
        x, y, scale = self.scores.x, self.scores.y, self.scores.scale
        col = row if self.scores.symmetric else col
        dx = torch.zeros_like(x) if wanted[0] else None
        dy = torch.zeros_like(y) if wanted[1] and not self.scores.symmetric else None
        for i in strips(x, y):
            s = self._strip(i)
            h = torch.zeros(s.shape, dtype=x.dtype, device=x.device)
            for k, power in enumerate(self.scores.powers):
                if row is not None:
                    h += _share(power * s, row.lse[k, i, None], power * row.grad[k, i, None])
                if col is not None:
                    h += _share(power * s, col.lse[k], power * col.grad[k])
            if dx is not None:
                dx[i].addmm_(h, y, alpha=scale)
            if dy is not None:
                dy.addmm_(h.T, x[i], alpha=scale)
        return dx, dy

    def _strip(self, i: slice) -> Tensor:
        """Scores (r, m) of some rows in float64, -inf at their own group."""
        x, y, own, other, scale, *_ = self.scores
        s = x[i].to(wide(x)) @ y.to(wide(y)).T * scale
        return s.masked_fill_(own[i, None] == other, -math.inf)


def strips(x: Tensor, y: Tensor) -> list[slice]:
    """Slices of the rows of x with about ``STRIP`` scores each, or ``LEAST`` rows."""
    height = max(LEAST, STRIP["cuda" if x.is_cuda else "cpu"] // max(len(y), 1))
    return [slice(top, min(top + height, len(x))) for top in range(0, len(x), height)]


def wide(x: Tensor) -> torch.dtype:
    """The type of sums and logarithms: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


# Pieces -------------------------------------------------------------------------------------------


def _bands(own: Tensor, other: Tensor, height: int) -> list[tuple[int, int]]:
    """For every tile of rows, the columns that may hold candidates of their groups."""
    if own.device.type != "cpu":  # looking would wait for the device
        return [(0, len(other))] * -(-len(own) // height)
    first, last = own.numpy()[::height], own.numpy()[height - 1 :: height]
    last = np.append(last, own[-1:].numpy()) if len(last) < len(first) else last
    low = np.searchsorted(other.numpy(), first)
    high = np.searchsorted(other.numpy(), last, side="right")
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _coefficients(arrived: Arrived | None, scores: Scores) -> list[Tensor | None]:
    """k G e^{-L}, K times (n,): what multiplies e^{k s}; zero where there are no negatives."""
    if arrived is None:
        return [None] * len(scores.powers)
    made = arrived.grad * torch.exp(-arrived.lse)
    made = made.masked_fill_(arrived.lse == -math.inf, 0.0).to(scores.x.dtype)
    return [k * row for k, row in zip(scores.powers, made, strict=True)]


def _share(s: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """grad e^{s - lse}; subtracted in float64, as a difference of large numbers."""
    some = lse > -math.inf
    return torch.where(some, grad, 0.0) * torch.exp(s - torch.where(some, lse, 0.0))
