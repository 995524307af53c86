"""The page on orders: its theorems on random and enumerated laws, its helpers on made-up input."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import iv, ive
from torch.nn import functional as F

from hcl import ordering

PAGE = Page("supervised/orderings")
SMALL = {"counts": [40, 40, 30, 10], "steps": 5, "seeds": [0]}


@pytest.fixture(scope="module")
def page():
    """The cells up to the table of all batches, in a tiny form, with a pool that nobody trained."""
    found = PAGE.run("four", **SMALL)
    draw = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(2, 300, 16, generator=draw, dtype=torch.float64), dim=2)
    found["pool"] = [(part, torch.arange(300) % 4) for part in z]
    return PAGE.run("kinds", "everything", "table", "pairs", into=found)


def test_every_parameter_is_used():
    assert not PAGE.unused_parameters()


# --- the theorems


def weighted_mean(law, eta):
    """g of eq-orders-g for a law as (score, probability) pairs."""
    mass = sum(p * eta(s) for s, p in law)
    return sum(p * eta(s) * math.exp(s) for s, p in law) / mass


ETAS = {
    "tilt": lambda s: math.exp(2 * s),
    "threshold": lambda s: float(s >= 0.1),
    "power": lambda s: (3 + s) ** 3,
    "steps": lambda s: 1.0 + math.floor(s),
}


@given(
    scores=st.lists(st.floats(-0.9, 3), min_size=1, max_size=6),
    raw=st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
    name=st.sampled_from(sorted(ETAS)),
)
@settings(max_examples=150, deadline=None)
def test_hardening_raises_and_its_reverse_lowers(scores, raw, name):
    scores = [*scores, 2.5]  # so that the threshold leaves one
    law = [(s, p / sum(raw[: len(scores)])) for s, p in zip(scores, [*raw, 0.5], strict=False)]
    total = sum(p for _, p in law)
    law, eta = [(s, p / total) for s, p in law], ETAS[name]

    def steps(s):
        return max(eta(s), 0.0) + (0.2 if name == "steps" else 0.0)

    plain = weighted_mean(law, lambda s: 1.0)
    assert weighted_mean(law, steps) >= plain - 1e-12
    assert weighted_mean(law, lambda s: 1 / (1 + steps(s))) <= plain + 1e-12
    two_copies = sum(
        p * r * (steps(a) - steps(b)) * (math.exp(a) - math.exp(b))
        for (a, p), (b, r) in itertools.product(law, law)
    )
    mean_eta = sum(p * steps(s) for s, p in law)
    mixed = sum(p * steps(s) * math.exp(s) for s, p in law)
    assert two_copies == pytest.approx(2 * mixed - 2 * mean_eta * plain, abs=1e-9)  # the display
    values = {steps(s) for s, _ in law}
    if len(values) == 1:
        assert weighted_mean(law, steps) == pytest.approx(plain)


def test_the_chain_needs_only_that_the_ratio_rises():
    law = [(s, 0.25) for s in (-1.0, 0.2, 0.9, 1.7)]
    rising = [
        lambda s: math.exp(-s), lambda s: 1.0, lambda s: math.exp(s),
        lambda s: math.exp(s) * (s >= 0), lambda s: math.exp(s) * (s >= 0.5),
        lambda s: math.exp(2 * s) * (s >= 0.5),
    ]  # fmt: skip
    values = [weighted_mean(law, eta) for eta in rising]
    assert values == sorted(values)
    assert len(set(values)) == len(values)


def test_the_slope_is_a_difference_of_two_means():
    draw = np.random.default_rng(0)
    s, beta, h = draw.normal(size=9), 0.7, 1e-5

    def log_g(b):
        return math.log(weighted_mean([(x, 1 / 9) for x in s], lambda x: math.exp(b * x)))

    def mean(b):
        return (np.exp(b * s) / np.exp(b * s).sum()) @ s

    assert (log_g(beta + h) - log_g(beta - h)) / (2 * h) == pytest.approx(
        mean(1 + beta) - mean(beta), rel=1e-6
    )


def expected(law, k, value):
    """The mean of value(tuple) over all k-tuples of independent draws."""
    return sum(
        math.prod(p for _, p in draws) * value([s for s, _ in draws])
        for draws in itertools.product(law, repeat=k)
    )


@pytest.mark.parametrize("beta", [0.5, 3.0])
@pytest.mark.parametrize(
    "psi",
    [lambda g: math.log1p(5 * g), lambda g: g, lambda g: g**2],
    ids=["loss", "linear", "convex"],
)
def test_few_negatives_by_enumeration(beta, psi):
    law = [(-1.0, 0.5), (0.3, 0.3), (1.5, 0.2)]
    tilt = {s: p * math.exp(beta * s) for s, p in law}
    hard_law = [(s, w / sum(tilt.values())) for s, w in tilt.items()]

    def plain(scores):
        return psi(sum(map(math.exp, scores)) / len(scores))

    def weighed(scores):
        weights = [math.exp(beta * s) for s in scores]
        top = sum(w * math.exp(s) for w, s in zip(weights, scores, strict=True))
        return psi(top / sum(weights))

    kinds = {"plain": (law, plain), "weighed": (law, weighed), "hard": (hard_law, plain)}
    means = {name: [expected(x, k, f) for k in range(1, 7)] for name, (x, f) in kinds.items()}
    for name in ("weighed", "hard"):  # parts 1 and 2 need no concave psi
        assert all(h >= p - 1e-12 for h, p in zip(means[name], means["plain"], strict=True))
    assert means["weighed"][0] == pytest.approx(means["plain"][0])
    if psi(2) - psi(1) <= psi(1) - psi(0) + 1e-12:  # part 3
        for name in kinds:
            assert all(b >= a - 1e-12 for a, b in itertools.pairwise(means[name])), name
        limit = psi(weighted_mean(law, lambda s: math.exp(beta * s)))
        assert max(means["weighed"] + means["hard"]) <= limit + 1e-12
    else:
        assert means["plain"][0] > means["plain"][-1]  # and there it does


def test_the_simplex_is_an_equality_for_the_supervised_losses_alone():
    found = PAGE.run("four", "simplex")["at_simplex"]
    assert np.ptp(found[["scl", "h_scl"]].to_numpy()) < 1e-9
    assert (found["h_ucl"] > found["ucl"] + 0.5).all()


def test_of_two_negatives_g_is_a_function_of_the_ratio():
    a, b = -0.4, 1.1
    for rho in (0.5, 1.0, 4.0):
        g = weighted_mean([(a, 0.5), (b, 0.5)], lambda s, r=rho: r if s == b else 1.0)
        assert g == pytest.approx(math.exp(a) + rho / (1 + rho) * (math.exp(b) - math.exp(a)))


def test_the_power_is_a_hardening_in_the_library_too():
    torch.manual_seed(0)
    (source,) = PAGE.solutions("solution-clamp-end")
    found = PAGE.run()
    exec(source, found)  # it asserts the order
    assert len(set(found["values"])) == 3


# --- the sphere


def test_the_tilted_mean_of_a_cluster_is_an_integral():
    """On the circle, where the integral over the angle can be done by quadrature."""
    found = PAGE.define("vmf")
    kappa, t, beta = 1.7, 0.5, 1.0
    angles = (0.0, 2.0, 4.0)  # of the centres
    mu = np.array([[math.cos(a), math.sin(a)] for a in angles])
    x = np.array([[math.cos(0.4), math.sin(0.4)]])

    def moment(centre, b):
        def density(phi):
            return math.exp(kappa * math.cos(phi - centre) + b * math.cos(phi - 0.4))

        return quad(density, 0, 2 * math.pi)[0] / (2 * math.pi * iv(0, kappa))

    def log_g(centres):
        top, bottom = (sum(moment(c, b) for c in centres) for b in ((1 + beta) / t, beta / t))
        return math.log(top / bottom)

    same, other = found["population_means"](x, mu, kappa, t, beta)
    assert same[0] == pytest.approx(log_g(angles[:1]))
    assert other[0] == pytest.approx(log_g(angles[1:]))


def test_centres_are_a_simplex():
    z = PAGE.define("vmf")["centres"](5, 7)
    assert z.shape == (5, 7)
    np.testing.assert_allclose(z @ z.T, (1 + 1 / 4) * np.eye(5) - 1 / 4, atol=1e-12)


@pytest.mark.parametrize("d", [2, 3, 16])
def test_what_the_proof_on_clusters_uses(d):
    """b h(r_b) rises in b up to kappa, for every u; h falls and A rises."""
    nu, u = d / 2 - 1, np.linspace(-1, 1, 41)[:, None]
    r = np.linspace(0.05, 60, 400)
    a = ive(nu + 1, r) / ive(nu, r)
    assert (np.diff(a) > 0).all()
    assert (np.diff(a / r) < 0).all()
    for kappa in (0.5, 3.0, 20.0):
        b = np.linspace(1e-3, kappa, 200)
        r = np.sqrt(np.maximum(kappa**2 + b**2 + 2 * kappa * b * u, 1e-12))
        value = b * ive(nu + 1, r) / ive(nu, r) / r
        assert (np.diff(value, axis=1) > -1e-12).all()


def test_two_clusters_hold_just_where_the_nearest_centre_is_right():
    found = PAGE.define("vmf")
    mu = np.array([[1.0, 0, 0], [0.3, math.sqrt(1 - 0.09), 0]])
    x = F.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    same, other = found["population_means"](x.numpy(), mu, 8.0, 0.5, 1.0)
    nearer = (x.numpy() @ mu.T).argmax(1) == 0
    assert ((same >= other) == nearer).all()
    assert 0 < nearer.mean() < 1


def test_bessel_functions_are_far_from_overflow():
    found = PAGE.define("vmf")["log_bessel"](np.array([1e-3, 1.0, 500.0, 5000.0]), 8)
    assert np.isfinite(found).all()
    assert found[1] == pytest.approx(math.log(iv(3, 1.0)))


# --- the cells in a tiny form


def test_the_four_losses_of_many_batches_are_the_librarys(page):
    z, y = page["uniform"](3)
    t, beta = torch.tensor([0.2, 0.5, 1.0]).double(), torch.tensor([0.0, 1.0, 5.0]).double()
    found = page["four"](z, y, t, beta)
    for k in range(3):
        library = ordering.four_losses(
            *z[k].chunk(2), y[k, :8], temperature=t[k].item(), beta=beta[k].item()
        )
        ours = {name: found[name][k].mean().item() for name in found}
        assert ours == pytest.approx(
            {"SCL": library["scl"], "H-SCL": library["h_scl"], "UCL": library["ucl"],
             "H-UCL": library["h_ucl"]}
        )  # fmt: skip


def test_no_batch_is_against_the_order(page):
    table = page["table"]
    assert table["batches"].tolist() == [40, 40, 30, 10, 120]
    assert (table["violations"] == 0).all()
    assert page["shares"].loc["SCL", "H-SCL"] == page["shares"].loc["UCL", "H-UCL"] == 0


def test_every_anchor_of_every_kind_has_a_stranger(page):
    for name in ("uniform", "clustered", "trained"):
        z, y = page[name](30)
        assert (y.amax(1) > y.amin(1)).all() or name == "trained"
        assert torch.equal(y[:, :8], y[:, 8:])  # both views of an image
        torch.testing.assert_close(z.norm(dim=2), torch.ones(30, 16, dtype=torch.float64))


def test_the_optimiser_makes_the_gap_smaller(page):
    t, beta = torch.full((10,), 0.5).double(), torch.ones(10).double()
    before = page["four"](*page["uniform"](10), t, beta)
    after = page["four"](*page["optimised"](10, t, beta), t, beta)
    assert page["gap"](after).mean() < page["gap"](before).mean()


def test_a_violation_would_be_counted(page):
    frame = pd.DataFrame({"kind": ["a", "a"], "UCL": [1.0, 1.0], "SCL": [1.0, 1.0]})
    frame = frame.assign(**{"H-UCL": [1.0, 0.9], "H-SCL": [1.0, 2.0]})
    found = page["smallest"](frame)
    assert found.loc["together", "violations"] == 1
    assert found.loc["a", "least H-UCL − UCL"] == pytest.approx(-0.1)


def test_the_pairs_without_an_order_are_refuted_both_ways(page):
    PAGE.run("counterexamples", into=page)
    for _, row in page["refuted"].iterrows():
        low, high = row["claim"].split(" < ")
        assert row[low] < row[high], row["claim"]
    assert len(page["refuted"]) == 8


def test_the_diagram_refuses_an_arrow_that_anchors_are_against(page):
    PAGE.run("diagram", into=page)
    wrong = page["shares"].copy()
    wrong.loc["SCL", "H-SCL"] = 0.01
    with pytest.raises(AssertionError):
        page["diagram"](wrong)


def test_what_each_way_of_hardening_does(page):
    PAGE.run("etas", into=page)
    found = page["by_eta"]
    assert found["g not lower"].iloc[:4].tolist() == [1, 1, 1, 1]
    assert found["g not higher"].iloc[4] == 1
    assert 0 < found["g not lower"].iloc[5] < 1  # a band is neither


def test_released_debiasing_keeps_the_chain_and_separate_does_not(page):
    PAGE.run("debias", into=page)
    found = page["by_debias"].set_index(["debias", "τ⁺"])["that fall somewhere"]
    assert found["released"].tolist() == [0, 0, 0]
    assert found["separate"][0.0] == 0
    assert found["separate"][0.3] > 0


def test_the_crossing_is_where_the_losses_cross(page):
    found = PAGE.run("chain-figure", "crossing", into=dict(page))
    draw = torch.Generator().manual_seed(3)
    z = F.normalize(torch.randn(30, 4, generator=draw, dtype=torch.float64), dim=1)
    y = torch.arange(30) % 3
    s = z @ z.T / 0.5
    stars = found["crossing"](s, y)
    assert stars.isfinite().any()
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        level = sum(math.exp(s[i, j]) for j in rest) / 29
        other = [(s[i, j].item(), 1.0) for j in rest if y[j] != y[i]]

        def hard(beta, other=other):
            return weighted_mean(other, lambda score: math.exp(beta * score))

        star = stars[i].item()
        if math.isinf(star):
            assert math.exp(max(x for x, _ in other)) <= level
        elif star == 0:
            assert hard(0.0) >= level
        elif star < 300:  # no overflow in this loop
            assert hard(star * 0.99) < level <= hard(star * 1.01 + 1e-9)


def test_a_chain_that_drops_is_measured_in_last_places(page):
    found = PAGE.run("simplex", "float32", into=page | {"BETAS": (0.0, 1.0, 8.0)})
    one = float(np.float32(5.0))
    lower = float(np.nextafter(np.float32(5.0), np.float32(0), dtype=np.float32))
    assert found["largest_drop"]([one, one, lower]) == 1
    assert found["largest_drop"]([lower, one]) == 0
    assert found["drops"].to_numpy().max() <= 8  # rounding, not a violation


def test_the_words_on_few_negatives_follow_the_numbers():
    say = PAGE.define("few-words")["few_words"]
    rows = [
        {"k": k, "negatives": n, "mean loss": v, "se": 0.001}
        for k, values in {1: (1.0, 1.0, 1.5), 2: (1.2, 1.4, 1.8)}.items()
        for n, v in zip(("plain", "weighed", "drawn hard"), values, strict=True)
    ]
    frame, limit = pd.DataFrame(rows), {"plain": 1.3, "hard": 2.0}
    said = say(frame, limit)
    assert said.startswith("Within four standard errors: 1. holds, 2. holds, 3. holds.")
    assert "weighing is still 0.600 below" in said
    frame.loc[frame["negatives"] == "weighed", "mean loss"] = [0.9, 0.8]
    said = say(frame, limit)
    assert "1. **fails**, 2. holds, 3. **fails**" in said


def test_the_last_solution_is_no_approach_from_below():
    values = list(PAGE.run("solution-clamp")["found"].values())
    assert values[0] > values[-1]
    assert values != sorted(values)
