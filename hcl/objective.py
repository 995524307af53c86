"""What a training step asks of the model: views or mates, one pass or two, a batch or a queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcl import losses
from hcl.graphs.gin import GIN
from hcl.graphs.infograph import Heads, LocalGlobal
from hcl.moco import MomentumQueue, queue_loss
from hcl.runs import INFOGRAPH, Run, beta_in_epoch

if TYPE_CHECKING:
    from hcl.train import Data, Model


class Objective:
    """The loss of a batch of rows as a Run says: views, mates, queue, one pass or two."""

    def __init__(self, run: Run, model: Model, data: Data, *, compile: bool = False):
        self.run, self.model, self.data = run, model, data
        device = data.x_train.device
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self.forward = torch.compile(model, mode=mode) if compile else model
        self.loss = _loss(run)
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
        self.view_data = self.data
        if self.run.sides == "growing":
            self.view_data = self.data.grown((epoch - 1) / self.run.epochs)  # type: ignore[attr-defined]

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar loss of the samples ``rows`` (B,) of the training data."""
        x = self.data.x_train
        if self.run.method == INFOGRAPH:
            return self._local_global(x[rows])
        if self.mates is None:
            v1, v2 = self.view_data.views(x[rows], generator)
        else:
            v1, v2 = self.view_data.views(x[rows], generator, x[self.mates(rows, generator)])
        with torch.autocast(x.device.type, torch.bfloat16, self.run.precision == "bfloat16"):
            if self.keys:
                z1, z2 = self.forward(v1), self.keys.keys(v2, generator)
            elif self.run.separate_views:
                z1, z2 = self.forward(v1), self.forward(v2)
            else:
                z1, z2 = self.forward(_joined(v1, v2)).chunk(2)  # (B, out_dim) each
        try:
            if self.keys:
                return self._queued(z1, z2)
            if self.run.normalize != "sphere":
                z1, z2 = (placed(z, self.run.normalize) for z in (z1, z2))
            found: Tensor = self.loss(z1, z2, self.data.y_train[rows])
            return found
        except ValueError as error:  # what the losses say of embeddings that are not finite
            raise FloatingPointError(
                f"training diverged in epoch {self.epoch} of {self.run}: {error}"
            ) from error

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

    def _local_global(self, x: Tensor) -> Tensor:
        try:
            found: Tensor = self.loss(*self._nodes_and_graphs(x))
            return found
        except ValueError as error:
            raise FloatingPointError(
                f"training diverged in epoch {self.epoch} of {self.run}: {error}"
            ) from error

    def batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of the batches of an epoch, as many as :func:`steps` says.

        InfoGraph's last batch may be smaller, and the released graph code has one order for all
        epochs.
        """
        n = len(self.data.x_train)
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


def _loss(run: Run) -> losses.ContrastiveLoss | LocalGlobal:
    if run.method == INFOGRAPH:
        args = {name: getattr(run, name) for name in ("beta", "tau_plus", "detach_weights", "sign")}
        return LocalGlobal(released=run.protocol == "released", **args)
    on_sphere = run.normalize == "sphere"  # where the loss itself divides
    return losses.ContrastiveLoss(run.method, normalize=on_sphere, **run.loss_args())


def _joined(v1: Any, v2: Any) -> Any:
    """Two batches of views as one: tensors, or graphs."""
    return torch.cat([v1, v2]) if isinstance(v1, Tensor) else v1.joined(v2)


def placed(z: Tensor, normalize: str) -> Tensor:
    """Rows (n, d) as a Run's loss compares them: on the sphere, in the ball, or as they are.

    Source: Jiang et al. 2023 (neural collapse), the released code divides lengths above 1 alone.

    >>> placed(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), "ball")
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    if normalize == "none":
        return z
    if normalize == "sphere":
        return F.normalize(z, dim=1)
    return z / z.norm(dim=1, keepdim=True).clamp(min=1.0)


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
