"""The first page on graphs: its equations are the library's, its sentences follow the numbers."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page, study
from matplotlib import pyplot as plt
from torch.nn import functional as F

from hcl import graphs, sweeps
from hcl.graphs import GraphBatch

PAGE = Page("graphs/first-look")
TINY = {"n_graphs": 36, "epochs": 1, "batch": 12, "seeds": [0], "raw_seeds": [0], "beta": 0.5}
TABLES = ("train-all", "accuracy-table", "accuracy-words", "records")


@pytest.fixture(scope="module")
def whole():
    """All cells but the tables of accuracies, on few graphs and one epoch."""
    return PAGE.outputs(*(name for name in PAGE.body if name not in TABLES), **TINY)


@pytest.fixture
def page(whole):
    return dict(whole[0])


def random_scores(n=7, g=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    s = 3 * torch.randn(n, g, generator=draw, dtype=torch.float64)
    return s, torch.randint(g, (n,), generator=draw)


def sp(a):
    return math.log1p(math.exp(a))


def sigma(a):
    return 1 / (1 + math.exp(-a))


# --- the mathematics


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


def test_the_page_runs_and_draws(whole):
    _, shown = whole
    drawn = {name for name, output in shown.items() if output.drawn}
    assert drawn == {
        "families", "batch-figure", "views-figure", "push-figure", "pca", "negatives-figure"
    }  # fmt: skip
    assert "would have 1.39" in shown["train-one"].value
    assert '"""' not in shown["take-source"].value + shown["network-source"].value
    assert "def take(" in shown["take-source"].value


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_the_objective_is_as_displayed(page, beta):
    """eq-first-jsd with the weights of eq-first-weights, in plain floats."""
    s, own = random_scores()
    total = 0.0
    for n, g in enumerate(own.tolist()):
        others = [k for k in range(s.shape[1]) if k != g]
        tilt = [math.exp(beta * s[n, k]) for k in others]
        pairs = zip(tilt, others, strict=True)
        total += sp(-s[n, g]) + sum(w / sum(tilt) * sp(s[n, k]) for w, k in pairs)
    eye = torch.eye(s.shape[1], dtype=torch.float64)  # scores of rows of s with these are s
    assert total / len(s) == pytest.approx(graphs.local_global(s, eye, own, beta=beta).item())
    assert total / len(s) == pytest.approx(float(page["by_hand"](s, own, beta)))


def test_the_pushes_are_as_displayed(page):
    """eq-first-push and eq-first-attached: derivatives by the negatives' scores, first is own."""
    scores, beta = [-2.0, -0.5, 1.0, 3.0], 0.7
    q = [math.exp(beta * x) for x in scores]
    q = [w / sum(q) for w in q]
    mean = sum(w * sp(x) for w, x in zip(q, scores, strict=True))
    nce = [math.exp(x) / (1 + sum(map(math.exp, scores))) for x in scores]
    expected = [
        (page["lines"]["InfoNCE"], nce),
        (page["jsd"](), [sigma(x) for x in scores]),
        (page["jsd"](beta=beta, detach_weights=True),
         [w * sigma(x) for w, x in zip(q, scores, strict=True)]),
        (page["jsd"](beta=beta),
         [w * (sigma(x) + beta * (sp(x) - mean)) for w, x in zip(q, scores, strict=True)]),
    ]  # fmt: skip
    for loss, pushes in expected:
        found = page["shares"](torch.tensor(scores), loss)
        np.testing.assert_allclose(found, np.array(pushes) / sum(pushes), rtol=1e-6)
    assert min(expected[-1][1]) < 0  # a pull


def test_the_least_loss_is_the_divergence():
    """eq-first-bound, on random densities over pairs."""
    rng = np.random.default_rng(0)
    p, n = rng.dirichlet(np.ones(9), 2)
    middle = (p + n) / 2
    jsd = ((p * np.log(p / middle)).sum() + (n * np.log(n / middle)).sum()) / 2

    def loss(s):
        return (p * np.logaddexp(0, -s) + n * np.logaddexp(0, s)).sum()

    best = np.log(p / n)
    assert loss(best) == pytest.approx(2 * math.log(2) - 2 * jsd)
    assert all(loss(best + rng.normal(0, 0.5, 9)) > loss(best) for _ in range(50))


def test_weights_are_a_distribution_over_the_other_graphs(page):
    s, own = random_scores(seed=1)
    q = page["weights"](s, own, 0.8)
    torch.testing.assert_close(q.sum(1), torch.ones(len(s)).double())
    assert (q.gather(1, own[:, None]) == 0).all()
    even = page["effective"](torch.zeros_like(s), own, 3.0)
    torch.testing.assert_close(even, torch.full_like(even, s.shape[1] - 1))
    sharp = page["effective"](s, own, 1e4)
    torch.testing.assert_close(sharp, torch.ones_like(sharp))


