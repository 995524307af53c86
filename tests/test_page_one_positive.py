"""The page on one positive: lemmas on random laws, exact moments against enumeration by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from hcl import geometry

PAGE = Page("hardness/one-positive")
HELPERS = ("cancel", "laws", "sharp", "bias", "population", "sweep-words", "runs", "runs-words")


@pytest.fixture(scope="module")
def page():
    names = PAGE.define(*HELPERS)
    names["draw"] = torch.Generator().manual_seed(0)
    return names


def laws(page, number=40, m=4, d=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for kind in page["KINDS"]:
        yield kind, page["random_laws"](kind, number, m, d, draw)


def by_hand(s, w, beta, M):
    """Mean and variance of the self-normalised estimate, over all tuples, in plain floats."""
    mean = square = 0.0
    for chosen in itertools.product(range(len(s)), repeat=M):
        chance = math.prod(w[i] for i in chosen)
        top = sum(math.exp((1 + beta) * s[i]) for i in chosen)
        value = top / sum(math.exp(beta * s[i]) for i in chosen)
        mean, square = mean + chance * value, square + chance * value**2
    return mean, square - mean**2


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- what one positive estimates


def test_with_one_positive_the_weight_cancels(page):
    s = torch.randn(50, 1, dtype=torch.float64)
    for beta in (0.0, 1.0, 7.0):
        torch.testing.assert_close(page["tilted"](s, beta), s[:, 0].exp())


def test_the_loss_with_one_positive_is_the_librarys():
    PAGE.run("cancel")  # asserts it


def test_laws_are_laws(page):
    for kind, (v, w, anchor) in laws(page):
        assert v.isfinite().all(), kind
        for rows in (v, anchor):
            np.testing.assert_allclose(rows.norm(dim=-1), 1)
        np.testing.assert_allclose(w.sum(1), 1)
        assert (w >= 0).all()


def test_alignment_is_that_of_two_draws(page):
    _, (v, w, _) = next(laws(page))
    by_pairs = (w[:, :, None] * w[:, None] * torch.cdist(v, v).square()).sum((1, 2))
    torch.testing.assert_close(page["alignment_of"](v, w), by_pairs)
    i, j = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    equal = torch.full((1, 4), 0.25, dtype=torch.float64)
    library = geometry.alignment(v[0][i], v[0][j])
    assert page["alignment_of"](v[:1], equal).item() == pytest.approx(library)


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_moments_are_exact(page, M, beta):
    for _, (v, w, anchor) in laws(page, number=2):
        s = (v @ anchor[..., None])[..., 0] / 0.5
        mean, variance = page["moments"](s, w, beta, M)
        for k in range(2):
            expected = by_hand(s[k].tolist(), w[k].tolist(), beta, M)
            assert (mean[k].item(), variance[k].item()) == pytest.approx(expected, abs=1e-9)


# --- the lemmas


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
def test_the_variance_of_the_plain_mean(page, t):
    for _, (v, w, anchor) in laws(page, number=300):
        e = ((v @ anchor[..., None])[..., 0] / t).exp()
        variance = (w * e.square()).sum(1) - (w * e).sum(1).square()
        limit = math.exp(2 / t) / (2 * t**2) * page["alignment_of"](v, w)
        assert (variance <= limit * (1 + 1e-9) + 1e-9 * math.exp(2 / t)).all()
        torch.testing.assert_close(page["bound"](page["alignment_of"](v, w), t, 0.0, 1), limit)
        sharp = (page["steepest"](t)[1] * math.exp(1 / t)) ** 2 / 2 * page["alignment_of"](v, w)
        assert (variance <= sharp * (1 + 1e-6) + 1e-9 * math.exp(2 / t)).all()


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_the_variance_of_the_quotient(page, beta):
    for _, (v, w, anchor) in laws(page, number=100):
        s = (v @ anchor[..., None])[..., 0]
        ratio = (beta * (s.amax(1) - s.amin(1))).exp()
        assert (ratio <= math.exp(2 * beta) * (1 + 1e-9)).all()
        assert (ratio <= (beta * torch.cdist(v, v).amax((1, 2))).exp() * (1 + 1e-6)).all()
        for M in (1, 2, 4):
            limit = page["bound"](page["alignment_of"](v, w), 1.0, beta, M, ratio)
            assert (page["moments"](s, w, beta, M)[1] <= limit + 1e-12).all()


def test_the_derivative_in_the_proof(page):
    """d theta / ds_i = w_i / W ((1 + beta) e^s_i - beta theta), by autograd."""
    s, beta = torch.randn(6, dtype=torch.float64, requires_grad=True), 1.7
    theta = page["tilted"](s, beta)
    (slope,) = torch.autograd.grad(theta, s)
    w = (beta * s).softmax(0)
    torch.testing.assert_close(slope, w * ((1 + beta) * s.exp() - beta * theta))


@pytest.mark.parametrize("t", [2.0, 0.5, 0.1])
def test_the_steepest_slope(page, t):
    found = minimize_scalar(
        lambda a: -math.exp((math.cos(a) - 1) / t) * math.sin(a) / t,
        bounds=(0, math.pi / 2), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    c, slope = page["steepest"](t)
    assert math.cos(found.x) == pytest.approx(c, abs=1e-6)
    assert -found.fun == pytest.approx(slope)
    assert 1 - c**2 == pytest.approx(t * c)
    assert page["largest_quotient"](t, 400) <= slope * (1 + 1e-9)
    assert page["largest_quotient"](t, 400) == pytest.approx(slope, rel=1e-3)


def test_at_low_temperature_the_lemma_is_loose_by_e_over_t(page):
    t = 1e-4
    assert (1 / t / page["steepest"](t)[1]) ** 2 == pytest.approx(math.e / t, rel=1e-2)


def test_the_anchor_of_the_class(page):
    t = 0.3
    for _, (v, w, _) in laws(page, number=100):
        z = v[:, 0]
        distance = (v - z[:, None]).norm(dim=-1)
        e = ((v @ z[..., None])[..., 0] / t).exp()
        variance = (w * e.square()).sum(1) - (w * e).sum(1).square()
        limit = math.exp(2 / t) / (4 * t**2) * (w * distance**4).sum(1)
        assert (variance <= limit + 1e-9 * math.exp(2 / t)).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
def test_the_bias(page, beta):
    t = 0.5
    for _, (v, w, anchor) in laws(page, number=200):
        s = (v @ anchor[..., None])[..., 0] / t
        theta = page["target"](s, w, beta)
        theta_0 = (w * s.exp()).sum(1)
        weight = (beta * s).exp()
        mean = (w * weight).sum(1)
        covariance = (w * weight * s.exp()).sum(1) - mean * theta_0
        torch.testing.assert_close(theta - theta_0, covariance / mean, atol=1e-12, rtol=1e-9)
        assert (theta - theta_0 >= -1e-12).all()
        away = (w * (v - anchor[:, None]).square().sum(-1)).sum(1)
        assert (theta - theta_0 <= math.exp(1 / t) / (2 * t) * away + 1e-12).all()
        second = beta * math.exp((1 + 2 * beta) / t) / (2 * t**2) * page["alignment_of"](v, w)
        assert (theta - theta_0 <= second + 1e-12).all()
        one, _ = page["moments"](s, w, beta, 1)
        torch.testing.assert_close(one, theta_0)


def test_both_vanish_at_one_order(page):
    shrunk = pd.concat(
        [page["shrinking"](kind, 0.5, 1.0, m=60) for kind in ("Gaussian noise", "outlier")]
    )
    table = page["slopes"](shrunk)
    for law, order in (("Gaussian noise", 2), ("outlier", 1)):
        for name in ("slope of variance", "slope of θβ − θ₀"):
            assert table.loc[law, name] == pytest.approx(order, abs=0.15)
    assert (table["bias² / variance, smallest A"] < 1e-3).all()


# --- the page's checks


def test_over_ten_thousand_laws_and_no_exception():
    found = PAGE.run("cancel", "laws")
    assert len(found["checked"]) >= 10_000
    assert found["over"] == found["exceeded"] == 0


def test_more_positives_help_less_when_aligned(page):
    page |= {"positives": [1, 8], "anchors": 8, "repeats": 40, "negatives": 60, "members": 20}
    columns = ["spread", "A", "M", "estimate", "squared error", "debiased, relative"]
    rows = [row for spread in (0.05, 1.2) for row in page["debiased_errors"](spread, page["draw"])]
    swept = pd.DataFrame(rows, columns=columns)
    table = swept.set_index(["spread", "estimate", "M"])
    for spread in (0.05, 1.2):
        one = [
            table.loc[(spread, n, 1), "squared error"] for n in ("plain mean", "self-normalised")
        ]
        assert one[0] == pytest.approx(one[1])
    hats = table.xs("self-normalised", level="estimate")["debiased, relative"]
    assert abs(hats[(0.05, 1)] - 1) < 0.01 < hats[(1.2, 1)] - 1
    said = page["gained"](swept)
    assert len(said) == 2
    assert f"{hats[(1.2, 1)]:.3f} times" in said[1]


def test_classes_of_an_embedding(page):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(24, 5)).astype(np.float32), np.arange(24) % 3
    found = page["of_classes"](z, y, 0.5, 1.0)
    unit = F.normalize(torch.from_numpy(z).double(), dim=1)
    expected = []
    for i in range(24):
        mates = unit[torch.from_numpy(y == y[i])]
        s = ((mates @ unit[i] - 1) / 0.5).tolist()
        mean, variance = by_hand(s, [1 / 8] * 8, 1.0, 1)
        tilt = sum(math.exp(2 * x) for x in s) / sum(math.exp(x) for x in s)
        expected.append(
            [torch.cdist(mates, mates).square().mean().item(), variance, tilt - mean, mean]
        )
    assert found[:4] == pytest.approx(np.mean(expected, axis=0))


def test_what_is_told_of_the_training(page):
    names = ["epochs", "seed", "A", "lemma", "variance", "bias", "sd / θ₀", "τ⁺ sd / g"]
    rows = [[0, 0, 0.1, 1, 0.1, 0, 0.1, 0.01], [1, 0, 0.7, 1, 0.1, 0, 0.1, 0.01]]
    rows.append([5, 0, 0.3, 1, 0.05, 0, 0.2, 0.03])
    said = page["told"](pd.DataFrame(rows, columns=names))
    assert "0.1, smaller than at the end, 0.3" in said[0]
    assert said[0].endswith("largest after 1")
    assert "20% of its mean" in said[1]
    assert "3.0% of the mean over negatives" in said[1]
    assert "20 times" in said[2]


def test_a_law_attains_the_sharp_constant():
    PAGE.run("cancel", "laws", "sharp", "solution-sharp", laws=20)  # asserts it
