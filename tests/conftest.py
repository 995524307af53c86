"""A store of its own for every test, and a Run that trains in a moment."""

import pytest
import torch

from hcl.runs import Run


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of floats depend on the number of threads, and some libraries change it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """No test reads or writes the recorded runs unless it asks for them."""
    monkeypatch.setenv("HCL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def tiny():
    """Makes a Run on 200 points of latent classes; three epochs take a fraction of a second."""

    def make(**changes):
        values = {
            "data": "sphere",
            "data_args": {"n_train": 200, "n_test": 100, "coarse": 4, "fine": 2},
            "encoder": "mlp", "epochs": 3, "batch": 32, "hidden_dim": 16, "out_dim": 8,
        }  # fmt: skip
        return Run(**{**values, **changes})

    return make
