"""The four losses and the tilted means against plain loops in float64, and the order they prove."""

import math

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hcl import ordering

NAMES = ("ucl", "h_ucl", "scl", "h_scl")


def batch(seed, images=7, classes=3, d=4, dtype=torch.float64):
    """Two views that resemble each other, and labels of which each class has one at least."""
    draw = torch.Generator().manual_seed(seed)
    z1 = torch.randn(images, d, generator=draw, dtype=torch.float64)
    z2 = z1 + 0.5 * torch.randn(images, d, generator=draw, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=draw)
    labels[:classes] = torch.arange(classes)
    return z1.to(dtype), z2.to(dtype), labels


def unit(z):
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in z.tolist()]


def tilted_mean(scores, beta):
    weights = [math.exp(beta * s) for s in scores]
    return sum(w * math.exp(s) for w, s in zip(weights, scores, strict=True)) / sum(weights)


def anchors(z1, z2, labels, t, beta):
    """For each anchor: the four losses, and log g of its own label and of others (or None)."""
    views, y = unit(z1) + unit(z2), labels.tolist() * 2
    images = len(labels)
    found = []
    for i, anchor in enumerate(views):
        s = [sum(a * b for a, b in zip(anchor, other, strict=True)) / t for other in views]
        mate = (i + images) % (2 * images)
        candidates = [j for j in range(2 * images) if j not in (i, mate)]
        same = [s[j] for j in candidates if y[j] == y[i]]
        other = [s[j] for j in candidates if y[j] != y[i]]
        row = {}
        for name, negatives, tilt in (
            ("ucl", same + other, 0), ("h_ucl", same + other, beta),
            ("scl", other, 0), ("h_scl", other, beta),
        ):  # fmt: skip
            q = (2 * images - 2) / math.exp(s[mate])
            row[name] = math.log1p(q * tilted_mean(negatives, tilt)) if negatives else 0.0
        row["same"] = math.log(tilted_mean(same, beta)) if same else None
        row["other"] = math.log(tilted_mean(other, beta)) if other else None
        found.append(row)
    return found


def means(found):
    return {name: sum(row[name] for row in found) / len(found) for name in NAMES}


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.5])
def test_both_are_what_the_formulas_say(t, beta):
    for seed in range(3):
        z1, z2, labels = batch(seed)
        loops = anchors(z1, z2, labels, t, beta)
        found = ordering.four_losses(z1, z2, labels, temperature=t, beta=beta)
        assert found == pytest.approx(means(loops), rel=1e-10)
        assert list(found) == list(NAMES)
        given = ordering.tilted_means(z1, z2, labels, temperature=t, beta=beta)
        for values, kind in zip(given, ("same", "other"), strict=True):
            assert values.shape == (2 * len(labels),)
            expected = [math.nan if row[kind] is None else row[kind] for row in loops]
            assert values.tolist() == pytest.approx(expected, rel=1e-10, nan_ok=True)


def test_the_defaults_are_those_of_the_losses():
    z1, z2, labels = batch(0)
    loops = anchors(z1, z2, labels, 0.5, 1.0)
    assert ordering.four_losses(z1, z2, labels) == pytest.approx(means(loops))
    assert ordering.tilted_means(z1, z2, labels)[1].tolist() == pytest.approx(
        [row["other"] for row in loops]
    )


def test_float32_is_close_and_the_means_are_float64():
    z1, z2, labels = batch(1, dtype=torch.float32)
    loops = anchors(z1.double(), z2.double(), labels, 0.5, 1.0)
    assert ordering.four_losses(z1, z2, labels) == pytest.approx(means(loops), rel=1e-5)
    same, other = ordering.tilted_means(z1, z2, labels)
    assert same.dtype == other.dtype == torch.float64


def test_no_gradient_is_kept():
    z1, z2, labels = batch(2)
    z1.requires_grad_()
    assert not any(g.requires_grad for g in ordering.tilted_means(z1, z2, labels))
    assert all(isinstance(v, float) for v in ordering.four_losses(z1, z2, labels).values())


