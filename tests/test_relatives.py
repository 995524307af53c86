"""Ring and BCL against loops from their formulas, against other losses, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch.nn import functional as F

from hcl import losses, relatives, tiles
from hcl.relatives import bayesian, bayesian_weights, check_bayesian, check_ring, ring

T = 0.3
WAYS = {
    "alone": ({}, ()),
    "cross_modal": ({"cross_modal": True}, ()),
    "queue": ({}, ("queue",)),
    "everything": ({"cross_modal": True}, ("queue", "synthetic")),
}


def data(seed=0, images=8, d=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    z1 = torch.randn(images, d, generator=draw, dtype=torch.float64)
    made = {
        "z1": z1,
        "z2": z1 + torch.randn(images, d, generator=draw, dtype=torch.float64),
        "queue": torch.randn(3, d, generator=draw, dtype=torch.float64),
        "synthetic": torch.randn(2 * images, 2, d, generator=draw, dtype=torch.float64),
    }
    return {name: z.to(dtype) for name, z in made.items()}


def anchors(z1, z2, cross_modal=False, queue=None, synthetic=None):
    """Of every anchor: the score of its positive, and a list of those of its negatives."""
    z = F.normalize(torch.cat([z1, z2]).double(), dim=1).numpy()
    n, images = len(z), len(z1)
    for i in range(n):
        others = [
            z[j]
            for j in range(n)
            if j % images != i % images and not (cross_modal and (i < images) == (j < images))
        ]
        if queue is not None:
            others += list(F.normalize(queue.double(), dim=1).numpy())
        if synthetic is not None:
            others += list(F.normalize(synthetic[i].double(), dim=1).numpy())
        yield z[i] @ z[(i + images) % n] / T, np.array(others) @ z[i] / T


def naive_ring(inner, outer, **given):
    total = []
    for p, s in anchors(**given):
        order = np.argsort(-s)  # the most similar first
        kept = order[: int(outer * len(s))]
        kept = kept[int(inner * len(kept)) :]
        total.append(-math.log(math.exp(p) / (math.exp(p) + sum(math.exp(s[j]) for j in kept))))
    return np.mean(total)


def solved(share, A):
    """The root Phi of F = 2 A Phi + (1 - 2 A) Phi^2, by bisection."""
    return brentq(lambda x: 2 * A * x + (1 - 2 * A) * x * x - share, 0, 1, xtol=1e-15)


def naive_weight(share, alpha, tau, b):
    phi = solved(share, (1 - tau) * alpha + tau * (1 - alpha))
    true = alpha * 2 * (1 - phi) + (1 - alpha) * 2 * phi
    false = (1 - alpha) * 2 * (1 - phi) + alpha * 2 * phi
    hard = alpha * (1 - b) * 2 * (1 - phi) + (1 - alpha) * b * 2 * phi
    hard /= alpha * (1 - b) + (1 - alpha) * b
    return hard / ((1 - tau) * true + tau * false)


def naive_bayesian(alpha, tau_plus, concentration, **given):
    total = []
    for p, s in anchors(**given):
        n = len(s)
        ranks = np.empty(n)
        ranks[np.argsort(s)] = np.arange(1, n + 1)
        w = [naive_weight(r / n, alpha, tau_plus, concentration) for r in ranks]
        ng = n * sum(a * math.exp(x) for a, x in zip(w, s, strict=True)) / sum(w)
        total.append(math.log(1 + ng / math.exp(p)))
    return np.mean(total)


# Against loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("inner", "outer"), [(0.0, 0.3), (0.4, 0.8), (0.5, 1.0), (0.1, 0.2)])
def test_ring_is_its_formula(way, inner, outer):
    among, extra = WAYS[way]
    made = data()
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    ours = ring(**given, **among, temperature=T, inner=inner, outer=outer)
    assert ours.item() == pytest.approx(naive_ring(inner, outer, **given, **among), rel=1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("alpha", "tau_plus", "concentration"),
    [(0.9, 0.1, 0.5), (0.6, 0.0, 0.5), (0.7, 0.5, 0.9), (0.8, 0.8, 1.0), (0.5, 0.1, 1.0)],
)
def test_bayesian_is_its_formula(way, alpha, tau_plus, concentration):
    among, extra = WAYS[way]
    made = data(seed=1)
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    options = {"alpha": alpha, "tau_plus": tau_plus, "concentration": concentration}
    ours = bayesian(**given, **among, temperature=T, **options)
    assert ours.item() == pytest.approx(naive_bayesian(**options, **given, **among), rel=1e-10)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.99])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("b", [0.5, 0.8, 1.0])
def test_weights_invert_the_distribution_function(alpha, tau_plus, b):
    shares = np.linspace(0, 1, 41)
    ours = bayesian_weights(
        torch.from_numpy(shares), alpha=alpha, tau_plus=tau_plus, concentration=b
    )
    expected = [naive_weight(share, alpha, tau_plus, b) for share in shares]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


# Properties ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_with_all_negatives_alike_both_are_nt_xent(way):
    among, extra = WAYS[way]
    made = data(seed=2)
    given = {k: made[k] for k in ("z1", "z2", *extra)} | among | {"temperature": T}
    plain = losses.nt_xent(**given)
    for tau_plus in (0.0, 0.1, 0.7):
        torch.testing.assert_close(bayesian(**given, alpha=0.5, tau_plus=tau_plus), plain)
    torch.testing.assert_close(bayesian(**given, alpha=0.8, tau_plus=0.0), plain)  # none is false
    torch.testing.assert_close(ring(**given, inner=0.0, outer=1.0), plain)


def test_a_ball_of_one_is_the_hardest_negative_alone():
    made = data(seed=3)
    given = {"z1": made["z1"], "z2": made["z2"], "temperature": T}
    ours = ring(**given, inner=0.0, outer=1 / 14)
    torch.testing.assert_close(ours, losses.hard(**given, tau_plus=0.0, beta=1e4, Q=1.0))


@pytest.mark.parametrize("alpha", [0.6, 0.9])
def test_weights_fall_with_similarity_unless_hardness_turns_them(alpha):
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (bayesian_weights(shares, alpha=alpha).diff() < 0).all()
    assert (bayesian_weights(shares, alpha=alpha, concentration=1.0).diff() > 0).all()


@pytest.mark.parametrize("b", [0.5, 0.75, 1.0])
def test_weights_have_mean_one(b):
    options = {"alpha": 0.8, "tau_plus": 0.2, "concentration": b}

    def weight(share):
        return bayesian_weights(torch.tensor(share, dtype=torch.float64), **options).item()

    assert quad(weight, 0, 1)[0] == pytest.approx(1)
    for n in (10, 100, 1000):
        ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
        assert abs(bayesian_weights(ranks, **options).mean().item() - 1) < 2 / n


def test_weights_are_the_posterior_of_a_simulation():
    """Scores drawn as the paper says: the share of true negatives among those near a score."""
    draw, n, alpha, tau = np.random.default_rng(0), 400_000, 0.8, 0.3
    pairs = np.sort(draw.random((n, 2)) ** 3, axis=1)  # any law
    true = draw.random(n) >= tau
    larger = np.where(draw.random(n) < alpha, ~true, true)
    scores = np.where(larger, pairs[:, 1], pairs[:, 0])
    found = true[np.argsort(scores)].reshape(20, -1).mean(axis=1)  # in twentieths of the ranks
    middles = torch.arange(20, dtype=torch.float64) / 20 + 1 / 40
    expected = (1 - tau) * bayesian_weights(middles, alpha=alpha, tau_plus=tau)
    np.testing.assert_allclose(found, expected.numpy(), atol=0.015)


def test_weights_are_constants():
    made = data(seed=4)
    z1, z2 = (made[k].requires_grad_() for k in ("z1", "z2"))

    def value(z1, z2):
        """The same loss with weights looked up, so that none can have a gradient."""
        s = F.normalize(torch.cat([z1, z2]), dim=1)
        s = s @ s.T / T
        image = torch.arange(len(z1)).repeat(2)
        apart = image[:, None] != image
        total = 0.0
        for i in range(len(s)):
            x = s[i][apart[i]]
            ranks = np.argsort(np.argsort(x.detach().numpy())) + 1
            w = torch.tensor([naive_weight(r / len(x), 0.9, 0.1, 0.5) for r in ranks])
            p = s[i][(i + len(z1)) % len(s)]
            total = total + torch.log(1 + len(x) * (w * x.exp()).sum() / w.sum() / p.exp())
        return total / len(s)

    ours = torch.autograd.grad(bayesian(z1, z2, temperature=T), (z1, z2))
    expected = torch.autograd.grad(value(z1, z2), (z1, z2))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_equal_scores():
    """All on two points: F is 1 for the near half and its share for the far one."""
    z = torch.eye(2, 3, dtype=torch.float64).repeat(3, 1)  # images 0, 2, 4 in one place
    near, far = math.exp(1 / T), 1.0  # 4 and 6 of 10
    w = [naive_weight(share, 0.9, 0.1, 0.5) for share in (1.0, 0.6)]
    ng = 10 * (4 * w[0] * near + 6 * w[1] * far) / (4 * w[0] + 6 * w[1])
    assert bayesian(z, z, temperature=T).item() == pytest.approx(math.log(1 + ng / near))
    ours = ring(z, z, temperature=T, inner=0.5, outer=0.6)  # ranks 4, 5, 6
    assert ours.item() == pytest.approx(math.log(1 + (near + 2 * far) / near))
    same = torch.ones(4, 3)
    torch.testing.assert_close(bayesian(same, same), losses.nt_xent(same, same))


def test_shares_of_a_decimal_do_not_lose_one_to_rounding():
    assert relatives._band(100, 0.0, 0.29) == (0, 29)
    assert relatives._band(7, 1 - 1e-12, 1.0) == (6, 7)


@pytest.mark.parametrize("loss", [ring, bayesian])
def test_strips_of_a_few_anchors_change_nothing(monkeypatch, loss):
    made = data(seed=5, images=12)
    options = {"outer": 0.5} if loss is ring else {"concentration": 0.7}

    def found():
        leaves = {k: z.clone().requires_grad_() for k, z in made.items()}
        value = loss(**leaves, **options)
        return [value, *torch.autograd.grad(value, list(leaves.values()))]

    whole = found()
    monkeypatch.setattr(tiles, "STRIP", {"cpu": 60})
    monkeypatch.setattr(tiles, "LEAST", 1)
    torch.testing.assert_close(found(), whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", [ring, bayesian])
def test_gradients_are_those_of_differences(loss):
    """No two ranks change places within a difference."""
    made = data(seed=6, images=5)
    leaves = [made[k].requires_grad_() for k in ("z1", "z2")]
    options = {"outer": 0.5} if loss is ring else {}
    assert torch.autograd.gradcheck(lambda z1, z2: loss(z1, z2, **options), leaves)


@pytest.mark.parametrize("loss", [ring, bayesian])
def test_other_precisions(loss):
    exact = loss(**data(seed=7), temperature=T, **({"outer": 0.5} if loss is ring else {}))
    made = data(seed=7, dtype=torch.float32)
    options = {"temperature": T, **({"outer": 0.5} if loss is ring else {})}
    ours = loss(**made, **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(**made, **options), ours)
    half = loss(**{k: z.bfloat16() for k, z in made.items()}, **options)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ours, rtol=0.05, atol=0)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "options", "message"),
    [
        (check_ring, (1.0, 0.1), "inner=1.0: a share in"),
        (check_ring, (-0.1, 0.1), "inner=-0.1: a share in"),
        (check_ring, (math.nan, 0.1), "inner=nan: must be finite"),
        (check_ring, (0.1, 0.0), "outer=0.0: a share in"),
        (check_ring, (0.1, 1.1), "outer=1.1: a share in"),
        (check_bayesian, (0.4, 0.1), "alpha=0.4: an AUC in"),
        (check_bayesian, (1.0, 0.1), "alpha=1.0: an AUC in"),
        (check_bayesian, (0.9, 1.0), "tau_plus=1.0: a class prior"),
        (check_bayesian, (0.9, 0.1, 0.4), "concentration=0.4: hardness in"),
        (check_bayesian, (0.9, 0.1, 1.1), "concentration=1.1: hardness in"),
    ],
)
def test_what_is_out_of_range(check, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check(*options)
    names = ("inner", "outer") if check is check_ring else ("alpha", "tau_plus", "concentration")
    loss = ring if check is check_ring else bayesian
    with pytest.raises(ValueError, match=message):  # before anything is looked at
        loss(None, None, **dict(zip(names, options, strict=False)))


def test_what_is_no_number():
    for check, options in ((check_ring, ("a", 0.1)), (check_bayesian, (None, 0.1))):
        with pytest.raises(TypeError, match="must be a number"):
            check(*options)


def test_a_band_that_is_empty_in_this_batch():
    made = data(images=5)
    with pytest.raises(ValueError, match=r"outer=0.1 of 8 negatives leaves none.* 1/8, or 10 neg"):
        ring(made["z1"], made["z2"])
    with pytest.raises(ValueError, match=r"outer=0.1 of 4 negatives"):
        ring(made["z1"], made["z2"], cross_modal=True)
    with pytest.raises(TypeError, match="unknown option 'beta'"):
        ring(made["z1"], made["z2"], outer=0.5, beta=1.0)
