"""Graphs: data sets packed on the device, their augmentations, the GIN, and InfoGraph's objective.

`load("mutag")` and `load_families()` hand over `Graphs`, the data contract of the trainer. PyTorch
Geometric is imported where it is used, so nothing here is needed for the losses.
"""

from hcl.graphs.batch import GraphBatch
from hcl.graphs.data import Graphs, download, load, load_families
from hcl.graphs.infograph import Heads, local_global, local_global_released

__all__ = [
    "GraphBatch",
    "Graphs",
    "Heads",
    "download",
    "load",
    "load_families",
    "local_global",
    "local_global_released",
]
