"""The page on the generalisation bound: its lemmas, its theorem, and its checks on small input."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from sklearn.neighbors import NearestCentroid

from hcl import packing

PAGE = Page("hardness/bound")
FUNCTIONS = ("measure", "bounds", "kinds", "bound-figure", "search", "regions-figure", "beyond")
COUNTS = (2, 3, 4, 7)


@pytest.fixture(scope="module")
def page():
    names = ("check-table", "check-words", "search-words", "runs", "learners-words", "needed")
    return PAGE.define(*FUNCTIONS, *names)


def population(seed, C, d, m, spread=2.0):
    """Simplex corners with noise, points (C, m, d) and weights (C, m), and as arrays."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(C, m, d, generator=draw, dtype=torch.float64)
    z = spread * torch.rand(1, generator=draw, dtype=torch.float64) * z
    z = torch.nn.functional.normalize(packing.simplex(C, d)[:, None] + z, dim=-1)
    w = torch.rand(C, m, generator=draw, dtype=torch.float64) + 0.01
    return z, w / w.sum(1, keepdim=True)


def by_hand(z, w):
    """A, D and the error of the nearest mean, with loops, from their definitions."""
    C, m, _ = z.shape
    z, w = z.numpy(), w.numpy()
    means = [sum(w[c, i] * z[c, i] for i in range(m)) for c in range(C)]
    A = D = error = 0.0
    for c, i in itertools.product(range(C), range(m)):
        A += sum(w[c, i] * w[c, j] * np.sum((z[c, i] - z[c, j]) ** 2) for j in range(m)) / C
        others = [z[k, j] for k in range(C) if k != c for j in range(m)]
        D += w[c, i] * min(np.sum((z[c, i] - x) ** 2) for x in others) / C
        nearest = min(range(C), key=lambda k: np.sum((z[c, i] - means[k]) ** 2))
        error += w[c, i] * (nearest != c) / C
    return A, D, error


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the quantities


@pytest.mark.parametrize("C", COUNTS)
def test_measure_is_the_definition(page, C):
    for seed in range(3):
        z, w = population(seed, C, C + 1, 4)
        found = [x.item() for x in page["measure"](z[None], w[None])]
        assert found == pytest.approx(by_hand(z, w))


def test_the_error_is_that_of_a_nearest_centroid_classifier(page):
    z, _ = population(3, 5, 6, 20)
    labels = np.repeat(np.arange(5), 20)
    model = NearestCentroid().fit(z.flatten(0, 1).numpy(), labels)
    wrong = 1 - model.score(z.flatten(0, 1).numpy(), labels)
    equal = torch.full((1, 5, 20), 1 / 20, dtype=torch.float64)
    assert wrong > 0
    assert page["measure"](z[None], equal)[2].item() == pytest.approx(wrong)


def test_a_tie_is_an_error(page):
    z = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]], dtype=torch.float64)[None]
    assert page["measure"](z, torch.ones(1, 2, 1))[2].item() == 1


def test_the_loss_is_the_librarys():
    PAGE.run("measure")  # asserts it


def test_rows_and_labels_become_classes(page):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(30, 6)).astype(np.float32), rng.permutation(np.arange(30) % 4)
    points, w = page["by_class"](z, y)
    assert w.sum(2).tolist() == [[pytest.approx(1.0)] * 4]
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    means = np.stack([unit[y == c].mean(0) for c in range(4)])
    np.testing.assert_allclose((w[..., None] * points).sum(2)[0], means, atol=1e-6)
    for c in range(4):
        rows = torch.cdist(points[0, c], torch.from_numpy(unit[y == c]).double())
        assert rows.amin(1).max() < 1e-6
        assert rows.amin(0).max() < 1e-6


# --- the proofs


@pytest.mark.parametrize("C", COUNTS)
def test_the_lemma_of_one_line(page, C):
    """For random weights; and the splitting of the excess into two parts that are not negative."""
    rng = np.random.default_rng(C)
    for seed in range(20):
        z, w = population(seed, C, C, 3)
        A, D, _ = (x.item() for x in page["measure"](z[None], w[None]))
        mean = (w[..., None] * z).sum(1).numpy()
        weights = rng.random((C, C)) * (1 - np.eye(C))
        weights /= weights.sum(1, keepdims=True)
        assert 2 * C - 2 * (weights * (mean @ mean.T)).sum() + 1e-12 >= C * D
        spread = (1 - (mean**2).sum(1)).sum()
        xi2 = 2 * C / (C - 1)
        bound = xi2 - 2 / (C * (C - 1)) * (np.sum(mean.sum(0) ** 2) + spread)
        assert bound + 1e-12 >= D
        assert pytest.approx(2 * spread / C) == A
        assert page["excess"](A, D, C) == pytest.approx(A / 2 + (xi2 - D) / 2)


