"""Who is compared with whom: a batch's anchors, their positives, and sums over their negatives.

A :class:`Batch` brings two views (or two modalities, or one labelled view), labels, a queue,
synthetic negatives and the rows of other processes into one form: anchors and candidates sorted by
group, where an anchor's negatives are the candidates of other groups. Without labels the views of
one image are a group. :mod:`hcl.losses` writes every loss in these terms.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from hcl import checks, distributed
from hcl.rowstats import Engine, Precision, by_strips, logsumexps
from hcl.tiles import LEAST, STRIP, wide
from hcl.units import EPSILON, unit_views

Unlabelled = Literal["negative", "ignore"]


class Among(TypedDict, total=False):
    """Options of every loss: who is compared with whom, and how that is computed.

    normalize: divide each row by its L2 norm first (True). The clamps assume unit rows.
    cross_modal: compare z1 with z2 alone, and z2 with z1, as CLIP does (False).
    queue: (K, d) more negatives, the same for every anchor, as MoCo has. They have no labels, and
        are not gathered: give every process the same.
    synthetic: (2B, S, d) more negatives, each anchor's own: of z1's rows, then of z2's, of this
        process; (B, S, d) for one view.
    gather: candidates are the rows of all processes of torch.distributed; all get the same loss.
        "averaged" scales gradients by the number of processes, for a trainer that averages them
        (DistributedDataParallel), "summed" does not; False looks at this process alone.
    engine, precision: see :func:`hcl.rowstats.logsumexps`. The positives of scl, hard_scl and
        schane, and weighted, are computed in torch whatever the engine.
    """

    normalize: bool
    cross_modal: bool
    queue: Tensor | None
    synthetic: Tensor | None
    gather: Literal[False, "averaged", "summed"]
    engine: Engine
    precision: Precision | None


DEFAULTS: Among = {
    "normalize": True, "cross_modal": False, "queue": None, "synthetic": None, "gather": False,
    "engine": "auto", "precision": None,
}  # fmt: skip


class Side(NamedTuple):
    """Anchors and the candidates they are compared with, both sorted by group."""

    x: Tensor  # (n, d) anchors
    y: Tensor  # (m, d) candidates, x itself where the anchors are all of them
    own: Tensor  # (n,) group of each anchor
    other: Tensor  # (m,) group of each candidate
    anchors: tuple[int, ...]  # views that are anchors here: 0 of z1, 1 of z2
    candidates: tuple[int, ...]  # views that are candidates


class Batch:
    """The anchors of a batch, in an order of its own that every (n,) tensor below follows.

    Args:
        z1, z2: (B, d) floating point; z2 is None for one view, which needs labels.
        temperature: t > 0, or a tensor of one element, which may learn.
        labels: (B,) integers; None makes every image a class of its own, unless ``supervised``.
        unlabelled: an image of label -1 is a class of its own ("negative") or left out ("ignore").
        among: see :class:`Among`.

    Attributes:
        positives: (n,) score of the anchor with its other view.
        pairs: (B,) the same once for each pair, of all processes.
        others: how many candidates are neither the anchor nor its other view, 2B - 2, and the
            queue and the synthetic ones.
    """

    def __init__(
        self, z1: Tensor, z2: Tensor | None, temperature: float | Tensor,
        labels: Tensor | None = None, unlabelled: Unlabelled = "negative",
        supervised: bool = False, **among: Any,
    ):  # fmt: skip
        checks.options(among)
        self.among: Any = {**DEFAULTS, **among}

        def check() -> None:  # when gathered, a refusal here is one on all processes
            if supervised:
                checks.given(labels)
            checks.batch(z1, z2, temperature, labels, unlabelled, self.among)

        if self.among["gather"]:
            everyone = distributed.gather(z1, z1 if z2 is None else z2, labels, check=check)
            self.mine = range(everyone.start, everyone.start + len(z1))
            z1, z2 = everyone.z1, None if z2 is None else everyone.z2
            labels = everyone.labels
        else:
            check()
            self.mine = range(len(z1))
        checks.enough(len(z1), labels, self.among)
        self.size, self.dtype, self.supervised = len(z1), z1.dtype, labels is not None
        self.temperature = checks.temperature(temperature)
        with torch.autocast(z1.device.type, enabled=False):
            self.order, group = _groups(z1, labels, unlabelled)
            z, p = unit_views(
                z1, z2, self.order if self.supervised else None, normalize=self.among["normalize"]
            )
            p = p / self.temperature  # z (B, V, d), p (B,)
            self.root: Tensor | None = None
            if isinstance(temperature, Tensor) and temperature.requires_grad:
                # <x, y> / t knows nothing of t's gradient; rows times sqrt(t / t') do
                self.root = (self.temperature / temperature.reshape(()).to(p)).sqrt()
                z, p = z * self.root.to(z), p * self.root**2
            self.pairs = p  # (B,) of all processes
            self.sides = self._sides(z, group)
            p = p[self.local] if len(self.mine) < self.size else p
            # a pair's score is that of both its views
            self.positives = p.repeat(2) if self.among["cross_modal"] else _each(p, z.shape[1])
            queue, synthetic = self.among["queue"], self.among["synthetic"]
            self.queue = None if queue is None else self._like(queue, z)
            self.synthetic = None if synthetic is None else self._own_scores(synthetic.to(z.dtype))
        self.extra = (0 if queue is None else len(queue)) + (
            0 if synthetic is None else synthetic.shape[1]
        )
        self.others = len(self.sides[0].y) + self.extra
        self.others -= 1 if self.among["cross_modal"] else z.shape[1]

    def _sides(self, z: Tensor, group: Tensor) -> list[Side]:
        v, own, here = z.shape[1], z, group
        if len(self.mine) < self.size:  # only the rows of this process are anchors
            own, here = z[self.local], group[self.local]
        if self.among["cross_modal"]:
            return [Side(own[:, k], z[:, 1 - k], here, group, (k,), (1 - k,)) for k in (0, 1)]
        other, views = _each(group, v), tuple(range(v))
        y = z.reshape(-1, z.shape[2])
        if own is z:
            return [Side(y, y, other, other, views, views)]
        x = own.reshape(-1, z.shape[2])
        return [Side(x, y, _each(here, v), other, views, views)]

    @cached_property
    def local(self) -> Tensor:
        """Which images, in order, are of this process."""
        if not self.supervised:
            return torch.arange(self.mine.start, self.mine.stop, device=self.order.device)
        return ((self.order >= self.mine.start) & (self.order < self.mine.stop)).nonzero().flatten()

    def rows(self, side: Side) -> Tensor:
        """Index (n,) of each anchor in cat([z1, z2]) of all processes."""
        return self._index(self.order[self.local], side.anchors, self.size)

    def cols(self, side: Side) -> Tensor:
        """Index (m,) of each candidate in cat([z1, z2]) of all processes."""
        return self._index(self.order, side.candidates, self.size)

    def places(self, side: Side) -> Tensor:
        """Which of the candidates (n,) each anchor is; -1 where they are of another modality."""
        if self.among["cross_modal"]:
            return torch.full_like(side.own, -1)
        v = len(side.anchors)
        return (self.local[:, None] * v + torch.arange(v, device=self.local.device)).flatten()

    @staticmethod
    def _index(images: Tensor, views: tuple[int, ...], step: int) -> Tensor:
        view = torch.arange(views[0], views[-1] + 1, device=images.device)
        return (images[:, None] + step * view).flatten()

    def _like(self, more: Tensor, z: Tensor) -> Tensor:
        """More negatives, treated as the rows of the batch."""
        more = F.normalize(more.to(z.dtype), dim=-1) if self.among["normalize"] else more.to(z)
        return more if self.root is None else more * self.root.to(z)

    def _own_scores(self, synthetic: Tensor) -> Tensor:
        """Scores (n, S) of the anchors with their own synthetic negatives."""
        images = self.order[self.local] - self.mine.start
        mine = torch.cat([self._index(images, s.anchors, len(self.mine)) for s in self.sides])
        x = torch.cat([side.x for side in self.sides])
        # the few anchors are put in the order of the many negatives, whose lengths divide at last
        x = x.new_zeros(len(synthetic), x.shape[1]).index_copy(0, mine, x)
        scores = torch.einsum("nd,nsd->ns", x, synthetic) / self.temperature
        if self.among["normalize"]:
            scores = scores / torch.linalg.vector_norm(synthetic, dim=2).clamp(min=EPSILON)
        return (scores if self.root is None else scores * self.root.to(scores))[mine]

    @cached_property
    def _group_sizes(self) -> Tensor:
        """How many candidates (n,) are of the anchor's group."""
        sizes = []
        for side in self.sides:
            size = torch.zeros(len(side.other), dtype=torch.int64, device=side.x.device)
            sizes.append(size.index_add_(0, side.other, torch.ones_like(side.other))[side.own])
        return torch.cat(sizes)

    @property
    def bound(self) -> float | Tensor:
        """1 / t, the largest score of unit rows, with the gradient of a temperature that learns."""
        return 1 / self.temperature * (1 if self.root is None else self.root**2)

    @property
    def negatives(self) -> int | Tensor:
        """How many an anchor has: an int, or (n,) where labels decide."""
        if not self.supervised:
            return self.others
        return len(self.sides[0].y) - self._group_sizes + self.extra

    @property
    def companions(self) -> Tensor:
        """How many positives (n,) each anchor has, its other view among them."""
        return self._group_sizes - (0 if self.among["cross_modal"] else 1)

    def log_sums(self, *powers: float, everyone: bool = False) -> list[Tensor]:
        r"""Log of the sum of :math:`e^{k s_{ij}}` over an anchor's negatives, (n,), for each k.

        everyone: over all candidates but the anchor itself instead, as SupCon's denominator has.
        """
        found, turned = [], None
        for k, side in enumerate(self.sides):
            if turned is not None and k == 1:  # the columns of the first side's rows
                found.append(turned)
                continue
            own, other = side.own, side.other
            if everyone:
                own, other = self.places(side), torch.arange(len(side.other), device=own.device)
            both = self.among["cross_modal"] and len(side.x) == len(side.y)
            symmetric = side.x is side.y
            rows, turned = self._stream(
                side.x, None if symmetric else side.y, own, None if symmetric else other, powers,
                columns=both,
            )  # fmt: skip
            found.append(rows)
        total = found[0] if len(found) == 1 else torch.cat(found, dim=1)  # (K, n)
        if self.queue is not None:
            x = torch.cat([side.x for side in self.sides])
            zero = x.new_zeros(len(x), dtype=torch.int64)
            one = zero.new_ones(len(self.queue))
            total = log_add(total, self._stream(x, self.queue, zero, one, powers)[0])
        if (s := self.synthetic) is not None:
            more = torch.stack([(k * s.to(total)).logsumexp(dim=1) for k in powers])
            total = log_add(total, more)
        return list(total)

    def _stream(
        self, x: Tensor, y: Tensor | None, own: Tensor, other: Tensor | None,
        powers: tuple[float, ...], columns: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        bound = 1 / self.temperature
        if not self.among["normalize"]:
            bound = math.inf
            if x.device.type == "cpu" and len(x):  # looking would wait for another device
                longest = [v.detach().norm(dim=1).max().item() for v in (x, x if y is None else y)]
                bound = longest[0] * longest[1] / self.temperature
        if x.is_cuda and self.among["engine"] != "tiled" and self.dtype.itemsize == 2:
            x, y = x.to(self.dtype), None if y is None else y.to(self.dtype)  # products of 16 bits
        return logsumexps(
            x, y, own, other, powers=powers, scale=1 / self.temperature, bound=bound,
            columns=columns, engine=self.among["engine"], precision=self.among["precision"],
        )  # fmt: skip

    def over_negatives(self, function: Callable[..., Tensor]) -> Tensor:
        """The open door: a statistic (n, ...) of every anchor's scores with all its candidates.

        ``function(s, excluded, i, j)`` gets scores s (r, c), where a candidate is no negative
        (r, c), and the indices i (r,) of the anchors and j (c,) of the candidates: in
        cat([z1, z2]), then the queue, then the synthetic ones. See
        :func:`hcl.rowstats.by_strips` for what it may do.
        """
        found, first = [], 0
        for side in self.sides:
            y, other, j = side.y, side.other, self.cols(side)
            if self.queue is not None:
                y = torch.cat([y, self.queue])
                other = torch.cat([other, other.new_full((len(self.queue),), -1)])
            values = [side.own, self.rows(side)]
            if self.synthetic is not None:
                values.append(self.synthetic[first : first + len(side.x)])
            first += len(side.x)
            rows = self.size * (2 if self.among["cross_modal"] else len(side.candidates))
            j = torch.cat([j, torch.arange(rows, rows + self.extra, device=j.device)])

            def strip(
                s: Tensor, rows: slice, cols: slice, own: Tensor, i: Tensor, *synthetic: Tensor,
                other: Tensor = other, j: Tensor = j,
            ) -> Tensor:  # fmt: skip
                excluded = own[:, None] == other
                if synthetic:
                    s = torch.cat([s, *synthetic], dim=1)
                    excluded = F.pad(excluded, (0, synthetic[0].shape[1]))
                return function(s, excluded, i, j)

            found.append(
                by_strips(
                    strip, side.x, y, *values, scale=1 / self.temperature,
                    precision=self.among["precision"],
                )
            )  # fmt: skip
        return torch.cat(found)

    def over_positives(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """A statistic (n, ...) of every anchor's scores with the candidates of its group.

        ``function(s, positive, *values)`` gets scores s (r, c), which of them are of positives
        (r, c), and the rows (r, ...) of ``values`` (n, ...).
        """
        found, first = [], 0
        for side in self.sides:
            part = [v[first : first + len(side.x)] for v in values]
            first += len(side.x)
            # their columns, which are next to each other; on a GPU this waits for the device
            low = torch.searchsorted(side.other, side.own).tolist()
            high = torch.searchsorted(side.other, side.own, right=True).tolist()

            def strip(
                s: Tensor, rows: slice, cols: slice, place: Tensor, *values: Tensor,
                side: Side = side,
            ) -> Tensor:  # fmt: skip
                j = torch.arange(cols.start, cols.stop, device=s.device)
                positive = side.own[rows, None] == side.other[cols]
                return function(s, positive & (place[:, None] != j), *values)

            found.append(
                by_strips(
                    strip, side.x, side.y, self.places(side), *part, scale=1 / self.temperature,
                    strips=_spans(low, high), precision=self.among["precision"],
                )
            )  # fmt: skip
        return torch.cat(found)

    def positive_mean(self) -> Tensor:
        """Mean score (n,) of the anchor's positives, by the sum of each class; 0 without any."""
        found = []
        for side in self.sides:
            sums = torch.zeros_like(side.y).index_add(0, side.other, side.y)  # (m, d), class sums
            found.append((side.x * sums[side.own]).sum(dim=1, dtype=wide(side.x)))
            if not self.among["cross_modal"]:
                found[-1] = found[-1] - (side.x * side.x).sum(dim=1, dtype=wide(side.x))
        return torch.cat(found) / self.temperature / self.companions.clamp(min=1)

    def mean(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean of the anchors' values (n,), over all processes that were gathered."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if weight is None and not self.among["gather"]:
            return values.mean().to(dtype)
        weight = torch.ones_like(values) if weight is None else weight.to(values)
        local, total = (values * weight).sum(), weight.sum()
        if not self.among["gather"]:
            return (local / total.clamp(min=1)).to(dtype)
        local = local / distributed.total(total).clamp(min=1)
        value = distributed.total(local.detach())
        if self.among["gather"] == "averaged":
            local = local * distributed.size()
        return (value + (local - local.detach())).to(dtype)


def _spans(low: list[int], high: list[int]) -> list[tuple[slice, slice]]:
    """Rows in turn, as many as fit into a strip with the columns low to high that they need."""
    spans, top = [], 0
    while top < len(low):
        end = min(top + 256, len(low))
        while end - top > LEAST and (end - top) * (high[end - 1] - low[top]) > STRIP["cpu"]:
            end = top + (end - top) // 2
        spans.append((slice(top, end), slice(low[top], high[end - 1])))
        top = end
    return spans


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b); torch's logaddexp has no second derivative at -inf."""
    return torch.stack([a, b]).logsumexp(dim=0)


def _each(v: Tensor, times: int) -> Tensor:
    """Every element several times; repeat_interleave may wait for the device."""
    return v[:, None].expand(-1, times).flatten().contiguous()


def _groups(z: Tensor, labels: Tensor | None, unlabelled: Unlabelled) -> tuple[Tensor, Tensor]:
    """An order of the images by label, and the group of each in that order, from 0."""
    place = torch.arange(len(z), device=z.device)
    if labels is None:
        return place, place
    labels = labels.long()
    labels = torch.where(labels < 0, -1 - place, labels)  # each its own
    order = labels.argsort(stable=True)
    if unlabelled == "ignore":
        order = order[labels[order] >= 0]
    labels = labels[order]
    new = torch.ones_like(labels, dtype=torch.bool)
    new[1:] = labels[1:] != labels[:-1]
    return order, new.cumsum(0) - 1
