"""Metrics of neural collapse against loops in plain Python, closed forms, and a theorem's bound."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hcl import collapse
from hcl.collapse import LEAST, free_embeddings, latent_class_loss
from hcl.packing import simplex

NUMBERS = ("zero_sum", "unit_norm", "equal_angle", "within_class")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(seed=0, n=30, d=5, classes=4):
    """Random rows in float64 and labels, of which every class has at least one."""
    z = torch.randn(n, d, generator=generator(seed), dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator(seed + 1))
    labels[:classes] = torch.arange(classes)
    return z, labels


def turned(z, seed=0):
    """z in a random basis: no number here may depend on it."""
    basis = torch.randn(z.shape[1], z.shape[1], generator=generator(seed), dtype=torch.float64)
    return z @ torch.linalg.qr(basis).Q


# The frame ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_classes", "dim"), [(2, 1), (2, 3), (3, 2), (7, 6), (10, 16), (100, 99)]
)
def test_a_simplex_has_equal_angles_and_no_centre(n_classes, dim):
    vectors = simplex(n_classes, dim)
    assert vectors.shape == (n_classes, dim)
    wanted = np.full((n_classes, n_classes), -1 / (n_classes - 1))
    np.fill_diagonal(wanted, 1)
    np.testing.assert_allclose((vectors @ vectors.T).numpy(), wanted, atol=1e-12)
    np.testing.assert_allclose(vectors.sum(dim=0).numpy(), 0, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_a_collapsed_frame_has_no_deviation_at_all(n_classes):
    means = turned(simplex(n_classes, n_classes + 2))
    labels = torch.arange(n_classes).repeat(3)
    found = collapse.metrics(means[labels], labels, means, torch.arange(n_classes))
    for name in NUMBERS:
        assert found[name] == pytest.approx(0, abs=1e-12), name
    assert found["dimensions"] == n_classes - 1
    assert found["nearest_mean"] == 1
    values = [found[f"singular_{k}"] for k in range(1, n_classes)]
    assert values == pytest.approx([1] * (n_classes - 1))
    assert f"singular_{n_classes}" not in found


# Each number --------------------------------------------------------------------------------------


def by_loops(z, labels):
    """The four deviations from their definitions, number by number."""
    classes = sorted(set(labels))
    means = [
        [sum(r[k] for r in rows) / len(rows) for k in range(len(z[0]))]
        for rows in ([r for r, y in zip(z, labels, strict=True) if y == c] for c in classes)
    ]
    of = dict(zip(classes, means, strict=True))

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def length(a):
        return math.sqrt(dot(a, a))

    cosines = [
        dot(a, b) / length(a) / length(b)
        for i, a in enumerate(means)
        for j, b in enumerate(means)
        if i != j
    ]
    centre = [sum(m[k] for m in means) / len(means) for k in range(len(means[0]))]
    far = [
        length([a - b for a, b in zip(r, of[y], strict=True)])
        for r, y in zip(z, labels, strict=True)
    ]
    return {
        "zero_sum": length(centre),
        "unit_norm": sum(abs(length(m) - 1) for m in means) / len(means),
        "equal_angle": sum(abs(c + 1 / (len(means) - 1)) for c in cosines) / len(cosines),
        "within_class": sum(far) / len(far),
    }


@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_four_deviations_are_those_of_loops(seed, classes):
    z, labels = points(seed, classes=classes)
    names = torch.randperm(50, generator=generator(seed))[:classes].sort().values
    found = collapse.metrics(z, names[labels], z, names[labels])
    wanted = by_loops(z.tolist(), labels.tolist())
    assert {name: found[name] for name in NUMBERS} == pytest.approx(wanted, rel=1e-12)
    around = collapse.metrics(turned(z), labels, turned(z), labels)
    assert {name: around[name] for name in NUMBERS} == pytest.approx(wanted, rel=1e-9)


def test_single_precision_is_counted_in_double():
    z, labels = points()
    one, two = (collapse.metrics(x, labels, x, labels) for x in (z, z.float()))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize(("n", "d"), [(6, 3), (4, 8), (2, 5)])
def test_the_spectrum_is_that_of_numpys_covariance(n, d):
    means = torch.randn(n, d, generator=generator(), dtype=torch.float64)
    values = np.linalg.svd(np.cov(means.numpy().T), compute_uv=False)
    found = collapse.spectrum(means).numpy()
    assert len(found) == min(d, n - 1)
    np.testing.assert_allclose(found, values[: len(found)] / values[0], atol=1e-12)
    np.testing.assert_allclose(values[len(found) :] / values[0], 0, atol=1e-12)
    np.testing.assert_allclose(collapse.spectrum(3 * means + 5).numpy(), found, atol=1e-12)


def test_dimensions_are_counted_from_a_hundredth_on():
    assert LEAST == 0.01
    scale = torch.tensor([1.0, 0.2, 0.05, 0.0])  # variances 1, 0.04, 0.0025, 0
    means = torch.cat([torch.diag(scale), -torch.diag(scale)])
    assert collapse.dimensions(means) == 2
    assert collapse.dimensions(means, least=0.001) == 3
    assert collapse.dimensions(means, least=1.0) == 1


def test_means_of_a_plane_fill_two_dimensions():
    means = F.pad(torch.randn(9, 2, generator=generator()), (0, 6))
    means = turned(means.double()) + 1e-6 * torch.randn(9, 8, generator=generator(1))
    assert collapse.dimensions(means) == 2


@pytest.mark.parametrize("seed", range(3))
def test_nearest_mean_is_that_of_a_loop(seed):
    z, y = points(seed)
    test_z, test_y = points(seed + 7, n=40, classes=5)  # class 4 has no training point
    means = [z[y == c].mean(dim=0) for c in range(4)]
    right = sum(
        max(range(4), key=lambda c: float(row @ means[c])) == label
        for row, label in zip(test_z, test_y.tolist(), strict=True)
    )
    assert collapse.nearest_mean(z, y, test_z, test_y) == right / 40


def test_nearest_mean_is_scikit_learns_nearest_centroid_where_the_means_are_a_frame():
    from sklearn.neighbors import NearestCentroid

    means, y = simplex(6, 5).repeat(2, 1), torch.arange(6).repeat(2)
    means[:6], means[6:] = means[:6] + 0.1, means[6:] - 0.1  # their mean is the frame
    z = torch.randn(200, 5, generator=generator(), dtype=torch.float64)
    labels = torch.randint(6, (200,), generator=generator(1))
    wanted = NearestCentroid().fit(means.numpy(), y.numpy()).score(z.numpy(), labels.numpy())
    assert collapse.nearest_mean(means, y, z, labels) == pytest.approx(wanted)


# What is refused ----------------------------------------------------------------------------------

Z, Y = torch.eye(3), torch.tensor([0, 0, 1])
NAN = torch.tensor([[1.0], [math.nan], [2.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: collapse.class_means(Z, torch.zeros(3, dtype=torch.int64)), "one class only, 0"),
     (lambda: collapse.class_means(NAN, Y), "z has NaN"),
     (lambda: collapse.class_means(Z, Y[:2]), r"labels has shape \(2,\) and z 3 rows"),
     (lambda: collapse.class_means(Z, Y[:, None]), r"labels has shape \(3, 1\)"),
     (lambda: collapse.class_means(Z, Y.float()), "labels is torch.float32"),
     (lambda: collapse.class_means(Z, torch.tensor([0, -1, 1])), "labels has -1"),
     (lambda: collapse.class_means(Z[0], Y), r"z has shape \(3,\)"),
     (lambda: collapse.within_class(Z, Y * 0), "one class only"),
     (lambda: collapse.zero_sum(NAN), "means has NaN"),
     (lambda: collapse.unit_norm(Z[:1]), r"means has 1 row"),
     (lambda: collapse.equal_angle(torch.diag(torch.tensor([1.0, 0.0]))), "length 0 in row 1"),
     (lambda: collapse.equal_angle(Z[:1]), "two classes or more"),
     (lambda: collapse.spectrum(torch.ones(3, 2)), "means coincide"),
     (lambda: collapse.spectrum(torch.zeros(3, 2)), "means coincide"),
     (lambda: collapse.dimensions(Z, least=0.0), "least is 0.0"),
     (lambda: collapse.dimensions(Z, least=math.nan), "least is nan"),
     (lambda: collapse.nearest_mean(Z, Y, Z[:, :2], Y), "z_test has 2 columns, z_train 3"),
     (lambda: collapse.nearest_mean(Z, Y, Z, Y[:1]), r"y_test has shape \(1,\) and z_test 3"),
     (lambda: latent_class_loss(Z, Y, negatives="some"), "negatives='some'"),
     (lambda: latent_class_loss(Z, Y, temperature=0.0), "temperature=0.0"),
     (lambda: latent_class_loss(Z, Y, beta=-1.0), "beta=-1.0"),
     (lambda: latent_class_loss(Z, Y, beta=math.inf), "beta=inf"),
     (lambda: latent_class_loss(Z, Y, Q=0.0), "Q=0.0"),
     (lambda: latent_class_loss(NAN, Y), "z has NaN"),
     (lambda: free_embeddings(Z, Y, normalize="cube"), "normalize='cube'"),
     (lambda: free_embeddings(Z, Y, steps=0), "steps is 0"),
     (lambda: free_embeddings(Z, Y, lr=0.0), "lr=0.0"),
     (lambda: free_embeddings(Z, Y * 0), "one class only")],
)  # fmt: skip
def test_what_has_no_geometry_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The loss of the points ---------------------------------------------------------------------------


def loss_by_loops(z, y, kind, t, beta, q_weight):
    total = 0.0
    for i in range(len(z)):
        s = [float(z[i] @ z[j]) / t for j in range(len(z))]
        negatives = [j for j in range(len(z)) if kind == "all" or y[j] != y[i]]
        tilt = [math.exp(beta * s[j]) for j in negatives]
        g = sum(w * math.exp(s[j]) for w, j in zip(tilt, negatives, strict=True)) / sum(tilt)
        mates = [p for p in range(len(z)) if y[p] == y[i]]
        total += sum(math.log1p(q_weight * g / math.exp(s[p])) for p in mates) / len(mates)
    return total / len(z)


@pytest.mark.parametrize("kind", ["other", "all"])
@pytest.mark.parametrize(
    ("t", "beta", "q_weight"), [(1.0, 0.0, 1.0), (0.5, 2.0, 1.0), (0.7, 9.0, 5.0)]
)
@pytest.mark.parametrize("detach", [False, True])
def test_the_loss_is_that_of_a_loop(kind, t, beta, q_weight, detach):
    z, y = points(3, n=17)
    found = latent_class_loss(
        z, y, negatives=kind, temperature=t, beta=beta, Q=q_weight, detach_weights=detach
    )
    assert found.item() == pytest.approx(loss_by_loops(z, y, kind, t, beta, q_weight), rel=1e-12)


@pytest.mark.parametrize("kind", ["other", "all"])
def test_detached_weights_have_the_gradient_of_fixed_ones(kind):
    z, y = points(5, n=12)
    z.requires_grad_()
    loss = latent_class_loss(z, y, negatives=kind, beta=3.0, detach_weights=True)
    (found,) = torch.autograd.grad(loss, z)
    same = y[:, None] == y
    s = z @ z.T
    fixed = (3.0 * s).masked_fill(same, -torch.inf) if kind == "other" else 3.0 * s
    g = (fixed.softmax(dim=1).detach() * s.exp()).sum(dim=1)
    pairs = (1 + g[:, None] / s.exp()).log()
    wanted = ((pairs * same).sum(dim=1) / same.sum(dim=1)).mean()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, z)[0])


def test_the_loss_survives_a_hardness_that_saturates_doubles():
    z, y = points()
    for kind in ("other", "all"):
        z = F.normalize(z, dim=1).requires_grad_()
        loss = latent_class_loss(z, y, negatives=kind, beta=1e6, temperature=0.01)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
        assert loss.isfinite()


def least(n_classes, t=1.0, q_weight=1.0):
    return math.log1p(q_weight * math.exp(-n_classes / (n_classes - 1) / t))


@pytest.mark.parametrize("t", [1.0, 0.2])
@pytest.mark.parametrize("beta", [0.0, 1.0, 7.0])
def test_no_balanced_points_of_the_ball_go_below_the_frame(beta, t):
    draw = generator(2)
    for classes in (2, 3, 6):
        y = torch.arange(classes).repeat(4)
        frame = latent_class_loss(simplex(classes, 5)[y], y, beta=beta, temperature=t, Q=3.0).item()
        assert frame == pytest.approx(least(classes, t, 3.0), rel=1e-12)
        for _ in range(40):
            z = torch.randn(len(y), 5, generator=draw, dtype=torch.float64)
            z = z / z.norm(dim=1, keepdim=True).clamp(min=1) * torch.rand(1, generator=draw)
            plain = latent_class_loss(z, y, temperature=t, Q=3.0).item()
            hard = latent_class_loss(z, y, beta=beta, temperature=t, Q=3.0).item()
            assert hard >= plain - 1e-12 >= frame - 1e-9 or beta == 0
            assert plain >= least(classes, t, 3.0)


def test_unbalanced_points_may_go_below_the_frame():
    """The theorem wants classes of one size: with weights 4, 1, 1 another figure is lower."""
    y = torch.tensor([0] * 8 + [1, 1, 2, 2])
    start = simplex(3, 2)[y]
    bound = latent_class_loss(start, y).item()
    z, losses = free_embeddings(start + 0.01 * torch.randn(start.shape, generator=generator()), y)
    assert losses[-1] < bound - 1e-3
    assert collapse.equal_angle(collapse.class_means(z, y)) > 0.05


@pytest.mark.parametrize("normalize", ["ball", "sphere"])
@pytest.mark.parametrize("beta", [2.0, 10.0])
def test_free_embeddings_find_the_frame(normalize, beta):
    y = torch.arange(4).repeat_interleave(3)
    start = 0.1 * torch.randn(12, 3, generator=generator(), dtype=torch.float64)
    before = start.clone()
    z, losses = free_embeddings(start, y, normalize=normalize, beta=beta, detach_weights=True)
    assert torch.equal(start, before)
    assert len(losses) == 500
    assert losses[0] > losses[-1] == pytest.approx(least(4), abs=1e-4)
    assert z.norm(dim=1).max() <= 1 + 1e-9
    found = collapse.metrics(z, y, z, y)
    assert all(found[name] < 0.01 for name in NUMBERS)


def test_without_a_ball_the_loss_has_no_least_value():
    y = torch.arange(4).repeat_interleave(3)
    start = 0.1 * torch.randn(12, 3, generator=generator(), dtype=torch.float64)
    z, losses = free_embeddings(start, y, normalize="none", beta=2.0, steps=800)
    assert losses[-1] < least(4) / 4
    assert z.norm(dim=1).min() > 1
