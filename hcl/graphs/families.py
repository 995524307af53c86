"""Random graphs of known classes, drawn here: synthetic data that needs no download.

Six families of the textbooks, in one range of sizes and with two edges for each node, so that
counting nodes and edges says nothing about the class. Some edges are replaced by random ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Edges = np.ndarray  # (2, E) int64, each undirected edge once in each direction
DEGREE = 4  # on average, exactly


def _geometric(nx: Any, n: int, seed: int) -> Any:
    """The 2n pairs of random points in the square that are nearest."""
    points = np.random.default_rng(seed).random((n, 2))
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    first, second = np.triu_indices(n, 1)
    near = np.argsort(apart[first, second])[: n * DEGREE // 2]
    graph = nx.empty_graph(n)
    graph.add_edges_from(zip(first[near].tolist(), second[near].tolist(), strict=True))
    return graph


def _blocks(nx: Any, n: int, seed: int) -> Any:
    """Two communities, nine of ten edges within one."""
    sizes = [n // 2, n - n // 2]
    within, across = min(1.0, 0.9 * DEGREE / (n / 2 - 1)), 0.1 * DEGREE / (n / 2)
    return nx.stochastic_block_model(sizes, [[within, across], [across, within]], seed=seed)


FAMILIES: dict[str, Callable[[Any, int, int], Any]] = {
    "uniform": lambda nx, n, seed: nx.gnm_random_graph(n, n * DEGREE // 2, seed=seed),
    "regular": lambda nx, n, seed: nx.random_regular_graph(DEGREE, n, seed=seed),
    "preferential": lambda nx, n, seed: nx.barabasi_albert_graph(n, DEGREE // 2, seed=seed),
    "small world": lambda nx, n, seed: nx.watts_strogatz_graph(n, DEGREE, 0.1, seed=seed),
    "blocks": _blocks,
    "geometric": _geometric,
}


def draw(
    n_graphs: int, *, nodes: tuple[int, int] = (20, 40), noise: float = 0.1, seed: int = 0
) -> tuple[list[int], list[Edges], np.ndarray]:
    """Sizes, edges and labels of so many graphs, the families in turn, in a random order.

    nodes: least and largest size, evenly drawn. noise: share of edges replaced by random ones.

    Source: networkx's generators; the choice of them is ours.
    Raises: ValueError for fewer graphs than families, sizes below 8, or a share out of [0, 1].

    >>> sizes, edges, labels = draw(12)
    >>> len(edges), sorted(labels.tolist())
    (12, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    """
    import networkx as nx

    _check(n_graphs, nodes, noise)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n_graphs) % len(FAMILIES))
    sizes = rng.integers(nodes[0], nodes[1] + 1, n_graphs).tolist()
    makers = list(FAMILIES.values())
    edges = []
    for size, label in zip(sizes, labels, strict=True):
        graph = makers[label](nx, size, int(rng.integers(2**31)))
        once = np.array(graph.edges(), dtype=np.int64).reshape(-1, 2).T
        once = _replaced(once, size, noise, rng)
        edges.append(np.concatenate([once, once[::-1]], axis=1))
    return sizes, edges, labels


def _replaced(once: Edges, n: int, noise: float, rng: np.random.Generator) -> Edges:
    """Some edges, and those that are missing or too many, replaced by random pairs of nodes."""
    wanted = n * DEGREE // 2
    once = once[:, rng.permutation(once.shape[1])][:, :wanted]
    first, second = np.triu_indices(n, 1)
    joined = np.zeros((n, n), dtype=bool)
    joined[once[0], once[1]] = joined[once[1], once[0]] = True
    once = once[:, rng.random(once.shape[1]) >= noise]
    free = np.flatnonzero(~joined[first, second])
    new = rng.choice(free, size=min(len(free), wanted - once.shape[1]), replace=False)
    return np.concatenate([once, np.stack([first[new], second[new]])], axis=1)


def _check(n_graphs: int, nodes: tuple[int, int], noise: float) -> None:
    if n_graphs < len(FAMILIES):
        raise ValueError(f"n_graphs={n_graphs}: at least {len(FAMILIES)}, one of each family")
    if not 8 <= nodes[0] <= nodes[1]:
        raise ValueError(f"nodes={nodes}: give a least and a largest size, from 8")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise={noise}: a share of the edges, in [0, 1]")
