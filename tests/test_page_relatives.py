"""The page on HCL's relatives: its formulas by loops, its words on made-up frames, its cells."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, made_up_record, study
from scipy import integrate, stats
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from hcl import compare, losses, runs

PAGE = Page("beyond/relatives")
TINY = {"epochs": 1, "seeds": [0, 1]}


@pytest.fixture(scope="module")
def page():
    """The page up to the weights on one batch, after one epoch of training."""
    return PAGE.run("omega", "in-code", "check", "embed", **TINY)


def views(seed, images=6, d=4):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, images, d, generator=draw, dtype=torch.float64), dim=2)


def rows(z1, z2, t):
    """Of each anchor its positive's score and its negatives', one by one."""
    z, n = torch.cat([z1, z2]), len(z1)
    for i in range(2 * n):
        s = [(z[i] @ z[j]).item() / t for j in range(2 * n) if j % n != i % n]
        yield (z[i] @ z[(i + n) % (2 * n)]).item() / t, s


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the mathematics


@pytest.mark.parametrize(("alpha", "tau"), [(0.6, 0.1), (0.9, 0.02), (0.75, 0.3)])
def test_the_rank_is_inverted_and_the_posterior_is_bayes(page, alpha, tau):
    def true(x):
        return 2 * alpha * (1 - x) + 2 * (1 - alpha) * x

    def false(x):
        return 2 * (1 - alpha) * (1 - x) + 2 * alpha * x

    for phi in (0.1, 0.5, 0.9):
        share, _ = integrate.quad(lambda x: (1 - tau) * true(x) + tau * false(x), 0, phi)
        at = torch.tensor(share, dtype=torch.float64)
        both = (1 - tau) * true(phi) + tau * false(phi)
        posterior = (1 - tau) * page["omega"](at, alpha, tau, 0.5).item()
        assert posterior == pytest.approx((1 - tau) * true(phi) / both)
        assert page["omega"](at, alpha, tau, 1.0).item() == pytest.approx(2 * phi / both)


@pytest.mark.parametrize("b", [0.5, 0.7, 1.0])
def test_weights_have_mean_one_and_the_stated_ends(page, b):
    shares = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    weights = page["omega"](shares, 0.8, 0.1, b)
    assert weights.mean().item() == pytest.approx(1, abs=1e-3)
    one = torch.ones((), dtype=torch.float64)
    A = 0.9 * 0.8 + 0.1 * 0.2
    assert page["omega"](one, 0.8, 0.1, 1.0).item() == pytest.approx(1 / (1 - A))
    assert (page["omega"](shares, 0.8, 0.1, 0.5).diff() < 0).all()
    assert (page["omega"](shares, 0.8, 0.1, 1.0).diff() > 0).all()


def test_the_simulation_meets_the_posterior(page):
    at, true = page["simulated"](0.9, 0.1, bins=10)
    fine = ((torch.arange(10_000) + 0.5) / 10_000).double()
    wanted = 0.9 * page["omega"](fine, 0.9, 0.1, 0.5).view(10, -1).mean(1)
    torch.testing.assert_close(true, wanted, atol=0.01, rtol=0)
    assert at[0].item() == pytest.approx(0.05)


def test_the_lines_of_the_page_against_loops(page):
    t, z1, z2 = 0.4, *views(0, images=9)
    N = 16

    def loop(weigh):
        terms = []
        for p, s in rows(z1, z2, t):
            w = weigh(np.array(s))
            terms.append(math.log1p((w * np.exp(s)).sum() / math.exp(p)))
        return np.mean(terms)

    def ring(s):
        order = np.argsort(-s)
        w = np.zeros(N)
        w[order[1:8]] = 1.0  # half of 16, less int(0.2 * 8) = 1
        return w

    def tilted(s):
        return N * np.exp(1.5 * s) / np.exp(1.5 * s).sum()

    def above(s):
        kept = (s * t >= min(0.3, s.max() * t)).astype(float)
        return N * kept / kept.sum()

    def posterior(s):
        share = torch.tensor([(s <= x).mean() for x in s])
        w = page["omega"](share, 0.8, 0.1, 1.0).numpy()
        return N * w / w.sum()

    for found, weigh, Q in (
        (page["band"](0.2, 0.5), ring, None),
        (page["tilt"](1.5), tilted, N),
        (page["above"](0.3, t), above, N),
        (page["posterior"](0.8, 0.1, 1.0), posterior, N),
        (page["alike"](), np.ones_like, N),
    ):
        value = losses.weighted(z1, z2, found, temperature=t, Q=Q).item()
        assert value == pytest.approx(loop(weigh), abs=1e-12)


def test_many_copies_are_the_decoupled_loss(page):
    z1, z2 = views(1)
    page = page | {}  # the functions read t where they were defined
    t = page["t"]
    pairs = list(rows(z1, z2, t))
    wanted = np.mean([math.log(np.exp(s).sum()) - p for p, s in pairs])
    assert page["copied"](z1, z2).item() == pytest.approx(wanted, abs=1e-9)
    cosines = (z1 * z2).sum(1)
    v = 2 - len(z1) * (cosines / page["sigma"]).exp() / (cosines / page["sigma"]).exp().sum()
    assert v.mean().item() == pytest.approx(1)
    weighed = np.mean(
        [math.log(np.exp(s).sum()) - w * p for (p, s), w in zip(pairs, v.tolist() * 2, strict=True)]
    )
    assert page["pulled"](z1, z2).item() == pytest.approx(weighed, abs=1e-9)


@pytest.mark.parametrize("t", [0.5, 0.1])
def test_the_coupling_is_the_one_factor_between_the_gradients(t):
    coupling = PAGE.define("coupling")["coupling"]
    z1, z2 = views(2)
    found = coupling(z1, z2, t)
    for (p, s), q in zip(rows(z1, z2, t), found, strict=True):
        x = torch.tensor([p, *s], dtype=torch.float64, requires_grad=True)
        (plain,) = torch.autograd.grad(torch.log1p((x[1:] - x[0]).exp().sum()), x)
        (free,) = torch.autograd.grad(x[1:].logsumexp(0) - x[0], x)
        torch.testing.assert_close(plain, q * free)
        N, mean = len(s), np.exp(s).mean()
        assert q.item() == pytest.approx(N * mean / (math.exp(p) + N * mean))


def test_the_checks_of_the_page(page):
    assert len(page["checks"]) == 10
    assert page["checks"][["difference", "of gradients"]].to_numpy().max() < 1e-9


# --- the solutions


def test_where_half_of_the_gradient_is_left(page):
    half, *_ = PAGE.solutions("holds")
    exec(half, page)
    found = page["half"]
    assert round(found[0.5]) == 5
    assert round(found[0.2]) == 68
    assert 7_000 < found[0.1] < 8_000
    assert 4e7 < found[0.05] < 6e7
    B, t = found[0.2], 0.2
    u = math.exp(1 / (2 * 128 * t**2))
    N = 2 * B - 2
    assert N * u / (math.exp(1 / t) + N * u) == pytest.approx(0.5)


def test_the_auc_is_not_alpha(page):
    _, source, _ = PAGE.solutions("holds")
    space = dict(page)
    exec(source, space)
    assert space["auc"] == pytest.approx((1 + 4 * 0.9) / 6, abs=0.005)
    truth = np.r_[np.zeros(1000), np.ones(1000)]
    score = np.r_[space["true"][:1000], space["false"][:1000]]
    assert roc_auc_score(truth, score) == pytest.approx(space["auc"], abs=0.03)


def test_a_relative_of_ones_own(page):
    *_, source = PAGE.solutions("holds")
    space = PAGE.run("numbers", into=dict(page))
    exec(source, space)
    assert 0 < space["own"]["false negatives"] < 1


# --- what stands in tables


def test_weights_in_numbers():
    cosine = torch.tensor([[-math.inf, 0.1, -math.inf, 0.5]] * 12, dtype=torch.float64)
    cosine = torch.cat([cosine, torch.full((12, 8), -0.2, dtype=torch.float64)], dim=1)
    w = torch.where(cosine.isfinite(), 1.0, 0.0).double()
    labels = torch.tensor([0, 1, 0, 0, *[2] * 8])
    found = PAGE.define("numbers")["in_numbers"].__globals__
    found["t"] = 0.5
    found = found["in_numbers"](cosine, w, labels)
    assert found["counts for"] == 10
    assert found["share the weight"] == pytest.approx(10)
    assert found["most similar tenth"] == pytest.approx(0.1)
    share = [sum(w[i, j] for j in range(12) if labels[j] == labels[i]) / 10 for i in range(12)]
    assert found["false negatives"] == pytest.approx(np.mean(share))


def test_the_weights_of_a_batch_add_up(page):
    z1, z2 = page["embed"](range(16))
    for name, how in page["mine"](z1, z2).items():
        _, w = page["weighed"](*how, z1, z2)
        number = {"Ring": 15 - 1, "Ball": 15}.get(name, 30)
        assert w.sum(1).mean().item() == pytest.approx(number), name


def runs_by_batch(gain):
    return pd.DataFrame(
        {"label": label, "batch": B, "temperature": t, "seed": seed,
         "knn": 0.5 + 0.01 * seed + (label != "SimCLR") * gain / B * (1 + 0.01 * (seed - 1.5))}
        for label in ("SimCLR", "DCL", "DCLW") for B in (16, 64) for t in (0.5, 0.1)
        for seed in range(4)
    )  # fmt: skip


def test_batches_in_words():
    found = PAGE.define("batch-table", "batch-words", "paper-table", "paper-words")
    lines = found["batch_words"](runs_by_batch(1.6), "knn")
    assert "DCL at t = 0.5: +10.0 points at a batch of 16, +2.5 at 64" in lines[0]
    assert "of 2 95 % intervals 2 lie above zero and 0 below" in lines[0]
    assert sum("each at its best temperature" in line for line in lines) == 2
    assert all("**beyond**" not in line and "within" not in line for line in lines)
    assert "batch 16: +10.0 ± 0.1 points, 95 % interval +9.8 to +10.2, 4 seeds" in lines[-1]


def test_whether_the_gain_falls_is_judged_over_seeds():
    """The difference of two paired gains by hand, its sign, and when there is none to tell."""
    found = PAGE.define("batch-table", "batch-words", "paper-table", "paper-words")
    steepness, shape = found["steepness"], found["shape"]
    df = runs_by_batch(1.6)
    row = steepness(df, "knn", 0.1)
    each = [1.6 * (1 / 16 - 1 / 64) * (1 + 0.01 * (seed - 1.5)) for seed in range(4)]
    half = stats.t.ppf(0.975, 3) * np.std(each, ddof=1) / 2
    assert row["difference"] == pytest.approx(np.mean(each))
    assert row["high"] - row["low"] == pytest.approx(2 * half)
    assert shape("ours", row).endswith(": falls")
    assert "gain at a batch of 16 minus that at 64 is +7.5 ± 0.0 points" in shape("ours", row)
    assert shape("ours", steepness(runs_by_batch(-1.6), "knn", 0.1)).endswith(": rises")
    noisy = df.assign(knn=df["knn"] + 0.2 * (df["seed"] % 2) * (df["batch"] == 16))
    noisy.loc[noisy["label"] == "SimCLR", "knn"] = 0.5
    assert shape("ours", steepness(noisy, "knn", 0.1)).endswith(": not told apart")
    assert "one seed" in shape("ours", steepness(df[df["seed"] == 0], "knn", 0.1))
    for too_little in (df[df["batch"] == 16], df[df["label"] == "DCL"], df.iloc[:0]):
        assert shape("none", steepness(too_little, "knn", 0.1)) == "none: too little to judge"


def test_beside_the_published_table():
    found = PAGE.define("batch-table", "paper-table")
    ours = runs_by_batch(1.6)
    ours = ours[ours["temperature"] == 0.1].assign(linear=ours["knn"])
    table = found["beside"](ours.replace({"batch": {16: 32}}), "linear")
    assert table.loc[32, ("gain, CIFAR-10, theirs", "DCL")] == "+6.3"
    assert table.loc[32, ("gain, CIFAR-10, ours", "DCL")].startswith("+10.0")
    assert table.loc[256, ("gain, CIFAR-10, ours", "DCLW")] == "–"
    none = found["beside"](ours.iloc[:0], "linear")
    assert set(none[("gain, CIFAR-10, ours", "DCL")]) == {"–"}


def test_the_verdict_names_who_gains():
    found = PAGE.define("batch-table", "paired-table", "verdict")
    df = pd.DataFrame(
        {"label": label, "temperature": t, "seed": seed,
         "knn": 0.5 + 0.02 * seed + t / 10 + gain * (1 + 0.05 * seed)}
        for label, gain in (("SimCLR", 0.0), ("HCL β=1", 0.05), ("Ring", -0.1), ("DCL", 0.06))
        for t in (0.5, 0.2) for seed in range(4)
    )  # fmt: skip
    lines = found["verdict"](df, "knn")
    assert "6 comparisons" in lines[0]
    assert "4 have a 95 % interval above zero, 2 one below" in lines[0]
    assert (
        "against SimCLR at t = 0.5: intervals above zero for HCL β=1, DCL; below for Ring"
        in (lines[1])
    )
    assert "the highest mean is DCL's, at t = 0.5" in lines[-1]


def test_who_mines_in_words():
    who = PAGE.define("numbers-words")["who_mines"]
    columns = ["most similar tenth", "false negatives"]
    table = pd.DataFrame([[0.1, 0.02], [0.5, 0.1], [0.05, 0.01]], ["SimCLR", "HCL", "b"], columns)
    lines = who(table)
    assert lines[0].endswith(": HCL")
    assert lines[1] == "less: b"
    assert "HCL (20%)" in lines[2]


# --- the Records


@pytest.mark.parametrize("seeds", [[], [0], [0, 1]])
def test_recorded_cells_with_nothing_some_and_more(tmp_path, monkeypatch, seeds):
    monkeypatch.setenv("HCL_RUNS", str(tmp_path))
    wanted = [
        r
        for r in study("relatives-lab")
        if r.temperature == 0.1 and r.method in ("nt_xent", "decoupled")
    ]
    assert len(wanted) == 36
    for k, run in enumerate(wanted):
        if run.seed in seeds:
            accuracy = 0.4 + 0.01 * run.seed + 0.001 * k
            metrics = {"loss": 1.0, "knn": accuracy, "linear": accuracy}
            runs.save(made_up_record(run, metrics))
    names = ("lab-read", "lab-table", "lab-words", "paper-table", "paper-words", "records")
    page = PAGE.define("omega", "batch-table", "batch-words", seeds=[0])
    page["small"] = runs_by_batch(1.6)
    page, shown = PAGE.outputs(*names, into=page)
    assert f"{12 * len(seeds)} of 36 are recorded" in shown["lab-read"].text
    assert page["ready"] == (len(seeds) > 1)
    if len(seeds) > 1:
        assert "DCL at t = 0.1" in shown["lab-words"].text
        assert "DCLW" in shown["lab-words"].text
    said = shown["paper-words"].text.splitlines()
    assert "32 minus that at 256 is +4.2 points; no spread is printed" in said[0]
    assert sum(line.endswith(": falls.") for line in said[1:3]) == 2
    assert ("too little" in said[3]) == (len(seeds) < 2)


def test_what_the_sweeps_ask_for(monkeypatch):
    """Nothing is trained: stand-ins answer, and what is asked for is counted."""
    asked = []

    def record(wanted, **options):
        asked.extend(wanted)
        return [
            made_up_record(
                r,
                {
                    "loss": 1.0,
                    "knn": 0.5 + 0.01 * r.seed + 0.001 * k,
                    "linear": 0.6,
                    "uniformity": -0.1 * k,
                },
            )
            for k, r in enumerate(wanted)
        ]

    page = PAGE.run("omega", seeds=[0, 1])
    page["base"] = {
        "data": "sphere",
        "encoder": "mlp",
        "lr": 0.002,
        "hidden_dim": 32,
        "out_dim": 16,
    }
    page["t"] = 0.5
    monkeypatch.setattr("hcl.sweeps.record", record)
    names = ["batch-runs", "batch-table", "batch-figure", "batch-words", "runs", "table"]
    names += ["paired-table", "paired-figure", "verdict", "sweeps", "sweep-words"]
    page, shown = PAGE.outputs(*names, into=page)
    small = [r for r in asked if r.method != "ring"][: 2 * 3 * 2 * 2]
    updates = {r.epochs * (2000 // r.batch) for r in small}
    assert max(updates) - min(updates) <= 5
    assert (
        len({replace(r, study="quick").digest for r in asked}) == 2 * 3 * 2 * 2 + 8 * 2 * 2 + 3 * 2
    )
    assert "BCL b=1" in set(page["df"]["label"])
    assert "Ball, outer 0.1" in shown["sweeps"].value.index
    assert shown["batch-figure"].drawn
    assert shown["paired-figure"].drawn
    largest = shown["sweeps"].value["largest weight"]
    low, high = 0.02 * 0.9 + 0.98 * 0.1, 0.98 * 0.9 + 0.02 * 0.1  # 1 - A and A
    weights = []
    for k in range(1, 127):
        roots = np.roots([low - high, 2 * high, -k / 126])
        phi = next(x for x in roots.real if -1e-9 <= x <= 1 + 1e-9)
        weights.append(2 * phi / (2 * high * (1 - phi) + 2 * low * phi))
    assert largest["BCL b=1, α = 0.9"] == f"{max(weights) / np.mean(weights):.1f}"
    assert "these 6 settings" in shown["sweep-words"].value
    assert "95 % interval" in shown["sweep-words"].value


def test_labels_are_those_of_the_library():
    names = {compare.label(made_up_record(r, {})) for r in study("relatives-lab")}
    assert {"SimCLR", "DCL", "DCLW"} <= names
