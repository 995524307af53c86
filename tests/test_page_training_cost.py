"""The page on what training costs: its counts, its reading of a benchmark, its table of habits."""

import json
import re

import pytest
import torch
from cells import Page

from hcl import project_root, runs, sweeps, vision
from hcl.runs import Record

PAGE = Page("practice/training-cost")
STUDY = sweeps.load_study(project_root() / "book" / "profiles" / "cifar10-lab.yml")
BENCH = json.loads((project_root() / "benchmarks" / "train.json").read_text())
HABITS = ("read", "shares", "habits", "habits-table", "habits-figure", "habits-words")
GAIN = {"muon": 0.04, "bfloat16": 0.0, "triangle": -0.01}  # made up; what is not listed gains 0.02


def products(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Multiplications of a forward pass, from the shapes its layers see."""
    total = 0

    def convolution(layer, _, out):
        nonlocal total
        k = layer.kernel_size[0] * layer.kernel_size[1]
        total += k * layer.in_channels // layer.groups * out[0].numel()

    def linear(layer, _, out):
        nonlocal total
        total += layer.in_features * out[0].numel()

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(convolution)
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(linear)
    with torch.no_grad():
        model.eval()(x)
    return total


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_the_count_is_that_of_the_layers_shapes(name):
    flops = PAGE.define("count")["forward_flops"](name)
    net = vision.encoder(name, pixels=32 * 32)
    head = int(net.out_dim) * 512 + 512 * 128
    assert flops == 2 * (products(net, torch.zeros(1, 3, 32, 32)) + head)


def test_resnet50_is_as_large_as_published():
    """1.31 GMAC a view: README of the SimCLR code that the released one descends from."""
    assert PAGE.define("count")["forward_flops"]("resnet50") == pytest.approx(2 * 1.31e9, rel=0.02)


def test_the_table_follows_the_pages_equation():
    page, shown = PAGE.show("count", encoders=["small"], pictures=1000, rates=[0.5])
    tera = float(shown["count"].loc["small", "TFLOP an epoch"].replace(",", ""))
    assert tera == pytest.approx(3 * 2 * 1000 * page["forward_flops"]("small") / 1e12, rel=1e-3)
    seconds = shown["count"].loc["small", "s an epoch at 0.5 TFLOP/s"]
    assert float(seconds) == pytest.approx(tera / 0.5, rel=1e-3)


def test_the_exercises_answers_have_the_stated_size():
    flops = PAGE.define("count")["forward_flops"]
    batch = {name: flops(name) / (400 * 128) for name in ("small", "resnet50")}
    assert 100 < batch["small"] < 1000
    assert 10_000 < batch["resnet50"] < 100_000


def test_the_page_reads_the_committed_benchmark():
    page, shown = PAGE.show("read", "shares", "steps-table", "rate", "views-table", "side")
    assert BENCH["provenance"]["commit"][:7] in shown["read"]
    ours, usual = BENCH["step"]["ours"], BENCH["step"]["PIL through a DataLoader"]
    factor = usual["microseconds"] / ours["microseconds"]
    said = float(re.search(r"trains ([\d.]+) times more slowly", shown["rate"])[1])
    assert said == pytest.approx(factor, rel=0.15)  # medians of ratios against ratio of medians
    bars = [p.get_width() for p in page["ax"].patches]
    assert sum(bars) == pytest.approx(page["took"].to_numpy().sum())
    for name, row in BENCH["step"].items():
        if not row.get("skipped"):
            assert sum(row["shares"].values()) == pytest.approx(1, abs=0.05), name
            assert f"{row['microseconds']:,.0f}" == shown["steps-table"].loc[name, "µs"]
    assert len(shown["views-table"]) == len(BENCH["augmentation"])


def test_an_implementation_that_was_not_measured_says_why():
    page = PAGE.define("steps-table")
    rows = page["pd"].DataFrame({"theirs": {"skipped": "not installed"}}).T
    assert page["ratios"](rows, "ratio").loc["theirs", "not measured"] == "not installed"


def made_up(run):
    """A Record whose accuracy is half, a seed's effect and the gain of its habit."""
    changed = {run.precision, run.optimizer, run.schedule, run.sides, *run.encoder_args}
    plain = changed <= {"float32", "adam", "constant", "fixed"}
    gain = 0.0 if plain else next((GAIN[c] for c in sorted(changed) if c in GAIN), 0.02)
    noise = int(run.digest[:4], 16) / 65535 * 1e-4
    value = 0.5 + 0.01 * run.seed + gain + noise
    return Record(
        run=run, metrics={"knn": value, "linear": value}, history=[],
        cost={"seconds": 60.0, "images_per_second": 1.0, "peak_memory_bytes": 1},
        provenance={"code": "abc", "commit": "1234567", "clean": True, "device": "CPU",
                    "torch": "2", "date": "2026-01-01T00:00:00"},
    )  # fmt: skip


def test_the_habits_are_those_of_the_study(own_store):
    for run in STUDY:
        if run.method == "nt_xent" and run.epochs == 10:
            runs.save(made_up(run), store=own_store)
    _, shown = PAGE.show(
        "read", "shares", "habits", "habits-table", "habits-figure", "habits-words"
    )
    table = shown["habits-table"]
    assert table.loc["Muon", "knn"].startswith("+4.0 ± 0.0")
    assert table.loc["triangle", "linear"].startswith("-1.0 ± 0.0")
    assert (table.drop(["Muon", "triangle", "bfloat16"])["knn"].str[:4] == "+2.0").all()
    assert (table["knn"] != "").all()
    assert "- Muon: " in shown["habits-words"]


def test_nothing_recorded_is_said():
    _, shown = PAGE.show(
        "read", "shares", "habits", "habits-table", "habits-figure", "habits-words"
    )
    assert shown["habits-table"] == "Not recorded yet."
    assert shown["habits-words"] == ""


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()
