"""Mixtures against slow loops: whom they mix, in which shares, and what the losses make of them."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hcl.losses import hard, nt_xent
from hcl.synthetic import check, mixtures

B, D = 6, 5


def views(b=B, d=D, *, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(b, d, generator=g, dtype=torch.float64)
    pair = [base + 0.5 * torch.randn(b, d, generator=g, dtype=torch.float64) for _ in range(2)]
    return [(z * torch.arange(1, b + 1)[:, None]).to(dtype) for z in pair]  # of many lengths


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(z1, z2):
    return [row / np.linalg.norm(row) for row in np.concatenate([z1, z2])]


def hardest_of(z, i, k):
    """The k most similar rows that are neither anchor i nor its other view, by a full sort."""
    b = len(z) // 2
    order = np.argsort([-(z[i] @ row) for row in z], kind="stable")
    return [int(j) for j in order if j % b != i % b][:k]


def shares(h, u, v):
    """Both weights of h among u and v, and how far h is from what they span."""
    pair = np.stack([u, v], axis=1)
    weights, *_ = np.linalg.lstsq(pair, h, rcond=None)
    return weights, np.linalg.norm(pair @ weights - h)


def parents(h, z, candidates):
    """The pair of candidates that h lies between, and the first one's share of the mixture."""
    found = []
    for a, i in enumerate(candidates):
        for j in candidates[a + 1 :]:
            weights, distance = shares(h, z[i], z[j])
            if distance < 1e-9 and min(weights) > -1e-9:
                found.append(((i, j), weights[0] / sum(weights)))
    assert len(found) == 1  # in general position a mixture is of one pair
    return found[0]


