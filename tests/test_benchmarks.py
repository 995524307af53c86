"""The benchmarks measure what they say, at sizes that take a moment."""

import importlib.util
import json
import math
import platform
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import pad

import hcl.losses
from hcl import views

FOLDER = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- a step of every method


@pytest.fixture(scope="module")
def steps():
    return load("step")


def test_a_step_trains_and_every_loss_is_compared(steps):
    x = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(8) % 3
    for loss in steps.LOSSES.values():
        step = steps.Step(loss, "small", CPU)
        before = [p.clone() for p in step.model.parameters()]
        assert step.seconds(x, labels) > 0
        moved = [
            not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True)
        ]
        assert any(moved)
    found = steps.measure("small", batch=8, size=8, rounds=4, device=CPU)
    assert set(found) == {"SimCLR_seconds"} | {
        f"{name}_{what}" for name in list(steps.LOSSES)[1:] for what in ("ratio", "q1", "q3")
    }
    for name in list(steps.LOSSES)[1:]:
        assert 0 < found[f"{name}_q1"] <= found[f"{name}_ratio"] <= found[f"{name}_q3"]


def test_every_name_stands_for_its_loss(steps):
    """At equal embeddings: H-SCL differs from SCL, mixtures add negatives, and so on."""
    g = torch.Generator().manual_seed(0)
    z1, z2 = (torch.nn.functional.normalize(torch.randn(40, 8, generator=g), dim=1) for _ in "ab")
    labels = torch.randint(10, (40,), generator=g)
    values = {name: loss(z1, z2, labels).item() for name, loss in steps.LOSSES.items()}
    assert len(set(values.values())) == len(steps.LOSSES)
    others = torch.arange(40).repeat(2)
    changed = {n for n, loss in steps.LOSSES.items() if n not in ("MoCHi", "SSCL")
               and loss(z1, z2, others[:40]).item() != values[n]}  # fmt: skip
    assert changed == {"SCL", "H-SCL", "SupCon", "SCHaNe"}
    assert values["MoCHi"] > values["SimCLR"]
    array = torch.cat([z1, z2]).double().numpy()
    assert values["SimCLR"] == pytest.approx(loop(array, beta=0.0, tau=0.0), rel=1e-5)
    assert values["HCL"] == pytest.approx(loop(array), rel=1e-5)
    assert values["DCL"] == pytest.approx(loop(array, kind="decoupled"), rel=1e-5)


def test_mixtures_are_made_within_the_step(steps, monkeypatch):
    asked = []
    monkeypatch.setattr(
        steps, "mixtures", lambda z1, z2, **kinds: asked.append(kinds) or torch.ones(80, 3, 8)
    )
    z = torch.eye(40, 8) + 0.1
    for name in ("MoCHi", "SSCL"):
        steps.LOSSES[name](z, z, None)
    assert asked == [{"hardest": 64, "between": 32, "with_anchor": 16}] * 2


def test_the_step_benchmark_writes_what_the_page_reads(steps, tmp_path, monkeypatch, capsys):
    few = {name: steps.LOSSES[name] for name in ("SimCLR", "Debiased", "HCL", "Ring")}
    monkeypatch.setattr(steps, "LOSSES", few)
    out = tmp_path / "step.json"
    words = ["--rounds=2", "--batch=9", "--size=8", f"--out={out}"]
    with pytest.raises(SystemExit):
        steps.main([*words, "--batch=5"])
    assert "--batch 5: must be 6 or more" in capsys.readouterr().err
    steps.main([*words, "--batch=6"])
    made = json.loads(out.read_text(), parse_constant=refuse_constants)
    assert made["setting"] == {"rounds": 2, "encoder": "small", "batch": 6, "size": 8}
    assert made["result"]["HCL_q1"] <= made["result"]["HCL_ratio"] <= made["result"]["HCL_q3"]
    assert made["provenance"]["torch"] == str(torch.__version__)
    assert "Ring_ratio" in capsys.readouterr().out


# --- sentences