def test_hardness_that_overflows_exp_does_not_matter():
    z1, z2, labels = batch(3)
    for g in ordering.tilted_means(z1, z2, labels, temperature=0.01, beta=100.0):
        assert g[~g.isnan()].isfinite().all()


def test_much_hardness_leaves_the_nearest():
    z1, z2, labels = batch(4)
    z, y, image = F.normalize(torch.cat([z1, z2]), dim=1), labels.repeat(2), torch.arange(14) % 7
    s = (z @ z.T / 0.5).masked_fill(image[:, None] == image, -math.inf)
    nearest = s.masked_fill(y[:, None] == y, -math.inf).amax(1)
    _, other = ordering.tilted_means(z1, z2, labels, beta=1e6)
    torch.testing.assert_close(other, nearest, rtol=0, atol=1e-4)


# --- what must not matter


@given(seed=st.integers(0, 10_000), beta=st.floats(0, 5), t=st.floats(0.1, 2))
@settings(max_examples=25, deadline=None)
def test_order_of_images_names_of_labels_and_lengths_of_rows_do_not_matter(seed, beta, t):
    z1, z2, labels = batch(seed)
    args = {"temperature": t, "beta": beta}
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    names = torch.tensor([40, 7, 19])
    moved = (3 * z1[order], 0.2 * z2[order], names[labels[order]])
    assert ordering.four_losses(*moved, **args) == pytest.approx(
        ordering.four_losses(z1, z2, labels, **args), rel=1e-9
    )
    both = torch.cat([order, order + len(order)])
    before, after = (ordering.tilted_means(*x, **args) for x in ((z1, z2, labels), moved))
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(b[both], a, equal_nan=True)
    swapped = ordering.four_losses(z2, z1, labels, **args)
    assert swapped == pytest.approx(ordering.four_losses(z1, z2, labels, **args), rel=1e-9)


# --- the theorem


@given(
    seed=st.integers(0, 10_000), images=st.integers(3, 10), classes=st.integers(2, 3),
    beta=st.floats(0, 8), t=st.floats(0.1, 2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_an_anchor_is_in_order_if_and_only_if_the_assumption_holds(seed, images, classes, beta, t):
    z1, z2, labels = batch(seed, images, classes)
    same, other = ordering.tilted_means(z1, z2, labels, temperature=t, beta=beta)
    loops = anchors(z1, z2, labels, t, beta)
    for s, o, row in zip(same.tolist(), other.tolist(), loops, strict=True):
        gap = row["h_ucl"] - row["h_scl"]
        if math.isnan(s):  # no companion: nothing is left out
            assert gap == pytest.approx(0, abs=1e-12)
        elif abs(gap) > 1e-9:
            assert (gap > 0) == (s > o)


@given(
    seed=st.integers(0, 10_000), beta=st.floats(0, 8), t=st.floats(0.1, 2), pull=st.floats(0, 9)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_means_are_in_order_where_all_anchors_are(seed, beta, t, pull):
    z1, z2, labels = batch(seed, 6, 2)
    centre = pull * torch.eye(4, dtype=torch.float64)[labels]  # makes the assumption likely
    z1, z2, args = z1 + centre, z2 + centre, {"temperature": t, "beta": beta}
    found = ordering.four_losses(z1, z2, labels, **args)
    if ordering.assumption_share(z1, z2, labels, **args) == 1:
        event("all anchors have the assumption")
        assert found["h_scl"] <= found["h_ucl"] + 1e-9
    assert found["h_ucl"] >= found["ucl"] - 1e-9  # hardening raises both, in any case
    assert found["h_scl"] >= found["scl"] - 1e-9


def test_classes_that_are_points_have_the_assumption_and_antipodes_do_not():
    corners = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]]
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert ordering.assumption_share(corners, corners, labels) == 1
    assert ordering.assumption_share(corners, corners, torch.tensor([0, 1, 2, 0, 1, 2])) == 0
    apart = torch.cat([corners[::2], -corners[::2]])
    pairs = torch.arange(3).repeat(2)
    assert ordering.assumption_share(apart, apart, pairs) == 0
    found = ordering.four_losses(apart, apart, pairs)
    assert found["h_scl"] > found["h_ucl"]


# --- anchors without negatives of a kind


def test_where_no_label_is_shared_the_supervised_losses_are_the_others():
    z1, z2, _ = batch(5)
    found = ordering.four_losses(z1, z2, torch.arange(7))
    assert found["scl"] == pytest.approx(found["ucl"])
    assert found["h_scl"] == pytest.approx(found["h_ucl"])
    same, other = ordering.tilted_means(z1, z2, torch.arange(7))
    assert same.isnan().all()
    assert not other.isnan().any()
    assert math.isnan(ordering.assumption_share(z1, z2, torch.arange(7)))


def test_where_all_share_one_label_the_supervised_losses_are_zero():
    z1, z2, _ = batch(6)
    one = torch.zeros(7, dtype=torch.int64)
    found = ordering.four_losses(z1, z2, one)
    assert found["scl"] == found["h_scl"] == 0
    assert found["h_ucl"] > 0
    assert ordering.tilted_means(z1, z2, one)[1].isnan().all()


def test_the_share_leaves_out_those_that_cannot_tell():
    z = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2, 2]]
    labels = torch.tensor([0, 0, 1, 2, 3])  # the last three have no companion
    assert ordering.assumption_share(z, z, labels) == 1
    labels = torch.tensor([0, 0, 1, 2, 1])  # of label 1, one ties and one lies on a stranger
    assert ordering.assumption_share(z, z, labels) == 3 / 4