@pytest.mark.parametrize("C", [3, 4, 5, 9])
def test_the_table_of_weights(C):
    """Rows sum to one, each pair of classes has 2 / (C + 1), none is negative."""
    low, high = ((C - k) / ((C + 1) * (C - 2)) for k in (3, 1))
    a, b, u = 0, 1, C
    w = np.full((C, C + 1), 1 / (C + 1))
    w[:, u] = 2 / (C + 1)
    w[:, a], w[:, b] = low, high
    w[a] = high
    w[b] = low
    w[a, u], w[a, b] = 0, 2 / (C + 1)
    w[b, u], w[b, a] = 4 / (C + 1), 0
    np.fill_diagonal(w, 0)
    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(1), 1)
    pairs = (w[:, :C] + w[:, :C].T)[~np.eye(C, dtype=bool)]
    np.testing.assert_allclose(pairs, 2 / (C + 1))
    for row in (
        r"| $a$ | – | – | $\frac{2}{C+1}$ | $\frac{C-1}{(C+1)(C-2)}$ |",
        r"| $b$ | $\frac4{C+1}$ | $0$ | – | $\frac{C-3}{(C+1)(C-2)}$ |",
    ):
        assert row in PAGE.prose


@pytest.mark.parametrize("C", COUNTS)
def test_means_are_apart_as_the_proof_says(page, C):
    xi2 = 2 * C / (C - 1)
    for seed in range(30):
        z, w = population(seed, C, C + 2, 3, spread=0.5)
        A, D, _ = (x.item() for x in page["measure"](z[None], w[None]))
        mean = (w[..., None] * z).sum(1)
        V = 1 - mean.square().sum(1)
        for a, b in itertools.combinations(range(C), 2):
            g2 = (mean[a] - mean[b]).square().sum().item()
            first = xi2 - (C + 1) / 2 * (xi2 - D) + A / 2 - (V[a] + V[b]).item()
            assert g2 >= first - 1e-12
            assert first >= xi2 - (C + 1) * page["excess"](A, D, C) + A - 1e-12


def test_the_second_part_follows_from_markov(page):
    """The last step: 4 a / (xi^2 - (C + 1) e + 2 a) at the largest a there can be."""
    for C in COUNTS:
        e_0, xi2 = page["threshold"](C), 2 * C / (C - 1)
        for e in np.linspace(e_0, xi2 / (C + 1), 7)[:-1]:
            sizes = np.linspace(0, e - e_0, 9)
            values = 4 * sizes / (xi2 - (C + 1) * e + 2 * sizes)
            assert (np.diff(values) >= 0).all()
            found = page["proved"](torch.tensor([e], dtype=torch.float64), C).item()
            assert found == pytest.approx(values[-1])
        beyond = torch.linspace(xi2 / (C + 1), 3, 20, dtype=torch.float64)
        assert (page["proved"](beyond, C) >= 2 - 1e-9).all()
        edge = page["proved"](torch.tensor([page["empty_from"](C)], dtype=torch.float64), C)
        assert edge.item() == pytest.approx(1)


@pytest.mark.parametrize("C", [3, 5, 10])
def test_the_spare_corner_attains_the_threshold(page, C):
    for p in (1e-2, 1e-4, 1e-6):
        z, w = page["spare_corner"](C, p)
        A, D, error = page["measure"](z, w)
        e = page["excess"](A, D, C).item()
        assert error.item() == pytest.approx(p)
        assert 0 < e - page["threshold"](C) < 4 * p


def test_two_classes_attain_theirs(page):
    """Three points on a circle, with the cosines that the page names."""
    side, top = math.acos(-1 / 4), 0.0
    angles = torch.tensor([top, side, -side], dtype=torch.float64)
    u, a, b = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert (a @ b).item() == pytest.approx(-7 / 8)
    for p in (1e-3, 1e-5):
        z = torch.stack([torch.stack([u, a]), torch.stack([b, b])])[None]
        w = torch.tensor([[p, 1 - p], [0.5, 0.5]], dtype=torch.float64)[None]
        A, D, _ = page["measure"](z, w)
        assert page["excess"](A, D, 2).item() == pytest.approx(7 / 16, abs=4 * p)


def test_the_corollary_in_numbers(page):
    """Wherever the recalled form is finite the excess is below the threshold."""
    for C in (2, 3, 4, 10, 100):
        for t in 10.0 ** np.arange(-5, 3.1, 0.25):
            e = torch.logspace(-8, 1, 400, dtype=torch.float64)
            speaks = page["recalled"](e, C, t).isfinite()
            assert (e[speaks] < page["threshold"](C)).all(), (C, t)


def test_the_recalled_form_is_as_written(page):
    e, C, t = 0.001, 3, 0.25
    tau, eps = math.sqrt(t), e / t
    bracket = (math.sqrt(3) / tau) ** 2 - 2 * C * (1 + 1 / tau) * math.sqrt(eps)
    found = page["recalled"](torch.tensor([e], dtype=torch.float64), C, t).item()
    assert found == pytest.approx(8 * eps / bracket**2)
    assert page["raw"](e, C, t) == pytest.approx(found)
    until = page["speaks_until"](C, t)
    inside, outside = (torch.tensor([until * k], dtype=torch.float64) for k in (0.999, 1.001))
    assert page["recalled"](inside, C, t).item() < 1 <= page["recalled"](outside, C, t).item()