@pytest.fixture(scope="module")
def reading():
    return load("sentences")


def small(reading, *more):
    words = ["--batch", "30", "--width", "8", "--hidden", "4", "--rounds", "3", *map(str, more)]
    return reading.arguments(words)


def test_both_loops_train_alike_from_the_same_weights(reading):
    run = reading.run_of(small(reading))
    data = reading.load_data(run)
    both = reading.entrants(run, data)
    blocks = list(data.blocks(30, torch.Generator().manual_seed(0)))[:6]
    ours, plain = ([entrant(rows).item() for rows in blocks] for entrant in both.values())
    assert ours == pytest.approx(plain, rel=1e-4)
    assert ours[0] == pytest.approx(math.log(30), rel=0.05)  # nothing is learnt yet
    assert both[reading.OURS](blocks[0]) < ours[0]


def test_targets_are_uniform_on_the_neighbours_of_a_book(reading):
    found = reading.neighbours(torch.tensor([4, 4, 4, 7, 9, 9]))
    half = 0.5
    assert found.tolist() == [
        [0, 1, 0, 0, 0, 0], [half, 0, half, 0, 0, 0], [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0],
    ]  # fmt: skip


def test_sentences_a_second_by_hand(reading):
    ours, plain = reading.OURS, reading.PLAIN
    times = [{ours: 1.0, plain: 3.0}, {ours: 2.0, plain: 2.0}, {ours: 4.0, plain: 8.0}]
    rows = reading.summary(times, 400)
    assert rows[ours] == {
        "seconds": 2.0, "sentences_per_second": 200.0, "ratio": 1, "ratio_q1": 1, "ratio_q3": 1,
    }  # fmt: skip
    assert [rows[plain][f"ratio{end}"] for end in ("_q1", "", "_q3")] == [1, 2, 3]
    assert rows[plain]["sentences_per_second"] == pytest.approx(400 / 3)


def test_both_read_the_same_block_in_every_round(reading):
    calls = []
    entered = {name: lambda rows, name=name: calls.append((name, int(rows))) for name in "ab"}
    times = reading.race(entered, [torch.tensor(5), torch.tensor(6)], 20)
    assert len(times) == 20
    assert all(set(row) == {"a", "b"} for row in times)
    rounds = [calls[i : i + 2] for i in range(2, 42, 2)]  # after one of each to warm up
    assert [{name for name, _ in r} for r in rounds] == [{"a", "b"}] * 20
    assert [{block for _, block in r} for r in rounds] == [{5}, {6}] * 10
    assert len({r[0][0] for r in rounds}) == 2  # in either order


def test_the_sentence_benchmark_writes_what_it_found(reading, tmp_path, capsys):
    out = tmp_path / "sentences.json"
    words = ["--batch=30", "--width=8", "--hidden=4", "--rounds=3", f"--out={out}"]
    reading.main(words)
    made = json.loads(out.read_text(), parse_constant=refuse_constants)
    assert made["setting"]["batch"] == 30
    assert made["setting"]["data"] == "pydoc"
    assert made["setting"]["clock"] in ("wall", "processor time of one thread")
    assert made["provenance"]["torch"] == str(torch.__version__)
    assert set(made["step"]) == {reading.OURS, reading.PLAIN}
    for row in made["step"].values():
        assert set(row) == {*made["fields"], "ratio_q1", "ratio_q3"}
        assert row["seconds"] * row["sentences_per_second"] == pytest.approx(30)
        assert 0 < row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
    assert "sentences_per_second" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--rounds", 1), ("--batch", 3), ("--width", 0)])
def test_an_impossible_sentence_benchmark_is_refused(reading, words, capsys):
    with pytest.raises(SystemExit):
        small(reading, *words)
    assert f"{words[0]} {words[1]}: must be" in capsys.readouterr().err


# --- the loss alone


@pytest.fixture(scope="module")
def bench():
    return load("loss")


def arguments(bench, *words):
    return bench.arguments([str(word) for word in words])


