"""The page on the limit of large hardness: its integrals, its rates and its counterexamples."""

import math
import re

import numpy as np
import pytest
import torch
from cells import Page
from scipy import integrate, stats
from torch.nn import functional as F

PAGE = Page("hardness/limit")


@pytest.fixture(scope="module")
def page():
    return PAGE.define("check", "law", "sphere", "supports-table", "dims", "rare", "own")


def below(density, top, beta, low=-1.0, t=0.5, scale=1.0):
    """top / t minus log g for a density of the cosine on [low, top], by quadrature."""

    def mean(k):
        f = lambda c: density(c) * math.exp(k * (c - top))  # noqa: E731
        cut = max(low, top - 40 / max(k, 1))
        parts = [integrate.quad(f, low, cut, limit=200)[0] if cut > low else 0.0]
        return parts[0] + integrate.quad(f, cut, top, limit=400)[0]

    return math.log(mean(beta / t) / mean((1 + beta) / t))


# --- the formulas behind the curves


@pytest.mark.parametrize("d", [3, 4, 8])
@pytest.mark.parametrize("beta", [0.5, 2.0, 20.0])
def test_bessel_functions_against_quadrature(page, d, beta):
    expected = below(lambda c: (1 - c * c) ** ((d - 3) / 2), 1.0, beta)
    assert page["below_sphere"](beta, d, 0.5) == pytest.approx(expected, rel=1e-6)


def test_the_circle_against_quadrature(page):
    def mean(k):
        return integrate.quad(lambda a: math.exp(k * (math.cos(a) - 1)), 0, math.pi, limit=400)[0]

    for beta in (0.5, 5.0, 50.0):
        expected = math.log(mean(beta / 0.5) / mean((1 + beta) / 0.5))
        assert page["below_sphere"](beta, 2, 0.5) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
def test_the_rates_of_the_theorem(page, t):
    beta = 2e4
    for d in (2, 3, 8, 32):
        found = beta * page["below_sphere"](beta, d, t)
        assert found == pytest.approx((d - 1) / 2, rel=0.02)
    assert beta * page["below_ring"](beta, t) == pytest.approx(1.0, rel=0.01)
    assert beta * page["below_cap"](beta, t) == pytest.approx(1.5, rel=0.01)


