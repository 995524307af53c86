"""Many graphs as one: nodes in a row, and picking graphs out of it without a loop over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(eq=False)
class GraphBatch:
    """Disjoint graphs side by side, with the names that PyTorch Geometric's Batch has for them.

    x: (V, F) floating point; edge_index: (2, E) int64, an undirected edge once in each direction,
    sorted by graph; batch: (V,) int64, the graph of each node, ascending; num_graphs: G, so that
    graphs without nodes at the end count.
    """

    x: Tensor
    edge_index: Tensor
    batch: Tensor
    num_graphs: int

    @cached_property
    def nodes(self) -> Tensor:
        """How many nodes (G,) each graph has."""
        return torch.bincount(self.batch, minlength=self.num_graphs)

    @cached_property
    def edges(self) -> Tensor:
        """How many columns (G,) of edge_index each graph has."""
        return torch.bincount(self.batch[self.edge_index[0]], minlength=self.num_graphs)

    @cached_property
    def first_node(self) -> Tensor:
        """Number (G,) of the first node of each graph."""
        return self.nodes.cumsum(0) - self.nodes

    @cached_property
    def first_edge(self) -> Tensor:
        """Column (G,) of the first edge of each graph."""
        return self.edges.cumsum(0) - self.edges

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same on a device."""
        x, edge_index, batch = self.x.to(device), self.edge_index.to(device), self.batch.to(device)
        return GraphBatch(x, edge_index, batch, self.num_graphs)

    def take(self, rows: Tensor) -> GraphBatch:
        """The graphs ``rows`` (G',) int64 in that order; a graph may be taken twice.

        >>> x, edges = torch.arange(3.0)[:, None], torch.tensor([[1, 2], [2, 1]])
        >>> two = GraphBatch(x, edges, torch.tensor([0, 1, 1]), 2)  # a point, and an edge
        >>> two.take(torch.tensor([1, 0])).edge_index
        tensor([[0, 1],
                [1, 0]])
        """
        nodes, edges = self.nodes[rows], self.edges[rows]
        kept = spans(self.first_node[rows], nodes)
        shift = nodes.cumsum(0) - nodes - self.first_node[rows]
        return GraphBatch(
            self.x[kept],
            self.edge_index[:, spans(self.first_edge[rows], edges)]
            + shift.repeat_interleave(edges),
            torch.arange(len(rows), device=rows.device).repeat_interleave(nodes),
            len(rows),
        )

    def split(self, size: int) -> list[GraphBatch]:
        """So many graphs after the other, as torch splits the rows of a tensor."""
        every = torch.arange(self.num_graphs, device=self.batch.device)
        return [self.take(rows) for rows in every.split(size)]

    def joined(self, other: GraphBatch) -> GraphBatch:
        """These graphs, then the others."""
        return GraphBatch(
            torch.cat([self.x, other.x]),
            torch.cat([self.edge_index, other.edge_index + len(self.x)], dim=1),
            torch.cat([self.batch, other.batch + self.num_graphs]),
            self.num_graphs + other.num_graphs,
        )


def spans(first: Tensor, length: Tensor) -> Tensor:
    """The numbers first[k], first[k] + 1, … , length[k] of them, for one k after the other.

    >>> spans(torch.tensor([5, 0]), torch.tensor([2, 3]))
    tensor([5, 6, 0, 1, 2])
    """
    start = length.cumsum(0) - length
    shift = (first - start).repeat_interleave(length)
    return shift + torch.arange(len(shift), device=first.device)
