"""Probes and geometry against scikit-learn and plain float64 loops."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from hcl import geometry, probe


def clusters(n=300, d=8, classes=4, spread=1.5, seed=0):
    """Overlapping Gaussian clusters with unequal feature scales: (f_train, y, f_test, y)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=g)
    y = torch.randint(classes, (2 * n,), generator=g)
    f = centres[y] + spread * torch.randn(2 * n, d, generator=g)
    f = f * torch.logspace(-2, 2, d) + 3
    return f[:n], y[:n], f[n:], y[n:]


def unit(n=40, d=5, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- features -------------------------------------------------------------------------------


def test_features_use_running_statistics_and_restore_every_mode():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    encoder[1].eval()  # a frozen BatchNorm must stay frozen
    x = torch.randn(10, 3)
    f = probe.features(encoder, x, lambda rows: 2 * rows, batch=4)
    assert [m.training for m in encoder.modules()] == [True, True, False, True]
    expected = encoder.eval()(2 * x)
    torch.testing.assert_close(f, expected)
    assert not f.requires_grad
    assert encoder[1].num_batches_tracked == 0


def test_features_restore_the_mode_after_an_error():
    encoder = nn.Linear(3, 4).train()
    with pytest.raises(RuntimeError):
        probe.features(encoder, torch.randn(2, 5), lambda rows: rows)
    assert encoder.training


def test_features_of_a_bfloat16_encoder_are_float32():
    encoder = nn.Linear(3, 4).bfloat16()
    f = probe.features(encoder, torch.randn(2, 3), lambda rows: rows.bfloat16())
    assert f.dtype == torch.float32


# --- linear probe ---------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
@pytest.mark.parametrize("classes", [2, 4])
def test_linear_probe_is_logistic_regression(l2, classes):
    f, y, g, labels = clusters(classes=classes)
    scaler = StandardScaler().fit(f)
    reference = LogisticRegression(C=1 / (l2 * len(f)), max_iter=5000, tol=1e-8)
    if classes == 2:  # scikit-learn then has one weight vector, the difference of our two
        reference.set_params(C=2 / (l2 * len(f)))
    reference.fit(scaler.transform(f), y)
    expected = reference.score(scaler.transform(g), labels)
    assert 0.4 < expected < 0.99
    assert probe.linear_probe(f, y, g, labels, l2=l2) == pytest.approx(expected, abs=1.5 / len(g))


def test_linear_probe_finds_the_minimum():
    f, y, _, _ = clusters()
    f = ((f - f.mean(0)) / f.std(0, correction=0)).requires_grad_(False)
    w, b = probe._logistic_regression(f, y, 4, 1e-2, 200)
    w, b = w.double().requires_grad_(), b.double().requires_grad_()
    loss = F.cross_entropy(f.double() @ w + b, y) + 1e-2 / 2 * w.square().sum()
    gradients = torch.autograd.grad(loss, [w, b])
    assert max(g.abs().max() for g in gradients) < 1e-4


def test_linear_probe_ignores_affine_maps_of_the_features_and_constant_ones():
    f, y, g, labels = clusters()
    expected = probe.linear_probe(f, y, g, labels)
    assert probe.linear_probe(5 * f - 2, y, 5 * g - 2, labels) == expected
    constant = torch.full((len(f), 1), 0.1)
    wider = torch.cat([f, constant], 1), torch.cat([g, constant], 1)
    assert probe.linear_probe(wider[0], y, wider[1], labels) == expected


def test_linear_probe_is_deterministic_and_works_under_no_grad():
    f, y, g, labels = clusters()
    torch.manual_seed(1)
    once = probe.linear_probe(f, y, g, labels)
    torch.manual_seed(2)
    with torch.no_grad():
        assert probe.linear_probe(f, y, g, labels) == once


def test_labels_need_not_start_at_zero_and_unseen_test_labels_count_as_wrong():
    f, y, g, labels = clusters()
    for method in (probe.linear_probe, probe.knn):
        base = method(f, y, g, labels)
        assert method(f, 10 * y + 3, g, 10 * labels + 3) == base
        assert method(f, y, g, torch.full_like(labels, 99)) == 0


def test_linear_probe_is_fast_enough_to_run_every_epoch():
    f, y, g, labels = clusters(n=5000, d=128, classes=10, spread=3.0)
    start = time.perf_counter()
    probe.linear_probe(f, y, g, labels)
    assert time.perf_counter() - start < 10


# --- k nearest neighbours -------------------------------------------------------------------


def naive_knn(f_train, y_train, f_test, y_test, k, temperature):
    f, g = f_train.double().numpy(), f_test.double().numpy()
    right = 0
    for query, label in zip(g, y_test.tolist(), strict=True):
        s = f @ query / np.linalg.norm(f, axis=1) / np.linalg.norm(query)
        votes = {}
        for i in np.argsort(-s)[:k]:
            c = int(y_train[i])
            votes[c] = votes.get(c, 0.0) + math.exp(s[i] / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(g)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.5), (7, 0.5), (200, 0.5), (200, 0.05)])
