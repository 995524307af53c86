"""UnReMix against loops in float64, gradients against autograd and differences, and refusals."""

import math

import pytest
import torch
from torch.nn import functional as F

from hcl import losses, unremix

EACH = {
    "anchor": (1.0, 0.0, 0.0),
    "uncertainty": (0.0, 1.0, 0.0),
    "representativeness": (0.0, 0.0, 1.0),
    "all": (1.0, 1.0, 1.0),
    "some": (0.2, 0.5, 0.1),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def views(seed, images=5, d=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    z1 = torch.randn(images, d, generator=draw, dtype=torch.float64)
    z2 = z1 + torch.randn(images, d, generator=draw, dtype=torch.float64)
    return z1.to(dtype), z2.to(dtype)


def mixed(name):
    return dict(zip(("anchor", "uncertainty", "representativeness"), EACH[name], strict=True))


def naive(z1, z2, t, lambdas, normalisation="minmax", nearness="far", tau_plus=0.0, h=None):
    """Scores, weights and the loss with lists and floats alone, from the formulas."""
    z = [[x / math.sqrt(sum(y * y for y in r)) for x in r] for r in torch.cat([z1, z2]).tolist()]
    h = z if h is None else h.tolist()
    n, images = len(z), len(z1)

    def dot(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    s = [[dot(x, y) / t for y in z] for x in z]
    gradients = []
    for i in range(n):
        total = sum(math.exp(s[i][k]) for k in range(n) if k != i)
        g = [math.exp(s[i][k]) / total if k != i else 0.0 for k in range(n)]
        g[max((k for k in range(n) if k != i), key=lambda k, i=i: s[i][k])] -= 1
        gradients.append(g)
    r = [sum(1 - dot(z[j], z[k]) for k in range(n) if k != j) / (n - 1) for j in range(n)]
    u = [[dot(gradients[i], gradients[j]) * dot(h[i], h[j]) for j in range(n)] for i in range(n)]
    a = [[0.0] * n for _ in range(n)]
    w = [[0.0] * n for _ in range(n)]
    total_loss = 0.0
    for i in range(n):
        negatives = [j for j in range(n) if j % images != i % images]
        for j in negatives:
            a[i][j] = math.exp(s[i][j]) / sum(math.exp(s[i][k]) for k in negatives)
        rows = [
            [math.exp(s[i][j]) for j in negatives],
            [u[i][j] for j in negatives],
            [r[j] if nearness == "far" else -r[j] for j in negatives],
        ]
        mixture = [0.0] * len(negatives)
        for lam, row in zip(lambdas, rows, strict=True):
            row = [x - min(row) for x in row]
            by = max(row) if normalisation == "minmax" else sum(row)
            mixture = [m + lam * x / by for m, x in zip(mixture, row, strict=True)]
        for j, m in zip(negatives, mixture, strict=True):
            w[i][j] = m / sum(mixture)
        p, count = s[i][(i + images) % n], len(negatives)
        g = sum(w[i][j] * math.exp(s[i][j]) for j in negatives)
        ng = count * (g - tau_plus * math.exp(p)) / (1 - tau_plus)
        if tau_plus:
            ng = max(ng, count * math.exp(-1 / t))
        total_loss -= math.log(math.exp(p) / (math.exp(p) + ng)) / n
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (a, u, r, w))
    return *tensors, total_loss


# --- values


@pytest.mark.parametrize("lambdas", EACH)
@pytest.mark.parametrize("normalisation", ["minmax", "sum"])
@pytest.mark.parametrize("nearness", ["far", "near"])
def test_weights_and_loss_are_those_of_a_loop(lambdas, normalisation, nearness):
    options = {"normalisation": normalisation, "nearness": nearness}
    for seed, t, tau_plus in ((0, 0.5, 0.0), (1, 0.2, 0.1), (2, 1.0, 0.4)):
        z1, z2 = views(seed)
        *_, w, loss = naive(z1, z2, t, EACH[lambdas], tau_plus=tau_plus, **options)
        found = unremix.weights(z1, z2, temperature=t, **mixed(lambdas), **options)
        torch.testing.assert_close(found, w)
        found = unremix.unremix(
            z1, z2, temperature=t, tau_plus=tau_plus, **mixed(lambdas), **options
        )
        assert found.item() == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("width", [None, 3])
def test_scores_are_those_of_a_loop(width):
    z1, z2 = views(3)
    h = None
    if width:
        h = torch.randn(10, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, u, r, w, loss = naive(z1, z2, 0.3, EACH["all"], h=h)
    found = unremix.scores(z1, z2, temperature=0.3, features=h)
    torch.testing.assert_close(found.anchor, a)
    torch.testing.assert_close(found.uncertainty, u)
    torch.testing.assert_close(found.representativeness, r)
    torch.testing.assert_close(unremix.weights(z1, z2, temperature=0.3, features=h), w)
    found = unremix.unremix(z1, z2, temperature=0.3, features=h)
    assert found.item() == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("own", [True, False])
def test_uncertainty_is_the_product_of_gradients_that_autograd_finds(own):
    """A real linear layer, whose rows are the views, names the other view of each."""
    z1, z2 = views(4, images=4, d=5)
    z, t = F.normalize(torch.cat([z1, z2]), dim=1), 0.4
    n = len(z)
    h = z if own else torch.randn(n, 3, dtype=torch.float64)
    gradients = []
    for j in range(n):
        logits = z @ z[j] / t
        # what the layer says must be these logits, while its input is h: the bias sees to that
        layer = torch.nn.Linear(h.shape[1], n, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(z / t if own else torch.randn(n, 3))
            layer.bias.copy_(logits - layer.weight @ h[j])
        said = layer(h[j])
        said = said.masked_fill(torch.arange(n) == j, -math.inf)
        loss = F.cross_entropy(said[None], said.argmax()[None])
        gradients.append(torch.autograd.grad(loss, layer.weight)[0].flatten())
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    found = unremix.scores(z1, z2, temperature=t, features=None if own else h)
    torch.testing.assert_close(found.uncertainty, expected)


def test_large_batches_are_as_small_ones():
    """The products are made in blocks; sizes that blocks do not divide must not matter."""
    for images in (33, 101, 300):
        z1, z2 = views(images, images=images, d=8)
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        s = 2 * z @ z.T
        p = s.masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf).softmax(dim=1)
        g = p - F.one_hot(p.argmax(dim=1), len(z))
        found = unremix.scores(z1, z2, temperature=0.5).uncertainty
        torch.testing.assert_close(found, (g @ g.T) * (z @ z.T))


# --- properties


@pytest.mark.parametrize("normalisation", ["minmax", "sum"])
def test_rows_are_distributions_over_the_negatives(normalisation):
    z1, z2 = views(5, images=7, dtype=torch.float32)
    w = unremix.weights(z1, z2, normalisation=normalisation)
    image = torch.arange(7).repeat(2)
    assert w.dtype == torch.float32
    assert (w >= 0).all()
    assert (w[image[:, None] == image] == 0).all()
    torch.testing.assert_close(w.sum(dim=1), torch.ones(14))


def test_the_order_of_images_does_not_matter_and_views_may_change_places():
    z1, z2 = views(6, images=6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    both = torch.cat([order, order + 6])
    w, loss = unremix.weights(z1, z2), unremix.unremix(z1, z2)
    torch.testing.assert_close(unremix.weights(z1[order], z2[order]), w[both][:, both])
    torch.testing.assert_close(unremix.unremix(z1[order], z2[order]), loss)
    torch.testing.assert_close(unremix.unremix(z2, z1), loss)
    h = torch.randn(12, 3, dtype=torch.float64)
    w = unremix.weights(z1, z2, features=h)
    shuffled = unremix.weights(z1[order], z2[order], features=h[both])
    torch.testing.assert_close(shuffled, w[both][:, both])


def test_the_anchor_score_alone_orders_negatives_by_nearness():
    z1, z2 = views(7, images=8)
    w = unremix.weights(z1, z2, **mixed("anchor"))
    hard = losses.negative_weights(z1, z2, beta=1.0)
    image = torch.arange(8).repeat(2)
    negative = image[:, None] != image
    for ours, tilted in zip(w[negative].view(16, 14), hard[negative].view(16, 14), strict=True):
        assert torch.equal(ours.argsort(), tilted.argsort())
        # the tilt with beta = 1, less its least value
        torch.testing.assert_close(ours, (tilted - tilted.min()) / (tilted - tilted.min()).sum())


def test_a_score_alone_weighs_the_same_under_both_normalisations():
    z1, z2 = views(8)
    for name in ("anchor", "uncertainty", "representativeness"):
        both = [unremix.weights(z1, z2, **mixed(name), normalisation=n) for n in ("minmax", "sum")]
        torch.testing.assert_close(*both)


def test_lambdas_count_by_their_ratios():
    z1, z2 = views(9)
    third = unremix.unremix(z1, z2, anchor=1 / 3, uncertainty=1 / 3, representativeness=1 / 3)
    torch.testing.assert_close(third, unremix.unremix(z1, z2))
    torch.testing.assert_close(
        unremix.weights(z1, z2, anchor=2, uncertainty=0, representativeness=6),
        unremix.weights(z1, z2, anchor=1, uncertainty=0, representativeness=3),
    )


@pytest.mark.parametrize("lambdas", EACH)
@pytest.mark.parametrize("normalisation", ["minmax", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach", [True, False])
def test_scores_that_are_all_the_same_weigh_alike(lambdas, normalisation, dtype, detach):
    options = {**mixed(lambdas), "normalisation": normalisation}
    draw = torch.Generator().manual_seed(0)
    # rows whose scores are equal up to rounding
    turned = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))[0]
    for z in (torch.eye(6, dtype=dtype), torch.eye(6, 9, dtype=dtype), turned.to(dtype)):
        z = z.clone().requires_grad_()
        w = unremix.weights(z, z, **options)
        torch.testing.assert_close(w, losses.negative_weights(z, z, beta=0.0))
        loss = unremix.unremix(z, z, **options, detach_weights=detach)
        torch.testing.assert_close(loss, losses.nt_xent(z, z))
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("lambdas", EACH)
@pytest.mark.parametrize("detach", [True, False])
def test_collapsed_views_have_a_finite_loss_and_gradient(lambdas, detach):
    z = torch.ones(6, 4, requires_grad=True)
    loss = unremix.unremix(z, z, **mixed(lambdas), detach_weights=detach)
    torch.testing.assert_close(loss.item(), math.log(11))  # all scores equal: any weights do
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.isfinite().all()
    w = unremix.weights(z, z, anchor=1, uncertainty=0, representativeness=1)
    torch.testing.assert_close(w, losses.negative_weights(z, z, beta=0.0))


def test_views_far_from_all_others_weigh_most_or_least():
    near = torch.tensor([1.0, 0.0]) + 0.1 * torch.randn(6, 2)
    z = torch.cat([near, torch.tensor([[-1.0, 0.0]])])
    far = unremix.weights(z, z, **mixed("representativeness"))
    close = unremix.weights(z, z, **mixed("representativeness"), nearness="near")
    assert (far[:6].argmax(dim=1) % 7 == 6).all()
    assert (close[:6, 6] < 1e-5).all()


def test_the_weights_go_with_the_loss_that_takes_any():
    z1, z2 = views(10)
    log_w = unremix.weights(z1, z2).log()
    expected = losses.weighted(z1, z2, lambda s, i, j: log_w[i[:, None], j], Q=8, tau_plus=0.05)
    torch.testing.assert_close(unremix.unremix(z1, z2, tau_plus=0.05), expected)


@pytest.mark.parametrize("temperature", [0.005, 0.05, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures_stay_finite(temperature, dtype):
    z1, z2 = (z.requires_grad_() for z in views(11, images=8, dtype=dtype))
    for detach in (True, False):
        loss = unremix.unremix(z1, z2, temperature=temperature, detach_weights=detach)
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, (z1, z2)):
            assert gradient.isfinite().all()


def test_it_is_computed_in_single_precision_at_least():
    z1, z2 = views(12, images=16, d=8, dtype=torch.float32)
    exact = unremix.unremix(z1.double(), z2.double())
    single = unremix.unremix(z1, z2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, exact.float(), rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(unremix.unremix(z1, z2), single)
        assert torch.equal(unremix.weights(z1, z2), unremix.weights(z1.clone(), z2))
    half = unremix.unremix(z1.bfloat16(), z2.bfloat16())
    rounded = unremix.unremix(z1.bfloat16().float(), z2.bfloat16().float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, rounded)


# --- gradients


@pytest.mark.parametrize("lambdas", EACH)
@pytest.mark.parametrize("normalisation", ["minmax", "sum"])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
def test_attached_gradients_are_those_of_differences(lambdas, normalisation, tau_plus):
    z1, z2 = (z.requires_grad_() for z in views(13))
    options = {"normalisation": normalisation, "tau_plus": tau_plus, "temperature": 0.7}

    def loss(z1, z2):
        return unremix.unremix(z1, z2, **mixed(lambdas), **options, detach_weights=False)

    assert torch.autograd.gradcheck(loss, (z1, z2))


@pytest.mark.parametrize("detach", [True, False])
def test_features_and_temperature_get_their_gradients(detach):
    z1, z2 = views(14)
    h = torch.randn(10, 3, dtype=torch.float64, requires_grad=not detach)
    t = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    w = unremix.weights(z1, z2, temperature=0.6, features=h)

    def loss(t, h):
        if detach:  # differences must not see the weights move, so they are written out
            s = F.normalize(torch.cat([z1, z2]), dim=1)
            s = s @ s.T / t
            p = s.diagonal(5).repeat(2)
            return torch.log1p(8 * (w * s.exp()).sum(dim=1) / p.exp()).mean()
        return unremix.unremix(z1, z2, temperature=t, features=h, detach_weights=False)

    assert torch.autograd.gradcheck(loss, (t, h))
    if detach:
        found = unremix.unremix(z1, z2, temperature=t, features=h)
        torch.testing.assert_close(*(torch.autograd.grad(x, t)[0] for x in (found, loss(t, h))))


@pytest.mark.parametrize("lambdas", EACH)
def test_detached_gradients_are_those_with_constant_weights(lambdas):
    z1, z2 = (z.requires_grad_() for z in views(15))
    w = unremix.weights(z1, z2, **mixed(lambdas))
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = 2 * z @ z.T
    p = s.diagonal(5).repeat(2)
    expected = torch.log1p(8 * (w * s.exp()).sum(dim=1) / p.exp()).mean()
    found = unremix.unremix(z1, z2, **mixed(lambdas))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    h = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    loss = unremix.unremix(z1, z2, features=h)
    assert torch.autograd.grad(loss, h, allow_unused=True) == (None,)


def test_without_gradients_the_value_is_the_same():
    z1, z2 = views(16)
    with torch.no_grad():
        quiet = unremix.unremix(z1, z2, detach_weights=False)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, unremix.unremix(z1, z2))


# --- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"anchor": -0.1}, ValueError, "anchor=-0.1: a weight of 0 or more"),
        ({"uncertainty": math.nan}, ValueError, "uncertainty=nan"),
        ({"representativeness": "1"}, TypeError, "representativeness='1'"),
        (
            {"anchor": 0, "uncertainty": 0, "representativeness": 0},
            ValueError,
            "their sum is 0.0, one of them must be above 0",
        ),
        ({"normalisation": "batch"}, ValueError, "normalisation='batch': choose one of 'minmax'"),
        ({"nearness": "close"}, ValueError, "nearness='close': choose one of 'far'"),
        ({"tau_plus": 1.0}, ValueError, "tau_plus=1.0"),
        ({"tau_plus": -0.1}, ValueError, "tau_plus=-0.1"),
        ({"detach_weights": "yes"}, ValueError, "detach_weights='yes'"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
    ],
)
def test_impossible_options_are_refused(options, error, message):
    z1, z2 = views(17)
    with pytest.raises(error, match=message):
        unremix.check(**options)
    with pytest.raises(error, match=message):
        unremix.unremix(z1, z2, **options)
    if not {"tau_plus", "detach_weights"} & set(options):
        with pytest.raises(error, match=message):
            unremix.weights(z1, z2, **options)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(5, 3), ValueError, r"features \(5, 3\) on cpu: must be \(10, d\)"),
        (torch.ones(10), ValueError, "features"),
        (torch.full((10, 3), math.nan), ValueError, "features: NaN"),
        (torch.ones(10, 3, dtype=torch.int64), TypeError, "features"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, error, message):
    z1, z2 = views(18)
    for function in (unremix.unremix, unremix.weights, unremix.scores):
        with pytest.raises(error, match=message):
            function(z1, z2, features=features)


def test_batches_that_do_not_fit_are_refused():
    z1, z2 = views(19)
    for function in (unremix.unremix, unremix.weights, unremix.scores):
        with pytest.raises(ValueError, match="of one shape"):
            function(z1, z2[:4])
        with pytest.raises(ValueError, match="leave no negatives"):
            function(z1[:1], z2[:1])
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(z1 * math.inf, z2)
