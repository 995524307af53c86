"""The sets of graphs: reading TU data sets through PyTorch Geometric, and features of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hcl.graphs.batch import GraphBatch
from hcl.graphs.pyg import pyg
from hcl.imagesets import DamagedDataError, data_root

TU = {
    "mutag": "MUTAG", "ptc_mr": "PTC_MR", "enzymes": "ENZYMES", "proteins": "PROTEINS", "dd": "DD",
    "nci1": "NCI1", "imdb-binary": "IMDB-BINARY", "imdb-multi": "IMDB-MULTI",
    "reddit-binary": "REDDIT-BINARY", "reddit-multi-5k": "REDDIT-MULTI-5K", "collab": "COLLAB",
}  # fmt: skip
FEATURES = ("released", "degree", "ones")
ONE_HOT = 1000  # largest degrees from here on are a number, not a word


class GraphSet(NamedTuple):
    """Graphs and their classes, (G,) int64 from 0."""

    graphs: GraphBatch
    labels: Tensor


def tu_name(name: str) -> str:
    """The name a TU data set has there.

    Raises: ValueError: an unknown name; the message lists those that are known.

    >>> tu_name("imdb-binary")
    'IMDB-BINARY'
    """
    if name not in TU:
        raise ValueError(f"name={name!r}: choose one of {', '.join(TU)}")
    return TU[name]


def read_tu(name: str, *, root: str | Path | None = None, features: str = "released") -> GraphSet:
    """A TU data set: its graphs with features of their nodes, and their labels.

    features: "released" takes the nodes' labels, one-hot, where the set has them (continuous
    attributes are left out) and else the degree as :func:`degree_features` has it; "degree" always
    that; "ones" a 1 where there are no labels, as InfoGraph's own code does.

    Raises: ValueError: an unknown name or features; FileNotFoundError: the set is not there (the
    message says how to get it); DamagedDataError: it is there, but incomplete.
    """
    if features not in FEATURES:
        raise ValueError(f"features={features!r}: choose one of {', '.join(FEATURES)}")
    folder = folder_of(name, root) / "raw"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} is not in {folder.parent}: get it with `hcl data {name}`, or set HCL_DATA to "
            "the folder that holds tudataset/"
        )
    whole, words = _read(folder, tu_name(name))
    graphs, labels = whole
    return GraphSet(replace(graphs, x=_features(graphs, words, features)), labels)


def folder_of(name: str, root: str | Path | None = None) -> Path:
    """Where a TU data set is, or would be downloaded to."""
    return data_root(root) / "tudataset" / tu_name(name)


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch a TU data set with PyTorch Geometric and return its folder; nothing if it is there.

    Raises: ValueError: an unknown name.
    """
    folder = folder_of(name, root)
    pyg("datasets").TUDataset(str(folder.parent), tu_name(name))
    return folder


@lru_cache(maxsize=8)  # a text file of seconds; a sweep reads it once
def _read(folder: Path, name: str) -> tuple[GraphSet, int]:
    """Graphs with the nodes' labels, one-hot, as features, and how many of these there are."""
    read_tu_data = pyg("io").read_tu_data  # outside the `try`: a broken installation is no damage
    try:
        data, slices, sizes = read_tu_data(str(folder), name)
        labels = data.y.flatten().long()
        x = data.x[:, sizes["num_node_attributes"] :] if data.x is not None else None
        nodes = slices["x"].diff() if x is not None else torch.tensor(data._num_nodes)
        if len(nodes) != len(labels):
            raise ValueError(f"{len(nodes)} graphs and {len(labels)} labels")
    except (OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DamagedDataError(
            f"{name} in {folder} is damaged or incomplete ({type(error).__name__}: {error}): "
            f"delete {folder.parent} and get it again with `hcl data {name.lower()}`"
        ) from error
    edges = F.pad(slices["edge_index"].diff(), (0, len(labels)))[: len(labels)]  # last ones: none
    first = (nodes.cumsum(0) - nodes).repeat_interleave(edges)
    batch = torch.arange(len(labels)).repeat_interleave(nodes)
    x = torch.zeros(len(batch), 0) if x is None else x.float()
    return GraphSet(GraphBatch(x, data.edge_index + first, batch, len(labels)), labels), x.shape[1]


def of_pyg(graphs: Sequence[Any], *, features: str = "released") -> GraphSet:
    """Your own graphs: Data objects of PyTorch Geometric, each with a label y.

    features: as in :func:`read_tu`; node features x are taken as they are.

    Raises: ValueError: no graphs, one without nodes or its one label, edges that are missing, out
    of range or of one direction only, or features that only some have.
    """
    if not graphs:
        raise ValueError("graphs: none given")
    if features not in FEATURES:
        raise ValueError(f"features={features!r}: choose one of {', '.join(FEATURES)}")
    for place, one in enumerate(graphs):
        _check_graph(f"graphs[{place}]", one)
    widths = {None if one.x is None else one.x.shape[1] for one in graphs}
    if len(widths) > 1:
        raise ValueError(f"graphs: node features of {widths} columns; all alike, or none at all")
    whole = pyg("data").Batch.from_data_list(list(graphs))
    x = torch.zeros(whole.num_nodes, 0) if whole.x is None else whole.x.float()
    joined = GraphBatch(x, whole.edge_index, whole.batch, whole.num_graphs)
    _, labels = whole.y.flatten().unique(return_inverse=True)
    return GraphSet(replace(joined, x=_features(joined, x.shape[1], features)), labels)


def _check_graph(name: str, one: Any) -> None:
    """Refuse what would go wrong later, or not at all: edges into the next graph of the batch."""
    if not one.num_nodes or one.y is None:
        raise ValueError(f"{name}: must have at least one node, and a label y")
    if (count := torch.as_tensor(one.y).numel()) != 1:
        raise ValueError(f"{name}: y has {count} entries, one label of the graph would do")
    if one.x is not None and (one.x.ndim != 2 or len(one.x) != one.num_nodes):
        raise ValueError(f"{name}: x is {tuple(one.x.shape)}, must be ({one.num_nodes}, F)")
    edges = one.edge_index
    if edges is None:
        raise ValueError(f"{name}: edge_index is None; torch.zeros(2, 0).long() says no edges")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < one.num_nodes:
        raise ValueError(f"{name}: edge_index must number nodes 0 to {one.num_nodes - 1}")
    if not pyg("utils").is_undirected(edges, num_nodes=one.num_nodes):
        raise ValueError(f"{name}: edge_index has edges of one direction; to_undirected would do")


def degree_features(graphs: GraphBatch) -> Tensor:
    """The degree of each node: one-hot, or standardised where the largest is 1000 or more.

    Returns: (V, largest degree + 1), or (V, 1).

    Source: the released graph code of Robinson et al. 2021 (REDDIT's degrees are standardised).

    >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> degree_features(GraphBatch(torch.zeros(3, 0), edges, torch.zeros(3).long(), 1)).tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    degrees = torch.bincount(graphs.edge_index[0], minlength=len(graphs.x))
    if degrees.max() < ONE_HOT:
        return F.one_hot(degrees).float()
    return ((degrees - degrees.float().mean()) / degrees.float().std())[:, None]


def _features(graphs: GraphBatch, words: int, features: str) -> Tensor:
    if words and features != "degree":
        return graphs.x
    if features == "ones":
        return torch.ones(len(graphs.x), 1)
    return degree_features(graphs)
