"""The benchmark measures what it says, at a size that takes a moment."""

import importlib.util
from pathlib import Path

import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "step.py"


def load():
    spec = importlib.util.spec_from_file_location("step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_trains_and_every_loss_is_compared():
    bench = load()
    step = bench.Step(bench.LOSSES["HCL"], "small", torch.device("cpu"))
    before = [p.clone() for p in step.model.parameters()]
    x = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    assert step.seconds(x) > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    found = bench.measure("small", batch=8, size=8, rounds=4, device=torch.device("cpu"))
    assert found["HCL_q1"] <= found["HCL_ratio"] <= found["HCL_q3"]
    assert found["Debiased_ratio"] > 0