def test_ring_and_cap_against_draws(page):
    draw = np.random.default_rng(0)
    z = draw.normal(size=(400_000, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    ring = z[z[:, 0] <= math.cos(0.7), 0]
    centre = np.array([math.cos(1.2), math.sin(1.2), 0.0])
    cap = z[z @ centre >= math.cos(0.6), 0]
    for name, cosines, top in (("ring", ring, 0.7), ("cap", cap, 1.2 - 0.6)):
        for beta in (0.5, 2.0):
            s = (cosines - math.cos(top)) / 0.5
            drawn = -math.log(np.exp((1 + beta) * s).mean() / np.exp(beta * s).mean())
            assert page[f"below_{name}"](beta, 0.5) == pytest.approx(drawn, abs=0.01)


@pytest.mark.parametrize("share", [0.1, 1e-3, 0.0])
def test_rare_negatives_against_quadrature(page, share):
    for beta in (0.3, 2.0, 6.0):

        def mean(k):
            f = lambda c: math.exp(k * (c - 0.9)) / 1.5  # noqa: E731
            return share + (1 - share) * integrate.quad(f, -1, 0.5)[0]

        expected = math.log(mean(beta / 0.5) / mean((1 + beta) / 0.5))
        assert page["below_rare"](beta, share, 0.5) == pytest.approx(expected, rel=1e-8)


def test_what_has_no_probability_is_never_seen(page):
    assert page["below_rare"](1e4, 0.0, 0.5) == pytest.approx(0.4 / 0.5, abs=1e-3)
    assert page["below_rare"](1e4, 1e-6, 0.5) == pytest.approx(0.0, abs=1e-12)


def test_density_of_the_cosine(page):
    c = np.linspace(-1, 1, 4003)[1:-1]
    plain = page["cosine_density"](c, 0, 8, 0.5)
    half = stats.beta(3.5, 3.5)
    assert np.allclose(plain, half.pdf((c + 1) / 2) / 2, atol=1e-6)
    tilted = page["cosine_density"](c, 4, 8, 0.5)
    ratio = np.log(tilted / plain)
    assert np.allclose(np.diff(ratio) / np.diff(c), 4 / 0.5)


def test_largest_cosine_and_the_hardness_there(page):
    z = F.normalize(torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosine = page["largest_cosine"](8, 100)
    assert (z[:, 0] > cosine).double().mean().item() == pytest.approx(0.01, abs=1e-3)
    beta = page["reaching"](cosine, 8, 0.5)
    weights = (beta * z[:, 0].double() / 0.5).softmax(0)
    assert (weights * z[:, 0]).sum().item() == pytest.approx(cosine, abs=5e-3)


def test_the_slope_is_the_difference_of_two_means(page):
    s = torch.randn(50, 9, dtype=torch.float64)
    assert page["slope_error"](s, 1.5) < 1e-7
    scores = page["random_scores"](40, 3, 0.5, torch.Generator().manual_seed(0))
    assert scores.shape == (40, 32)
    assert scores.abs().max() <= 2 + 1e-12


def test_own_class_negatives_are_the_limit_without_labels():
    mixed = PAGE.run("check", "own", embeddings=40)["mixed"]
    assert mixed["true negatives"].is_monotonic_increasing
    assert mixed["true negatives"].iloc[-1] < 0.2
    assert mixed["all"].iloc[-1] > 0.99
    assert mixed["all, debiased"].iloc[-1] > 0.98


# --- the theorems


def test_both_bounds_for_few_negatives():
    """M - log g <= log(1/pi)/beta and 1 - g e^-M <= (1-pi)/pi e^(-beta gap), by float64 loops."""
    draw = np.random.default_rng(1)
    for _ in range(300):
        n = draw.integers(2, 9)
        s, p, beta = np.sort(draw.normal(size=n)), draw.dirichlet(np.ones(n)), draw.exponential(5)
        q = p * np.exp(beta * s)
        g = (q * np.exp(s)).sum() / q.sum()
        pi, gap = p[-1], s[-1] - s[-2]
        assert -1e-12 <= s[-1] - math.log(g) <= math.log(1 / pi) / beta
        assert 1 - g * math.exp(-s[-1]) <= (1 - pi) / pi * math.exp(-beta * gap) + 1e-12


def test_the_smallest_of_many_is_weibull():
    u = np.random.default_rng(2).random((20_000, 200)) ** (1 / 1.5)  # P(U <= u) = u^1.5
    predicted = math.gamma(1 + 1 / 1.5) * 200 ** (-1 / 1.5)
    assert u.min(1).mean() == pytest.approx(predicted, rel=0.02)


def test_normal_scores_have_no_worst_case():
    s = np.linspace(-12, 16, 40_001)
    for beta in (0.0, 1.0, 3.0):
        log = beta * s - s * s / 2
        q = np.exp(log - log.max())
        log_g = math.log((q * np.exp(s)).sum() / q.sum())
        assert log_g == pytest.approx(beta + 0.5, abs=1e-9)


# --- the page


def test_inequalities_on_random_embeddings():
    page = PAGE.run("check", "library", "finite-check", embeddings=800)
    assert page["checked"]["embeddings"].sum() == 800
    assert page["finite"]["median ratio"].sub(1).abs().max() < 0.01


def test_the_default_is_ten_thousand_embeddings():
    found = re.search(r"^embeddings = (\d+)", PAGE.code["parameters"], re.MULTILINE)
    assert int(found[1]) >= 10_000


def test_batches_level_off_where_they_should():
    seen = PAGE.run("check", "sphere", "batches", embeddings=40, batch_sizes=[16, 64])["seen"]
    for end, hardest, predicted in seen.values():
        assert end == pytest.approx(hardest, rel=0.02)
        assert hardest == pytest.approx(predicted, rel=0.25)


def test_every_parameter_is_used():
    others = "\n".join(source for name, source in PAGE.code.items() if name != "parameters")
    for name in re.findall(r"^(\w+) =", PAGE.code["parameters"], re.MULTILINE):
        assert re.search(rf"\b{name}\b", others), name