def test_the_solutions_hold(page):
    blocks = PAGE.solutions()
    assert len(blocks) == 3
    for block in blocks:
        exec(block, page)


# --- helpers


@pytest.mark.parametrize("kind", ["nodes", "edges", "features", "subgraph"])
def test_a_view_is_told_in_the_old_numbers(page, kind):
    one = page["every"].take(torch.tensor([3]))
    before = set(map(tuple, one.edge_index.T.tolist()))
    kept, blank, edges = page["changed"](one, kind, torch.Generator().manual_seed(5))
    after = set(map(tuple, edges.T.tolist()))
    assert set(edges.flatten().tolist()) <= set(kept.tolist())
    if kind == "edges":
        assert after - before
        assert len(kept) == len(one.x)
        return
    among = {(a, b) for a, b in before if {a, b} <= set(kept.tolist())}
    assert after == among
    assert blank.any() == (kind == "features")


def test_a_graph_is_drawn_with_all_its_nodes_and_edges(page):
    edges = torch.tensor([[0, 1, 3, 4], [1, 0, 4, 3]])
    two = GraphBatch(torch.zeros(6, 1), edges, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    found = page["as_networkx"](two, 1)
    assert (sorted(found.nodes), sorted(found.edges)) == ([0, 1, 2], [(0, 1)])
    page["picture"](plt.subplots()[1], found, "C0", "one")
    plt.close("all")


def test_the_benchmark_is_told_as_it_is_on_file(page):
    row = {"epoch": {"released loop": {"ratio": 1.5}, "loader, masks at once": {"ratio": 1.1}},
           "masks": {"released loop": {"ratio": 25.6}}}  # fmt: skip
    made = {"device": "CPU", "threads": 1, "date": "2026-01-02T00:00:00"}
    said = page["benchmark_words"](
        {"data": {"a": row, "b": {"skipped": "not there"}}, "provenance": made}
    )
    assert said[0].startswith("a: the loop takes 26 times our time for the masks")
    assert "1.50 times for a whole epoch" in said[0]
    assert said[1:] == ["measured on CPU, 1 thread, 2026-01-02"]


def test_the_effective_number_is_told_with_the_scores(page):
    s, own = random_scores(40, 6, seed=2)
    kin = F.one_hot(own, 6).bool()  # nobody but the own graph is of the own class
    said = page["effective_words"](s, own, kin, 0.0)
    assert "5 negatives count as 5.0 (median)" in said
    assert said.endswith("0% of the weight, 0% without hardness: **not** more.")


def test_accuracies_are_compared_seed_by_seed():
    page = PAGE.define("accuracy-words", beta=1.0)
    page |= {"PLAIN": "InfoGraph β=0", "HARD": "InfoGraph β=1"}
    level = {"raw input": 0.6, "untrained encoder": 0.5, "InfoGraph β=0": 0.7, "InfoGraph β=1": 0.6}
    rows = [
        {"label": label, "seed": seed, "svc": value + 0.01 * (seed % 2), "svc_sd": 0.1,
         "epochs": int("Info" in label)}
        for label, value in level.items() for seed in range(3)
    ]  # fmt: skip
    said = page["accuracy_words"](pd.DataFrame(rows), "svc")
    assert said[0].startswith("InfoGraph β=0 minus untrained encoder: +20.0 ± 0.0 points, n = 3")
    assert said[1].startswith("InfoGraph β=0 minus raw input: +10.0")
    assert said[2].startswith("InfoGraph β=1 minus InfoGraph β=0: -10.0")
    assert said[3] == "within one run, the ten folds differ by ± 10.0 points (sd)"
    one = pd.DataFrame([row for row in rows if row["seed"] == 0])
    assert "interval" not in page["accuracy_words"](one, "svc")[0]


def test_the_lab_form_is_read_and_not_trained():
    """With the study's settings all runs of the table are of the study file."""
    lab = {"study": "tu-lab", "data": "mutag", "n_graphs": 0, "epochs": 200, "batch": 128,
           "lr": 0.001, "beta": 1.0, "seeds": [0, 1, 2, 3, 4], "raw_seeds": [0]}  # fmt: skip
    page = PAGE.define(**lab)
    exec(PAGE.code["world"].split("plain,")[0], page)
    exec(PAGE.code["train-all"].split("df =")[0], page)
    wanted = sweeps.expand(page["base"], page["grid"])
    assert len(wanted) == 1 + 3 * 5
    assert {r.digest for r in wanted} <= {r.digest for r in study("tu-lab")}