# Whom they mix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 7, 10])
def test_mixtures_of_negatives_lie_between_two_of_the_hardest_and_no_pair_comes_twice(k):
    z1, z2 = views(seed=k)
    s = min(k * (k - 1) // 2, 8)
    z, h = unit(z1, z2), mixtures(z1, z2, hardest=k, between=s, generator=seeded()).numpy()
    assert h.shape == (2 * B, s, D)
    for i in range(2 * B):
        pairs = [parents(row, z, hardest_of(z, i, k))[0] for row in h[i]]
        assert len(set(pairs)) == s


def test_all_pairs_can_be_asked_for():
    z1, z2 = views()
    z = unit(z1, z2)
    for k in (5, 6):  # the numbering of pairs ends differently for odd and even
        h = mixtures(z1, z2, hardest=k, between=k * (k - 1) // 2, generator=seeded()).numpy()
        candidates = hardest_of(z, 0, k)
        found = {parents(row, z, candidates)[0] for row in h[0]}
        assert len(found) == k * (k - 1) // 2


def test_mixtures_with_the_anchor_are_of_each_of_the_hardest_and_mostly_the_negative():
    z1, z2 = views()
    k, s = 4, 60
    z, h = unit(z1, z2), mixtures(z1, z2, hardest=k, with_anchor=s, generator=seeded()).numpy()
    assert h.shape == (2 * B, s, D)
    for i in range(2 * B):
        seen = set()
        for row in h[i]:
            fits = []
            for j in range(2 * B):
                weights, distance = shares(row, z[i], z[j])
                if j != i and distance < 1e-9:
                    assert 0 <= weights[0] <= weights[1]  # the anchor's share is below one half
                    fits.append(j)
            assert len(fits) == 1
            seen.update(fits)
        assert seen == set(hardest_of(z, i, k))


def test_those_of_two_negatives_come_first():
    z1, z2 = views()
    z = unit(z1, z2)
    h = mixtures(z1, z2, hardest=4, between=3, with_anchor=2, generator=seeded()).numpy()
    for i in range(2 * B):
        candidates = hardest_of(z, i, 4)
        assert all(i not in parents(row, z, candidates)[0] for row in h[i, :3])
        assert all(parents(row, z, [i, *candidates])[0][0] == i for row in h[i, 3:])


def test_shares_and_pairs_are_uniform():
    """Over many anchors: shares by their Kolmogorov distance, pairs by chi squared."""
    b, k = 3, 4
    z1, z2 = views(b=b, d=3)
    z, drawn, counts = unit(z1, z2), [], dict.fromkeys(range(6), 0)
    candidates = hardest_of(z, 0, k)
    pairs = [(i, j) for a, i in enumerate(candidates) for j in candidates[a + 1 :]]
    solve = [np.linalg.pinv(np.stack([z[i], z[j]], axis=1)) for i, j in pairs]
    for seed in range(600):
        for row in mixtures(z1, z2, hardest=k, between=2, generator=seeded(seed))[0].numpy():
            for number, (i, j) in enumerate(pairs):
                w = solve[number] @ row
                if np.linalg.norm(w[0] * z[i] + w[1] * z[j] - row) < 1e-9 and min(w) > -1e-9:
                    counts[number] += 1
                    drawn.append(w[0] / sum(w))
    assert len(drawn) == sum(counts.values()) == 1200
    distance = np.abs(np.sort(drawn) - (np.arange(1200) + 0.5) / 1200).max()
    assert distance < 1.95 / math.sqrt(1200)  # p = 0.001
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 20.5  # 5 degrees, p = 0.001


def test_the_anchors_share_is_uniform_below_one_half():
    z1, z2 = views(b=2, d=4)
    z, h = unit(z1, z2), mixtures(z1, z2, hardest=1, with_anchor=2000, generator=seeded())
    j = hardest_of(z, 0, 1)[0]
    weights = np.linalg.lstsq(np.stack([z[0], z[j]], axis=1), h[0].numpy().T, rcond=None)[0]
    share = np.sort(weights[0] / weights.sum(axis=0))
    wanted = (np.arange(2000) + 0.5) / 4000
    assert np.abs(share - wanted).max() < 0.5 * 1.95 / math.sqrt(2000)


def test_the_order_of_the_images_does_not_matter():
    """With one pair to mix, what is drawn is only the share: the arcs move with the images."""
    z1, z2 = views()
    order = torch.randperm(B, generator=seeded(1))
    h = mixtures(z1, z2, hardest=2, between=1, generator=seeded())
    moved = mixtures(z1[order], z2[order], hardest=2, between=1, generator=seeded(5)).numpy()
    z = unit(z1, z2)
    for place, i in enumerate(torch.cat([order, order + B]).tolist()):
        candidates = hardest_of(z, i, 2)
        assert parents(moved[place, 0], z, candidates)[0] == tuple(candidates)
        assert parents(h[i, 0].numpy(), z, candidates)[0] == tuple(candidates)


# What comes out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_rows_of_the_dtype_that_came(dtype):
    z1, z2 = views(dtype=dtype)
    h = mixtures(z1, z2, hardest=4, between=5, with_anchor=3)
    assert h.dtype == dtype
    assert h.shape == (2 * B, 8, D)
    within = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(h.double().norm(dim=2), torch.ones(2 * B, 8).double(),
                               rtol=0, atol=within)  # fmt: skip


def test_autocast_does_not_lower_the_precision():
    z1, z2 = views(dtype=torch.float32)
    options = {"hardest": 4, "between": 3, "with_anchor": 2}
    plain = mixtures(z1, z2, **options, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, mixtures(z1, z2, **options, generator=seeded()))


def test_the_lengths_of_the_embeddings_do_not_matter():
    z1, z2 = views()
    options = {"hardest": 4, "between": 3, "with_anchor": 2}
    torch.testing.assert_close(
        mixtures(z1, z2, **options, generator=seeded()),
        mixtures(normalize(z1, dim=1), 7 * z2, **options, generator=seeded()),
    )


def test_a_seed_gives_the_same_again_and_leaves_the_global_generator_alone():
    z1, z2 = views()
    options = {"hardest": 5, "between": 4, "with_anchor": 3}
    before = torch.get_rng_state()
    first = mixtures(z1, z2, **options, generator=seeded(1))
    assert torch.equal(first, mixtures(z1, z2, **options, generator=seeded(1)))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, mixtures(z1, z2, **options, generator=seeded(2)))


def test_opposite_and_zero_rows_give_no_nan(monkeypatch):
    z = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    half = lambda *size, **_: torch.full(size, 0.5, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(torch, "rand", half)  # equal shares of +x and -x cancel
    h = mixtures(z, z, hardest=4, between=6)
    assert torch.isfinite(h).all()
    assert (h[0].norm(dim=1) == 0).any()
    zero = mixtures(torch.zeros(3, 2), torch.zeros(3, 2), hardest=4, between=3, with_anchor=2)
    assert torch.equal(zero, torch.zeros(6, 5, 2))
    assert torch.isfinite(nt_xent(z, z, synthetic=h))


# In a loss ----------------------------------------------------------------------------------------


def test_no_gradient_flows_through_the_mixtures_but_the_anchors_get_theirs():
    z1, z2 = (z.requires_grad_() for z in views())
    h = mixtures(z1, z2, hardest=4, between=3, with_anchor=2, generator=seeded())
    assert not h.requires_grad
    with_h = torch.autograd.grad(nt_xent(z1, z2, synthetic=h), [z1, z2])
    without = torch.autograd.grad(nt_xent(z1, z2), [z1, z2])
    assert all((a - b).norm() > 1e-6 for a, b in zip(with_h, without, strict=True))

    def constant(a, b):  # the same numbers, as a constant of the loss
        return nt_xent(a, b, synthetic=torch.tensor(h.tolist(), dtype=torch.float64))

    wanted = torch.autograd.grad(constant(z1, z2), [z1, z2])
    for a, b in zip(with_h, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(constant, (z1, z2))


def slow(z1, z2, h, *, t, beta, tau):
    """The papers' estimator over N' = N + S negatives, anchor by anchor with Python floats."""
    z, total = unit(z1, z2), 0.0
    for i in range(2 * B):
        partner = (i + B) % (2 * B)
        positive = math.exp(z[i] @ z[partner] / t)
        negatives = [z[j] for j in range(2 * B) if j not in (i, partner)] + list(h[i])
        n = len(negatives)
        assert n == 2 * B - 2 + len(h[i])
        e = [math.exp(z[i] @ row / t) for row in negatives]
        weight = [x**beta for x in e]
        mean = sum(weight) / n
        tilted = sum(w / mean * x for w, x in zip(weight, e, strict=True))
        ng = max((tilted - tau * n * positive) / (1 - tau), n * math.exp(-1 / t))
        total += math.log((positive + ng) / positive)
    return total / (2 * B)


@pytest.mark.parametrize("t", [0.2, 0.5])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("tau", [0.0, 0.05])
def test_losses_over_real_and_synthetic_negatives_are_the_formula(t, beta, tau):
    z1, z2 = views(seed=3)
    h = mixtures(z1, z2, hardest=5, between=4, with_anchor=3, generator=seeded())
    wanted = slow(z1.numpy(), z2.numpy(), h.numpy(), t=t, beta=beta, tau=tau)
    ours = hard(z1, z2, temperature=t, beta=beta, tau_plus=tau, synthetic=h)
    assert ours.item() == pytest.approx(wanted, abs=1e-10)
    if not beta and not tau:
        assert nt_xent(z1, z2, temperature=t, synthetic=h).item() == pytest.approx(wanted)


def test_a_mixture_with_the_anchor_is_harder_than_the_negative_it_is_made_of():
    z1, z2 = views(b=20, d=8)
    z = torch.cat([normalize(z, dim=1) for z in (z1, z2)])
    h = mixtures(z1, z2, hardest=1, with_anchor=9)
    nearest = torch.tensor([(z[i] @ z[hardest_of(z.numpy(), i, 1)[0]]).item() for i in range(40)])
    assert (torch.einsum("nd,nsd->ns", z, h) > nearest[:, None]).all()


# Refusals -----------------------------------------------------------------------------------------

IMPOSSIBLE = [
    ({"between": 0}, ValueError, "between=0, with_anchor=0: nothing to make"),
    ({"between": -1}, ValueError, "between=-1: must be 0 or more"),
    ({"with_anchor": -2}, ValueError, "with_anchor=-2: must be 0 or more"),
    ({"hardest": 0}, ValueError, "hardest=0: must be 1 or more"),
    ({"hardest": -3}, ValueError, "hardest=-3: must be 1 or more"),
    ({"hardest": 1}, ValueError, "hardest=1: must be 2 or more to mix pairs"),
    ({"hardest": 3, "between": 4}, ValueError, "between=4: more synthetic negatives than the 3"),
    ({"hardest": 2.0}, TypeError, "hardest=2.0: must be a whole number"),
    ({"between": True}, TypeError, "between=True: must be a whole number"),
    ({"with_anchor": None}, TypeError, "with_anchor=None: must be a whole number"),
]


@pytest.mark.parametrize(("changes", "exception", "words"), IMPOSSIBLE)
def test_what_no_batch_makes_possible_is_refused_with_and_without_one(changes, exception, words):
    options = {"hardest": 4, "between": 2, "with_anchor": 0, **changes}
    with pytest.raises(exception, match=words):
        check(**options)
    with pytest.raises(exception, match=words):
        mixtures(*views(), **options)


def test_one_of_the_hardest_is_enough_for_mixtures_with_the_anchor():
    check(hardest=1, between=0, with_anchor=50)
    check(hardest=4, between=6, with_anchor=0)


@pytest.mark.parametrize(("b", "k"), [(6, 11), (2, 3), (1, 1)])
def test_more_than_there_are_negatives(b, k):
    words = f"hardest={k}: {b} images leave an anchor {2 * b - 2} negatives"
    with pytest.raises(ValueError, match=words):
        mixtures(*views(b=b), hardest=k, with_anchor=1)
    if b > 1:
        assert len(mixtures(*views(b=b), hardest=2 * b - 2, between=1)) == 2 * b


def test_embeddings_that_do_not_fit():
    z1, z2 = views()
    with pytest.raises(ValueError, match=r"z1 \(6, 5\), z2 \(5, 5\)"):
        mixtures(z1, z2[1:], hardest=2, between=1)
    with pytest.raises(TypeError, match=r"z2 is torch\.float32"):
        mixtures(z1, z2.float(), hardest=2, between=1)
    with pytest.raises(ValueError, match=r"z1: NaN or infinity in row\(s\) \[0\]"):
        mixtures(z1.index_fill(0, torch.tensor(0), math.nan), z2, hardest=2, between=1)
    with pytest.raises(TypeError, match="z1: must be a floating point tensor"):
        mixtures(z1.long(), z2, hardest=2, between=1)
