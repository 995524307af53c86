"""The page on debiasing and hardness: its equations, its effects, and what it says of a table."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, study
from torch.nn import functional as F

from hcl import losses, notebooks, project_root, sweeps
from hcl.runs import Run

PAGE = Page("images/two-by-two")


@pytest.fixture(scope="module")
def page():
    return PAGE.define(
        "threshold", "estimates", "train", "table", "effects", "effects-figure", "verdict",
        "separate", "best", "chance", "lab-verdict",
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    """Two near views (10, 6) of three classes, float64."""
    draw = torch.Generator().manual_seed(5)
    z1 = torch.randn(10, 6, generator=draw, dtype=torch.float64)
    z2 = z1 + 0.3 * torch.randn(10, 6, generator=draw, dtype=torch.float64)
    return F.normalize(z1, dim=1), F.normalize(z2, dim=1), torch.arange(10) % 3


def scores(batch, t, i):
    """Of anchor i: its scores with false and with true negatives, and with its positive."""
    z1, z2, labels = batch
    z, n = torch.cat([z1, z2]), len(z1)
    false, true = [], []
    for j in range(2 * n):
        if j % n != i % n:
            kind = false if labels[j % n] == labels[i % n] else true
            kind.append(float(z[i] @ z[j]) / t)
    return false, true, float(z[i] @ z[(i + n) % (2 * n)]) / t


def tilted(s, beta):
    """The weighted mean of e^s under weights e^(beta s)."""
    return sum(math.exp((1 + beta) * x) for x in s) / sum(math.exp(beta * x) for x in s)


# --- the mathematics


@pytest.mark.parametrize(("t", "beta"), [(0.5, 0.0), (0.5, 2.0), (0.2, 1.0)])
def test_the_estimates_are_those_of_a_loop(page, batch, t, beta):
    """Equations eq-tt-ng, eq-tt-split and eq-tt-separate, anchor by anchor."""
    found = page["estimates"](*batch, t, beta)
    want = {name: [] for name in found}
    prior = sum(len(scores(batch, t, i)[0]) for i in range(20)) / (20 * 18)
    for i in range(20):
        false, true, p = scores(batch, t, i)
        s = false + true
        g, m = tilted(s, beta), len(s)
        weight = sum(math.exp(beta * x) for x in false) / sum(math.exp(beta * x) for x in s)
        split = weight * tilted(false, beta) + (1 - weight) * tilted(true, beta)
        assert split == pytest.approx(g)
        want["oracle"].append(tilted(true, beta))
        want["nothing removed"].append(g)
        released = (g - prior * math.exp(p)) / (1 - prior)
        want["released"].append(max(released, math.exp(-1 / t)))
        sums = []
        for power in (1 + beta, beta):
            mean = sum(math.exp(power * x) for x in s) / m - prior * math.exp(power * p)
            sums.append(max(mean, (1 - prior) * math.exp(-power / t)))
        separate = min(max(sums[0] / sums[1], math.exp(-1 / t)), math.exp(1 / t))
        want["separate"].append(separate if beta else want["released"][-1])
        want["weight"].append(weight)
        want["false part"].append(weight * tilted(false, beta))
        want["subtracted"].append(prior * math.exp(p))
    for name, values in want.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-6), name


def test_hardness_lifts_the_weighted_mean_by_the_formula(batch):
    """Equation eq-tt-growth, and the exercise's limits."""
    for i in (0, 7, 13):
        false, true, _ = scores(batch, 0.5, i)
        s = np.array(false + true)
        for beta in (0.0, 1.0, 3.0):
            r, q = (np.exp(k * s) / np.exp(k * s).sum() for k in (1 + beta, beta))
            slope = (math.log(tilted(s, beta + 1e-5)) - math.log(tilted(s, beta))) / 1e-5
            assert slope == pytest.approx((r - q) @ s, abs=1e-4)
            assert slope > 0
        assert tilted(s, 0.0) == pytest.approx(np.exp(s).mean())
        assert tilted(s, 200.0) == pytest.approx(np.exp(s.max()), rel=1e-6)


