"""A set of graphs as the trainer wants it: a row of x is the number of a graph.

All graphs of the set lie on the device as one; `inputs` and `views` pick those of a batch out of
it. Without a held-out part every graph is trained on, and the probe cross-validates on the same
graphs, as the papers do. Losses that see labels need one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hcl.graphs import families, sets, views
from hcl.graphs.batch import GraphBatch
from hcl.graphs.gin import GIN, Raw
from hcl.graphs.sets import GraphSet
from hcl.graphs.sets import download as download

ENCODERS = ("gin", "raw")


@dataclass(eq=False, kw_only=True)
class Graphs:
    """Graphs and what the trainer may do with them (implements `hcl.train.Data`).

    x_*: (n,) int64, numbers of graphs; y_*: (n,) int64.
    """

    name: str
    classes: tuple[str, ...]
    graphs: GraphBatch
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    augmentation: str = "mixed"
    strength: float = 0.2

    @property
    def x_probe(self) -> Tensor:
        return self.x_train

    @property
    def y_probe(self) -> Tensor:
        return self.y_train

    @property
    def cross_validated(self) -> bool:
        """Whether no graphs were held out, so that the probe has to split them itself."""
        return self.x_test is self.x_train

    def inputs(self, x: Tensor) -> GraphBatch:
        """The graphs x (B,) as they are."""
        return self.graphs.take(x)

    def views(
        self, x: Tensor, generator: torch.Generator, mate: Tensor | None = None
    ) -> tuple[GraphBatch, GraphBatch]:
        """Two random views of graphs x (B,), or one of x and one of mate."""
        one = self.graphs.take(x)
        two = one if mate is None else self.graphs.take(mate)
        first, second = (
            views.augment(g, self.augmentation, self.strength, generator) for g in (one, two)
        )
        return first, second

    def encoder(self, name: str, *, layers: int = 3, hidden: int = 32) -> nn.Module:
        """A new encoder of these graphs: "gin", or "raw", the sums of their nodes' features.

        Raises: ValueError for another name, or no layers.
        """
        if name == "gin":
            return GIN(self.graphs.x.shape[1], layers=layers, hidden=hidden)
        if name == "raw":
            return Raw(self.graphs.x.shape[1])
        raise ValueError(f"encoder={name!r}: graphs have {', '.join(ENCODERS)}")


def load(
    name: str,
    *,
    root: str | Path | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    features: str = "released",
    held_out: float = 0.0,
    augmentation: str = "mixed",
    strength: float = 0.2,
) -> Graphs:
    """A TU data set, read with PyTorch Geometric.

    features: see :func:`hcl.graphs.sets.read_tu`. held_out: the share of graphs, in the classes'
    proportions and drawn with ``seed``, that only the probe sees. augmentation, strength: of the
    views, see :func:`hcl.graphs.views.augment`.

    Raises: ValueError: an unknown name, or an option out of range; FileNotFoundError: the set is
    not there, and the message says how to get it; DamagedDataError: it is incomplete.
    """
    views.check(augmentation, strength)
    found = sets.read_tu(name, root=root, features=features)
    return of_set(
        name, found, device=device, seed=seed, held_out=held_out, augmentation=augmentation,
        strength=strength,
    )  # fmt: skip


def load_families(
    name: str = "graphs",
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    n_graphs: int = 300,
    least: int = 20,
    most: int = 40,
    noise: float = 0.1,
    held_out: float = 0.0,
    augmentation: str = "mixed",
    strength: float = 0.2,
) -> Graphs:
    """Synthetic graphs: six families of random graphs, see :mod:`hcl.graphs.families`.

    least, most: nodes of a graph. The features of a node are its degree, one-hot. Graphs depend on
    ``seed`` alone. The other options are those of :func:`load`.

    >>> data = load_families(n_graphs=60)
    >>> len(data.x_train), data.classes[:3]
    (60, ('uniform', 'regular', 'preferential'))
    """
    views.check(augmentation, strength)
    sizes, edges, labels = families.draw(n_graphs, nodes=(least, most), noise=noise, seed=seed)
    count = torch.tensor(sizes)
    first = np.repeat(np.cumsum(sizes) - sizes, [e.shape[1] for e in edges])
    joined = GraphBatch(
        torch.zeros(sum(sizes), 0),
        torch.from_numpy(np.concatenate(edges, axis=1) + first),
        torch.arange(n_graphs).repeat_interleave(count),
        n_graphs,
    )
    joined.x = sets.degree_features(joined)
    return of_set(
        name, GraphSet(joined, torch.from_numpy(labels)), classes=tuple(families.FAMILIES),
        device=device, seed=seed, held_out=held_out, augmentation=augmentation, strength=strength,
    )  # fmt: skip


def of_set(
    name: str, found: GraphSet, *, classes: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu", seed: int = 0, held_out: float = 0.0,
    augmentation: str = "mixed", strength: float = 0.2,
) -> Graphs:  # fmt: skip
    """What the trainer wants of any graphs with labels, those of :func:`sets.of_pyg` for instance.

    Raises: ValueError: options out of range, or a class with too few graphs to hold any out.
    """
    views.check(augmentation, strength)
    labels = found.labels.to(device)
    train = torch.arange(len(labels), device=device)
    test = train
    if held_out:
        kept, left = _split(found.labels, held_out, seed)
        train, test = kept.to(device), left.to(device)
    y_train = labels[train]
    return Graphs(
        name=name,
        classes=classes or tuple(str(c) for c in range(int(labels.max()) + 1)),
        graphs=found.graphs.to(device),
        x_train=train,
        y_train=y_train,
        x_test=test,
        y_test=y_train if test is train else labels[test],
        augmentation=augmentation,
        strength=strength,
    )


def _split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of graphs kept and held out, ascending."""
    from sklearn.model_selection import train_test_split

    if not 0 <= share < 1:
        raise ValueError(f"held_out={share}: a share of the graphs, in [0, 1)")
    try:
        parts = train_test_split(
            np.arange(len(labels)), test_size=share, stratify=labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise ValueError(f"held_out={share}: {error}") from error
    kept, left = (torch.from_numpy(np.sort(part)) for part in parts)
    return kept, left