def test_knn_is_the_naive_weighted_vote(k, temperature):
    f, y, g, labels = clusters(n=250)
    expected = naive_knn(f, y, g, labels, k, temperature)
    got = probe.knn(f, y, g, labels, k=k, temperature=temperature, chunk=64)
    assert got == pytest.approx(expected)


def test_knn_is_scikit_learns_with_the_same_weights():
    f, y, g, labels = clusters(n=250)
    reference = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.5)
    ).fit(f, y)
    assert probe.knn(f, y, g, labels, k=20) == pytest.approx(reference.score(g, labels))


def test_knn_caps_k_and_chunks_do_not_matter():
    f, y, g, labels = clusters(n=60)
    assert probe.knn(f, y, g, labels, k=10**6) == probe.knn(f, y, g, labels, k=60)
    for chunk in (1, 7, 60):
        assert probe.knn(f, y, g, labels, chunk=chunk) == probe.knn(f, y, g, labels)


def test_knn_weights_matter():
    """One near neighbour outvotes two far ones when the temperature is low, not when it is high."""
    f = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    y, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.2]])
    assert probe.knn(f, y, query, torch.tensor([0]), temperature=0.5) == 1
    assert probe.knn(f, y, query, torch.tensor([1]), temperature=50) == 1


# --- the released probe ---------------------------------------------------------------------


class Encoder(nn.Sequential):
    def __init__(self, d=6):
        super().__init__(nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.out_dim = 16


def toy_data(n=130):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = 2 * torch.eye(3, 6)[y] + 0.5 * torch.randn(n, 6, generator=g)

    def views(x, generator):
        noise = torch.randn(2, *x.shape, generator=generator)
        return x + noise[0], x + noise[1]

    return SimpleNamespace(
        x_probe=x, y_probe=y, x_test=x, y_test=y, views=views, inputs=lambda rows: rows
    )


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_released_probe_learns_and_leaves_the_encoder_alone():
    torch.manual_seed(0)
    data, encoder = toy_data(), Encoder().eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    accuracy = probe.linear_probe_released(
        encoder, data, epochs=30, batch=32, lr=1e-2, generator=rng()
    )
    assert accuracy > 0.9
    assert not encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_released_probe_is_reproducible_from_its_generator_alone():
    torch.manual_seed(0)
    data, encoder = toy_data(), Encoder()
    accuracies = []
    for seed in (1, 1, 2, 3, 4, 5):
        torch.manual_seed(len(accuracies))
        accuracies.append(
            probe.linear_probe_released(encoder, data, epochs=1, batch=32, generator=rng(seed))
        )
    assert accuracies[0] == accuracies[1]
    assert len(set(accuracies)) > 1


def test_released_probe_is_the_released_recipe_step_by_step():
    """Train mode on views, running statistics for the test: an independent loop agrees."""
    torch.manual_seed(0)
    data, encoder = toy_data(n=97), Encoder()  # 97 = 3 * 32 + 1: the single row is left out
    got = probe.linear_probe_released(encoder, data, epochs=4, batch=32, lr=1e-2, generator=rng(3))

    g, layer = rng(3), nn.Linear(16, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.empty_like(parameter).uniform_(-0.25, 0.25, generator=g))
    adam = torch.optim.Adam(layer.parameters(), lr=1e-2, weight_decay=1e-6)
    encoder.train()
    for _ in range(4):
        order = torch.randperm(97, generator=g)
        for i in range(0, 96, 32):
            rows = order[i : i + 32]
            with torch.no_grad():
                f = encoder(data.views(data.x_probe[rows], g)[0])
            loss = F.cross_entropy(layer(f), data.y_probe[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    predicted = layer(encoder.eval()(data.x_test)).argmax(1)
    assert 0.4 < got < 1
    assert got == pytest.approx((predicted == data.y_test).double().mean().item())


@pytest.mark.parametrize("option", [{"epochs": 0}, {"batch": 1}])
def test_released_probe_refuses_impossible_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        probe.linear_probe_released(Encoder(), toy_data(), generator=rng(), **option)


# --- geometry -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_alignment_is_the_mean_distance(alpha):
    a, b = unit(seed=1), unit(seed=2)
    pairs = zip(a.double().numpy(), b.double().numpy(), strict=True)
    expected = np.mean([np.linalg.norm(p - q) ** alpha for p, q in pairs])
    assert geometry.alignment(a, b, alpha=alpha) == pytest.approx(expected, rel=1e-6)
    assert geometry.alignment(a, a) == 0
    assert geometry.alignment(3 * a, 0.1 * b, alpha=alpha) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("t", [0.5, 2, 10])
def test_uniformity_is_the_log_mean_gaussian_potential(t, chunk):
    z = unit(n=33)
    d = z.double().numpy()
    potentials = [
        math.exp(-t * np.sum((d[i] - d[j]) ** 2)) for i in range(33) for j in range(i + 1, 33)
    ]
    expected = math.log(np.mean(potentials))
    assert geometry.uniformity(z, t=t, chunk=chunk) == pytest.approx(expected, rel=1e-5)


def test_uniformity_of_one_point_is_zero_and_large_t_does_not_underflow():
    assert geometry.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    antipodes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert geometry.uniformity(antipodes, t=1000.0) == pytest.approx(-4000)


def test_uniform_points_are_more_uniform_than_a_cluster():
    spread = unit(n=500, d=16)
    assert geometry.uniformity(spread) < geometry.uniformity(spread + 1) - 0.5


@pytest.mark.parametrize("chunk", [1, 9, 1024])
def test_histograms_count_every_pair_once(chunk):
    z, labels = unit(n=41, seed=4), torch.arange(41) % 3
    edges, same, different = geometry.similarity_histograms(z, labels, bins=20, chunk=chunk)
    s, i, j = z.double() @ z.double().T, *np.triu_indices(41, 1)
    is_same = (labels[i] == labels[j]).numpy()
    for density, keep in ((same, is_same), (different, ~is_same)):
        expected, _ = np.histogram(s[i, j].numpy()[keep], bins=20, range=(-1, 1), density=True)
        np.testing.assert_allclose(density, expected, atol=1e-12)
        assert np.sum(density * np.diff(edges)) == pytest.approx(1)


def test_identical_and_antipodal_pairs_land_in_the_outer_bins():
    z = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, -2.0]])
    _, same, different = geometry.similarity_histograms(z, torch.tensor([0, 0, 1]), bins=4)
    assert same.tolist() == [0, 0, 0, 2]
    assert different.tolist() == [2, 0, 0, 0]


