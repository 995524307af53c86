"""Pictures: the data sets as one uint8 tensor on the device, and the encoders that read them.

`load("cifar10")` hands over an `Images`, the data contract of the trainer. The sets themselves are
read in `hcl.imagesets`, random views made in `hcl.views`. torchvision and scikit-learn are
imported where they are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hcl import checks, initial
from hcl.imagesets import SOURCES, DamagedDataError, data_root, download, read
from hcl.views import Augmentation, augment

__all__ = ["DamagedDataError", "Images", "download", "encoder", "load", "resized", "subset"]

# The released image code normalises every set with these: the mean is CIFAR-10's, the deviation
# the mean of its pictures' own deviations.
RELEASED = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
ENCODERS = ("resnet18", "resnet50", "small", "mlp", "raw")


@dataclass(eq=False, kw_only=True)
class Images:
    """A data set of pictures and what the trainer may do with it.

    x_*: (n, C, H, W) uint8; y_*: (n,) int64, -1 where unlabelled; mean, std: (C, 1, 1) float32.
    """

    name: str
    classes: tuple[str, ...]
    x_train: Tensor
    y_train: Tensor
    x_probe: Tensor
    y_probe: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: Tensor
    std: Tensor
    augmentation: Augmentation
    input_size: int | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Rows x, (B, C, H, W) uint8, as normalised float32 without augmentation."""
        x = x.float() / 255
        if self.input_size is not None:
            side = (self.input_size, self.input_size)
            x = interpolate(x, side, mode="bilinear", antialias=True)
        return x.sub_(self.mean).div_(self.std)

    def views(
        self, x: Tensor, generator: torch.Generator, mate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two random views of rows x, or one of x and one of mate, both (B, C, H, W) uint8.

        Normalised float32, drawn per image.
        """
        x = x.float() / 255
        mate = x if mate is None else mate.float() / 255
        first, second = (augment(v, self.augmentation, generator) for v in (x, mate))
        return first.sub_(self.mean).div_(self.std), second.sub_(self.mean).div_(self.std)

    def grown(self, share: float) -> "Images":
        """The same data with smaller views: 3/4 of their side at first, all of it at share 0.8."""
        full = self.augmentation.side or self.x_train.shape[-1]
        side = round(full * (0.75 + 0.25 * min(1.0, share / 0.8)))
        return replace(self, augmentation=replace(self.augmentation, side=side))

    def encoder(
        self, name: str, *, whiten: bool = False, dirac: bool = False, norm_momentum: float = 0.1
    ) -> nn.Module:
        """A new encoder for pictures of this shape; see `encoder`, and `hcl.initial` for options.

        whiten: the first convolution starts as whitening filters of the training pictures; dirac:
        the others pass their input on; norm_momentum: of BatchNorm's running statistics.
        """
        channels, height, width = self.x_train.shape[1:]
        for option, value in (("whiten", whiten), ("dirac", dirac)):
            checks.choice(option, value, (True, False))
        view, read = (
            (height, width) if side is None else (side, side)
            for side in (self.augmentation.side, self.input_size)
        )
        if name == "mlp" and view != read:
            raise ValueError(
                f"encoder='mlp': reads pictures of one size, but views are {view} and inputs "
                f"{read}; give view_size and input_size alike"
            )
        net = encoder(name, channels=channels, pixels=read[0] * read[1])
        initial.set_norm_momentum(net, norm_momentum)
        convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        if (whiten or dirac) and not convs:
            raise ValueError(f"whiten, dirac: encoder {name!r} has no convolutions")
        if whiten:
            initial.whiten_(convs[0], self.inputs(self.x_train[: initial.PATCHES]).cpu())
        if dirac:
            initial.dirac_(net)
        return net


def load(
    name: str,
    *,
    root: str | Path | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    n_train: int | None = None,
    n_test: int | None = None,
    size: int | None = None,
    view_size: int | None = None,
    input_size: int | None = None,
    labelled: bool = False,
    shots: int | None = None,
    statistics: str = "own",
    augmentation: Augmentation | None = None,
) -> Images:
    """Read a data set, draw its subsets, resize it once and put it on the device.

    `seed` draws the 70/30 split of "digits" and the subsets of `n_train` and `n_test` pictures,
    in the classes' proportions. `size` resizes every picture to size × size with antialiasing;
    `view_size` is the side of the random views where it differs (the released code trains STL-10
    on views of 32 pixels and tests on 96). Pictures are normalised with the mean and deviation of
    the training pictures ("own") or, as the released code does for every set, with those it has
    for CIFAR-10 ("released"). `shots` keeps so many training pictures of each class, drawn by
    `seed` out of the `n_train`, and the probe's are the same few. STL-10's probe rows are its
    5,000 labelled training pictures.

    Raises:
        ValueError: an unknown name, or an option out of range.
        FileNotFoundError: the data set is not there; the message says how to get it.
        DamagedDataError: it is there, but incomplete or changed.

    >>> digits = load("digits", n_train=500)
    >>> digits.x_train.shape, digits.inputs(digits.x_test[:2]).dtype
    (torch.Size([500, 1, 8, 8]), torch.float32)
    """
    if statistics not in ("own", "released"):
        raise ValueError(f"statistics={statistics!r}: choose 'own' or 'released'")
    if input_size is not None and input_size < 1:
        raise ValueError(f"input_size={input_size}: give at least 1 pixel, or None")
    splits = read(name, data_root(root), seed)
    if labelled:
        has = np.flatnonzero(splits.y_train >= 0)
        splits = splits._replace(x_train=splits.x_train[has], y_train=splits.y_train[has])
    x_train, y_train = _part(splits.x_train, splits.y_train, n_train, "n_train", seed, size)
    x_test, y_test = _part(splits.x_test, splits.y_test, n_test, "n_test", seed, size)
    mean, std = _statistics(x_train) if statistics == "own" else _released(x_train)
    if shots is not None:
        few = _few(y_train, shots, seed, splits.classes)
        x_train, y_train = x_train[few], y_train[few]
    rows = x_train, y_train = x_train.to(device), y_train.to(device)
    known = splits.y_train >= 0
    if shots is not None or known.all():
        x_probe, y_probe = rows
    else:
        x_probe, y_probe = _part(splits.x_train[known], splits.y_train[known], size=size)
    augmentation = augmentation or SOURCES[name].augmentation
    return Images(
        name=name,
        classes=tuple(splits.classes),
        x_train=x_train,
        y_train=y_train,
        x_probe=x_probe.to(device),
        y_probe=y_probe.to(device),
        x_test=x_test.to(device),
        y_test=y_test.to(device),
        mean=mean.to(device),
        std=std.to(device),
        augmentation=augmentation if view_size is None else replace(augmentation, side=view_size),
        input_size=input_size,
    )


def _part(
    x: np.ndarray,
    y: np.ndarray,
    n: int | None = None,
    what: str = "n",
    seed: int = 0,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    if n is not None:
        rows = subset(y, n, seed=seed, what=what)
        x, y = x[rows], y[rows]
    return resized(torch.from_numpy(x), size), torch.from_numpy(y).long()


def _few(y: Tensor, shots: int, seed: int, classes: Sequence[str]) -> Tensor:
    """Row numbers of so many random members of each class, ascending."""
    if type(shots) is not int or shots < 1:
        raise ValueError(f"shots={shots}: give at least 1 picture a class, or None for all")
    rng, found = np.random.default_rng(seed), []
    for k, name in enumerate(classes):
        members = np.flatnonzero(y.numpy() == k)
        if len(members) < shots:
            raise ValueError(f"shots={shots}: class {name!r} has {len(members)} training pictures")
        found.append(rng.choice(members, shots, replace=False))
    return torch.from_numpy(np.sort(np.concatenate(found)))


def subset(y: np.ndarray, n: int, *, seed: int, what: str = "n") -> np.ndarray:
    """n row numbers, ascending, drawn so that every label keeps its share (Sainte-Laguë).

    Raises:
        ValueError: n is below 1 or above len(y).

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> labels[subset(labels, 3, seed=0)]
    array([0, 0, 1])
    """
    if not 1 <= n <= len(y):
        raise ValueError(f"{what}={n}: there are {len(y)} pictures, give 1 to {len(y)}")
    shuffled = np.random.default_rng(seed).permutation(len(y))
    _, labels, counts = np.unique(y[shuffled], return_inverse=True, return_counts=True)
    by_label = np.argsort(labels, kind="stable")
    rank = np.empty(len(y))
    rank[by_label] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    turn = np.argsort((rank + 0.5) / counts[labels], kind="stable")
    return np.sort(shuffled[turn[:n]])


def resized(x: Tensor, size: int | None) -> Tensor:
    """Pictures (n, C, H, W) uint8 as (n, C, size, size) uint8, antialiased bilinear."""
    if size is None or x.shape[2:] == (size, size):
        return x
    if size < 1:
        raise ValueError(f"size={size}: give at least 1 pixel, or None to keep the size")
    small = torch.empty(*x.shape[:2], size, size, dtype=torch.uint8)
    for target, part in zip(small.split(1024), x.split(1024), strict=True):
        shrunk = interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        target.copy_(shrunk.round_().clamp_(0, 255))
    return small


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, (C, 1, 1), of values in [0, 1]; exact counts."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in x.unbind(1)]).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).sqrt().clamp_min(1e-6)  # one flat colour has none
    return mean[:, None, None].float(), std[:, None, None].float()


def _released(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] != 3:
        raise ValueError("statistics='released': these are of colour pictures, use 'own' here")
    mean, std = torch.tensor(RELEASED)[:, :, None, None]
    return mean, std


def encoder(name: str, *, channels: int = 3, pixels: int = 32 * 32) -> nn.Module:
    """A new encoder: (B, channels, H, W) float32 to (B, out_dim); `out_dim` is an attribute.

    "resnet18", "resnet50" (512, 2048): torchvision's with the released stem for small pictures, a
    3×3 convolution of stride 1 and no max-pooling. "small" (128): four 3×3 convolutions,
    4.0 million multiplications for a 32×32 colour picture. "mlp" (64): one hidden layer of 128.
    "raw": the pixels. The last two depend on `pixels` = H·W.

    Raises:
        ValueError: an unknown name.

    >>> encoder("small")(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 128])
    """
    if name in ("resnet18", "resnet50"):
        return _resnet(name, channels)
    if name == "small":
        return _small(channels)
    if name == "mlp":
        return _mlp(channels * pixels)
    if name == "raw":
        return _sized(nn.Flatten(), channels * pixels)
    raise ValueError(f"encoder={name!r}: choose one of {', '.join(ENCODERS)}")


def _sized(net: nn.Module, out_dim: int) -> nn.Module:
    net.out_dim = out_dim  # type: ignore[assignment]
    return net


def _resnet(name: str, channels: int) -> nn.Module:
    from torchvision import models

    net = getattr(models, name)(weights=None)
    out_dim = net.fc.in_features
    net.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    net.maxpool, net.fc = nn.Identity(), nn.Identity()
    return _sized(net, out_dim)


def _small(channels: int, widths: Sequence[int] = (16, 32, 64, 128)) -> nn.Module:
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        stride = 1 if i == 0 else 2
        layers += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return _sized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels)


def _mlp(in_dim: int, hidden: int = 128, out_dim: int = 64) -> nn.Module:
    layers = nn.Linear(in_dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()
    return _sized(nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden, out_dim)), out_dim)
