"""Two random views of a batch of images, drawn for every image separately, on the images' device.

The released SimCLR transforms work on one PIL image at a time on the processor. Here a batch costs
one affine `grid_sample` (crop, resize, flip, rotation), one 3×4 colour matrix per image
(brightness, contrast, saturation, hue, greyscale) and one separable three-tap blur. Random draws
have torchvision's distributions; the crop boxes are whole pixels found by the same ten tries.
What differs from torchvision's transforms of one image:

- the order of the colour steps is fixed: brightness, contrast, saturation, hue, greyscale
  (torchvision shuffles the first four); values are clamped to [0, 1] once, after the last;
- contrast pulls towards the mean grey of the unclamped crop;
- hue turns RGB about its grey axis and keeps the mean of the channels, so that it is linear;
  torchvision turns HSV and keeps the largest and the smallest channel (a turn in the chroma plane
  of YIQ, the other usual choice, lies farther from it);
- resizing is bilinear; where it shrinks, by averaging a finer bilinear grid rather than by PIL's
  antialiased triangle. Pixels at the edge of a crop still see the neighbour outside it;
- nothing is rounded to 8 bits between the steps; blur reflects at the border, as OpenCV's does.
"""

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what PIL calls grey
TRIES = 10  # boxes proposed per crop, as in torchvision's RandomResizedCrop
DRAWS = 2 * TRIES + 12  # uniform numbers one view of one image uses


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may happen to an image: ranges and probabilities, each drawn anew for every view.

    `scale` (share of the area) and `ratio` (width/height) bound the crop; `flip`, `jitter`, `gray`
    and `blur` are probabilities; `brightness`, `contrast` and `saturation` are factors from
    U(1 - a, 1 + a); `hue` is a share of the colour circle from U(-a, a); `rotation` is in degrees
    from U(-a, a); `sigma` bounds the blur's standard deviation in pixels. `side` is the side of
    the views; None keeps the images' size. The defaults are those of the released image code.

    >>> Augmentation(flip=0.0) == SIMCLR
    False
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotation: float = 0.0
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    side: int | None = None

    def __post_init__(self) -> None:
        limits = {"rotation": 180.0, "hue": 0.5}
        for field in fields(self):
            value, limit = getattr(self, field.name), limits.get(field.name, 1.0)
            if isinstance(value, tuple):
                if not 0 < value[0] <= value[1]:
                    raise ValueError(f"{field.name}={value}: give (low, high) with 0 < low <= high")
            elif field.name != "side" and not 0 <= value <= limit:
                raise ValueError(f"{field.name}={value}: give a number from 0 to {limit:g}")
        if self.scale[1] > 1:
            raise ValueError(f"scale={self.scale}: a crop has at most the whole area, 1")
        if self.side is not None and self.side < 1:
            raise ValueError(f"side={self.side}: give at least 1 pixel, or None")


SIMCLR = Augmentation()
# Handwritten signs: mirrored, a 2 is no 2, and a close crop of an 8 is a 0.
GENTLE = Augmentation(
    scale=(0.5, 1.0), flip=0.0, rotation=15.0, saturation=0.0, hue=0.0, gray=0.0, blur=0.0
)


