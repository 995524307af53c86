"""Random views of graphs, drawn for all graphs of a batch at once.

Four augmentations: leave nodes out, replace edges, blank the features of nodes, keep a connected
part. Each takes one strength per graph, so a mixture of the four is all of them in turn with
strength 0 where a graph was dealt another. Every graph keeps at least one node. PyTorch Geometric
has the first three for one graph and the global random state; random edges of a batch would there
join different graphs.

Source: You et al. 2020 (GraphCL), as we recall it: the four kinds, and a strength of 0.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hcl.graphs.batch import GraphBatch

Augmentation = Callable[[GraphBatch, Tensor, torch.Generator], GraphBatch]


def augment(
    graphs: GraphBatch, kind: str, strength: float, generator: torch.Generator
) -> GraphBatch:
    """One random view of every graph.

    kind: "nodes", "edges", "features", "subgraph"; "mixed" deals each graph one of them, "none"
    changes nothing. strength: the share, in [0, 1], of nodes left out, edges replaced, or nodes
    blanked.

    Raises: ValueError: an unknown kind or a strength out of [0, 1].

    >>> one = GraphBatch(torch.ones(4, 1), torch.zeros(2, 0).long(), torch.zeros(4).long(), 1)
    >>> augment(one, "features", 1.0, torch.Generator()).x.sum()
    tensor(0.)
    """
    check(kind, strength)
    device, n = graphs.x.device, graphs.num_graphs
    if kind == "mixed":
        dealt = torch.randint(len(KINDS), (n,), generator=generator, device=device)
        for place, change in enumerate(KINDS.values()):
            graphs = change(graphs, strength * (dealt == place), generator)
    elif kind != "none":
        graphs = KINDS[kind](graphs, torch.full((n,), strength, device=device), generator)
    return graphs


def check(kind: str, strength: float) -> None:
    """Refuse what :func:`augment` would."""
    known = (*KINDS, "mixed", "none")
    if kind not in known:
        raise ValueError(f"augmentation={kind!r}: choose one of {', '.join(known)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: a share in [0, 1] (0.2 is common)")


def without_nodes(graphs: GraphBatch, share: Tensor, generator: torch.Generator) -> GraphBatch:
    """Leave out that share (G,) of each graph's nodes, at random, and their edges."""
    return _first(graphs, _uniform(len(graphs.x), generator), share)


def subgraph(graphs: GraphBatch, share: Tensor, generator: torch.Generator) -> GraphBatch:
    """Leave out that share (G,) of nodes, those farthest from a random one of the graph.

    What is kept is connected if the graph is. Ties are broken at random.
    """
    draw = _uniform(len(graphs.x), generator)
    return _first(graphs, _hops(graphs, _places(graphs, draw) == 0) + draw, share)


def other_edges(graphs: GraphBatch, share: Tensor, generator: torch.Generator) -> GraphBatch:
    """Replace that share (G,) of each graph's edges by random pairs of its nodes.

    A pair that is joined already is not joined twice, and one of a node with itself joins nothing,
    so a dense graph loses some.
    """
    first, second = once = graphs.edge_index[:, graphs.edge_index[0] < graphs.edge_index[1]]
    graph = graphs.batch[first]
    replaced = _uniform(len(first), generator) < share[graph]
    of = graph[replaced]
    ends = torch.rand(2, len(of), generator=generator, device=first.device) * graphs.nodes[of]
    new = graphs.first_node[of] + torch.minimum(ends.long(), graphs.nodes[of] - 1)
    once = torch.cat([once[:, ~replaced], new.sort(dim=0).values], dim=1)
    first, second = once[:, once[0] < once[1]]
    pairs = torch.cat([first * len(graphs.x) + second, second * len(graphs.x) + first]).unique()
    edges = torch.stack([pairs // len(graphs.x), pairs % len(graphs.x)])
    return GraphBatch(graphs.x, edges, graphs.batch, graphs.num_graphs)


def without_features(graphs: GraphBatch, share: Tensor, generator: torch.Generator) -> GraphBatch:
    """Set the features of each node to zero, with that probability (G,)."""
    kept = _uniform(len(graphs.x), generator) >= share[graphs.batch]
    x = graphs.x * kept[:, None]
    return GraphBatch(x, graphs.edge_index, graphs.batch, graphs.num_graphs)


KINDS: dict[str, Augmentation] = {
    "nodes": without_nodes,
    "edges": other_edges,
    "features": without_features,
    "subgraph": subgraph,
}


def _first(graphs: GraphBatch, order: Tensor, share: Tensor) -> GraphBatch:
    """Keep the nodes of each graph that come first by ``order`` (V,), and the edges among them."""
    left = (share * graphs.nodes).floor().long()
    count = torch.minimum((graphs.nodes - left).clamp(min=1), graphs.nodes)
    kept = _places(graphs, order) < count[graphs.batch]
    number = kept.cumsum(0) - 1
    edges = graphs.edge_index[:, kept[graphs.edge_index].all(dim=0)]
    return GraphBatch(graphs.x[kept], number[edges], graphs.batch[kept], graphs.num_graphs)


def _places(graphs: GraphBatch, order: Tensor) -> Tensor:
    """The place (V,) of each node among those of its graph, 0 for the least ``order`` (V,)."""
    by_order = order.argsort()
    by_graph = by_order[graphs.batch[by_order].argsort(stable=True)]
    places = torch.empty_like(by_graph)
    places[by_graph] = torch.arange(len(by_graph), device=order.device)
    return places - graphs.first_node[graphs.batch]


def _hops(graphs: GraphBatch, centre: Tensor) -> Tensor:
    """Edges from each node (V,) to the centre of its graph; V where there is no way."""
    source, target = graphs.edge_index
    far = len(centre)
    hops = torch.where(centre, 0, far)
    while True:
        nearer = hops.scatter_reduce(0, target, hops[source] + 1, "amin")
        if torch.equal(nearer, hops):
            return hops
        hops = nearer


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device)
