"""The page on debiasing both sums: its theorems on random input, and what it says of a table."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from torch.nn import functional as F

from hcl import losses, runs, sweeps
from hcl.runs import Record, Run

PAGE = Page("hardness/separate-debiasing")


@pytest.fixture(scope="module")
def page():
    cells = ("identities", "moments", "bias", "bias-table", "bias-words", "one-positive")
    cells += ("packing", "packing-figure", "packing-words", "free", "free-words", "views")
    cells += ("views-words", "train", "levels", "paired", "paired-figure", "verdict")
    return PAGE.define(*cells)


# --- the mathematics


def law(seed, points=7):
    """A random finite law: scores of false and of true candidates, their masses, and the prior."""
    draw = np.random.default_rng(seed)
    s = draw.uniform(-2, 2, size=(2, points))
    masses = draw.dirichlet(np.ones(points), size=2)
    return s, masses, draw.uniform(0.05, 0.95)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
def test_the_theorems_hold_for_finite_laws(seed, beta):
    """Mixture, its derivative, the error and the exact quotient, from the definitions."""
    (s_false, s_true), (m_false, m_true), tau = law(seed)
    s = np.concatenate([s_false, s_true])
    p = np.concatenate([tau * m_false, (1 - tau) * m_true])
    false = np.arange(len(s)) < len(s_false)

    def tilt(beta):
        q = p * np.exp(beta * s)
        return q / q.sum()

    q = tilt(beta)
    weight = q[false].sum()
    z = [(m * np.exp(beta * x)).sum() for m, x in ((m_false, s_false), (m_true, s_true))]
    assert weight == pytest.approx(tau * z[0] / (tau * z[0] + (1 - tau) * z[1]))
    means = [(q[k] * s[k]).sum() / q[k].sum() for k in (false, ~false)]
    slope = (tilt(beta + 1e-6)[false].sum() - weight) / 1e-6
    assert slope == pytest.approx(weight * (1 - weight) * (means[0] - means[1]), abs=1e-5)

    g = (q * np.exp(s)).sum()
    g_false, g_true = ((q[k] * np.exp(s[k])).sum() / q[k].sum() for k in (false, ~false))
    released = (g - tau * g_false) / (1 - tau)
    error = (weight - tau) * (g_false - g_true) / (1 - tau)
    assert released - g_true == pytest.approx(error)
    sums = [
        (p * np.exp(k * s)).sum() - tau * (m_false * np.exp(k * s_false)).sum()
        for k in (1 + beta, beta)
    ]
    assert sums[0] / sums[1] == pytest.approx(g_true)


def test_the_page_checks_its_identities_on_ten_thousand_anchors(page):
    found = page["identities"](10_000, 3)
    assert len(found) == 10_000
    assert list(found) == ["mixture", "error", "exact"]
    assert found.max().max() < 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_the_limits_of_both_formulas(seed):
    (s_false, s_true), (m_false, m_true), tau = law(seed)

    def tilted(s, m, beta):
        w = np.log(m) + beta * s
        w = np.exp(w - w.max())
        return (w * np.exp(s)).sum() / w.sum()

    beta = 3000.0
    both = np.concatenate([s_false, s_true])
    masses = np.concatenate([tau * m_false, (1 - tau) * m_true])
    found = (tilted(both, masses, beta) - tau * tilted(s_false, m_false, beta)) / (1 - tau)
    false, true = np.exp(s_false.max()), np.exp(s_true.max())
    want = false if false >= true else true + tau / (1 - tau) * (true - false)
    assert found == pytest.approx(want, rel=1e-3)
    assert tilted(s_true, m_true, beta) == pytest.approx(true, rel=1e-3)


def estimate(x, tau, beta):
    """F of the theorem for the x of the other classes (..., K - 1)."""
    w = (1 - tau) / x.shape[-1]
    return (tau + w * (x ** (1 + beta)).sum(-1)) / (tau + w * (x**beta).sum(-1))


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("tau", [0.02, 0.25, 0.7])
def test_no_classes_beat_the_root(page, tau, beta):
    """The least F over 20,000 random cosines, also near the bound, is the theorem's."""
    draw = np.random.default_rng(0)
    c = page["best_cosine"](beta, tau)
    root = math.exp((c - 1) / page["t"])
    assert 0 < root < 1
    assert (1 - tau) * root ** (1 + beta) + (1 + beta) * tau * root == pytest.approx(beta * tau)
    least = (1 + beta) * root / beta
    assert estimate(np.full((1, 3), root), tau, beta)[0] == pytest.approx(least)
    near = np.clip(root * (1 + 0.1 * draw.normal(size=(10_000, 3))), 1e-9, 1)
    for x in (near, draw.uniform(0, 1, size=(10_000, 3))):
        assert estimate(x, tau, beta).min() >= least * (1 - 1e-12)


def test_the_root_goes_to_one_as_the_theorem_says(page):
    """y solves (1 - tau) e^-y = tau (y - 1)."""
    tau, beta = 0.1, 1e5
    y = (1 - page["best_cosine"](beta, tau)) / page["t"] * (1 + beta)
    assert (1 - tau) * math.exp(-y) == pytest.approx(tau * (y - 1), rel=1e-3)


