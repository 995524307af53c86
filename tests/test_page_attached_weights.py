"""The page on attached weights: its proposition and bounds on random input, and what it says."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from torch.nn import functional as F

from hcl import losses, runs, sweeps
from hcl.runs import Record, Run

PAGE = Page("hardness/attached-weights")


@pytest.fixture(scope="module")
def page():
    cells = ("check", "bounds", "train", "picture", "counts", "during", "during-words")
    cells += ("levels", "paired", "verdict", "why", "why-words")
    return PAGE.define(*cells)


# --- the proposition


def anchor_loss(s, p, t, beta, tau, Q, weights_of=None):
    """The loss of one anchor, from the page's formulas in plain numbers."""
    w = np.exp(beta * (s if weights_of is None else weights_of))
    g = (w * np.exp(s)).sum() / w.sum()
    ng = max(Q * (g - tau * math.exp(p)) / (1 - tau), Q * math.exp(-1 / t))
    return math.log(1 + ng * math.exp(-p))


def slope(function, s, j, step=1e-6):
    up, down = s.copy(), s.copy()
    up[j] += step
    down[j] -= step
    return (function(up) - function(down)) / (2 * step)


@pytest.mark.parametrize("seed", range(12))
def test_the_gradient_is_the_propositions(seed):
    draw = np.random.default_rng(seed)
    t, beta, tau = draw.choice([0.2, 0.5, 1.0]), draw.uniform(0.1, 4), draw.choice([0.0, 0.05])
    s, p, Q = draw.uniform(-1, 1, size=9) / t, draw.uniform(-0.5, 0.3) / t, 7.0
    q = np.exp(beta * s) / np.exp(beta * s).sum()
    g = (q * np.exp(s)).sum()
    ng = Q * (g - tau * math.exp(p)) / (1 - tau)
    live = ng > Q * math.exp(-1 / t)
    gamma = live * Q * g / ((1 - tau) * (math.exp(p) + ng))
    attached, detached = np.empty(9), np.empty(9)
    for j in range(9):
        attached[j] = slope(lambda x: anchor_loss(x, p, t, beta, tau, Q), s, j)
        detached[j] = slope(lambda x: anchor_loss(x, p, t, beta, tau, Q, s), s, j)
    np.testing.assert_allclose(
        attached, gamma * q * ((1 + beta) * np.exp(s) / g - beta), rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(detached, gamma * q * np.exp(s) / g, rtol=1e-4, atol=1e-7)
    if live:
        clear = np.abs(attached) > 1e-7  # of the differences' rounding
        assert ((attached < 0) == (np.exp(s) < beta / (1 + beta) * g))[clear].all()
        assert (detached > -1e-7).all()
        assert attached.sum() == pytest.approx(gamma, rel=1e-5)
        step = 1e-6
        pull = anchor_loss(s, p + step, t, beta, tau, Q) - anchor_loss(s, p - step, t, beta, tau, Q)
        assert attached.sum() + pull / (2 * step) == pytest.approx(0, abs=1e-6)
    else:
        assert (attached == 0).all()


@pytest.mark.parametrize("debias", ["released", "separate"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_library_attracts_below_the_threshold(page, debias, beta):
    """Each score's derivative by autograd of hcl.losses.hard, against sums in a loop."""
    t, tau, images = 0.5, 0.02, 12
    draw = torch.Generator().manual_seed(3)
    z1, z2, u = page["random_views"](images, 4, 0.5, draw)
    z2 = F.normalize(z1 - 0.8 * z2, dim=1)  # no near positives: no clamp binds
    options = {"beta": beta, "tau_plus": tau, "debias": debias}
    found = page["score_gradient"](z1, z2, u, t, **options)
    z, counted = torch.cat([z1, z2]).numpy(), 0
    for i in range(2 * images):
        partner = (i + images) % (2 * images)
        s = np.concatenate([np.delete(z @ z[i], [i, partner]), u[i].numpy() @ z[i]]) / t
        p = z[partner] @ z[i] / t
        sums = [np.exp(k * s).mean() for k in (1 + beta, beta)]
        if debias == "separate":
            sums = [x - tau * math.exp(k * p) for x, k in zip(sums, (1 + beta, beta), strict=True)]
        below = np.exp(s[-4:]) < beta / (1 + beta) * sums[0] / sums[1]
        assert ((found[i].numpy() < 0) == below).all()
        counted += below.sum()
    assert 0 < counted < found.numel()


def test_detached_and_clamped_anchors_attract_nothing(page):
    views = page["random_views"](12, 4, 0.5, torch.Generator().manual_seed(4))
    fixed = page["score_gradient"](*views, 0.5, beta=2.0, tau_plus=0.0, detach_weights=True)
    assert (fixed > 0).all()
    near = views[0], views[0], views[2]
    assert losses.clamp_share(views[0], views[0], beta=0.5, tau_plus=0.9) == 1
    still = page["score_gradient"](*near, 0.5, beta=0.5, tau_plus=0.9)
    assert (still == 0).all()


def test_the_opening_example():
    g = (4 * 4 + 1.1 * 1.1) / 5.1
    assert g == pytest.approx(3.375, abs=5e-4)
    assert "\\approx3.375<3.4" in PAGE.prose
    fixed = 0.8 * 4 + 0.2 * 1.1
    assert fixed == pytest.approx(3.42)


def test_the_directional_derivative_has_a_covariance():
    draw = np.random.default_rng(5)
    s, v, beta = draw.normal(size=8), draw.normal(size=8), 1.7

    def g(s):
        w = np.exp(beta * s)
        return (w * np.exp(s)).sum() / w.sum()

    q = np.exp(beta * s) / np.exp(beta * s).sum()
    x = np.exp(s)
    want = (q * x * v).sum() + beta * ((q * x * v).sum() - (q * x).sum() * (q * v).sum())
    assert (g(s + 1e-6 * v) - g(s - 1e-6 * v)) / 2e-6 == pytest.approx(want, rel=1e-6)


# --- the theorem


@pytest.mark.parametrize("beta", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("width", [0.3, 1.0, 3.0])
def test_the_bounds_hold_and_the_nearest_is_never_attracted(page, beta, width):
    draw = torch.Generator().manual_seed(6)
    s = width * torch.randn(2000, 12, generator=draw, dtype=torch.float64)
    spread, (below, pull) = s.amax(1) - s.amin(1), page["attraction"](s, beta)
    for row, seen, force in zip(s[:200].numpy(), below[:200].numpy(), pull[:200], strict=True):
        w, x = np.exp(beta * row), np.exp(row)
        g = (w * x).sum() / w.sum()
        assert (seen == (x < beta / (1 + beta) * g)).all()
        bracket = w / w.sum() * ((1 + beta) * x / g - beta)
        assert float(force) == pytest.approx(-bracket[bracket < 0].sum())
    assert not below.gather(1, s.argmax(1, keepdim=True)).any()
    alpha = below.double().mean(1)
    assert not below[spread <= math.log((1 + beta) / beta)].any()
    wide = spread > math.log((1 + beta) / beta)
    r = spread[wide].exp()
    odds = r**beta * (beta * r - 1 - beta)
    assert (alpha[wide] / (1 - alpha[wide]) < odds).all()
    assert (pull <= page["pull_bound"](spread, beta) + 1e-12).all()
    assert (page["pull_bound"](spread, beta) < beta).all()


def test_large_hardness_attracts_all_but_the_nearest(page):
    s = torch.tensor([[0.0, 0.5, 1.0, 2.0, 2.0]], dtype=torch.float64)
    below, pull = page["attraction"](s, 200.0)
    assert below.tolist() == [[True, True, True, False, False]]
    assert pull.item() < 1e-6


def test_normal_scores(page):
    draw = torch.Generator().manual_seed(7)
    s = 0.8 * torch.randn(1, 400_000, generator=draw, dtype=torch.float64)
    for beta in (0.5, 1.0, 2.0):
        found = page["attraction"](s, beta)[0].double().mean().item()
        assert found == pytest.approx(page["normal_share"](beta, 0.8), abs=0.01)


def test_the_settings_of_the_check_make_ten_thousand_anchors(page):
    settings = page["SETTINGS"]
    assert len(settings) == 40
    assert page["anchors"] // (2 * len(settings)) * 2 * len(settings) == 10_000
    assert {tau for *_, tau in settings} >= {0.0, 0.1}


# --- the figures' numbers


def test_forces_have_mean_one(page):
    draw = torch.Generator().manual_seed(8)
    z = F.normalize(torch.randn(20, 6, generator=draw, dtype=torch.float64), dim=1)
    cosines = page["others"](z)
    want = [[float(z[i] @ z[j]) for j in range(20) if j != i] for i in range(20)]
    np.testing.assert_allclose(cosines, want)
    for detach in (False, True):
        force = page["forces"](cosines / 0.5, 1.0, detach)
        torch.testing.assert_close(force.mean(1), torch.ones(20, dtype=torch.float64))
    flat = page["on_the_hardest"](z, 0.5, 1.0, True)
    assert flat < page["on_the_hardest"](z, 0.5, 1.0, False)
    top = cosines.sort(1, descending=True)[0][:, :1].div(0.5).mul(2).exp()
    share = (top[:, 0] / (cosines / 0.5 * 2).exp().sum(1)).mean().item()
    assert flat == pytest.approx(share)  # a tenth of 19 is one


def test_the_gap_between_two_curves(page):
    points = [("SimCLR", 0.2, 0.5), ("detached", 0.4, 0.7), ("attached", 0.3, 0.65)]
    points += [("attached", 0.9, 0.0)]  # sharper than all others: left out
    rows = [{"weights": w, "t": 0.5, "sharpness": x, "accuracy": a} for w, x, a in points]
    count, gap = page["curve_gap"](pd.DataFrame(rows), 0.5)
    assert (count, gap) == (1, pytest.approx(0.05))
    alone = pd.DataFrame([row for row in rows if row["accuracy"] != 0.65])
    assert page["curve_gap"](alone, 0.5) is None


# --- what it says


def frame(values):
    """Runs of three seeds from {(weights, beta, t): accuracy}."""
    rows = [
        {"weights": w, "beta": b, "temperature": t, "seed": seed, "code": "one"}
        | {"knn": a + 0.05 * seed + 0.001 * seed * (w == "detached"), "linear": a}
        for (w, b, t), a in values.items()
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


CELLS = {
    ("none", 0.0, 0.5): 0.4, ("attached", 1.0, 0.5): 0.6, ("detached", 1.0, 0.5): 0.5,
    ("attached", 1.0, 0.2): 0.5, ("detached", 1.0, 0.2): 0.7,
}  # fmt: skip


def test_the_verdict_follows_the_interval(page):
    first, second = page["verdict"](frame(CELLS), "knn")
    assert first.startswith("t = 0.5, β = 1: detached minus attached -9.9 ± 0.1")
    assert "is below zero" in first
    assert "is above zero" in second
    lines = page["at_best"](frame(CELLS), "knn")
    assert any(
        "detached (β = 1, t = 0.2) minus attached (β = 1, t = 0.5): +10.1" in x for x in lines
    )
    assert any("SimCLR (t = 0.5) minus" in x for x in lines)
    lone = frame({("attached", 1.0, 0.5): 0.6})
    assert page["verdict"](lone, "knn") == page["at_best"](lone, "knn") == []


def test_the_words_on_the_training(page):
    rows = [
        {"epoch": e, "trained": "attached", "seed": s, "false": 0.01, "true": 0.05 * e, "pull": 0.1}
        for e in (0, 6)
        for s in (0, 1)
    ]
    (line,) = page["during_words"](pd.DataFrame(rows))
    assert "from epoch 0 to 6 the share goes from 0% to 30% of the true and from 1% to 1%" in line


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_runs_are_those_of_the_other_pages(monkeypatch):
    asked = []
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: asked.append(wanted) or [])
    page = PAGE.run("train")
    kept, on_the_way, grid = asked
    shared = Run(
        data="sphere", encoder="mlp", epochs=15, batch=128, lr=0.002, hidden_dim=32, out_dim=16,
        method="hard", beta=0.5, tau_plus=0.0, temperature=0.2, seed=4,
    )  # fmt: skip
    assert shared in grid
    assert len(grid) == 70
    assert all(run in grid for run in kept)
    assert {run.epochs for run in on_the_way} == set(page["looks"])


# --- the recorded study


LAB = ("lab-read", "lab-levels", "lab-verdict", "records")


def invent(wanted):
    for run in wanted:
        metrics = dict.fromkeys(("knn", "linear"), 0.5 - 0.02 * run.detach_weights)
        made = {"commit": "0" * 40, "clean": True, "code": "c", "device": "CPU", "date": "2026"}
        record = Record(
            run=run, metrics=metrics, history=[], cost={"seconds": 60.0}, provenance=made
        )
        runs.save(record, arrays={})


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_the_page_can_do_with_none_some_and_all(page, seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    wanted = sweeps.load_study(PAGE.path.parents[1] / "profiles/cifar10-lab.yml")
    invent([r for r in wanted if r.seed in seeds and r.epochs == 10 and r.method == "hard"])
    variables = PAGE.run(*LAB, into=dict(page))
    assert variables["wanted"] == 6
    assert len(variables["lab"]) == 2 * len(seeds)
    assert len(variables["lines"]) == 2 * bool(seeds)
    for line in variables["lines"]:
        assert "detached minus attached -2.0" in line
