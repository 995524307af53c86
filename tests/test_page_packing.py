"""The page on packings: its loss, its propositions and what it says of equal and unequal priors."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from cells import Page
from scipy.optimize import linprog
from torch.nn import functional as F

from hcl import packing

PAGE = Page("hardness/packing")


@pytest.fixture(scope="module")
def page():
    return PAGE.define("check", "shapes", "exceptions", "priors-check", "frequent", "marginal")


def vectors(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1)


# --- the loss of embeddings


def worst_loop(z, rho, t):
    """The worst-case loss of points z (C, n, d), anchor and positive independent, by loops."""
    total = 0.0
    for c in range(len(z)):
        others = [x for k in range(len(z)) if k != c for x in z[k]]
        for anchor, positive in itertools.product(z[c], z[c]):
            worst = max(float(anchor @ x) for x in others)
            total += rho[c] * (worst - float(anchor @ positive)) / t / len(z[c]) ** 2
    return total


def test_worst_loss_against_a_loop(page):
    z, rho = vectors(3, 4, 5, 3), np.array([0.1, 0.2, 0.3, 0.4])
    found = page["worst_loss"](z, torch.from_numpy(rho), 0.5)
    assert found.tolist() == pytest.approx([worst_loop(one.numpy(), rho, 0.5) for one in z])


def test_of_constant_classes_it_is_the_packing_objective(page):
    v, rho = vectors(6, 3), torch.full((6,), 1 / 6, dtype=torch.float64)
    found = page["worst_loss"](page["embedded"](v), rho, 0.5).item()
    assert found == pytest.approx(-packing.objective(v).item(), abs=1e-12)  # 2 t = 1


def test_without_labels_all_constant_classes_are_alike(page):
    for seed in range(5):
        loss = page["marginal_loss"](page["embedded"](vectors(5, 3, seed=seed)), 0.5)
        assert loss.item() == pytest.approx(0, abs=1e-12)
    scattered = page["marginal_loss"](vectors(50, 4, 3, 3), 0.5)
    assert (scattered >= 0).all()


def test_a_large_q_leaves_the_limit():
    """log(1 + Q x) - log Q is above log x, by at most 1 / (Q x)."""
    for Q, x in itertools.product((10.0, 1e4), (math.exp(-4), 1.0, math.exp(4))):
        gap = math.log(1 + Q * x) - math.log(Q) - math.log(x)
        assert 0 <= gap <= 1 / (Q * x)


# --- packings that are not Tammes'


@pytest.mark.parametrize("d", [3, 4, 5, 6])
def test_pyramids_have_the_nearest_cosines_of_the_proof(page, d):
    for classes in range(d + 2, 2 * d):
        v, h = page["pyramid"](classes, d), 1 / (2 * (classes - 1))
        assert v.shape == (classes, d)
        assert torch.allclose(v.norm(dim=1), torch.ones(classes, dtype=torch.float64))
        nearest = packing.nearest_cosines(v)
        assert nearest[0].item() == pytest.approx(-h)
        assert (nearest[1:] <= h**2 + 1e-12).all()
        assert nearest.sum().item() <= -1 / (4 * (classes - 1)) + 1e-12


@pytest.mark.parametrize(("classes", "d"), [(5, 3), (6, 4), (7, 4)])
def test_in_tammes_packings_every_point_has_a_right_angle(classes, d):
    for seed in range(4):
        v = packing.polish(vectors(classes, d, seed=seed), anchors="worst")
        assert packing.nearest_cosines(v).max().item() == pytest.approx(0, abs=1e-7)
        assert packing.nearest_cosines(v).min().item() == pytest.approx(0, abs=1e-6)


# --- priors


def splits(rho):
    """Can weights of pairs be divided as the proof needs? By linear programming."""
    C = len(rho)
    pairs = list(itertools.combinations(range(C), 2))  # x: what the first of a pair gets
    weight, A, b = 2 / (C * (C - 1)), np.zeros((C, len(pairs))), np.array(rho, dtype=float)
    for n, (i, j) in enumerate(pairs):
        A[i, n], A[j, n] = 1, -1
        b[j] -= weight
    return linprog(np.zeros(len(pairs)), A_eq=A, b_eq=b, bounds=(0, weight)).status == 0


@pytest.mark.parametrize("classes", [3, 4, 5])
def test_the_condition_on_priors_is_that_of_the_tournament(page, classes):
    draw = np.random.default_rng(0)
    for rho in draw.dirichlet(np.full(classes, 2.0), size=40):
        assert bool(page["keeps_simplex"](torch.from_numpy(rho))) == splits(rho)


def test_equal_priors_and_their_extremes(page):
    keeps = page["keeps_simplex"]
    assert keeps(torch.full((6,), 1 / 6, dtype=torch.float64))
    assert keeps(torch.tensor([0.65, 0.2, 0.15]).double())
    assert not keeps(torch.tensor([0.68, 0.2, 0.12]).double())
    assert keeps(torch.tensor([0.0, 0.5, 0.5]).double())  # one rare class


def test_the_motion_of_the_proof_changes_products_as_it_says():
    for classes in (3, 4, 6):
        draw = torch.Generator().manual_seed(classes)
        delta = torch.randn(classes, classes, generator=draw, dtype=torch.float64)
        delta = (delta + delta.T).fill_diagonal_(0)
        delta = (delta - delta.sum() / classes / (classes - 1)).fill_diagonal_(0)
        V = packing.simplex(classes, classes - 1).T
        ones = torch.ones(classes, classes, dtype=torch.float64)
        W = (classes - 1) / (2 * classes) * V @ (delta + delta @ ones / classes)
        assert torch.allclose(V.T @ W + W.T @ V, delta, atol=1e-12)


def test_the_formula_for_one_frequent_class(page):
    for classes in (3, 4, 5):
        grid = np.linspace(1 / (classes - 1), 1, 20_001)
        for r in (0.3, 0.6, 0.72, 0.9):
            ring = grid**2 - (1 - grid**2) / (classes - 2)
            x = grid[(-r * grid + (1 - r) * ring).argmin()]
            first, others = page["predicted"](r, classes)
            assert first == pytest.approx(-x, abs=1e-3)
            assert others == pytest.approx(x**2 - (1 - x**2) / (classes - 2), abs=3e-3)
        low, high = 2 / classes, 2 * (classes - 1) / (3 * classes - 4)
        assert page["predicted"](low, classes)[0] == pytest.approx(-1 / (classes - 1))
        assert page["predicted"](high, classes)[1] == pytest.approx(1)


# --- finite hardness


def test_the_simplex_is_least_at_every_hardness():
    for classes, beta in itertools.product((3, 4), (0.0, 0.5, 4.0, 64.0)):
        least = packing.class_loss(packing.simplex(classes, 3), beta=beta).item()
        assert least == pytest.approx((-1 / (classes - 1) - 1) / 0.5)
        assert (packing.class_loss(vectors(500, classes, 3), beta=beta) >= least).all()


# --- the page


def test_the_bound_holds_on_random_embeddings():
    checked = PAGE.run("check", embeddings=200, restarts=15)["checked"]
    assert (checked["smallest loss"] >= checked["−P*/2t"]).all()


def test_the_default_is_ten_thousand_embeddings():
    found = re.search(r"^embeddings = (\d+)", PAGE.code["parameters"], re.MULTILINE)
    assert int(found[1]) >= 10_000


def test_tables_of_few_classes():
    names = ("tammes-table", "tammes-words", "mean-table", "two-problems", "two-words")
    page = PAGE.run(*names, largest=6, restarts=8)
    assert page["distances"]["difference"].abs().max() < 1e-3
    assert page["differ"]["C"].tolist() == [5]
    assert page["together"] == []


def test_finite_hardness_of_four_and_eight_classes():
    page = PAGE.run("finite", "finite-words", few=[4, 8], betas=[0.0, 4.0])
    assert page["lines"][0] == "C = 4: the best packing of Tammes' problem at every β."
    assert page["lines"][1].endswith("β = 0, 4; the largest cosine falls with every step of β.")


def test_points_are_drawn_with_an_edge_to_each_nearest(page):
    ax = page["plt"].figure().add_subplot(projection="3d")
    page["draw_points"](ax, packing.configuration("octahedron"))
    assert len(ax.lines) == 24  # twelve edges, from both ends
    page["plt"].close("all")


def test_every_parameter_is_used():
    others = "\n".join(source for name, source in PAGE.code.items() if name != "parameters")
    for name in re.findall(r"^(\w+) =", PAGE.code["parameters"], re.MULTILINE):
        assert re.search(rf"\b{name}\b", others), name