def test_the_released_loss_gathers_classes_where_the_theorem_says():
    """Four classes in four dimensions: the optimiser on hcl.losses finds c*."""
    given = {"packing_betas": [1.0, 2.0], "starts": 1, "copies": 4}
    page = PAGE.define("packing", "packing-figure", **given)
    vectors = page["pack"]("released", 4, 4)
    for beta, v in zip(given["packing_betas"], vectors, strict=True):
        cosines = (v @ v.T)[~torch.eye(4, dtype=torch.bool)]
        want = torch.full_like(cosines, page["best_cosine"](beta, 2 / 14))
        torch.testing.assert_close(cosines, want, atol=1e-5, rtol=0)
    for v in page["pack"]("separate", 4, 4):
        assert page["largest_cosine"](v) == pytest.approx(-1 / 3, abs=1e-5)


def test_aligned_classes_make_the_separate_loss_that_of_true_negatives(page):
    draw = torch.Generator().manual_seed(2)
    v = F.normalize(torch.randn(5, 4, generator=draw, dtype=torch.float64), dim=1).repeat(3, 1)
    for beta in (0.0, 1.0, 3.0):
        both = [page["class_loss"](kind, v, v, 5, beta) for kind in ("separate", "true negatives")]
        torch.testing.assert_close(*both)
    released = page["class_loss"]("released", v, v, 5, 3.0)
    assert released > both[1] + 0.1


@pytest.mark.parametrize("beta", [16.0, 1000.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_doubles_saturate_the_loss_stays_finite(beta, dtype):
    z = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]], dtype=dtype)
    z = z.repeat(3, 1).requires_grad_()
    loss = losses.hard(z, z, beta=beta, tau_plus=4 / 22, debias="separate")
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


# --- the clusters


def test_moments_of_a_cluster(page):
    """In three dimensions the normaliser is sinh(k) / k; and by numbers in more."""
    mu, v, kappa = np.array([0.0, 0.0, 1.0]), np.array([[0.3, -0.2, 0.5]]), 4.0
    k = np.linalg.norm(kappa * mu + v[0])
    want = math.log(math.sinh(k) / k * kappa / math.sinh(kappa))
    assert page["log_moment"](v, mu, kappa)[0] == pytest.approx(want)
    means, labels, z = page["cluster_batch"](0, 30.0)
    first = z[:, labels == labels[0]].flatten(0, 1).numpy()
    v = 3 * first[:1]
    want = np.exp(first[1:] @ v[0])
    found = math.exp(page["log_moment"](v, means[labels[0]], 30.0)[0])
    assert abs(want.mean() - found) < 5 * want.std() / len(want) ** 0.5


def test_an_estimate_is_that_of_a_loop(page):
    draw = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(2, 6, 5, generator=draw, dtype=torch.float64), dim=2)
    t, beta, tau = page["t"], 1.5, 0.1
    both, want = z.flatten(0, 1).numpy(), []
    tops, bottoms = page["raw_sums"](z.flatten(0, 1), beta, tau)
    for i in range(12):
        s = np.delete(both @ both[i], [i, (i + 6) % 12]) / t
        p = both[i] @ both[(i + 6) % 12] / t
        top, bottom = (np.exp(k * s).mean() - tau * math.exp(k * p) for k in (1 + beta, beta))
        assert (tops[i], bottoms[i]) == pytest.approx((top, bottom))
        top, bottom = (
            max(x, (1 - tau) * math.exp(-k / t)) for x, k in ((top, 1 + beta), (bottom, beta))
        )
        want.append(min(max(top / bottom, math.exp(-1 / t)), math.exp(1 / t)))
    batch = page["negatives"].Batch(*z, t)
    assert page["estimate"](batch, beta, tau, "separate") == pytest.approx(np.mean(want))


def test_more_positives_shrink_the_error(page):
    few, many = (page["quotient_error"](2000, n, 1.0, 4, seed=1) for n in (1, 2000))
    assert many < few


# --- what it says