@pytest.mark.parametrize(("tau", "t"), [(0.1, 0.5), (0.02, 0.2)])
def test_the_threshold_is_where_the_library_clamps(page, tau, t):
    """Aligned anchors all at the same cosine c with their negatives: g = e^(c/t)."""
    limit = page["threshold"](tau, t)
    for factor, clamped in ((0.98, 1.0), (1.02, 0.0)):
        c = t * math.log(factor * limit)
        gram = torch.full((4, 4), c, dtype=torch.float64).fill_diagonal_(1.0)
        z = torch.linalg.cholesky(gram)
        found = losses.clamp_share(z, z, temperature=t, beta=0.0, tau_plus=tau)
        assert found == clamped


def test_the_oracle_of_the_exercise(page, batch, capsys):
    z1, z2, labels = batch
    given = {**page, "test_batches": [(z1.float(), z2.float(), labels)], "batch": 10}
    PAGE.run("solution-oracle", into=given)  # it asserts
    anchors = [scores((z1, z2, labels), 0.5, i) for i in range(20)]
    each = [math.log1p(18 * tilted(true, 1.0) / math.exp(p)) for _, true, p in anchors]
    assert f"oracle {np.mean(each):.4f}" in capsys.readouterr().out


# --- effects


def table(corners, seeds=(0, 1, 2), noise=None):
    """A frame of runs from {(t, tau_plus, beta): accuracy} and noise by corner and seed."""
    rows = []
    for (t, tau, beta), value in corners.items():
        cell = {"temperature": t, "tau_plus": tau, "beta": beta, "debias": "released"}
        cell |= {"code": "one", "clamp_share": 0.7 if tau and not beta else 0.0}
        for seed in seeds:
            extra = noise(tau, beta, seed) if noise else 0.0
            accuracy = {"knn": value + 0.05 * seed + extra, "linear": value + extra}
            rows.append({**cell, "seed": seed, **accuracy})
    return pd.DataFrame(rows)


SQUARE = {(0.5, 0.0, 0.0): 0.5, (0.5, 0.1, 0.0): 0.52, (0.5, 0.0, 1.0): 0.6, (0.5, 0.1, 1.0): 0.7}


def test_effects_are_contrasts_seed_by_seed(page):
    def noise(tau, beta, seed):
        return 0.01 * seed * (1 if tau and beta else 0)

    found = page["effects"](table(SQUARE, noise=noise), "knn").loc[0.5, 0.1, 1.0]
    both = 0.7 + np.array([0, 0.01, 0.02])
    want = {
        "debiasing": (0.02 + both - 0.6) / 2,
        "hardness": (0.1 + both - 0.52) / 2,
        "interaction": (both - 0.6) - 0.02,
    }
    assert list(found.index) == list(want)
    for effect, values in want.items():
        row = found.loc[effect]
        assert row["difference"] == pytest.approx(values.mean())
        assert row["se"] == pytest.approx(values.std(ddof=1) / 3**0.5)
        assert row["n"] == 3
        assert row["high"] - row["low"] == pytest.approx(2 * 4.302653 * row["se"], rel=1e-5)


def test_effects_agree_with_a_regression(page):
    """Least squares with switches coded -1, +1 and a level for each seed."""
    draw = np.random.default_rng(0)
    df = table(SQUARE, noise=lambda *_: draw.normal(0, 0.02))
    d, h = (np.where(df[name] > 0, 1.0, -1.0) for name in ("tau_plus", "beta"))
    levels = pd.get_dummies(df["seed"]).to_numpy(float)
    fit = np.linalg.lstsq(np.column_stack([d, h, d * h, levels]), df["knn"], rcond=None)[0]
    found = page["effects"](df, "knn")["difference"].to_numpy()
    np.testing.assert_allclose(found, [2 * fit[0], 2 * fit[1], 4 * fit[2]], atol=1e-12)


def test_a_square_needs_its_four_corners_on_one_seed(page):
    df = table(SQUARE)
    assert len(page["effects"](df[df["beta"] == 0], "knn")) == 0
    lone = (df["tau_plus"] > 0) & (df["beta"] > 0) & (df["seed"] > 0)
    found = page["effects"](df[~lone], "knn")
    assert (found["n"] == 1).all()
    assert "nan" not in page["shown"](found).to_string()
    assert page["tally"](found) == []
    (line,) = page["sentences"](df[~lone], "knn")
    assert "one seed" in line
    separate = df.assign(debias="separate", knn=0.0)
    found = page["effects"](pd.concat([df, separate[lone]]), "knn")
    assert found.loc[(0.5, 0.1, 1.0, "interaction"), "difference"] == pytest.approx(0.08)


