"""What a training step asks of the model: views or mates, a batch or a queue, labels or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcl import synthetic
from hcl.graphs.gin import GIN
from hcl.graphs.infograph import Heads, LocalGlobal
from hcl.methods import CROSS_ENTROPY, INFOGRAPH, NEIGHBOURS, loss_of
from hcl.moco import MomentumQueue, queue_loss
from hcl.run import Run, beta_in_epoch
from hcl.sentences import Sentences
from hcl.units import placed

if TYPE_CHECKING:
    from hcl.train import Data, Model


MIXING = 2**40  # added to the seed of an epoch
HUGE = 1e15  # an entry of an embedding that no training comes to which has not diverged


class Objective:
    """The loss of a batch of rows as a Run says: views, mates, queue, one pass or two."""

    def __init__(self, run: Run, model: Model, data: Data, *, compile: bool = False):
        self.run, self.model, self.data = run, model, data
        device = data.x_train.device
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self.forward = torch.compile(model, mode=mode) if compile else model
        self.loss: Any = loss_of(run)
        self.mates = Mates(data.y_train) if run.positives == "class" else None
        self.keys = None
        if run.queue:
            keys = MomentumQueue(model, size=run.queue, dim=run.out_dim, momentum=run.momentum)
            self.keys = keys.to(device)

    def parts(self) -> list[nn.Module]:
        """What a checkpoint must hold beside the model."""
        return [self.keys] if self.keys else []

    def begin(self, epoch: int) -> None:
        """Set what changes from epoch to epoch."""
        self.epoch, self.loss.beta = epoch, beta_in_epoch(self.run, epoch)
        # of its own, so that a Run with mixtures has the views of the same Run without
        self.mixing = torch.Generator(self.data.x_train.device)
        self.mixing.manual_seed(self.run.seed * 1_000_003 + epoch + MIXING)
        self.view_data = self.data
        if self.run.sides == "growing":
            self.view_data = self.data.grown((epoch - 1) / self.run.epochs)  # type: ignore[attr-defined]

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar loss of the samples ``rows`` (B,) of the training data."""
        x = self.data.x_train
        if self.run.method == INFOGRAPH:
            nodes, graphs, which = self._nodes_and_graphs(x[rows])
            with self._watching(nodes, graphs):
                found: Tensor = self.loss(nodes, graphs, which)
                return found
        if self.run.method in NEIGHBOURS:
            return self._neighbours(rows)
        if self.mates is None:
            v1, v2 = self.view_data.views(x[rows], generator)
        else:
            v1, v2 = self.view_data.views(x[rows], generator, x[self.mates(rows, generator)])
        if self.run.cross_entropy:
            return self._with_labels(v1, v2, rows)
        with torch.autocast(x.device.type, torch.bfloat16, self.run.precision == "bfloat16"):
            if self.keys:
                z1, z2 = self.forward(v1), self.keys.keys(v2, generator)
            elif self.run.separate_views:
                z1, z2 = self.forward(v1), self.forward(v2)
            else:
                z1, z2 = self.forward(_joined(v1, v2)).chunk(2)  # (B, out_dim) each
        if self.keys:
            return self._queued(z1, z2)
        return self._contrast(z1, z2, rows)

    def _contrast(self, z1: Tensor, z2: Tensor, rows: Tensor) -> Tensor:
        """The method's loss of two views, and of mixtures where the Run has any."""
        if self.run.normalize != "sphere":
            z1, z2 = (placed(z, self.run.normalize) for z in (z1, z2))
        with self._watching(z1, z2):
            more = self._synthetic(z1, z2)
            found: Tensor = self.loss(z1, z2, self.data.y_train[rows], **more)
            return found

    @contextmanager
    def _watching(self, *embeddings: Tensor) -> Iterator[None]:
        """Tell what a loss refuses of embeddings out of bounds from what it refuses of a batch."""
        try:
            yield
        except ValueError as error:
            if all(bool((z.abs() < HUGE).all()) for z in embeddings):
                raise
            raise FloatingPointError(
                f"training diverged in epoch {self.epoch} of {self.run}: {error}"
            ) from error

    def _synthetic(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Further negatives, where the Run has any in this epoch."""
        args = dict(self.run.synthetic)
        if not args or self.epoch <= args.pop("after"):
            return {}
        return {"synthetic": synthetic.mixtures(z1, z2, generator=self.mixing, **args)}

    def _with_labels(self, v1: Any, v2: Any, rows: Tensor) -> Tensor:
        """Cross-entropy of both views, and the method's own loss for the rest."""
        labels, share = self.data.y_train[rows], self.run.cross_entropy
        device = labels.device.type
        with torch.autocast(device, torch.bfloat16, self.run.precision == "bfloat16"):
            if self.run.separate_views:
                h = torch.cat([self.model.encoder(v) for v in (v1, v2)])
            else:
                h = self.model.encoder(_joined(v1, v2))  # (2B, width)
            assert self.model.classifier is not None
            logits = self.model.classifier(h)
            z1, z2 = self.model.head(h).chunk(2)
        ce = F.cross_entropy(logits.float(), labels.repeat(2))
        if self.run.method == CROSS_ENTROPY:
            return ce
        return (1 - share) * self._contrast(z1, z2, rows) + share * ce

    def _neighbours(self, rows: Tensor) -> Tensor:
        """Consecutive sentences, compared by two encoders or by one."""
        x, run = self.data.x_train, self.run
        with torch.autocast(x.device.type, torch.bfloat16, run.precision == "bfloat16"):
            z = self.forward(self.data.inputs(x[rows]))
        f, g = halves(self.model, z.to(torch.promote_types(z.dtype, torch.float32)), run.normalize)
        with self._watching(f, g):
            found: Tensor = self.loss(f, g, self.data.y_train[rows])
            return found

    def _nodes_and_graphs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What InfoGraph compares, and the graph of each node."""
        batch: Any = self.data.inputs(x)
        encoder, head = cast(GIN, self.model.encoder), cast(Heads, self.model.head)
        with torch.autocast(x.device.type, torch.bfloat16, self.run.precision == "bfloat16"):
            nodes, graphs = encoder.both(batch)
            u, v = head.local(nodes), head(graphs)
        wide = torch.promote_types(u.dtype, torch.float32)
        return u.to(wide), v.to(wide), batch.batch

    def floor_share(self, x: Tensor) -> float:
        """Of the graphs x (B,), see :func:`hcl.graphs.infograph.floor_share`."""
        return cast(LocalGlobal, self.loss).floor_share(*self._nodes_and_graphs(x))

    def batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of the batches of an epoch, as many as :func:`steps` says.

        InfoGraph's last batch may be smaller, and the released graph code has one order for all
        epochs. Losses of neighbours take blocks of consecutive sentences.
        """
        n = len(self.data.x_train)
        if self.run.method in NEIGHBOURS:
            yield from cast(Sentences, self.data).blocks(self.run.batch, generator)
            return
        if self.run.method != INFOGRAPH:
            yield from batches(n, self.run.batch, generator)
            return
        if self.run.protocol == "released":
            generator = torch.Generator(generator.device).manual_seed(self.run.seed)
        order = torch.randperm(n, generator=generator, device=generator.device)
        yield from order.split(self.run.batch)[: steps(self.run, n)]

    def _queued(self, query: Tensor, key: Tensor) -> Tensor:
        assert self.keys is not None
        args = {"temperature": self.run.temperature, "tau_plus": self.run.tau_plus}
        with self._watching(query, key):
            loss = queue_loss(query, key, self.keys.queue.clone(), beta=self.loss.beta, **args)
        self.keys.push(key)
        return loss

    def after_step(self) -> None:
        """Let the queue's encoder follow."""
        if self.keys:
            self.keys.follow(self.model)


def steps(run: Run, n: int) -> int:
    """Batches of an epoch of n samples: whole ones, and InfoGraph's last one of two or more."""
    rest = run.method == INFOGRAPH and n % run.batch > 1
    return n // run.batch + rest


def halves(model: Model, z: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """What a loss of neighbours compares of an output z (B, d): f and g, or z with itself."""
    f, g = z.chunk(2, dim=1) if model.encoder.pair else (z, z)
    return placed(f, normalize), placed(g, normalize)


def _joined(v1: Any, v2: Any) -> Any:
    """Two batches of views as one: tensors, or graphs."""
    return torch.cat([v1, v2]) if isinstance(v1, Tensor) else v1.joined(v2)


class Mates:
    """For each row a random row of the same label, itself included.

    labels: (n,) integers. Source: Robinson et al. 2021, the released code's true positives.

    >>> Mates(torch.tensor([5, 7, 5]))(torch.tensor([1]), torch.Generator())
    tensor([1])
    """

    def __init__(self, labels: Tensor):
        _, group, self.count = labels.unique(return_inverse=True, return_counts=True)
        self.group, self.order = group, group.argsort(stable=True)
        self.start = self.count.cumsum(0) - self.count

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows (B,) of the mates of ``rows`` (B,)."""
        group = self.group[rows]
        share = torch.rand(len(rows), generator=generator, device=generator.device)
        place = (share * self.count[group]).long().clamp(max=self.count[group] - 1)
        return self.order[self.start[group] + place]


def batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices of an epoch's shuffled batches; the last incomplete one is dropped."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    yield from order[: n // batch * batch].split(batch)
