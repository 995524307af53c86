"""The page on true positives: its equations, the shares it adds up, and what it says of a table."""

import math

import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from torch.nn import functional as F

from hcl import losses, notebooks, project_root, runs, sweeps
from hcl.runs import Run

PAGE = Page("images/true-positives")
NEGATIVES = {"temperature": 0.5, "tau_plus": 0.0}


@pytest.fixture(scope="module")
def page():
    return PAGE.define("train", "weight-function", "own-table", "table", "verdict", "pairs", "best")


@pytest.fixture(scope="module")
def batch():
    """Two views (12, 6) of three classes, float64."""
    draw = torch.Generator().manual_seed(3)
    z1, z2 = F.normalize(torch.randn(2, 12, 6, generator=draw, dtype=torch.float64), dim=2)
    return z1, z2, torch.arange(12) % 3


def share(batch, beta):
    """The weight on class-mates of each anchor, from the library's weights."""
    z1, z2, labels = batch
    same = labels.repeat(2)[:, None] == labels.repeat(2)
    return (losses.negative_weights(z1, z2, temperature=0.5, beta=beta) * same).sum(1)


# --- the mathematics


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_the_push_on_class_mates_is_the_gradient(batch, beta):
    """Equation eq-tp-push and phi, by autograd of the page's loss in the scores."""
    z1, z2, labels = batch
    z, both = torch.cat([z1, z2]), labels.repeat(2)
    n = len(z)
    s = (z @ z.T / 0.5).requires_grad_()
    p = s.diagonal(n // 2).repeat(2)
    pair = torch.arange(n) % (n // 2)
    seen = s.masked_fill(pair[:, None] == pair, -math.inf)
    log_g = torch.logsumexp((1 + beta) * seen, 1) - torch.logsumexp(
        (beta * s).masked_fill(pair[:, None] == pair, -math.inf), 1
    )
    ng = (n - 2) * log_g.exp()
    loss = torch.log1p(ng * (-p).exp())
    torch.testing.assert_close(loss.mean(), losses.hard(z1, z2, beta=beta, **NEGATIVES))
    (slope,) = torch.autograd.grad(loss.sum(), s)
    gamma = (ng / (p.exp() + ng)).detach()
    negative = pair[:, None] != pair
    torch.testing.assert_close((slope * negative).sum(1), gamma)  # as much push as pull
    mates = negative & (both[:, None] == both)
    phi = (1 + beta) * share(batch, 1 + beta) - beta * share(batch, beta)
    torch.testing.assert_close((slope * mates).sum(1) / gamma, phi)


def test_the_odds_grow_as_the_difference_of_tilted_means(batch):
    """Equation eq-tp-odds, by a difference in beta."""
    z1, z2, labels = batch
    z, both, beta, h = torch.cat([z1, z2]), labels.repeat(2), 1.5, 1e-5
    low, high = (share(batch, b).logit() for b in (beta - h, beta + h))
    slopes = (high - low) / (2 * h)
    pair = torch.arange(len(z)) % len(z1)
    for i in range(len(z)):
        means = []
        for mate in (True, False):
            s = [
                2 * float(z[i] @ z[j])
                for j in range(len(z))
                if pair[i] != pair[j] and bool(both[i] == both[j]) == mate
            ]
            weight = [math.exp(beta * x) for x in s]
            means.append(sum(x * w for x, w in zip(s, weight, strict=True)) / sum(weight))
        assert slopes[i].item() == pytest.approx(means[0] - means[1], abs=1e-6)


def test_shares_are_those_of_a_double_loop_and_given_twice_changes_nothing(page, batch):
    z, _, labels = batch
    found = page["on_class"](z, labels, 0.5, 2.0, 6)
    total = 0.0
    for first in (0, 6):
        rows = range(first, first + 6)
        for i in rows:
            weight = {j: math.exp(2 * float(z[i] @ z[j]) / 0.5) for j in rows if i != j}
            mates = sum(w for j, w in weight.items() if labels[i] == labels[j])
            total += mates / sum(weight.values())
    assert found == pytest.approx(total / 12)


def test_a_record_has_its_own_temperature_batch_and_hardness(page, batch, tmp_path):
    z, _, labels = batch
    run = Run(
        data="sphere", encoder="mlp", epochs=1, batch=6, beta=2.0, tau_plus=0.0, temperature=0.25,
        positives="class",
    )  # fmt: skip
    record = made_up_record(run, {})
    assert page["with_embeddings"]([record]) == []
    rows = torch.cat([z, z[:2]])  # the last, incomplete batch is left out
    arrays = {"z": rows.half().numpy(), "labels": torch.cat([labels, labels[:2]]).numpy(), "of": 14}
    record = runs.save(record, store=tmp_path, arrays=arrays)
    assert page["with_embeddings"]([record]) == [record]
    found = page["weights"](record, 2.0)
    one, more = (page["on_class"](z, labels, 0.25, b, 6) for b in (2.0, 3.0))
    assert found["weight"] == pytest.approx(one, abs=1e-3)
    assert found["push"] == pytest.approx(3 * more - 2 * one, abs=5e-3)
    row = page["own"]([record]).loc[("true positives", 0.25, 2.0)]
    assert row["what the class gets"] == pytest.approx(100 - row["push"], abs=0.11)


# --- the schedules


def test_what_the_page_says_of_the_schedules(page):
    both = PAGE.run("schedule")["both"]
    text, code = both["as the text says"], both["as the code does"]
    assert (code[:88] == 1).all()
    assert code[89] == 0.875
    assert (code == 0).sum() == 4
    assert text[400] == pytest.approx(1 / 9)
    assert code.mean() == pytest.approx(0.605)  # the exercise's sum
    assert text.mean() == pytest.approx(5 / 9, abs=0.01)
    assert page["average"](8.0, "paper", 5, 15) == pytest.approx(8 * 6 / 10)


# --- sentences


def table(values, seeds=(0, 1, 2)):
    """A frame of runs: {(arm, beta, temperature): accuracy}, seeds a hundredth apart."""
    schedule = {"two views": "none", "true positives": "none", "annealed": "paper"}
    rows = [
        {
            "arm": arm, "beta": beta, "temperature": t, "seed": seed, "anneal": schedule[arm],
            "anneal_steps": 5, "epochs": 15, "knn": value + 0.01 * seed + 0.001 * seed**2 * beta,
            "linear": value,
        }
        for (arm, beta, t), value in values.items()
        for seed in seeds
    ]  # fmt: skip
    return pd.DataFrame(rows)


RISES_AND_FALLS = {("two views", b, 0.5): a for b, a in ((0.0, 0.5), (1.0, 0.7), (8.0, 0.6))}
RISES = {("true positives", b, 0.5): a for b, a in ((0.0, 0.5), (1.0, 0.6), (8.0, 0.65))}
ANNEALED = {("annealed", 8.0, 0.5): 0.66, ("annealed", 1.0, 0.5): 0.66}


def test_the_shapes_are_called_what_they_are(page):
    df = table(RISES_AND_FALLS | RISES | ANNEALED)
    views, true, annealed = page["shapes"](df, "linear")
    assert "from β=0 to 1: +20.0 ± 0.0" in views
    assert "from there to 8: -10.0 ± 0.0" in views
    assert "no fall" in true
    assert "no rise" in annealed
    assert all("This is the shape" in line for line in (views, true, annealed))
    swapped = {("true positives", b, t): a for (_, b, t), a in RISES_AND_FALLS.items()}
    (line,) = page["shapes"](table(swapped), "linear")
    assert "This is **not** the shape" in line
    (line,) = page["shapes"](table(RISES, seeds=[0]), "linear")
    assert "One seed cannot tell" in line
    (line,) = page["shapes"](table({("annealed", 8.0, 0.5): 0.6}), "linear")
    assert "no shape" in line


def test_pairs_are_at_equal_hardness_and_annealing_has_its_average(page):
    df = table(RISES_AND_FALLS | RISES | {("two views", 4.0, 0.5): 0.65} | ANNEALED)
    pairs = page["opponents"](df)
    assert (("annealed", 8.0, 0.5), ("two views", 4.0, 0.5)) in pairs  # 4.8 on average
    assert (("annealed", 8.0, 0.5), ("two views", 8.0, 0.5)) in pairs
    assert (("true positives", 0.0, 0.5), ("two views", 0.0, 0.5)) in pairs
    found = page["steps"](df, "linear", pairs)
    row = found.loc[(0.5, "true positives, β=8", "β=8")]
    assert row["difference"] == pytest.approx(0.05)
    assert row["n"] == 3
    assert len(page["steps"](df, "linear", [(pairs[0][0], ("two views", 99.0, 0.5))])) == 0
    lone = page["shown"](page["steps"](table(RISES_AND_FALLS | RISES, seeds=[0]), "knn", pairs))
    assert "nan" not in lone.to_string()


def test_the_best_cells(page):
    low = {("two views", 0.0, 0.2): 0.72}
    best = page["best_cells"](table(RISES_AND_FALLS | RISES | low), "linear")
    views, true = best.loc["two views"], best.loc["true positives"]
    assert (views["β"], views["t"], views["of cells"]) == ("0", "0.2", 4)
    assert (true["β"], true["t"], true["of cells"]) == ("8", "0.5", 3)
    assert true["minus two views"] == "-7.0 ± 0.0"
    assert views["minus two views"] == ""
    assert views["mean"] == "72.0%"


def test_the_gap_of_the_longer_training_is_a_difference_of_differences():
    page = PAGE.define("train", "table", "long", long_epochs=30)
    levels = {
        ("two views", 15): 0.6, ("two views", 30): 0.7,
        ("true positives", 15): 0.5, ("true positives", 30): 0.75,
    }  # fmt: skip
    rows = [
        {
            "arm": arm,
            "epochs": e,
            "beta": 8.0,
            "seed": s,
            "knn": a + 0.1 * s**2 * (a in (0.5, 0.75)),
        }
        for (arm, e), a in levels.items()
        for s in (0, 1, 2)
    ]
    found = page["gaps"](pd.DataFrame(rows), "knn").set_index("epochs")
    assert found.loc["change", "difference"] == pytest.approx(0.15)
    assert found.loc["change", "se"] == pytest.approx(0.0, abs=1e-12)
    assert found.loc[15, "difference"] == pytest.approx(-0.1 + 0.5 / 3)
    assert found.loc[15, "se"] > 0.05


def test_a_fall_that_stays_without_false_negatives_is_told():
    page = PAGE.define(
        "train", "table", "verdict", "supervised", "supervised-words", betas=[1.0, 8.0]
    )
    page["span"] = (1.0, 8.0)
    spread = {0: 0.0, 1: 0.01, 2: -0.01}
    levels = {
        ("two views", 1.0): 0.7, ("two views", 8.0): 0.6,
        ("true positives and negatives", 1.0): 0.8, ("true positives and negatives", 8.0): 0.72,
        ("annealed", 8.0): 0.65,
    }  # fmt: skip
    rows = [
        {"arm": arm, "beta": beta, "temperature": 0.5, "seed": s, "knn": a + e * (beta == 8)}
        for (arm, beta), a in levels.items()
        for s, e in spread.items()
    ]
    found = page["falls"](pd.DataFrame(rows), "knn", 1.0, 8.0)
    assert len(found) == 3  # the annealed arm has one hardness
    alone = found.loc[("true positives and negatives", "by itself")]
    assert alone["difference"] == pytest.approx(-0.08)
    assert alone["se"] == pytest.approx(0.01 / 3**0.5)
    more = found.loc[("true positives and negatives", "minus views")]
    assert more["difference"] == pytest.approx(0.02)
    assert more["se"] == pytest.approx(0.0, abs=1e-12)
    assert "it still falls" in page["cause"](found)
    assert "no clear fall" in page["cause"](found.assign(difference=-0.001))


# --- what is read


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_recorded_section_reads_all_arms_in_one_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    page = PAGE.run("lab-read", into=PAGE.define("train"))
    arms = [r for r in study(page["recorded"]) if r.positives == "class" or r.anneal != "none"]
    names = {page["arm_of"](r.positives, r.anneal, r.anneal_steps) for r in arms}
    assert "true positives" in names
    assert any(name.startswith("annealed") for name in names)
    settings = {(str(r.data_args), r.epochs, r.batch, r.precision, r.queue) for r in arms}
    assert len(settings) == 1
    assert page["planned"] > len(arms)
    assert len(page["lab"]) == 0  # the store is empty


def test_every_recorded_cell_has_one_run_a_seed(page):
    """Arms that differ in anything but their name would fall together."""
    listed = study()
    of_class = next(r for r in listed if r.positives == "class")
    varied = ("seed", "method", "temperature", "beta", "tau_plus", "positives", "anneal")
    same = {k: v for k, v in vars(of_class).items() if k not in (*varied, "anneal_steps")}
    cells = [
        (page["arm_of"](r.positives, r.anneal, r.anneal_steps), r.beta, r.temperature, r.seed)
        for r in listed
        if {k: v for k, v in vars(r).items() if k in same} == same and not r.tau_plus
        if r.method in ("nt_xent", "hard")
    ]
    assert len(cells) > 20
    assert len(set(cells)) == len(cells)


def test_the_lab_form_asks_for_recorded_runs_only(monkeypatch):
    given = notebooks.profile(project_root(), "lab").get(f"{PAGE.name}.ipynb")
    if given is None:
        pytest.skip("not in the lab profile yet")
    asked: list[Run] = []
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: asked.extend(wanted) or [])
    with pytest.raises(ValueError, match="none given"):  # no Records: nothing was recorded
        PAGE.run("train", **given)
    assert asked
    assert {r.digest for r in asked} <= {r.digest for r in study()}
    assert given["long_epochs"] == 0
