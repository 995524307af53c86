"""Hardening by a threshold against loops in float64, and against the losses it must coincide with.

A negative keeps its weight e^(beta s) where its cosine reaches the threshold, and the hardest one
keeps it in any case.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hcl import losses, tiles
from hcl.losses import ContrastiveLoss, hard, hard_scl

B, D, K, S = 6, 3, 4, 2  # images, dimensions, queue, synthetic negatives of each anchor
THRESHOLDS = (-1.0, -0.4, 0.0, 0.5, 0.9, 1.0)
LABELS = {
    "pairs": [2, 0, 2, 5, 0, 5],
    "one class": [3] * B,
    "all distinct": [4, 2, 0, 1, 3, 5],
    "without a label": [0, -1, 0, 1, -1, 1],
}
WAYS = {
    "alone": ({}, ()),
    "cross_modal": ({"cross_modal": True}, ()),
    "queue": ({}, ("queue",)),
    "synthetic": ({}, ("synthetic",)),
    "everything": ({"cross_modal": True}, ("queue", "synthetic")),
}


def data(seed=0, noise=0.4, b=B):
    g = torch.Generator().manual_seed(seed)

    def rows(*shape):
        return torch.randn(*shape, D, generator=g, dtype=torch.float64)

    z1 = rows(b)
    return {"z1": z1, "z2": z1 + noise * rows(b), "queue": rows(K), "synthetic": rows(2 * b, S)}


# The formula, anchor by anchor --------------------------------------------------------------------


def kept_mean(cosines, t, threshold, beta, detach):
    """Mean of e^s with the weights e^(beta s) of the negatives that are kept; 0 of nothing."""
    hardest = max(c.item() for c in cosines)
    total = weights = 0.0
    for c in cosines:
        if c.item() >= threshold or c.item() == hardest:
            w = torch.exp(beta * (c.detach() if detach else c) / t)
            total, weights = total + w * torch.exp(c / t), weights + w
    return total / weights


def by_hand(
    z1, z2, *, threshold, temperature=0.5, beta=1.0, tau_plus=0.1, detach_weights=False,
    clamp="scaled", Q=None, labels=None, unlabelled="negative", cross_modal=False, queue=None,
    synthetic=None,
):  # fmt: skip
    """hard without labels, hard_scl with them: no sorting, no strips, no logarithms."""
    t, b, found = temperature, len(z1), []
    images = [i for i in range(b) if labels is None or unlabelled != "ignore" or labels[i] >= 0]
    views = [(v, i) for v, z in enumerate((z1, z2)) if z is not None for i in images]
    unit = {(v, i): normalize((z1, z2)[v][i], dim=0) for v, i in views}
    for v, i in views:
        positives, negatives, others = [], [], 0
        for w, j in views:
            if (w, j) == (v, i) or (cross_modal and w == v):
                continue
            others += j != i
            same = j == i or (labels is not None and labels[i] == labels[j] >= 0)
            (positives if same else negatives).append(unit[v, i] @ unit[w, j])
        for more in (queue, None if synthetic is None else synthetic[v * b + i]):
            if more is not None:
                negatives += [unit[v, i] @ normalize(h, dim=0) for h in more]
                others += len(more)
        q = {None: others, "negatives": len(negatives)}.get(Q, Q)
        g = kept_mean(negatives, t, threshold, beta, detach_weights) if negatives else 0.0
        if labels is not None:
            found += [torch.log(1 + q * g / torch.exp(p / t)) for p in positives]
            continue
        p = torch.exp(unit[v, i] @ unit[1 - v, i] / t)
        ng = q * (g - tau_plus * p) / (1 - tau_plus)
        floor = torch.exp(-1 / torch.as_tensor(t, dtype=torch.float64)) * (
            q if clamp == "scaled" else 1
        )
        ng = torch.maximum(ng, floor) if tau_plus else ng
        found.append(torch.log(1 + ng / p))
    return torch.stack(found).mean() if found else torch.zeros((), dtype=torch.float64)


def agree(function, given, rtol=1e-9, **options):
    """Value and every gradient are those of the loop."""
    results = []
    for compute in (function, by_hand):
        leaves = {
            k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in given.items()
        }
        wanted = [v for v in leaves.values() if isinstance(v, torch.Tensor)]
        value = compute(**leaves, **options)
        grads = [torch.zeros_like(v) for v in wanted]
        if value.requires_grad:
            made = torch.autograd.grad(value, wanted, allow_unused=True)
            grads = [z if g is None else g for g, z in zip(made, grads, strict=True)]
        results.append((value.detach(), grads))
    torch.testing.assert_close(results[0], results[1], rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0, "tau_plus": 0.0}, {"beta": 0.0, "tau_plus": 0.05}, {"beta": 2.0},
     {"beta": 0.7, "tau_plus": 0.3, "clamp": "unscaled", "Q": 3.0},
     {"beta": 1.0, "tau_plus": 0.02, "detach_weights": True}],
    ids=["plain", "debiased", "tilted", "clamped", "detached"],
)  # fmt: skip
def test_hard_is_the_formula(options, threshold, way):
    among, extra = WAYS[way]
    made = data(seed=len(way))
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    agree(hard, given, threshold=threshold, **{"tau_plus": 0.1, **options}, **among)


@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
@pytest.mark.parametrize("group", LABELS)
@pytest.mark.parametrize("threshold", [-0.4, 0.5, 1.0])
@pytest.mark.parametrize(
    ("options", "way", "views"),
    [({"beta": 0.0}, "alone", 2), ({"beta": 2.0, "Q": "negatives"}, "alone", 2),
     ({"beta": 0.5, "Q": 2.5, "detach_weights": True}, "everything", 2), ({}, "alone", 1),
     ({"beta": 0.0, "Q": "negatives"}, "queue", 1)],
    ids=["plain", "negatives", "everything", "one view", "one view and a queue"],
)  # fmt: skip
def test_hard_scl_is_the_formula(options, way, views, threshold, group, unlabelled):
    among, extra = WAYS[way]
    made = data(seed=11)
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    given["z2"] = given["z2"] if views == 2 else None
    labels = torch.tensor(LABELS[group])
    agree(
        hard_scl, given, threshold=threshold, labels=labels, unlabelled=unlabelled, **options,
        **among,
    )  # fmt: skip


@pytest.mark.parametrize("t", [0.05, 0.2, 2.0])
@pytest.mark.parametrize("function", [hard, hard_scl])
def test_other_temperatures_and_one_that_learns(function, t):
    """The threshold is on the cosine, so it does not move with the temperature."""
    made = data(seed=5)
    labels = {"labels": torch.tensor(LABELS["pairs"])} if function is hard_scl else {}
    given = {"z1": made["z1"], "z2": made["z2"], "temperature": t}
    agree(function, given, rtol=1e-7, threshold=0.3, **labels)
    given["temperature"] = torch.tensor(t, dtype=torch.float64)
    agree(function, given, rtol=1e-7, threshold=0.3, **labels)


def test_strips_of_a_few_anchors_change_nothing(monkeypatch):
    made, labels = data(seed=6), torch.tensor(LABELS["pairs"])
    whole = [hard(**made, threshold=0.2), hard_scl(**made, labels=labels, threshold=0.2)]
    monkeypatch.setattr(tiles, "STRIP", {"cpu": 30})
    monkeypatch.setattr(tiles, "LEAST", 1)
    parts = [hard(**made, threshold=0.2), hard_scl(**made, labels=labels, threshold=0.2)]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    agree(hard, made, threshold=0.2, beta=0.7, tau_plus=0.02)


# What it must coincide with -----------------------------------------------------------------------


def with_antipodes(seed, dtype):
    """Two images whose views point the opposite way: a cosine of -1, up to the last digit."""
    made = data(seed=seed)
    made["z1"][1] = made["z2"][1] = -made["z1"][0]
    return {k: v.to(dtype) for k, v in made.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_of_minus_one_is_none(way, dtype):
    among, extra = WAYS[way]
    for seed in range(8):
        made = with_antipodes(seed, dtype)
        given = {k: made[k] for k in ("z1", "z2", *extra)}
        labels = torch.tensor(LABELS["pairs"])
        for function, more in ((hard, {"tau_plus": 0.02}), (hard_scl, {"labels": labels})):
            for beta in (0.0, 0.7):
                options = {**more, **among, "beta": beta}
                ours = function(**given, **options, threshold=-1.0)
                torch.testing.assert_close(ours, function(**given, **options), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_threshold_of_one_keeps_the_hardest_alone_as_large_beta_does(way, beta):
    among, extra = WAYS[way]
    made = data(seed=8)
    given = {k: made[k] for k in ("z1", "z2", *extra)}
    labels = torch.tensor(LABELS["pairs"])
    for function, more in ((hard, {"tau_plus": 0.02}), (hard_scl, {"labels": labels})):
        ours = function(**given, **more, **among, beta=beta, threshold=1.0)
        hardest = function(**given, **more, **among, beta=1e4)
        torch.testing.assert_close(ours, hardest, rtol=1e-6, atol=0)


def test_below_its_threshold_a_negative_gets_no_gradient():
    made = data(seed=9)
    h = made["synthetic"].requires_grad_()
    loss = hard(made["z1"][:1], made["z2"][:1], synthetic=h[:2], threshold=1.0, tau_plus=0.0)
    loss.backward()
    moved = h.grad.abs().sum(dim=2) > 0  # (2B, S)
    assert moved[:2].sum(dim=1).tolist() == [1, 1]
    z = normalize(torch.cat([made["z1"][:1], made["z2"][:1]]), dim=1)
    cosine = torch.einsum("nd,nsd->ns", z, normalize(h.detach()[:2], dim=2))
    assert torch.equal(moved[:2].int().argmax(dim=1), cosine.argmax(dim=1))


def test_weights_without_a_tilt_have_no_gradient_to_stop():
    made = data(seed=10)
    found = []
    for detach in (False, True):
        z1 = made["z1"].clone().requires_grad_()
        hard(z1, made["z2"], beta=0.0, threshold=0.2, detach_weights=detach).backward()
        found.append(z1.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


seeds = st.integers(0, 10_000)
relations = settings(max_examples=15, deadline=None)


@relations
@given(seed=seeds, threshold=st.floats(-1, 1), cross_modal=st.booleans(), beta=st.floats(0, 3))
def test_the_order_of_images_labels_queue_and_synthetic_does_not_matter(
    seed, threshold, cross_modal, beta
):
    made, g = data(seed=seed), torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, (B,), generator=g)
    order, queue, kind = (torch.randperm(n, generator=g) for n in (B, K, S))
    moved = {
        "z1": made["z1"][order], "z2": made["z2"][order], "queue": made["queue"][queue],
        "synthetic": made["synthetic"][torch.cat([order, order + B])][:, kind],
    }  # fmt: skip
    options = {"threshold": threshold, "beta": beta, "cross_modal": cross_modal}
    torch.testing.assert_close(hard(**made, **options), hard(**moved, **options))
    before = hard_scl(**made, labels=labels, **options)
    torch.testing.assert_close(before, hard_scl(**moved, labels=labels[order], **options))


@relations
@given(seed=seeds, low=st.floats(-1, 1), high=st.floats(-1, 1), beta=st.sampled_from([0.0, 1.5]))
def test_a_higher_threshold_never_lowers_the_loss(seed, low, high, beta):
    """The mean over what is kept grows with each of the smallest that leaves it."""
    made = data(seed=seed)
    low, high = sorted((low, high))
    losses = [hard(**made, beta=beta, tau_plus=0.0, threshold=c) for c in (low, high)]
    assert losses[1] >= losses[0] - 1e-12


def test_gathering_without_other_processes_changes_nothing():
    made, labels = data(seed=12), torch.tensor(LABELS["pairs"])
    for gather in ("averaged", "summed"):
        torch.testing.assert_close(
            hard(**made, threshold=0.3, gather=gather), hard(**made, threshold=0.3)
        )
        torch.testing.assert_close(
            hard_scl(**made, labels=labels, threshold=0.3, gather=gather),
            hard_scl(**made, labels=labels, threshold=0.3),
        )


# Second derivatives, low precision, nothing to compare with ---------------------------------------


@pytest.mark.parametrize("name", ["hard", "hard_scl"])
def test_the_gradient_of_the_gradient(name):
    made = data(seed=13)
    made = {k: v.requires_grad_() for k, v in made.items()}
    labels = {"labels": torch.tensor(LABELS["pairs"])} if name == "hard_scl" else {}

    def loss(*values):
        given = dict(zip(made, values, strict=True))
        return getattr(losses, name)(**given, **labels, threshold=0.1, beta=0.7)

    assert torch.autograd.gradgradcheck(loss, tuple(made.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [hard, hard_scl])
def test_low_precision_and_autocast_stay_near_float64(function, dtype):
    """Of the same rounded input, whose cosines are nowhere near the threshold."""
    made = {k: v.to(dtype) for k, v in data(seed=14).items() if k in ("z1", "z2", "queue")}
    labels = {"labels": torch.tensor(LABELS["pairs"])} if function is hard_scl else {}
    wanted = by_hand(**{k: v.double() for k, v in made.items()}, **labels, threshold=0.35)
    ours = function(**made, **labels, threshold=0.35)
    with torch.autocast("cpu", torch.bfloat16):
        cast = function(**made, **labels, threshold=0.35)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert cast.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1.0])
def test_nothing_to_compare_with_is_0_and_finite(threshold):
    made = data(seed=15)
    z1, z2 = made["z1"].requires_grad_(), made["z2"]
    cases = {
        "every image left out": (torch.full((B,), -1), "ignore"),
        "one class": (torch.zeros(B, dtype=torch.int64), "negative"),
    }
    for labels, unlabelled in cases.values():
        z1.grad = None
        loss = hard_scl(z1, z2, labels, threshold=threshold, unlabelled=unlabelled)
        assert loss.item() == 0.0
        if loss.requires_grad:
            loss.backward()
            assert z1.grad is None or not z1.grad.any()
    one = hard_scl(z1[:1], None, torch.tensor([7]), threshold=threshold)
    assert one.item() == 0.0


def test_equal_rows_are_all_the_hardest():
    z = torch.ones(4, 3)
    for threshold in (-1.0, 0.0, 1.0):
        ours = hard(z, z, threshold=threshold, tau_plus=0.0, beta=0.0)
        assert ours.item() == pytest.approx(math.log(7), rel=1e-6)


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.5, -1.01, float("nan"), float("inf")])
def test_a_threshold_that_is_no_cosine_is_refused(value):
    z, labels = torch.eye(4), torch.arange(4)
    for call in (
        lambda: hard(z, z, threshold=value),
        lambda: hard_scl(z, z, labels, threshold=value),
        lambda: ContrastiveLoss("hard", threshold=value),
    ):
        with pytest.raises(ValueError, match=rf"threshold={value}.*cosine in \[-1, 1\]"):
            call()


@pytest.mark.parametrize("value", ["0.5", True, [0.5]])
def test_a_threshold_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"threshold=.*must be a number"):
        hard(torch.eye(4), torch.eye(4), threshold=value)


def test_a_threshold_does_not_go_with_sums_debiased_separately():
    with pytest.raises(ValueError, match=r"debias='separate'.*threshold"):
        hard(torch.eye(4), torch.eye(4), threshold=0.5, debias="separate")
    with pytest.raises(ValueError, match=r"debias='separate'.*threshold"):
        ContrastiveLoss("hard", threshold=0.5, debias="separate")


def test_the_module_hands_its_threshold_on_to_the_methods_that_have_one():
    made, labels = data(seed=16), torch.tensor(LABELS["pairs"])
    z1, z2 = made["z1"], made["z2"]
    for method in losses.METHODS:
        without, having = (
            ContrastiveLoss(method, threshold=c)(z1, z2, labels) for c in (None, 0.8)
        )
        assert torch.equal(without, having) == (method not in ("hard", "hard_scl")), method
    assert "threshold=0.8" in repr(ContrastiveLoss("hard", threshold=0.8))


def test_the_share_of_clamped_anchors_knows_the_threshold():
    """Raising the threshold raises the weighted mean, so fewer anchors fall below the floor."""
    made, shares = data(seed=17, noise=0.3), []
    z1, z2 = made["z1"], made["z2"]
    z = [normalize(v, dim=1) for v in (z1, z2)]
    for threshold in (-1.0, 0.0, 0.5):
        bound = []
        for v, i in itertools.product((0, 1), range(B)):
            cosines = [z[v][i] @ z[w][j] for w in (0, 1) for j in range(B) if j != i]
            g = kept_mean(cosines, 0.5, threshold, 0.0, False)
            ng = (g - 0.4 * torch.exp(z[0][i] @ z[1][i] / 0.5)) / 0.6
            bound.append(bool(ng < math.exp(-2)))
        ours = losses.clamp_share(z1, z2, beta=0.0, tau_plus=0.4, threshold=threshold)
        assert ours == pytest.approx(sum(bound) / len(bound))
        shares.append(ours)
    assert shares[0] > shares[1] > shares[2]