# --- the checks of the page


@pytest.mark.parametrize("seed", [1, 2])
def test_no_kind_of_disturbance_exceeds_the_bound(page, seed):
    draw = torch.Generator().manual_seed(seed)
    for C, kind in itertools.product((2, 3, 6), page["KINDS"]):
        z, w = page["disturbed"](kind, C, C + 1, 60, 5, draw)
        np.testing.assert_allclose(z.norm(dim=-1), 1)
        np.testing.assert_allclose(w.sum(2), 1)
        A, D, error = page["measure"](z, w)
        e = page["excess"](A, D, C)
        assert (e >= -1e-12).all()
        assert (error <= page["proved"](e, C) + 1e-9).all()
        assert (error[e < page["threshold"](C)] == 0).all()


def test_the_page_counts_over_ten_thousand_and_finds_no_exception():
    found = PAGE.run("measure", "bounds", "kinds", "check-table", "check-words")
    checked = found["checked"]
    assert len(checked) >= 10_000
    assert (checked["error"] <= checked["bound"] + 1e-9).all()
    said = found["in_words"](checked, found["temperatures"])
    assert said[0].startswith("Our bound is exceeded in 0 of")


def test_what_exceeds_is_counted(page):
    made = pd.DataFrame(
        {"kind": ["noise"] * 3, "C": 3, "e": [0.1, 0.3, 0.9], "error": [0.2, 0.1, 0.5],
         "bound": [0.0, 0.4, math.inf], 1.0: [0.1, math.inf, math.inf]}
    )  # fmt: skip
    row = page["counted"](made, [1.0]).loc["all"]
    assert row["ours exceeded"] == 1
    assert row["recalled, t = 1 exceeded"] == 1
    assert row["ours < 1"] == 2
    said = page["in_words"](made, [1.0])
    assert "exceeded in 1 of 3" in said[0]
    assert "1 have an excess below" in said[1]
    assert "says something 1 times; the error is 0 in 0" in said[2]
    assert said[3].endswith("0.25")


def test_a_short_search_finds_errors_and_no_exception(page):
    found = page["search"](3, 3, 4, 80, torch.Generator().manual_seed(0))
    wrong = found[found["error"] > 0]
    assert len(found) == 24
    assert len(wrong) > 0
    assert (wrong["e"] > page["threshold"](3)).all()
    assert (wrong["error"] <= wrong["bound"] + 1e-9).all()


def test_learners_are_placed(page):
    made = pd.DataFrame(
        {"learner": ["free points", "X, seed 0"], "C": 5, "e": [0.001, 1.0],
         "error": [0.0, 0.1], "e₀": 0.05, "e₁": 0.325}
    )  # fmt: skip
    free, real = page["placed"](made, 0.5)
    assert "0 lie in the vacuous region, 1 below the threshold" in free
    assert "1 lie in the vacuous region, 0 below" in real
    assert real.endswith("10.0% to 10.0%")


# --- the limits


def test_both_conditions_of_the_recalled_form_are_needed():
    found = PAGE.run("measure", "bounds", "needed")["needed"]
    bracket, eps = found["bracket"], found["ε"]
    assert bracket[0] < 0 < bracket[1]
    assert eps[0] <= 1 < eps[1]
    assert (found["error"] > found["as recalled"]).all()
    assert (found["error"] <= found["ours"]).all()


def test_beyond_the_simplex_the_best_arrangement_is_another():
    found = PAGE.run("beyond")["beyond"]
    gain = found["other: P"] - found["Tammes: P"]
    assert gain.round(9).tolist() == pytest.approx([0.025, 0.0, 6 / 7 - found["Tammes: P"][2]])
    squares = [packing.known_distance(C, d) ** 2 for C, d in ((5, 3), (6, 2), (7, 2))]
    assert found["Tammes: P"].tolist() == pytest.approx(squares)
    assert found["its smallest ‖·‖²"].round(9).tolist()[1:] == [0, 0]
    assert (found["search: P"] <= found["other: P"] + 1e-6).all()
    assert (found["search: P"] >= found["other: P"] - 0.01).all()


def test_views_as_positives(page):
    """The first exercise: the negatives alone draw a class together."""
    for seed, C in itertools.product(range(10), COUNTS):
        z, w = population(seed, C, C + 1, 4, spread=0.3)
        A, D, _ = (x.item() for x in page["measure"](z[None], w[None]))
        assert A / 2 <= (C - 1) / 2 * (2 * C / (C - 1) - D) + 1e-12


def test_the_merged_classes_of_the_exercise():
    found = PAGE.run("measure", "bounds", "solution-merged")["merged"]
    assert (found["e"] / found["e₀"]).tolist() == pytest.approx([2 * C - 1 for C in found["C"]])
    assert (found["error"] * found["C"]).tolist() == pytest.approx([2] * len(found))
    assert "costs 19 times the threshold for ten classes" in PAGE.prose