def frame(values):
    """Runs of three seeds from {(subtracts, t): accuracy}."""
    rows = [
        {"subtracts": name, "temperature": t, "seed": seed, "clamp_share": 0.0, "code": "one"}
        | {"knn": a + 0.05 * seed + 0.001 * seed * (t < 0.3), "linear": a + 0.05 * seed}
        for (name, t), a in values.items()
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def test_the_verdict_follows_the_interval(page):
    df = frame({
        ("hardness alone", 0.5): 0.6, ("separate, τ⁺ = 0.1", 0.5): 0.7,
        ("hardness alone", 0.2): 0.65, ("separate, τ⁺ = 0.1", 0.2): 0.5,
    })  # fmt: skip
    first, second = page["verdict"](df, "knn")
    assert "+10.0 ± 0.0 points" in first
    assert "is above zero" in first
    assert "is below zero" in second
    (line,) = page["at_best"](df, "knn")
    assert "(t = 0.5) minus hardness alone (t = 0.2): +" in line
    assert page["at_best"](df[df["subtracts"] != "hardness alone"], "knn") == []


def test_the_table_has_a_row_an_arm_and_temperature(page):
    table = page["levels"](frame({("SimCLR", 0.2): 0.5, ("SimCLR", 0.5): 0.4}))
    assert table["t"].tolist() == [0.5, 0.2]
    assert table["kNN"][0] == "45.0 ± 5.0"


def test_the_words_on_the_packing_count(page):
    ends = {"true negatives": (-0.333, -0.333), "separate": (-0.333, 0.1), "released": (0, 0.9)}
    rows = [
        {"K": 4, "d": 3, "negatives": kind, "beta": b, "cosine": c}
        for kind, cosines in ends.items()
        for b, c in zip((1.0, 2.0), cosines, strict=True)
    ]
    (line,) = page["packing_words"](pd.DataFrame(rows))
    assert "at 1 of 2 β; the released formula ends at 0.900 for β = 2" in line


def test_the_words_on_free_points_name_those_that_tear(page):
    columns = ["partners", "negatives", "β", "loss at the simplex", "loss found"]
    columns += ["least cosine in a class", "clamped"]
    rows = [
        ("one", "separate", "1", 1.0, 0.4, 0.9, 1.0),
        ("all", "released", "1", 1.0, 0.4, 1.0, 0),
    ]
    free = pd.DataFrame(rows, columns=columns).set_index(columns[:3])
    (line,) = page["free_words"](free)
    assert line.startswith("one partner, separate, β = 1")
    assert "falls by 0.600; 100% of" in line
    assert page["free_words"](free.iloc[1:]) == ["Every loss stays with aligned classes"]


# --- what is read


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_runs_are_those_of_the_other_pages(monkeypatch):
    asked = []
    monkeypatch.setattr(sweeps, "record", lambda wanted, **_: asked.extend(wanted) or [])
    with pytest.raises(ValueError, match="records"):
        PAGE.run("train")
    shared = Run(
        data="sphere", encoder="mlp", epochs=15, batch=128, lr=0.002, hidden_dim=32, out_dim=16,
        method="hard", beta=1.0, tau_plus=0.0, temperature=0.5, seed=0,
    )  # fmt: skip
    assert shared in asked
    assert len(asked) == 50
    assert {run.seed for run in asked} == {0, 1, 2, 3, 4}


LAB = ("lab-read", "lab-levels", "lab-verdict", "records")


def fake(run, accuracy):
    """A Record of a Run, as if it had been trained."""
    metrics = {"knn": accuracy, "linear": accuracy, "clamp_share": 0.0}
    made = {"commit": "0" * 40, "clean": True, "code": "c", "device": "CPU", "date": "2026"}
    cost = {"seconds": 60.0}
    return Record(run=run, metrics=metrics, history=[], cost=cost, provenance=made)


def test_the_page_can_do_without_records(page, tmp_path, monkeypatch):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    variables = PAGE.run(*LAB, into=dict(page))
    assert len(variables["lab"]) == 0
    assert variables["lines"] == []


def test_the_page_reads_the_proposed_block(page, tmp_path, monkeypatch):
    """As it is to be recorded: the arms of the study file, and both sums debiased."""
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    of_study = [
        run
        for run in sweeps.load_study(page["project_root"]() / "book/profiles/cifar10-lab.yml")
        if run.data_args == {"size": 16, "n_train": 10000} and run.epochs == 10
    ]
    alone = {"method": "hard", "beta": 1.0, "tau_plus": 0.0, "temperature": 0.5}
    base = [r for r in of_study if alone.items() <= vars(r).items() and r.batch == 256]
    one = next(run for run in base if run == Run(**{**vars(run), "anneal": "none", "queue": 0}))
    same = {k: v for k, v in vars(one).items() if k not in ("seed", "tau_plus", "debias")}
    block = [Run(**same, seed=s, tau_plus=0.1, debias="separate") for s in (0, 1, 2)]
    plain = [Run(**same, seed=s, tau_plus=0.0) for s in (0, 1, 2)]
    monkeypatch.setattr(sweeps, "load_study", lambda path: [*block, *plain])
    variables = {**page, "recorded": "cifar10-lab"}
    for run in (*block, *plain):
        runs.save(fake(run, 0.5 + 0.01 * run.seed - 0.02 * (run.tau_plus > 0)), arrays={})
    usual = (
        PAGE.code["lab-read"]
        .replace("beta=[0.0, 1.0]", "beta=[1.0]")
        .replace('["nt_xent", "hard"]', '"hard"')
    )
    exec(compile(usual, "lab-read", "exec"), variables)
    assert len(variables["lab"]) == 6
    assert variables["there"] == variables["planned"] == 3
    PAGE.run("lab-levels", "lab-verdict", into=variables)
    said = "\n".join(variables["lines"])
    assert "separate, τ⁺ = 0.1, minus hardness alone: -2.0 ± 0.0 points, n = 3" in said