def loop(z, *, beta=1.0, tau=0.1, kind="hcl", t=0.5):
    """Anchor by anchor in Python floats; z (2B, d) as a numpy array in float64."""
    z = [row / math.sqrt(sum(x * x for x in row)) for row in z]
    n, total = len(z), 0.0
    for i in range(n):
        partner = (i + n // 2) % n
        pos = math.exp(z[i] @ z[partner] / t)
        neg = [math.exp(z[i] @ z[j] / t) for j in range(n) if j not in (i, partner)]
        if kind == "decoupled":
            total -= math.log(pos / sum(neg))
            continue
        if kind == "itself included":
            total -= math.log(pos / (pos + sum(neg) + math.exp(1 / t)))
            continue
        normaliser = sum(u**beta for u in neg)
        expected = sum(u**beta / normaliser * u for u in neg)
        debiased = (expected - tau * pos) / (1 - tau)
        total -= math.log(pos / (pos + len(neg) * max(debiased, math.exp(-1 / t))))
    return total / n


def as_array(data):
    return torch.cat([data.z1, data.z2]).detach().double().numpy()


@pytest.mark.parametrize("beta", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", ["released", "dense"])
def test_what_we_compare_with_is_hcl(bench, name, beta):
    data = bench.batch(16, 8, CPU)
    found = getattr(bench, name)(*data, beta=beta).item()
    assert found == pytest.approx(loop(as_array(data), beta=beta), rel=1e-5)


@pytest.mark.parametrize("name", ["released", "dense"])
def test_what_we_compare_with_is_clamped_as_hcl_is(bench, name, monkeypatch):
    data = bench.batch(16, 8, CPU)
    monkeypatch.setattr(bench, "TAU_PLUS", 0.5)
    found = getattr(bench, name)(data.z1, data.z1).item()  # aligned, so every anchor is clamped
    assert found == pytest.approx(math.log1p(14 * math.exp(-1 / 0.5) / math.exp(1 / 0.5)), rel=1e-5)


KINDS = {
    "HCL": {},
    "HCL beta=0.7": {"beta": 0.7},
    "Debiased": {"beta": 0.0},
    "NT-Xent": {"beta": 0.0, "tau": 0.0},
    "Decoupled": {"kind": "decoupled"},
    "InfoNCE": {"kind": "itself included"},
}


@pytest.mark.parametrize("loss", KINDS)
def test_the_reference_and_its_gradient(bench, loss):
    data = bench.batch(16, 8, CPU)
    anchors = next(c.anchors for c in bench.CONTENDERS if c.loss == loss)
    value, gradient = bench.reference(anchors, data, rows=5)  # strips of 5, 5, 5 and 1
    z, kind = as_array(data), KINDS[loss]
    assert value.item() == pytest.approx(loop(z, **kind), abs=1e-12)
    direction = np.random.default_rng(0).standard_normal(z.shape)
    up, down = (loop(z + h * direction, **kind) for h in (1e-5, -1e-5))
    slope = (gradient.numpy() * direction).sum()
    assert slope == pytest.approx((up - down) / 2e-5, rel=1e-6)


def refuse_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_the_quick_run_writes_what_the_page_reads(bench, tmp_path, capsys):
    path = tmp_path / "loss.json"
    bench.main(["--quick", "--out", str(path)])
    made = json.loads(path.read_text(), parse_constant=refuse_constants)
    assert made["setting"]["sizes"] == [64, 128]
    assert made["setting"]["clock"] in ("wall", "processor time of one thread")
    assert made["provenance"]["torch"] == str(torch.__version__)
    assert {"lightly", "solo-learn", "pytorch-metric-learning"} <= set(made["versions"])
    assert len(made["rows"]) == 2 * len(bench.CONTENDERS)
    assert {(r["views"], r["implementation"], r["loss"]) for r in made["rows"]} == {
        (n, c.implementation, c.loss) for n in (64, 128) for c in bench.CONTENDERS
    }
    for row in made["rows"]:
        check_row(row, made)
    ours = {r["loss"]: r for r in made["rows"] if r["implementation"] == "ours"}
    assert ours["HCL"]["ratio"] == ours["NT-Xent"]["nt_xent_ratio"] == 1
    assert ours["HCL"]["ratio_q1"] == ours["HCL"]["ratio_q3"] == 1
    weighed = {r["implementation"] for r in made["rows"] if r["peak_bytes"]}
    if sys.platform == "linux":
        assert weighed == {"ours", "released"}
    said = capsys.readouterr().out
    assert all(f"{c.implementation}, {c.loss}" in said for c in bench.CONTENDERS)


def check_row(row, made):
    assert set(row) == set(made["fields"])
    assert row["loss"] in made["losses"]
    assert (row["seconds"] is None) == (row["time_skipped"] is not None)
    assert (row["peak_bytes"] is None) == (row["memory_skipped"] is not None)
    if row["seconds"] is not None:
        assert row["rounds"] == 1
        assert row["seconds"] > 0
        assert row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
        assert row["nt_xent_ratio"] > 0
        if row["loss"] not in ("SupCon", "H-SCL"):
            limit = 2e-2 if row["loss"] == "HCL bfloat16" else 5e-6
            assert row["loss_error"] < limit
            assert row["gradient_error"] < limit
    elif row["implementation"] == "ours":
        missing = {"SupCon": "supcon", "H-SCL": "hard_scl"}[row["loss"]]
        assert not hasattr(hcl.losses, missing)


def test_the_quick_run_leaves_the_record_alone(bench):
    assert arguments(bench, "--quick").out is None
    assert arguments(bench).out == FOLDER / "loss.json"
    assert arguments(bench).sizes == bench.SIZES


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sizes", 64, 7), "--sizes 7"),
        (("--sizes", 2), "--sizes 2"),
        (("--rounds", 0), "--rounds 0"),
        (("--dim", -1), "--dim -1"),
    ],
)
def test_impossible_arguments_are_refused(bench, words, said, capsys):
    with pytest.raises(SystemExit):
        arguments(bench, *words)
    assert said in capsys.readouterr().err


