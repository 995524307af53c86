"""Whitening filters whiten, Dirac filters pass on, BatchNorm's momentum is what was asked for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hcl import initial, vision


def natural(n=200, channels=3, side=12, seed=0):
    """Smooth pictures with correlated channels, of mean 0 and variance 1, as photographs are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, side + 6, side + 6, generator=g)
    x = F.avg_pool2d(F.avg_pool2d(x, 4, stride=1), 4, stride=1)
    x = 0.4 * x + x.mean(dim=1, keepdim=True)
    return (x - x.mean()) / x.std()


def outputs(conv, x):
    """(n, filters) in float64: what each filter says of each patch."""
    return conv(x).double().transpose(0, 1).flatten(1).T


@pytest.mark.parametrize(("channels", "out", "kernel"), [(3, 16, 3), (3, 64, 3), (1, 8, (2, 3))])
def test_responses_are_uncorrelated_and_of_variance_one(channels, out, kernel):
    x = natural(channels=channels)
    conv = nn.Conv2d(channels, out, kernel, bias=False)
    before = torch.corrcoef(outputs(conv, x).T)
    initial.whiten_(conv, x)
    n = min(out // 2, conv.weight[0].numel())
    y = outputs(conv, x)[:, :n]
    covariance = torch.cov(y.T)
    off = covariance - torch.diag(covariance.diagonal())
    assert off.abs().max() < 1e-3
    assert (before - torch.eye(out)).abs().max() > 0.5  # there was something to whiten
    # the epsilon takes its share of the variance where a direction has little
    patches = F.unfold(x.double(), conv.kernel_size).transpose(1, 2).flatten(0, 1)
    variance = torch.linalg.svdvals(patches - patches.mean(dim=0)) ** 2 / (len(patches) - 1)
    wanted = variance[:n] / (variance[:n] + initial.EPSILON)
    torch.testing.assert_close(covariance.diagonal(), wanted, rtol=1e-3, atol=1e-4)


def test_filters_are_the_principal_directions_largest_first_and_their_negatives():
    from sklearn.decomposition import PCA

    x = natural()
    conv = nn.Conv2d(3, 12, 3, bias=False)
    initial.whiten_(conv, x)
    filters = conv.weight.detach().flatten(1)
    assert torch.equal(filters[:6], -filters[6:])
    patches = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    directions = torch.from_numpy(PCA(6).fit(patches.numpy()).components_).to(filters)
    cosine = F.cosine_similarity(filters[:6], directions).abs()
    torch.testing.assert_close(cosine, torch.ones(6), atol=1e-3, rtol=0)
    lengths = filters[:6].norm(dim=1)
    assert (lengths.diff() > 0).all()  # the smaller the variance, the longer the filter


@pytest.mark.parametrize(("out", "changed"), [(7, 6), (64, 54), (2, 2), (1, 0)])
def test_filters_there_is_no_direction_for_keep_their_values(out, changed):
    """Of 27 directions, 54 filters at most; an odd one is left over."""
    conv = nn.Conv2d(3, out, 3)
    before = conv.weight.detach().clone()
    bias = conv.bias.detach().clone()
    initial.whiten_(conv, natural())
    same = (conv.weight == before).flatten(1).all(dim=1)
    assert same.tolist() == [False] * changed + [True] * (out - changed)
    assert torch.equal(conv.bias, bias)
    assert conv.weight.requires_grad


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (5, 3, 2, 8), (5, 3, 8, 2), (3, 8, 8), (5, 27)])
def test_pictures_that_do_not_fit_are_refused(shape):
    conv = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match=r"x has shape .*\(n, 3, H, W\), H >= 3"):
        initial.whiten_(conv, torch.randn(shape))


@pytest.mark.parametrize("stride", [1, 2])
def test_dirac_filters_pass_the_input_on(stride):
    inner = nn.Conv2d(4, 9, 3, stride=stride, padding=1, bias=False)
    first = nn.Conv2d(3, 4, 3, padding=1)
    first_before, inner_before = first.weight.detach().clone(), inner.weight.detach().clone()
    initial.dirac_(nn.Sequential(first, nn.ReLU(), inner))
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(inner(x)[:, :4], x[:, :, ::stride, ::stride])
    assert torch.equal(inner.weight[4:], inner_before[4:])  # more filters than channels: random
    assert torch.equal(first.weight, first_before)


def test_dirac_filters_fewer_than_channels_pass_on_what_they_can():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3, padding=1, bias=False))
    initial.dirac_(net)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(net[1](x), x[:, :2])


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_every_inner_convolution_of_an_encoder_is_dirac(name):
    net = vision.encoder(name, channels=3)
    initial.dirac_(net)
    for conv in [m for m in net.modules() if isinstance(m, nn.Conv2d)][1:]:
        n = min(conv.in_channels, conv.out_channels)
        centre = tuple(k // 2 for k in conv.kernel_size)
        wanted = torch.zeros(n, conv.in_channels, *conv.kernel_size)
        wanted[range(n), range(n), centre[0], centre[1]] = 1.0
        assert torch.equal(conv.weight[:n], wanted)


def test_norm_momentum_is_that_of_the_running_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2)))
    initial.set_norm_momentum(net, 0.4)
    net(torch.randn(50, 2) + 5.0)
    x = torch.randn(50, 2) + 5.0
    before = net[0].running_mean.clone()
    net(x)
    torch.testing.assert_close(net[0].running_mean, 0.6 * before + 0.4 * x.mean(dim=0))
    assert net[1][0].momentum == 0.4


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_a_norm_momentum_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=f"norm_momentum={value}"):
        initial.set_norm_momentum(nn.BatchNorm1d(2), value)


def test_the_same_seed_gives_the_same_start_and_the_global_state_stays():
    x = natural()
    torch.manual_seed(1)
    wanted = torch.rand(2)
    torch.manual_seed(1)
    one, two = (nn.Conv2d(3, 8, 3).requires_grad_(False) for _ in range(2))
    torch.manual_seed(1)
    initial.whiten_(one, x)
    assert torch.equal(torch.rand(2), wanted)
    initial.whiten_(two, x)
    assert torch.equal(one.weight, two.weight)
