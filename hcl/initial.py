"""How a convolutional encoder may start: whitening filters, Dirac filters, quick BatchNorm.

Three habits of fast supervised CIFAR-10 training, tried here on contrastive training. Source:
Jordan 2024 (airbench), our reading of its description; there the whitening layer stays frozen.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 5e-4  # added to the variances, of pixels with variance one
PATCHES = 2000  # pictures whose patches are looked at


@torch.no_grad()
def whiten_(conv: nn.Conv2d, x: Tensor) -> None:
    """Set a convolution's filters so that their outputs on patches of x are nearly uncorrelated.

    x: (n, C, H, W) float, normalised. The filters are the patches' principal directions, largest
    variance first, each divided by its standard deviation, and their negatives; where there are
    more filters than that, the rest keep their values.

    Raises: ValueError: x has other channels than the filters, or is smaller than they are.

    >>> conv = nn.Conv2d(1, 8, 3, bias=False)
    >>> whiten_(conv, torch.randn(500, 1, 8, 8))
    >>> bool((conv(torch.randn(500, 1, 8, 8)).std(dim=(0, 2, 3)) - 1).abs().max() < 0.1)
    True
    """
    out, channels, height, width = conv.weight.shape
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] < height or x.shape[3] < width:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: give (n, {channels}, H, W), H >= {height}, W >= {width}"
        )
    patches = F.unfold(x[:PATCHES].double(), (height, width)).transpose(1, 2).flatten(0, 1)
    variance, direction = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    n = min(out // 2, len(variance))
    filters = direction.T.flip(0)[:n] / (variance.flip(0)[:n, None] + EPSILON).sqrt()
    filters = torch.cat([filters, -filters]).view(-1, channels, height, width)
    conv.weight[: len(filters)] = filters.to(conv.weight)


def dirac_(net: nn.Module) -> None:
    """Make every convolution but the first pass its input channels on, as far as it has filters.

    >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 3, padding=1, bias=False))
    >>> dirac_(net); x = torch.randn(1, 2, 5, 5)
    >>> torch.equal(net[1](x)[:, :2], x)
    True
    """
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs[1:]:
        nn.init.dirac_(conv.weight[: conv.in_channels].data)


def set_norm_momentum(net: nn.Module, momentum: float) -> None:
    """Let BatchNorm's running statistics move by ``momentum`` a step (torch's default: 0.1).

    Raises: ValueError: momentum outside (0, 1].

    >>> net = nn.BatchNorm1d(2); set_norm_momentum(net, 0.4); net.momentum
    0.4
    """
    if not 0 < momentum <= 1:
        raise ValueError(f"norm_momentum={momentum}: must be in (0, 1]; torch's default is 0.1")
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