def entrant(bench, implementation, loss="HCL"):
    return next(c for c in bench.CONTENDERS if (c.implementation, c.loss) == (implementation, loss))


def test_what_would_not_fit_is_skipped_with_the_reason(bench, monkeypatch):
    gib = 2.0**30
    for size, fits in ((8192, True), (16384, True), (32768, False)):
        assert (bench.too_large(entrant(bench, "released"), size, 20 * gib) is None) == fits
    assert bench.too_large(entrant(bench, "ours"), 2**20, gib) is None
    monkeypatch.setattr(bench, "available_bytes", lambda device: 10_000.0)
    monkeypatch.setattr(bench, "weigh_apart", lambda *_: 1)
    args = arguments(bench, "--sizes", 64, "--rounds", 1)
    rows = {(r["implementation"], r["loss"]): r for r in bench.measure(64, args, CPU)}
    row = rows["released", "HCL"]
    assert row["seconds"] is row["ratio"] is row["peak_bytes"] is None
    assert "GiB available" in row["time_skipped"]
    assert "GiB available" in row["memory_skipped"]
    assert rows["ours", "HCL"]["peak_bytes"] == 1


def test_large_sizes_on_a_cpu_are_ours_alone(bench, monkeypatch):
    monkeypatch.setattr(bench, "TIMED_UP_TO", 16)
    monkeypatch.setattr(bench, "weigh_apart", lambda *_: 1)
    args = arguments(bench, "--sizes", 32, "--rounds", 7)
    rows = bench.measure(32, args, CPU)
    timed = {(r["implementation"], r["loss"]): r["rounds"] for r in rows if r["seconds"]}
    assert timed == dict.fromkeys(bench.BEYOND, 2)
    assert all(r["gradient_error"] is None for r in rows)
    assert {r["time_skipped"] for r in rows} == {None, "on a CPU only up to N = 16"}
    assert all(r["peak_bytes"] == 1 for r in rows)  # others are weighed a little further
    monkeypatch.setattr(bench, "WEIGHED_UP_TO", 16)
    weighed = {
        (r["implementation"], r["loss"]) for r in bench.measure(32, args, CPU) if r["peak_bytes"]
    }
    assert weighed == set(bench.BEYOND)


