"""Packings of the sphere: published angles, exact configurations, and the loss that finds them."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch.nn import functional as F

from hcl import losses, packing

# Degrees, from the published tables of best packings on S^2 (Tammes' problem).
DEGREES = {
    2: 180.0, 3: 120.0, 4: 109.4712206, 5: 90.0, 6: 90.0, 7: 77.8695421, 8: 74.8584922,
    9: 70.5287794, 10: 66.1468220, 11: 63.4349488, 12: 63.4349488, 13: 57.1367031, 14: 55.6705700,
}  # fmt: skip


def random_points(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1)


# --- what is known


@pytest.mark.parametrize("classes", DEGREES)
def test_the_table_is_the_published_one(classes):
    cosine = packing.known_cosine(classes)
    assert math.degrees(math.acos(cosine)) == pytest.approx(DEGREES[classes], abs=1e-7)
    assert packing.known_distance(classes) == pytest.approx(2 * math.sin(math.acos(cosine) / 2))


def test_ten_points_solve_their_cubic():
    a = packing.known_cosine(10)
    assert abs(7 * a**3 - 4 * a**2 - 2 * a + 1) < 1e-13


@pytest.mark.parametrize("classes", [*range(4, 13), 14])
def test_the_table_is_what_direct_optimisation_finds(classes):
    ends = [packing.polish(v, anchors="worst") for v in random_points(12, classes, 3)]
    assert min(map(largest, ends)) == pytest.approx(packing.known_cosine(classes), abs=1e-9)


def largest(v):
    """The largest cosine, from the smallest distance that SciPy measures."""
    return 1 - pdist(v.numpy()).min() ** 2 / 2


def test_thirteen_points_need_a_good_start():
    v = packing.pack(13, anchors="worst", restarts=20, seed=1)
    assert largest(v) == pytest.approx(packing.known_cosine(13), abs=1e-9)


@pytest.mark.parametrize(
    ("classes", "d", "cosine"),
    [
        (2, 1, -1.0), (3, 2, -0.5), (4, 2, 0.0), (5, 2, math.cos(math.radians(72))),
        (17, 2, math.cos(2 * math.pi / 17)), (5, 4, -0.25), (6, 4, 0.0), (8, 4, 0.0),
        (100, 128, -1 / 99), (200, 128, 0.0),
    ],
)  # fmt: skip
def test_other_dimensions(classes, d, cosine):
    assert packing.known_cosine(classes, d) == pytest.approx(cosine, abs=1e-12)


@pytest.mark.parametrize(("classes", "d"), [(3, 2), (5, 2), (7, 2), (4, 4), (6, 4), (7, 4), (8, 4)])
def test_optimisation_agrees_in_other_dimensions(classes, d):
    ends = [packing.polish(v, anchors="worst") for v in random_points(6, classes, d)]
    assert min(map(largest, ends)) == pytest.approx(packing.known_cosine(classes, d), abs=1e-8)


@pytest.mark.parametrize(
    ("classes", "d", "message"),
    [
        (15, 3, "classes=15, d=3: not known here; at most 14 points"),
        (9, 4, "classes=9, d=4: not known here; at most 8 points"),
        (3, 1, "classes=3, d=1: there are only 2 unit vectors"),
        (1, 3, "classes=1: a packing needs 2"),
        (0, 3, "classes=0: a whole number"),
        (3, 0, "d=0: a whole number"),
        (True, 3, "classes=True"),
        (3.0, 3, r"classes=3\.0"),
    ],
)
def test_what_is_not_known_is_refused(classes, d, message):
    with pytest.raises(ValueError, match=message):
        packing.known_cosine(classes, d)
    with pytest.raises(ValueError, match=message):
        packing.known_distance(classes, d)


# --- exact configurations


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("triangle", 3), ("tetrahedron", 6), ("octahedron", 12), ("square antiprism", 16),
        ("icosahedron", 30),
    ],
)  # fmt: skip
def test_named_configurations_are_best_packings(name, edges):
    v = packing.configuration(name)
    assert v.dtype == torch.float64
    assert np.allclose(np.linalg.norm(v.numpy(), axis=1), 1, atol=1e-15)
    assert largest(v) == pytest.approx(packing.known_cosine(len(v)), abs=1e-14)
    assert len(packing.contacts(v)) == edges  # Euler: of the polyhedron of that name


@pytest.mark.parametrize(("classes", "d"), [(2, 1), (2, 5), (3, 2), (4, 3), (10, 9), (10, 128)])
def test_simplex(classes, d):
    v = packing.simplex(classes, d)
    wanted = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(wanted, 1)
    assert v.shape == (classes, d)
    assert np.allclose(v.numpy() @ v.numpy().T, wanted, atol=1e-14)


def test_no_simplex_of_too_many_points():
    with pytest.raises(
        ValueError, match="classes=5: a regular simplex in 3 dimensions has at most 4"
    ):
        packing.simplex(5, 3)
    with pytest.raises(ValueError, match="name='cube'"):
        packing.configuration("cube")


# --- what is measured of points


def loop(v, rho):
    """The packing objective, written from the formula."""
    total = 0.0
    for c in range(len(v)):
        others = [((v[c] - v[k]) ** 2).sum() for k in range(len(v)) if k != c]
        total += rho[c] * min(others)
    return total


@pytest.mark.parametrize(("classes", "d"), [(2, 1), (5, 3), (20, 8)])
def test_objective_against_a_loop(classes, d):
    draw = np.random.default_rng(0)
    for k in range(5):
        v, rho = random_points(classes, d, seed=k), draw.dirichlet(np.ones(classes))
        found = packing.objective(7.0 * v, torch.from_numpy(rho)).item()  # the length is no matter
        assert found == pytest.approx(loop(v.numpy(), rho), abs=1e-12)
        assert packing.objective(v).item() == pytest.approx(
            loop(v.numpy(), np.full(classes, 1 / classes)), abs=1e-12
        )
        assert packing.smallest_distance(v) == pytest.approx(pdist(v.numpy()).min(), abs=1e-7)


def test_many_packings_at_once():
    v = random_points(6, 5, 3)
    together = packing.objective(v)
    assert together.tolist() == pytest.approx([packing.objective(one).item() for one in v])
    assert packing.class_loss(v, beta=2.0).shape == (6,)
    assert packing.nearest_cosines(v.float()).dtype == torch.float32


# --- the loss of class vectors


def loss_loop(v, beta, t, rho):
    """Population loss of class vectors, without log Q, from the formula."""
    total = 0.0
    for c in range(len(v)):
        weights, values = [], []
        for k in range(len(v)):
            if k != c:
                s = v[c] @ v[k] / t
                weights.append(rho[k] * math.exp(beta * s))
                values.append(math.exp(s))
        g = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
        total += rho[c] * (math.log(g) - 1 / t)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.5, 1, 20.0])
@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
def test_class_loss_against_a_loop(beta, t):
    draw = np.random.default_rng(1)
    v, rho = random_points(7, 4), draw.dirichlet(np.ones(7))
    found = packing.class_loss(v, beta=beta, temperature=t, rho=torch.from_numpy(rho))
    assert found.item() == pytest.approx(loss_loop(v.numpy(), beta, t, rho), abs=1e-10)


@pytest.mark.parametrize("beta", [0.0, 1.0, 8.0])
def test_class_loss_is_the_losses_limit_of_many_negatives(beta):
    v, t, Q = random_points(9, 5), 0.5, 1e12
    batch = losses.hard(v, v, temperature=t, beta=beta, tau_plus=0.0, Q=Q).item() - math.log(Q)
    assert packing.class_loss(v, beta=beta, temperature=t).item() == pytest.approx(batch, abs=1e-9)


def test_the_worst_case_is_the_packing_objective():
    for k in range(10):
        v, t = random_points(8, 3, seed=k), 0.3
        worst = packing.class_loss(v, temperature=t).item()
        assert worst == pytest.approx(-packing.objective(v).item() / (2 * t), abs=1e-12)


@pytest.mark.parametrize("beta", [1e3, 1e10, 1e200, 1e308, math.inf])
def test_a_large_beta_saturates_at_the_worst_case(beta):
    v = random_points(8, 3).requires_grad_()
    loss = packing.class_loss(v, beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(packing.class_loss(v).item(), abs=1e-6)
    assert v.grad.isfinite().all()


def test_class_loss_has_the_right_derivative():
    v = random_points(5, 3).requires_grad_()
    for beta in (0.0, 2.0, 30.0):
        assert torch.autograd.gradcheck(lambda v, b=beta: packing.class_loss(v, beta=b), (v,))


def test_class_loss_does_not_decrease_in_beta():
    v = random_points(200, 6, 3)
    values = torch.stack([packing.class_loss(v, beta=b) for b in (0, 0.5, 1, 4, 16, 256, math.inf)])
    assert (values.diff(dim=0) >= -1e-12).all()


def test_the_tilted_mean_against_a_loop():
    draw = np.random.default_rng(2)
    s, p = draw.normal(size=(3, 6)), draw.dirichlet(np.ones(6))
    for beta in (0.0, 1.0, 7.5):
        found = packing.log_tilted_mean(torch.from_numpy(s), beta, torch.from_numpy(p))
        for row, value in zip(s, found.tolist(), strict=True):
            q = [p[j] * math.exp(beta * row[j]) for j in range(6)]
            g = sum(q[j] * math.exp(row[j]) for j in range(6)) / sum(q)
            assert value == pytest.approx(math.log(g), abs=1e-12)
    gone = torch.tensor([0.3, -math.inf, 0.1]), torch.tensor([0.3, 0.1])
    for beta in (0.0, 2.0, math.inf):
        with_gone, without = (packing.log_tilted_mean(s, beta).item() for s in gone)
        assert with_gone == pytest.approx(without)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_descent_at_one_hardness_ends_where_the_loss_is_flat(beta):
    v = packing.descend(8, betas=(beta, beta), temperature=0.5, restarts=4)[0].requires_grad_()
    (slope,) = torch.autograd.grad(packing.class_loss(v, beta=beta), v)  # tangential by itself
    assert slope.abs().max() < 1e-3


# --- the optimiser


@pytest.mark.parametrize("classes", range(2, 13))
def test_the_loss_alone_finds_the_best_packings(classes):
    v = packing.descend(classes, anchors="worst", restarts=4)[0]
    assert packing.known_distance(classes) - pdist(v.numpy()).min() < 1e-3


def test_five_classes_do_better_in_the_mean_than_tammes():
    """Apex (0, 0, 1), base a square at height -h: mean cosine (4 h^2 - h) / 5, least at h = 1/8."""
    v = packing.pack(5)
    assert packing.nearest_cosines(v).mean().item() == pytest.approx(-1 / 80, abs=1e-9)
    assert sorted(packing.nearest_cosines(v).tolist()) == pytest.approx([-1 / 8] + 4 * [1 / 64])
    assert largest(packing.pack(5, anchors="worst")) == pytest.approx(0, abs=1e-9)


def test_thirteen_classes_do_better_with_two_of_them_at_one_point():
    """The mean of the nearest cosines is (2 + 11 / sqrt 5) / 13: below Tammes' best, 0.5426."""
    twelve = packing.configuration("icosahedron")
    v = torch.cat([twelve, twelve[:1]])
    mean = (2 + 11 / math.sqrt(5)) / 13
    assert packing.objective(v).item() == pytest.approx(2 - 2 * mean)
    assert mean < packing.known_cosine(13) - 0.01
    assert packing.smallest_distance(v) == pytest.approx(0, abs=1e-7)