# --- bad input

BAD = {
    "beta=-1": {"beta": -1.0},
    "temperature=0": {"temperature": 0.0},
    r"labels \(5,\)": {"labels": torch.zeros(5, dtype=torch.int64)},
    "labels: -3 among them": {"labels": torch.tensor([0, 1, 2, 0, 1, 2, -3])},
    "NaN or infinity": {"z1": torch.full((7, 4), math.nan, dtype=torch.float64)},
}


@pytest.mark.parametrize("function", [ordering.four_losses, ordering.tilted_means])
@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused(function, message):
    z1, z2, labels = batch(7)
    args = {"z1": z1, "z2": z2, "labels": labels, **BAD[message]}
    with pytest.raises(ValueError, match=message):
        function(**args)


@pytest.mark.parametrize("function", [ordering.four_losses, ordering.tilted_means])
def test_what_is_of_another_type_is_refused(function):
    z1, z2, labels = batch(7)
    with pytest.raises(TypeError, match="labels"):
        function(z1, z2, labels.double())
    with pytest.raises(TypeError, match="dtype"):
        function(z1, z2.float(), labels)
    with pytest.raises(TypeError, match="beta"):
        function(z1, z2, labels, beta="1")


def test_views_of_two_lengths_are_refused():
    z1, z2, labels = batch(8)
    with pytest.raises(ValueError, match="z1"):
        ordering.four_losses(z1, z2[:6], labels)


def test_the_means_refuse_views_of_two_lengths():
    z1, z2, labels = batch(8)
    with pytest.raises(ValueError, match="z1"):
        ordering.tilted_means(z1, z2[:6], labels)


def test_the_means_refuse_nan_in_any_row():
    z1, z2, labels = batch(8)
    z1[5, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        ordering.tilted_means(z1, z2, labels)


def test_images_without_a_label_are_classes_of_their_own_as_in_the_losses():
    z1, z2, _ = batch(9)
    some = torch.tensor([0, 0, 1, 1, -1, -1, -1])
    own = torch.tensor([0, 0, 1, 1, 2, 3, 4])
    assert ordering.four_losses(z1, z2, some) == ordering.four_losses(z1, z2, own)
