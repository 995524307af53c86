"""The graph isomorphism network of InfoGraph, with embeddings of nodes and of graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hcl.graphs.pyg import pyg

if TYPE_CHECKING:
    from hcl.graphs.batch import GraphBatch


class GIN(nn.Module):
    """Layers of GINConv (Linear–ReLU–Linear, no epsilon) – ReLU – BatchNorm.

    A node's embedding is its output of all layers, side by side: (V, layers * hidden). A graph's
    is the sum of its nodes'. Biases begin at zero, weights as Glorot and Bengio have them.

    Source: Sun et al. 2020 (InfoGraph) and Robinson et al. 2021, the released graph code: three
    layers of 32.
    """

    def __init__(self, in_dim: int, *, layers: int = 3, hidden: int = 32):
        super().__init__()
        for name, value in (("layers", layers), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 would do")
        self.out_dim = layers * hidden
        widths = [in_dim] + [hidden] * (layers - 1)
        self.convs = nn.ModuleList([_convolution(width, hidden) for width in widths])
        self.norms = nn.ModuleList([nn.BatchNorm1d(hidden) for _ in widths])
        glorot_(self)

    def both(self, graphs: GraphBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of the nodes, (V, out_dim), and of the graphs, (G, out_dim).

        graphs: a GraphBatch, or a Batch of PyTorch Geometric.
        """
        h, found = graphs.x, []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = norm(conv(h, graphs.edge_index).relu())
            found.append(h)
        nodes = torch.cat(found, dim=1)
        return nodes, sums(nodes, graphs)

    def forward(self, graphs: GraphBatch) -> Tensor:
        return self.both(graphs)[1]


class Raw(nn.Module):
    """The sum of a graph's node features, without parameters: how many nodes of each label."""

    def __init__(self, in_dim: int):
        super().__init__()
        self.out_dim = in_dim

    def forward(self, graphs: GraphBatch) -> Tensor:
        return sums(graphs.x, graphs)


def sums(values: Tensor, graphs: GraphBatch) -> Tensor:
    """Sum of the nodes' values (V, d) in each graph, (G, d); 0 where there are none."""
    total = values.new_zeros(graphs.num_graphs, values.shape[1])
    return total.index_add(0, graphs.batch, values)


def glorot_(net: nn.Module) -> None:
    """Start every linear layer as the released code does: Glorot-uniform weights, no bias."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def _convolution(in_dim: int, out_dim: int) -> Any:
    net = nn.Sequential(nn.Linear(in_dim, out_dim), nn.ReLU(), nn.Linear(out_dim, out_dim))
    return pyg("nn").GINConv(net)