def test_an_error_of_another_library_is_recorded_and_ours_is_raised(bench, monkeypatch):
    def broken():
        raise RuntimeError("no kernel for this\nand a long story")

    ours = [c for c in bench.CONTENDERS if (c.implementation, c.loss) in bench.BEYOND]
    peer = bench.Contender("some library", "NT-Xent", broken)
    monkeypatch.setattr(bench, "CONTENDERS", [*ours, peer])
    args = arguments(bench, "--quick")
    row = bench.measure(64, args, CPU)[-1]
    assert row["time_skipped"] == row["memory_skipped"] == "RuntimeError: no kernel for this"
    monkeypatch.setattr(bench, "CONTENDERS", [*ours, peer._replace(implementation="ours")])
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.measure(64, args, CPU)


def test_the_race_takes_as_long_as_it_was_told_and_times_every_round(bench):
    calls = []

    def loss(z1, z2, labels):
        calls.append(1)
        return (z1 * z2).sum()

    times = bench.race({"a": loss, "b": bench.dense}, bench.batch(64, 8, CPU), 3, least=2e-3)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert len(calls) > 1 + 3  # more than one call a measurement
    assert (times["b"] > times["a"]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_call_alone(bench):
    n = 1024
    large = torch.zeros(50_000_000)  # 200 MB here must not show there
    found = bench.weigh_apart(entrant(bench, "released"), n, arguments(bench))
    assert 3 < found / (4 * n**2) < 15, len(large)  # a few matrices, and what is always needed
    with pytest.raises(RuntimeError, match="--weigh nobody/HCL"):
        bench.weigh_apart(bench.Contender("nobody", "HCL", None), n, arguments(bench))


# --- training


@pytest.fixture(scope="module")
def training():
    return load("train")


def tiny(training, *more):
    words = ["--size", "8", "--batch", "8", "--rounds", "2", "--no-compile", *map(str, more)]
    return training.arguments(words)


@pytest.fixture
def random_pictures(training, tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    return training.pictures(32, 8, CPU)


def test_the_training_benchmark_writes_what_the_page_reads(training, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    monkeypatch.setattr(training, "team", lambda threads, args, stack: lambda: sum(range(1000)))
    path = tmp_path / "train.json"
    training.main(["--size=8", "--batch=8", "--rounds=2", "--no-compile", f"--out={path}"])
    made = json.loads(path.read_text(), parse_constant=refuse_constants)
    assert made["setting"]["pictures"] == "random"
    assert made["setting"]["loader_workers"] == 0
    assert made["provenance"]["torch"] == str(torch.__version__)
    assert "pillow" in made["versions"]
    assert list(made["augmentation"]) == ["ours", "kornia", "PIL", "PIL without blur"]
    variants = [f"ours, {what}" for what in ("bfloat16", "Muon", "growing views")]
    assert list(made["step"]) == ["ours", training.LOADER, *variants]
    assert set(made["side_by_side"]) in (set(training.TEAMS), set())
    for group in ("augmentation", "step", "side_by_side"):
        for name, row in made[group].items():
            check_training_row(row, made["fields"])
            assert ("loader_ratio" in row) == ("shares" in row) == (group == "step")
            assert name != "ours" or row["ratio"] == row["ratio_q1"] == row["ratio_q3"] == 1
    assert made["step"][training.LOADER]["loader_ratio"] == 1
    kornia = made["augmentation"]["kornia"]
    assert ("skipped" in kornia) == (importlib.util.find_spec("kornia") is None)
    assert ("kornia" in made["versions"]) == ("ratio" in kornia)
    said = capsys.readouterr().out
    assert all(name in said for group in ("augmentation", "step") for name in made[group])


def check_training_row(row, fields):
    if "skipped" in row:
        assert row == {"skipped": "No module named 'kornia'"}
        return
    assert {name.removesuffix("_q1").removesuffix("_q3") for name in row} <= set(fields)
    assert row["microseconds"] * row["images_per_second"] == pytest.approx(1e6)
    assert 0 < row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
    if "shares" in row:
        assert list(row["shares"]) == ["augmentation", "forward", "loss", "backward", "optimiser"]
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert min(row["shares"].values()) > 0


def test_a_library_that_is_missing_has_a_row_that_says_so(training, random_pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    rows = training.augmentation(random_pictures, tiny(training))
    assert "kornia" in rows["kornia"]["skipped"]
    assert "ratio" not in rows["kornia"]
    assert rows["PIL"]["ratio"] > 0


def test_any_other_error_is_raised(training):
    def broken():
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        training.compare({"ours": lambda: lambda: None, "theirs": lambda: broken}, 1, 1)


def test_kornia_makes_views_of_the_same_law(training, tmp_path, monkeypatch):
    """Mean and spread of many views of one picture, as ours have them; where it is installed."""
    pytest.importorskip("kornia")
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    data = training.pictures(1, 32, CPU)
    ramp = (
        torch.linspace(0, 255, 32).expand(2000, 3, 32, 32)
        * torch.tensor([1, 0.6, 0.2])[:, None, None]
    )
    torch.manual_seed(0)
    theirs = training.kornia_views(data)(ramp.to(torch.uint8)) * data.std + data.mean
    ours = views.augment(ramp / 255, views.SIMCLR, torch.Generator().manual_seed(0))
    for describe in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3))):
        assert describe(theirs).mean() == pytest.approx(describe(ours).mean().item(), abs=0.02)


@pytest.mark.parametrize("blur", [True, False])
def test_views_of_pil_pictures_differ_and_are_normalised(training, random_pictures, blur):
    arrays = training.as_arrays(random_pictures.x_train)
    assert np.array_equal(arrays[3], random_pictures.x_train[3].permute(1, 2, 0).numpy())
    make = training.pil_views(random_pictures, blur=blur)
    first, second = make(arrays), make(arrays)
    assert first.shape == second.shape == (32, 3, 8, 8)
    assert first.dtype == torch.float32
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    values = first * random_pictures.std + random_pictures.mean
    assert values.min() > -1e-6
    assert values.max() < 1 + 1e-6


@pytest.mark.parametrize("feed", ["from_memory", "from_loader"])
def test_a_feed_gives_two_views_of_the_same_pictures_for_ever(training, random_pictures, feed):
    black = torch.arange(32) % 2 == 0  # and it stays black, as white never becomes it
    random_pictures.x_train[black], random_pictures.x_train[~black] = 0, 255
    stream = getattr(training, feed)(random_pictures, 8)
    seen = []
    for _ in range(6):  # longer than an epoch
        pair = next(stream)
        assert pair.shape == (16, 3, 8, 8)
        lights = (pair * random_pictures.std + random_pictures.mean).amax((1, 2, 3))
        assert torch.equal(lights[:8] < 0.1, lights[8:] < 0.1)
        seen.append(lights[:8] < 0.1)
    assert torch.cat(seen[:4]).sum() == 16  # an epoch has every picture once


def test_a_step_in_parts_is_a_step(training, random_pictures):
    step = training.Step(training.from_memory, random_pictures, tiny(training))
    twin = training.Step(training.from_memory, random_pictures, tiny(training))
    for _ in range(2):
        step()
        z1, z2 = twin.model(next(twin.views)).chunk(2)
        (adam,) = twin.optimizers
        adam.zero_grad()
        twin.loss(z1, z2).backward()
        adam.step()
    for ours, plain in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_step_is_marked_once_for_every_part(training, random_pictures, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(training, "now", lambda: next(ticks))
    step = training.Step(training.from_memory, random_pictures, tiny(training))
    assert step.marks() == list(range(1 + len(training.PARTS)))


def test_shares_and_ratios_by_hand(training):
    class Marked:
        turns = iter([[0, 1, 3, 6, 6.5, 8], [0, 2, 6, 12, 13, 16], [0, 1, 3, 6, 6.5, 8]])

        def marks(self):
            return next(self.turns)

    found = training.shares(Marked(), 3)
    assert list(found.values()) == pytest.approx([1 / 8, 2 / 8, 3 / 8, 0.5 / 8, 1.5 / 8])
    times = pd.DataFrame({"ours": [1.0, 2.0, 4.0], training.LOADER: [2.0, 6.0, 4.0]})
    rows = training.summary(times, 2)
    theirs = rows[training.LOADER]
    assert theirs["microseconds"] == 2e6  # half of 4 s
    assert theirs["images_per_second"] == 0.5
    assert [theirs[f"ratio{end}"] for end in ("_q1", "", "_q3")] == [1.5, 2, 2.5]
    assert theirs["loader_ratio"] == 1
    assert rows["ours"]["loader_ratio"] == 0.5


def test_everybody_runs_once_in_a_round(training):
    calls = []
    entrants = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = training.race(entrants, 20, training.now)
    assert times.shape == (20, 3)
    assert (times >= 0).all(axis=None)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert {tuple(sorted(r)) for r in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) > 1


def test_a_process_beside_this_one_makes_two_steps_and_ends_with_us(
    training, tmp_path, monkeypatch
):
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    started = []
    popen = training.subprocess.Popen
    monkeypatch.setattr(
        training.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with ExitStack() as stack:
        two_steps = training.team((1,), tiny(training), stack)
        two_steps()
        assert started[0].poll() is None
    assert started[0].returncode == 0
    with pytest.raises(ValueError, match="closed"):
        two_steps()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", 1), "--batch 1"),
        (("--size", 4), "--size 4"),
        (("--rounds", 0), "--rounds 0"),
        (("--encoder", "raw"), "invalid choice: 'raw'"),
    ],
)
def test_impossible_training_is_refused(training, words, said, capsys):
    with pytest.raises(SystemExit):
        tiny(training, *words)
    assert said in capsys.readouterr().err
    assert training.arguments([]).out == FOLDER / "train.json"


# Recorded runs depend on the views to the last bit: what makes them faster may not change them.


def test_an_upright_view_is_the_view_turned_by_nothing():
    g = torch.Generator().manual_seed(0)
    for size, side in ((32, None), (8, None), (96, 32), (28, 7)):
        x = torch.rand(64, 3, size, size, generator=g)
        boxes = views.crop_boxes(torch.rand(22, 64, generator=g), size, size, views.SIMCLR)
        mirrored = torch.rand(64, generator=g) < 0.5
        turned = views.resample(x, boxes, mirrored, torch.zeros(64), side)
        upright = views.resample(x, boxes, mirrored, None, side)
        exact = platform.machine() == "x86_64"  # there, recorded runs were made
        torch.testing.assert_close(upright, turned, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("shape", [(16, 3, 32, 32), (5, 1, 8, 8), (3, 3, 2, 5)])
def test_blur_is_the_padded_formula_to_the_last_bit(shape):
    g = torch.Generator().manual_seed(1)
    x, sigma = torch.rand(shape, generator=g), 0.1 + 1.9 * torch.rand(shape[0], generator=g)
    chosen = torch.rand(shape[0], generator=g) < 0.5
    near = torch.exp(-0.5 / sigma**2)
    tap = torch.where(chosen, near / (1 + 2 * near), 0.0)[:, None, None, None]
    tall = pad(x, (0, 0, 1, 1), mode="reflect")
    wanted = x + tap * (tall[:, :, :-2] + tall[:, :, 2:] - 2 * x)
    wide = pad(wanted, (1, 1, 0, 0), mode="reflect")
    wanted = wanted + tap * (wide[..., :-2] + wide[..., 2:] - 2 * wanted)
    before = x.clone()
    assert torch.equal(views.smooth(x, sigma, chosen), wanted)
    assert torch.equal(x, before)