def test_a_prior_moves_the_packing():
    """Three on the circle, one of prior r: -r x + (1 - r) (2 x^2 - 1) is least at r / (4 - 4r)."""
    for r in (0.5, 0.7, 0.75, 0.9):
        rho = torch.tensor([r, (1 - r) / 2, (1 - r) / 2])
        v = packing.pack(3, 2, rho=rho, restarts=12)
        x = min(1.0, max(0.5, r / (4 * (1 - r))))
        assert (v[0] @ v[1]).item() == pytest.approx(-x, abs=1e-6)
        assert (v[1] @ v[2]).item() == pytest.approx(2 * x**2 - 1, abs=1e-6)


def test_polish_does_not_make_worse_and_does_not_turn():
    rho = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for anchors, prior in (("mean", rho), ("mean", None), ("worst", None)):
        v = random_points(4, 3)
        end = packing.polish(v, rho=prior, anchors=anchors)
        if anchors == "mean":
            assert packing.objective(end, prior) >= packing.objective(v, prior)
        assert packing.smallest_distance(packing.polish(packing.simplex(4, 3))) == pytest.approx(
            packing.known_distance(4)
        )


def test_the_optimiser_is_reproducible():
    one, two = (packing.descend(5, restarts=2, steps=30, seed=3) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (2, 5, 3)
    first, second = packing.objective(one).tolist()
    assert first >= second


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.descend(1), "classes=1"),
        (lambda: packing.descend(3, 1), "classes=3, d=1"),
        (lambda: packing.descend(3, restarts=0), "restarts=0"),
        (lambda: packing.descend(3, steps=0), "steps=0"),
        (lambda: packing.descend(3, betas=(2.0, 1.0)), r"betas=\(2\.0, 1\.0\)"),
        (lambda: packing.descend(3, betas=(0.0, 1.0)), r"betas=\(0\.0, 1\.0\)"),
        (lambda: packing.descend(3, betas=(1.0, math.inf)), "betas="),
        (lambda: packing.descend(3, betas=(-1.0, 2.0)), r"beta=-1\.0"),
        (lambda: packing.descend(3, temperature=0.0), r"temperature=0\.0"),
        (lambda: packing.log_tilted_mean(torch.ones(3), 1.0, torch.ones(3)), "rho="),
        (lambda: packing.polish(torch.eye(3), rho=torch.ones(3) / 3, anchors="worst"), "rho: the"),
        (lambda: packing.descend(3, anchors="all"), "anchors='all'"),
        (lambda: packing.descend(3, anchors="worst", rho=torch.ones(3) / 3), "rho: the worst"),
        (lambda: packing.pack(3, restarts=0), "restarts=0"),
        (lambda: packing.pack(3, rho=torch.ones(3)), "rho="),
        (lambda: packing.objective(torch.eye(3), torch.ones(2) / 2), r"rho has shape \(2,\)"),
        (lambda: packing.objective(torch.eye(2), torch.tensor([1.0, 0.0])), "rho="),
        (lambda: packing.objective(torch.eye(2), torch.tensor([math.nan, 1.0])), "rho="),
        (lambda: packing.polish(torch.zeros(3, 3)), "length zero"),
        (lambda: packing.objective(torch.zeros(3, 3)), "length zero"),
        (lambda: packing.nearest_cosines(torch.full((3, 3), math.nan)), "NaN"),
        (lambda: packing.nearest_cosines(torch.ones(1, 3)), r"shape \(1, 3\)"),
        (lambda: packing.contacts(torch.ones(3)), r"shape \(3,\)"),
        (lambda: packing.class_loss(torch.ones(3)), r"shape \(3,\)"),
        (lambda: packing.polish(torch.ones(3)), r"shape \(3,\)"),
        (lambda: packing.polish(random_points(2, 3, 3)), r"shape \(2, 3, 3\)"),
        (lambda: packing.class_loss(torch.eye(3), beta=-1), "beta=-1"),
        (lambda: packing.class_loss(torch.eye(3), beta=math.nan), "beta=nan"),
        (lambda: packing.class_loss(torch.eye(3), temperature=0.0), r"temperature=0\.0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_whole_numbers_are_no_points():
    with pytest.raises(TypeError, match=r"v: must be a floating point tensor, not a tensor of"):
        packing.objective(torch.ones(3, 3, dtype=torch.int64))


def test_contacts_are_pairs_at_the_smallest_distance():
    v = packing.configuration("octahedron")
    pairs = {tuple(p) for p in packing.contacts(v).tolist()}
    opposite = {(0, 3), (1, 4), (2, 5)}
    assert pairs == set(itertools.combinations(range(6), 2)) - opposite


def test_a_beta_too_large_for_floats_is_the_limit():
    assert packing.log_tilted_mean(torch.tensor([0.0, 1.0, 0.5]), 1e39).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_a_narrow_type_is_near_that_of_doubles(dtype):
    v = packing.simplex(3, 2)
    assert packing.class_loss(v.to(dtype), beta=1.0).item() == pytest.approx(-3, abs=0.03)