def test_squares_across_versions_of_the_code_are_marked(page):
    df = table(SQUARE)
    df.loc[(df["seed"] == 2) & (df["beta"] > 0), "code"] = "another"
    found = page["effects"](df, "knn")
    assert (found["mixed"] == 1).all()
    assert "(1 pair across code versions)" in page["shown"](found).iloc[0]["difference ± se"]


def test_sentences_name_the_effect_and_the_clamp(page):
    df = table({**SQUARE, **{(0.2, *k[1:]): v for k, v in SQUARE.items()}})
    first, second = page["sentences"](df, "linear")
    assert first.startswith("t = 0.5, τ⁺ = 0.1, β = 1: debiasing +6.0 ± 0.0")
    assert "interaction +8.0 ± 0.0" in first
    assert "70% with debiasing alone, 0% with both" in first
    assert second.startswith("t = 0.2")
    lines = page["tally"](page["effects"](df, "linear"))
    assert [line.split(":")[0] for line in lines] == ["debiasing", "hardness", "interaction"]
    assert "over 2 squares" in lines[0]


def test_the_figure_has_a_row_a_square(page):
    switches = itertools.product((1.0, 2.0, 8.0), (0, 1), (0, 1))
    corners = {(0.5, 0.1 * d, b * h): 0.5 for b, d, h in switches}
    table_of = page["effects"](table(corners), "linear")
    page["effects_figure"](table_of, "linear")
    names = [label.get_text() for label in plt.gca().get_yticklabels()]
    plt.close("all")
    assert names == ["β = 1", "β = 2", "β = 8"]


def test_the_best_of_each_corner(page):
    low = {(0.2, 0.0, 0.0): 0.65}
    best = page["best_corners"](page["cornered"](table(SQUARE | low)), "linear")
    assert best.loc["neither", "t"] == "0.2"
    assert best.loc["neither", "of cells"] == 2
    assert best.loc["both", "minus neither"] == "+5.0 ± 0.0"
    assert best.loc["neither", "minus neither"] == ""


# --- what is read


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_recorded_section_reads_whole_squares_in_one_setting(page, tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    page = PAGE.run("lab-read", into=dict(page))
    same = page["same"]
    listed = study(page["recorded"])
    runs = [r for r in listed if {k: v for k, v in vars(r).items() if k in same} == same]
    runs = [r for r in runs if r.method in ("nt_xent", "debiased", "hard")]
    assert page["planned"] == len(runs)
    cells = {(r.temperature, r.tau_plus, r.beta) for r in runs}
    whole = [
        (t, tau, b)
        for t, tau, b in cells
        if tau and b and {(t, 0.0, 0.0), (t, tau, 0.0), (t, 0.0, b)} <= cells
    ]
    assert len(whole) >= 3
    assert len(page["lab"]) == 0  # the store is empty


def test_the_papers_numbers_are_told_as_a_difference():
    page = PAGE.define("paper-table")
    exec(PAGE.code["paper-words"].split("Markdown(")[0], page)
    assert page["debiased"] - page["plain"] == pytest.approx(4.11)
    assert page["both"] - page["debiased"] == pytest.approx(3.18)
    assert round(page["plain"] + page["both"] - page["debiased"], 2) == 83.33


def test_the_lab_form_asks_for_recorded_runs_only(monkeypatch):
    given = notebooks.profile(project_root(), "lab").get(f"{PAGE.name}.ipynb")
    if given is None:
        pytest.skip("not in the lab profile yet")
    asked: list[Run] = []
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: asked.extend(wanted) or [])
    page = PAGE.run(**given)
    exec(PAGE.code["network"].split("one = ")[0], page)  # the base, without the network
    with pytest.raises(ValueError, match="none given"):  # no Records: nothing was recorded
        PAGE.run("train", into=page)
    assert asked
    assert {r.digest for r in asked} <= {r.digest for r in study()}
