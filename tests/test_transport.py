"""Plans against a naive Sinkhorn and linear programming, the loss against loops, and refusals."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog, minimize
from torch.nn import functional as F

from hcl import losses, transport

INF = math.inf


def views(seed, images=6, d=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    z1 = torch.randn(images, d, generator=draw, dtype=torch.float64)
    z2 = z1 + torch.randn(images, d, generator=draw, dtype=torch.float64)
    return z1.to(dtype), z2.to(dtype)


def naive_cost(z1, z2):
    """Squared distances by a loop, inf between views of one image."""
    rows = [[x / math.sqrt(sum(y * y for y in r)) for x in r] for r in torch.cat([z1, z2]).tolist()]
    n, images = len(rows), len(z1)
    cost = np.full((n, n), INF)
    for i in range(n):
        for j in range(n):
            if i % images != j % images:
                cost[i, j] = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True))
    return cost


def naive_plan(cost, eps, rounds=3000):
    """Sinkhorn as in a textbook: scale columns, then rows, of the kernel itself."""
    kernel = np.exp(-cost / eps)
    u = v = np.ones(len(cost))
    for _ in range(rounds):
        v = 1 / (kernel.T @ u)
        u = 1 / (kernel @ v)
    return u[:, None] * kernel * v


def cheapest(cost):
    """The least sum of q * cost over q with rows and columns of one, by linear programming."""
    n = len(cost)
    where = np.argwhere(np.isfinite(cost))
    sums = np.zeros((2 * n, len(where)))
    for k, (i, j) in enumerate(where):
        sums[i, k] = sums[n + j, k] = 1
    found = linprog([cost[i, j] for i, j in where], A_eq=sums, b_eq=np.ones(2 * n), method="highs")
    assert found.success
    return found.fun


def paid(cost, plan):
    q = plan.log_weights.exp().numpy()
    return float(np.where(np.isfinite(cost), q * np.nan_to_num(cost, posinf=0), 0).sum())


# --- the plan


def test_the_cost_is_that_of_a_loop():
    z1, z2 = views(0)
    np.testing.assert_allclose(transport.squared_distances(z1, z2).numpy(), naive_cost(z1, z2))
    single = transport.squared_distances(z1.float(), z2.float())
    assert single.dtype == torch.float64
    assert (single >= 0).all()
    longer = transport.squared_distances(3 * z1, 0.1 * z2)
    torch.testing.assert_close(longer, transport.squared_distances(z1, z2))


@pytest.mark.parametrize("eps", [0.1, 0.7, 5.0])
def test_the_plan_is_that_of_a_naive_sinkhorn(eps):
    for seed in range(3):
        cost = naive_cost(*views(seed))
        found = transport.sinkhorn(torch.from_numpy(cost), eps=eps, tol=1e-11, max_iter=5000)
        expected = naive_plan(cost, eps)
        np.testing.assert_allclose(found.log_weights.exp().numpy(), expected, atol=1e-9)
        assert found.error <= 1e-11
        with np.errstate(invalid="ignore", divide="ignore"):
            factors = np.log(expected) + cost / eps  # of row and column; inf - inf on the diagonal
        mean = np.nanmean(factors - factors[:, [0]], axis=0)  # nan where row 0's mate is
        known = np.isfinite(mean)
        ours = found.log_columns.numpy()
        np.testing.assert_allclose((ours - ours[0])[known], mean[known], atol=1e-7)
        assert abs(ours.mean()) < 1e-12


def test_it_minimises_what_it_should():
    """Four free numbers of a plan between six views, by a general optimiser."""
    cost, eps = naive_cost(*views(1, images=3)), 0.4
    n = len(cost)
    where = np.argwhere(np.isfinite(cost))
    prices = np.array([cost[i, j] for i, j in where])
    sums = np.zeros((2 * n, len(where)))
    for k, (i, j) in enumerate(where):
        sums[i, k] = sums[n + j, k] = 1

    def objective(q):
        q = np.maximum(q, 1e-300)
        return q @ prices + eps * (q * np.log(q)).sum()

    found = minimize(
        objective, np.full(len(where), 1 / 4), bounds=[(0, 1)] * len(where),
        constraints={"type": "eq", "fun": lambda q: sums[:-1] @ q - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    ours = transport.sinkhorn(torch.from_numpy(cost), eps=eps, tol=1e-12)
    q = np.array([ours.log_weights.exp()[i, j].item() for i, j in where])
    assert objective(q) <= found.fun + 1e-9
    np.testing.assert_allclose(q, found.x, atol=1e-4)


def test_little_entropy_is_linear_programming_and_an_assignment():
    for seed in range(3):
        cost = naive_cost(*views(seed, images=5))
        least = cheapest(cost)
        rows, columns = linear_sum_assignment(np.where(np.isfinite(cost), cost, 1e6))
        assert cost[rows, columns].sum() == pytest.approx(least)  # a plan's corners (Birkhoff)
        gaps = []
        for eps in (1.0, 0.3, 0.1):
            found = transport.sinkhorn(torch.from_numpy(cost), eps=eps, tol=1e-4, max_iter=5000)
            assert found.error <= 1e-4
            gaps.append(paid(cost, found) - least)
            # of the cheapest plan's cost by no more than eps times the range of the entropy
            assert -1e-3 < gaps[-1] <= eps * len(cost) * math.log(len(cost))
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 0.1 * gaps[0]


def test_much_entropy_weighs_all_alike():
    cost = transport.squared_distances(*views(2))
    q = transport.sinkhorn(cost, eps=1e9).log_weights.exp()
    torch.testing.assert_close(q, cost.isfinite().double() / 10)


@given(seed=st.integers(0, 1000), images=st.integers(2, 8), eps=st.floats(0.4, 20))
@settings(max_examples=25, deadline=None)
def test_rows_and_columns_sum_to_one_and_the_plan_is_symmetric(seed, images, eps):
    cost = transport.squared_distances(*views(seed, images))
    found = transport.sinkhorn(cost, eps=eps, tol=1e-8, max_iter=2000)
    q = found.log_weights.exp()
    one = torch.ones(2 * images, dtype=torch.float64)
    torch.testing.assert_close(q.sum(1), one, rtol=0, atol=1e-12)
    torch.testing.assert_close(q.sum(0), one, rtol=0, atol=1e-8)
    torch.testing.assert_close(q, q.T, rtol=0, atol=1e-6)
    assert (q[cost.isinf()] == 0).all()


def test_the_order_of_the_points_does_not_matter():
    cost = transport.squared_distances(*views(3))
    order = torch.randperm(len(cost), generator=torch.Generator().manual_seed(0))
    found, moved = (
        transport.sinkhorn(c, eps=0.3, tol=1e-12, max_iter=5000)
        for c in (cost, cost[order][:, order])
    )
    torch.testing.assert_close(found.log_weights.exp()[order][:, order], moved.log_weights.exp())
    torch.testing.assert_close(found.log_columns[order], moved.log_columns)


@pytest.mark.parametrize("eps", [0.2, 0.7])
def test_it_is_the_tilt_times_a_factor_of_the_column(eps):
    z1, z2 = views(4, images=12)
    for t in (0.5, 0.1):
        tilt = losses.negative_weights(z1, z2, temperature=t, beta=2 * t / eps)
        plan = transport.sinkhorn(transport.squared_distances(z1, z2), eps=eps, tol=1e-12)
        by_hand = tilt * plan.log_columns.exp()
        by_hand /= by_hand.sum(dim=1, keepdim=True)
        torch.testing.assert_close(by_hand, plan.log_weights.exp(), rtol=1e-8, atol=1e-10)
        ratio = (plan.log_weights - tilt.log())[tilt > 0]
        assert ratio.abs().max() <= plan.log_columns.max() - plan.log_columns.min()


def test_where_all_points_are_alike_the_two_are_one():
    """Corners of a regular polygon, both views there: a turn maps any onto any other."""
    angle = 2 * math.pi * torch.arange(7, dtype=torch.float64) / 7
    z = torch.stack([angle.cos(), angle.sin()], dim=1)
    plan = transport.sinkhorn(transport.squared_distances(z, z), eps=0.25, tol=1e-13)
    assert plan.iterations == 1
    tilt = losses.negative_weights(z, z, temperature=0.5, beta=4.0)
    torch.testing.assert_close(plan.log_weights.exp(), tilt)


def test_two_images_leave_no_choice():
    q = transport.sinkhorn(transport.squared_distances(*views(5, images=2)), eps=50.0)
    assert q.error < 1e-6
    torch.testing.assert_close(
        q.log_weights.exp()[0, [1, 3]].sum(), torch.ones((), dtype=torch.float64)
    )


# --- numbers that do not fit, and those that are extreme


def test_tiny_eps_gives_no_nan():
    cost = transport.squared_distances(*views(6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = transport.sinkhorn(cost, eps=1e-8, max_iter=50)
    assert not found.log_weights.isnan().any()
    torch.testing.assert_close(found.log_weights.exp().sum(1), torch.ones(12, dtype=torch.float64))


def test_too_few_rounds_are_said():
    cost = transport.squared_distances(*views(7))
    with pytest.warns(RuntimeWarning, match=r"max_iter=2 rounds.*off by .*an eps above 0.02"):
        found = transport.sinkhorn(cost, eps=0.02, max_iter=2)
    assert found.iterations == 2
    assert found.error > 1e-6


def test_a_class_of_more_than_half_the_points_has_no_plan_with_others():
    """Labels as a mask: four points of one label have but two strangers."""
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    cost = torch.rand(6, 6).masked_fill(y[:, None] == y, INF)
    with pytest.raises(ValueError, match="at most 4 of the 6 points can be paired"):
        transport.sinkhorn(cost, eps=1.0)
    y[3] = 1
    transport.sinkhorn(torch.rand(6, 6).masked_fill(y[:, None] == y, INF), eps=1.0)


def test_a_pattern_may_need_zeros_where_the_cost_is_finite():
    """Upper triangle: the identity is the one plan; Sinkhorn comes near it, slowly."""
    cost = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).tril(-1) > 0, INF)
    with pytest.warns(RuntimeWarning):
        found = transport.sinkhorn(cost, eps=1.0, max_iter=500)
    torch.testing.assert_close(
        found.log_weights.exp(), torch.eye(3, dtype=torch.float64), rtol=0, atol=5e-3
    )


GOOD = torch.rand(4, 4)


@pytest.mark.parametrize(
    ("cost", "options", "said"),
    [
        (GOOD, {"eps": 0.0}, "eps=0.0: must be positive"),
        (GOOD, {"eps": -1}, "eps=-1"),
        (GOOD, {"eps": math.nan}, "eps=nan: must be finite"),
        (GOOD, {"eps": 1.0, "tol": 0.0}, "tol=0.0"),
        (GOOD, {"eps": 1.0, "max_iter": 0}, "max_iter=0"),
        (torch.rand(3, 4), {"eps": 1.0}, r"\(3, 4\)"),
        (torch.rand(4), {"eps": 1.0}, r"\(4,\)"),
        (torch.full((2, 2), math.nan), {"eps": 1.0}, "NaN"),
        (torch.full((2, 2), -INF), {"eps": 1.0}, "-inf"),
        (torch.tensor([[1.0, 1.0], [INF, INF]]), {"eps": 1.0}, "row 1 has no finite entry"),
        (torch.tensor([[1.0, INF], [1.0, INF]]), {"eps": 1.0}, "column 1 has no finite entry"),
    ],
)
def test_what_a_plan_refuses(cost, options, said):
    with pytest.raises(ValueError, match=said):
        transport.sinkhorn(cost, **options)


def test_eps_must_be_a_number():
    with pytest.raises(TypeError, match="eps=True"):
        transport.sinkhorn(GOOD, eps=True)


# --- the loss


def naive_loss(z1, z2, t, eps, tau):
    """As released: masked exp(s) times the plan, summed, times 2B and N; then the clamp."""
    plan = naive_plan(naive_cost(z1, z2), eps) / (2 * len(z1))
    rows = F.normalize(torch.cat([z1, z2]), dim=1).tolist()
    n, images = len(rows), len(z1)
    total = 0.0
    for i in range(n):
        u = [math.exp(sum(a * b for a, b in zip(rows[i], r, strict=True)) / t) for r in rows]
        positive = u[(i + images) % n]
        ng = sum(p * x for p, x in zip(plan[i], u, strict=True)) * n * (n - 2)
        ng = max((ng - tau * (n - 2) * positive) / (1 - tau), (n - 2) * math.exp(-1 / t))
        total -= math.log(positive / (positive + ng))
    return total / n


@pytest.mark.parametrize("t", [0.5, 0.2])
@pytest.mark.parametrize("eps", [0.25, 0.7])
@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_the_loss_is_the_released_formula(t, eps, tau):
    z1, z2 = views(8)
    ours = transport.transported(z1, z2, temperature=t, eps=eps, tau_plus=tau, tol=1e-12)
    assert ours.item() == pytest.approx(naive_loss(z1, z2, t, eps, tau), rel=1e-9)


def test_defaults_are_those_of_the_released_code():
    z1, z2 = views(9)
    assert transport.transported(z1, z2).item() == pytest.approx(
        naive_loss(z1, z2, 0.5, 0.7, 0.0), rel=1e-6
    )


def test_its_ends_are_simclr_and_the_cheapest_plan():
    z1, z2 = views(10)
    even = transport.transported(z1, z2, eps=1e8)
    torch.testing.assert_close(even, losses.nt_xent(z1, z2))
    values = [transport.transported(z1, z2, eps=eps, tol=1e-4).item() for eps in (2, 0.5, 0.2)]
    assert values == sorted(values)  # here; unlike the tilt's this is no theorem
    assert values[-1] <= losses.hard(z1, z2, beta=1e4, tau_plus=0.0)  # no anchor beyond its nearest


def test_no_gradient_flows_through_the_plan():
    z1, z2 = (z.requires_grad_() for z in views(11))
    with torch.no_grad():
        q = transport.sinkhorn(transport.squared_distances(z1, z2), eps=0.5).log_weights.exp()

    def held(z1, z2):
        """The loss with q as a constant, the whole matrix."""
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        s = z @ z.T / 0.5
        p = s[torch.arange(12), torch.arange(12).roll(6)]
        return torch.log1p(10 * (q * s.exp()).sum(1) / p.exp()).mean()

    ours = torch.autograd.grad(transport.transported(z1, z2, eps=0.5), (z1, z2))
    theirs = torch.autograd.grad(held(z1, z2), (z1, z2))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    slope = (held(z1.detach() + 1e-6, z2) - held(z1.detach() - 1e-6, z2)).item() / 2e-6
    assert ours[0].sum().item() == pytest.approx(slope, abs=1e-6)


def test_float32_is_close_and_its_own_type():
    z1, z2 = views(12, images=20, d=8, dtype=torch.float32)
    single, double = transport.transported(z1, z2), transport.transported(z1.double(), z2.double())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(double.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eps": 0.0}, "eps=0.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"tau_plus": 1.0}, "tau_plus=1.0"),
        ({"queue": torch.rand(3, 4)}, "queue: a plan is between the views of one batch"),
        ({"cross_modal": True}, "cross_modal"),
        ({"normalize": False}, "normalize=False"),
    ],
)
def test_what_the_loss_refuses(options, said):
    z1, z2 = views(13, dtype=torch.float32)
    with pytest.raises(ValueError, match=said):
        transport.transported(z1, z2, **options)


def test_one_image_has_no_negatives():
    z = torch.rand(1, 4)
    for function in (transport.squared_distances, transport.transported):
        with pytest.raises(ValueError, match="at least 2"):
            function(z, z)


def test_embeddings_that_are_none_are_refused():
    z = torch.rand(4, 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        transport.transported(z, z.masked_fill(z > 0.5, math.nan))
    with pytest.raises(TypeError, match="floating point"):
        transport.squared_distances(z.long(), z.long())
    with pytest.raises(ValueError, match="of one shape"):
        transport.squared_distances(z, z[:3])


def test_an_eps_too_small_for_doubles_is_refused():
    """Not a plan of NaN, from which the loss would be 0."""
    cost = torch.tensor([[math.inf, 1.0, 5.0], [1.0, math.inf, 2.0], [5.0, 2.0, math.inf]])
    with pytest.raises(ValueError, match=r"eps=1e-310: .*a larger eps would do"):
        transport.sinkhorn(cost, eps=1e-310)