def augment(x: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """One random view of every image, values in [0, 1].

    x: (B, C, H, W), uint8 in [0, 255] or floating point in [0, 1], C = 1 or 3. Returns float32
    (B, C, H, W), or (B, C, side, side) where the augmentation names a side. Every image has its
    own draws, all taken from `generator`, so the same generator state gives the same views.

    Source: SimCLR's family of transforms with the parameters of the released HCL image code.

    Raises:
        ValueError: x has neither one nor three channels.

    >>> x = torch.rand(4, 3, 32, 32)
    >>> augment(x, SIMCLR, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 32, 32])
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}: give (B, 1 or 3, H, W)")
    x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
    draws = torch.rand(DRAWS, len(x), generator=generator, device=generator.device).to(x.device)
    crop, rest = draws[: 2 * TRIES + 2], draws[2 * TRIES + 2 :]
    boxes = crop_boxes(crop, x.shape[2], x.shape[3], augmentation)
    mirrored = rest[0] < augmentation.flip
    turned = augmentation.rotation > 0
    angle = math.radians(augmentation.rotation) * (2 * rest[1] - 1) if turned else None
    x = resample(x, boxes, mirrored, angle, augmentation.side)
    x = recolour(x, *colour_factors(rest[2:8], augmentation)).clamp_(0, 1)
    if augmentation.blur > 0:
        low, high = augmentation.sigma
        x = smooth(x, low + (high - low) * rest[8], rest[9] < augmentation.blur)
    return x


def crop_boxes(u: Tensor, height: int, width: int, augmentation: Augmentation) -> Tensor:
    """Boxes (top, left, height, width) of whole pixels, (4, B), from uniform draws (22, B).

    Ten boxes with area ~ U(scale) and log aspect ratio ~ U(log ratio) are proposed per image and
    the first that fits is placed uniformly: torchvision's `RandomResizedCrop.get_params`. Should
    none fit, the first is cut to the image (torchvision: the largest box of allowed ratio).
    """
    (small, large), (narrow, wide) = augmentation.scale, map(math.log, augmentation.ratio)
    area = height * width * (small + (large - small) * u[:TRIES])  # (TRIES, B)
    ratio = torch.exp(narrow + (wide - narrow) * u[TRIES : 2 * TRIES])
    h, w = torch.round(torch.sqrt(area / ratio)), torch.round(torch.sqrt(area * ratio))
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)  # (1, B)
    h = h.gather(0, first)[0].clamp(1, height)  # (B,)
    w = w.gather(0, first)[0].clamp(1, width)
    top = torch.floor(u[-2] * (height - h + 1))
    left = torch.floor(u[-1] * (width - w + 1))
    return torch.stack([top, left, h, w])


def resample(
    x: Tensor, boxes: Tensor, mirrored: Tensor, angle: Tensor | None, side: int | None = None
) -> Tensor:
    """Cut one box out of each image, turn it by `angle` (radians) and resize it, in one resampling.

    x: (B, C, H, W); boxes: (4, B); mirrored, angle: (B,). Rotation is about the box's centre and
    repeats the image's edge where it looks outside; None does what an angle of 0 does, in less
    time. Returns (B, C, H, W) or (B, C, side, side).
    """
    height, width = x.shape[2:]
    rows, columns = (height, width) if side is None else (side, side)
    finer = max(1, math.ceil(height / rows), math.ceil(width / columns))
    theta = _box_to_image(boxes, mirrored, angle, height, width)
    if angle is None:
        grid = _upright_grid(theta, finer * rows, finer * columns)
    else:
        shape = [*x.shape[:2], finer * rows, finer * columns]
        grid = affine_grid(theta, shape, align_corners=False)
    x = grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return avg_pool2d(x, finer) if finer > 1 else x


def _box_to_image(
    boxes: Tensor, mirrored: Tensor, angle: Tensor | None, height: int, width: int
) -> Tensor:
    """Rows map a view's coordinates in [-1, 1] to the image's in [-1, 1]: (B, 2, 3)."""
    top, left, h, w = boxes
    sign = 1 - 2 * mirrored.to(boxes.dtype)
    angle = torch.zeros_like(top) if angle is None else angle
    cos, sin = torch.cos(angle), torch.sin(angle)  # pixels are square
    across = torch.stack([sign * w * cos / width, -h * sin / width, (2 * left + w) / width - 1], 1)
    down = torch.stack([sign * w * sin / height, h * cos / height, (2 * top + h) / height - 1], 1)
    return torch.stack([across, down], 1)


def _upright_grid(theta: Tensor, rows: int, columns: int) -> Tensor:
    """What `affine_grid` gives where nothing turns, to the last bit: x by column, y by row."""
    centres = [torch.linspace(-1, 1, n, device=theta.device) * (n - 1) / n for n in (columns, rows)]
    scale, shift = theta.diagonal(dim1=1, dim2=2), theta[..., 2]  # (B, 2) each
    across, down = (scale[:, i, None] * centres[i] + shift[:, i, None] for i in range(2))
    across, down = across[:, None, :], down[:, :, None]
    planes = torch.stack(torch.broadcast_tensors(across, down), 1)  # (B, 2, rows, columns)
    return planes.permute(0, 2, 3, 1)


def colour_factors(u: Tensor, augmentation: Augmentation) -> tuple[Tensor, ...]:
    """Brightness, contrast, saturation, hue (radians), colour (0 = grey): (B,) each; u: (6, B)."""
    span = 2 * u[:4] - 1
    jittered = u[4] < augmentation.jitter
    strengths = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    brightness, contrast, saturation = (
        torch.where(jittered, 1 + a * s, 1.0) for a, s in zip(strengths, span[:3], strict=True)
    )
    hue = torch.where(jittered, 2 * math.pi * augmentation.hue * span[3], 0.0)
    return brightness, contrast, saturation, hue, (u[5] >= augmentation.gray).float()


def recolour(
    x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, colour: Tensor
) -> Tensor:
    r"""Apply one affine colour map per image; the factors are (B,), x is (B, C, H, W).

    With brightness $b$, contrast $c$, saturation $s$, hue $\theta$, colour $k$ and luma $w$,

    $$ x \mapsto bc\,S_k R_\theta S_s\,x + (1-c)\,b\,w^\top\bar x, \qquad
       S_a = a I + (1-a)\,1 w^\top, $$

    where $R_\theta$ turns about the grey axis (1, 1, 1). One channel has luma only, so only
    brightness and contrast act on it.
    """
    gain, fixed = brightness * contrast, _colour_matrices(x.device)
    luma = fixed[0, 0]
    means = x.mean((1, 2, 3)) if x.shape[1] == 1 else x.mean((2, 3)) @ luma  # (B,)
    offset = (brightness * (1 - contrast) * means)[:, None, None]
    if x.shape[1] == 1:
        return torch.addcmul(offset[..., None], x, gain[:, None, None, None])
    saturate = torch.lerp(fixed[0], fixed[1], saturation[:, None, None])  # (B, 3, 3)
    desaturate = torch.lerp(fixed[0], fixed[1], colour[:, None, None])
    turn = torch.stack([torch.ones_like(hue), hue.cos(), hue.sin()], 1)  # (B, 3)
    turn = torch.tensordot(turn, fixed[2:], dims=([1], [0]))  # (B, 3, 3)
    matrix = gain[:, None, None] * (desaturate @ turn @ saturate)
    return torch.baddbmm(offset, matrix, x.flatten(2)).view_as(x)


@cache
def _colour_matrices(device: torch.device) -> Tensor:
    """Luma in every row, identity; projection on the grey axis, off it, quarter turn: (5, 3, 3)."""
    luma, identity, grey = torch.tensor(LUMA).expand(3, 3), torch.eye(3), torch.full((3, 3), 1 / 3)
    quarter = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return torch.stack([luma, identity, grey, identity - grey, quarter]).to(device)


def smooth(x: Tensor, sigma: Tensor, chosen: Tensor) -> Tensor:
    """Gaussian blur with three taps per axis where `chosen`; sigma, chosen: (B,), x: (B, C, H, W).

    Taps are exp(-k²/2σ²), k = -1, 0, 1, over their sum. Borders reflect.
    """
    near = torch.exp(-0.5 / sigma**2)
    tap = torch.where(chosen, near / (1 + 2 * near), 0.0)[:, None, None, None]
    for axis in 2, 3:
        along = x.movedim(axis, 0)
        around = torch.empty_like(along)  # the sum of both neighbours
        torch.add(along[:-2], along[2:], out=around[1:-1])
        torch.mul(along[1], 2, out=around[0])
        torch.mul(along[-2], 2, out=around[-1])
        x = around.movedim(0, axis).sub_(x, alpha=2).mul_(tap).add_(x)
    return x
