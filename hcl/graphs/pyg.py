"""PyTorch Geometric, imported when it is needed."""

import warnings
from importlib import import_module
from typing import Any


def pyg(part: str) -> Any:
    """A module of it, "nn" for instance, without torch's warnings about how it is imported.

    Raises: ImportError: it is not installed; the message says how.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return import_module(f"torch_geometric.{part}")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "torch_geometric":
                raise
            raise ImportError(
                "graphs need PyTorch Geometric: pip install torch_geometric"
            ) from error