def test_overlap_of_equal_disjoint_and_shifted_densities():
    edges = np.linspace(-1, 1, 201)
    centre = (edges[:-1] + edges[1:]) / 2

    def gaussian(mean):
        density = np.exp(-((centre - mean) ** 2) / (2 * 0.1**2))
        return density / density.sum() / 0.01

    assert geometry.overlap(gaussian(0), gaussian(0), edges) == pytest.approx(1)
    assert geometry.overlap(gaussian(-0.7), gaussian(0.7), edges) < 1e-6
    # Two normals at distance d share erfc(d / (2 sqrt(2) sigma)).
    expected = math.erfc(0.2 / (2 * math.sqrt(2) * 0.1))
    assert geometry.overlap(gaussian(-0.1), gaussian(0.1), edges) == pytest.approx(
        expected, abs=5e-3
    )


# --- what cannot be measured ----------------------------------------------------------------


def spoil(part, value):
    arguments = dict(zip(("f_train", "y_train", "f_test", "y_test"), clusters(n=20), strict=True))
    arguments[part] = value(arguments[part].clone())
    return tuple(arguments.values())


def with_nan(f):
    f[3, 1] = torch.nan
    return f


@pytest.mark.parametrize("method", [probe.linear_probe, probe.knn])
@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("f_train", with_nan, "f_train has NaN"),
        ("f_test", with_nan, "f_test has NaN"),
        ("f_train", lambda f: f[:-1], "train has 19 rows and 20 labels"),
        ("y_test", lambda y: y[:-1], "test has 20 rows and 19 labels"),
        ("f_test", lambda f: f[:, :-1], "f_test has 7 columns, f_train 8"),
        ("f_train", lambda f: f[0], "f_train has shape"),
        ("y_train", torch.zeros_like, "one class only, 0"),
        ("y_train", lambda y: y - 1, "unlabelled"),
    ],
)
def test_probes_refuse_what_cannot_be_probed(method, part, value, message):
    with pytest.raises(ValueError, match=message):
        method(*spoil(part, value))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe.knn(*clusters(n=20), k=0), "k is 0"),
        (lambda: probe.knn(*clusters(n=20), temperature=0.0), "temperature is 0.0"),
        (lambda: probe.linear_probe(*clusters(n=20), l2=-1.0), "l2 is -1.0"),
        (lambda: probe.linear_probe(*clusters(n=20), max_iter=0), "max_iter is 0"),
        (lambda: geometry.alignment(unit(4), unit(5)), "equal shapes"),
        (lambda: geometry.alignment(unit(4), unit(4), alpha=0), "alpha is 0"),
        (lambda: geometry.alignment(unit(4), with_nan(unit(4))), "z2 has NaN"),
        (lambda: geometry.uniformity(unit(1)), "1 row"),
        (lambda: geometry.uniformity(unit(4), t=0), "t is 0"),
        (lambda: geometry.similarity_histograms(unit(4), torch.arange(3)), "labels has 3 rows"),
        (lambda: geometry.similarity_histograms(unit(4), torch.arange(4)), "only one sort of pair"),
        (lambda: geometry.similarity_histograms(unit(4), torch.zeros(4)), "only one sort of pair"),
        (lambda: geometry.similarity_histograms(unit(4), torch.arange(4), bins=0), "bins is 0"),
        (lambda: geometry.overlap(np.ones(3), np.ones(3), np.ones(3)), "one more than bins"),
    ],
)
def test_geometry_refuses_what_cannot_be_measured(call, message):
    with pytest.raises(ValueError, match=message):
        call()
