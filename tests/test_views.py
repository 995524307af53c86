"""The batched views against torchvision's transforms of one image at a time."""

import colorsys

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import functional as tvf
from torchvision.transforms.functional import InterpolationMode

from hcl import views
from hcl.views import DRAWS, GENTLE, SIMCLR, Augmentation, augment

NOTHING = Augmentation(
    scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0, blur=0.0
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def only(**changes):
    """An augmentation that does nothing but what is named."""
    return Augmentation(
        **{**{f: getattr(NOTHING, f) for f in NOTHING.__dataclass_fields__}, **changes}
    )


@pytest.fixture(scope="module")
def photo():
    """A real 32×32 colour photograph, (3, 32, 32) float in [0, 1]."""
    from sklearn.datasets import load_sample_image

    picture = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    return tvf.resize(picture, [32, 32], antialias=True).float() / 255


@pytest.fixture
def muted():
    """Twelve random colour images with values that no single step drives out of [0, 1]."""
    return 0.3 + 0.3 * torch.rand(12, 3, 16, 16, generator=seeded(1))


# --- crop boxes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_crop_boxes_have_torchvisions_distribution(height, width):
    n = 3000
    ours = views.crop_boxes(torch.rand(22, n, generator=seeded()), height, width, SIMCLR).numpy()
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, SIMCLR.scale, SIMCLR.ratio)
            for _ in range(n)
        ]
    ).T
    for row in range(4):  # top, left, height, width
        assert ks_2samp(ours[row], theirs[row]).pvalue > 0.01
    assert ks_2samp(ours[2] * ours[3], theirs[2] * theirs[3]).pvalue > 0.01
    assert ks_2samp(ours[3] / ours[2], theirs[3] / theirs[2]).pvalue > 0.01


def test_the_comparison_of_boxes_can_fail():
    draws = torch.rand(22, 3000, generator=seeded())
    ours = views.crop_boxes(draws, 32, 32, SIMCLR)
    other = views.crop_boxes(1 - draws, 32, 32, Augmentation(scale=(0.12, 1.0)))
    assert ks_2samp(ours[2] * ours[3], other[2] * other[3]).pvalue < 1e-3


@pytest.mark.parametrize("augmentation", [SIMCLR, GENTLE, Augmentation(ratio=(0.1, 10.0))])
@pytest.mark.parametrize("side", [1, 8, 33])
def test_crop_boxes_are_whole_pixels_inside_the_image(augmentation, side):
    top, left, h, w = views.crop_boxes(
        torch.rand(22, 2000, generator=seeded()), side, side, augmentation
    )
    for value in (top, left, h, w):
        assert torch.equal(value, value.round())
    assert min(top.min(), left.min()) >= 0
    assert min(h.min(), w.min()) >= 1
    assert max((top + h).max(), (left + w).max()) <= side


def test_a_box_that_never_fits_is_cut_to_the_image():
    boxes = views.crop_boxes(
        torch.rand(22, 50, generator=seeded()), 16, 16, Augmentation(scale=(1, 1), ratio=(4, 5))
    )
    assert (boxes[3] == 16).all()
    assert (boxes[0] + boxes[2] <= 16).all()


# --- resampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 32, 32), (3, 7, 20, 12), (10, 0, 9, 32), (25, 25, 7, 7)])
def test_resample_agrees_with_resized_crop(photo, box, mirrored):
    ours = views.resample(
        photo[None], torch.tensor(box).float()[:, None], torch.tensor([mirrored]), torch.zeros(1)
    )[0]
    theirs = tvf.resized_crop(photo, *box, [32, 32], antialias=True)
    theirs = tvf.hflip(theirs) if mirrored else theirs
    # pixels within half a source pixel of the crop's edge see the neighbour outside it
    y, x = (int(np.ceil(32 / s / 2)) if s < 32 else 0 for s in box[2:])
    inner = (slice(None), slice(y, 32 - y), slice(x, 32 - x))
    torch.testing.assert_close(ours[inner], theirs[inner], atol=2e-5, rtol=0)
    assert (ours - theirs).abs().mean() < 0.01


def test_every_image_has_its_own_box(photo):
    boxes = torch.tensor([[0.0, 8, 4], [0, 8, 16], [32, 16, 8], [32, 16, 8]])  # (4, 3)
    flips, still = torch.tensor([False, True, False]), torch.zeros(3)
    batch = views.resample(photo.expand(3, -1, -1, -1), boxes, flips, still)
    for i in range(3):
        one = views.resample(photo[None], boxes[:, i : i + 1], flips[i : i + 1], still[:1])
        torch.testing.assert_close(batch[i], one[0])


@pytest.mark.parametrize("degrees", [-40.0, 15.0])
def test_rotation_agrees_with_torchvision_inside_the_disc(photo, degrees):
    box = torch.tensor([0.0, 0, 32, 32])[:, None]
    angle = torch.tensor([np.deg2rad(degrees)], dtype=torch.float32)
    ours = views.resample(photo[None], box, torch.tensor([False]), angle)[0]
    theirs = tvf.rotate(photo, degrees, interpolation=InterpolationMode.BILINEAR)
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    disc = (x**2 + y**2).sqrt() < 14
    torch.testing.assert_close(ours[:, disc], theirs[:, disc], atol=1e-4, rtol=0)


def test_smaller_views_average_the_pixels():
    x = torch.rand(2, 3, 96, 96, generator=seeded())
    box = torch.tensor([0.0, 0, 96, 96])[:, None].expand(4, 2)
    ours = views.resample(x, box, torch.zeros(2) > 0, torch.zeros(2), side=32)
    torch.testing.assert_close(ours, interpolate(x, (32, 32), mode="area"), atol=1e-5, rtol=0)


def test_side_sets_the_size_of_the_views():
    x = torch.rand(2, 3, 48, 48)
    assert augment(x, Augmentation(side=32), seeded()).shape == (2, 3, 32, 32)
    assert augment(x[..., :40], Augmentation(), seeded()).shape == (2, 3, 48, 40)


# --- colour -----------------------------------------------------------------------------------


def recoloured(x, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, colour=1.0):
    factors = (brightness, contrast, saturation, 2 * np.pi * hue, colour)
    return views.recolour(x, *(torch.full((len(x),), factor) for factor in factors))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("option", "reference"),
    [
        ("brightness", tvf.adjust_brightness),
        ("contrast", tvf.adjust_contrast),
        ("saturation", tvf.adjust_saturation),
    ],
)
def test_one_colour_step_agrees_with_torchvision(muted, option, reference, factor):
    ours = recoloured(muted, **{option: factor})
    torch.testing.assert_close(ours, reference(muted, factor), atol=2e-4, rtol=0)


def test_the_steps_compose_in_the_stated_order(muted):
    theirs = tvf.adjust_brightness(muted, 0.8)
    theirs = tvf.adjust_contrast(theirs, 1.2)
    theirs = tvf.adjust_saturation(theirs, 0.7)
    ours = recoloured(muted, 0.8, 1.2, 0.7)
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)
    turned, grey = recoloured(ours, hue=0.1), recoloured(recoloured(ours, hue=0.1), colour=0.0)
    torch.testing.assert_close(recoloured(muted, 0.8, 1.2, 0.7, 0.1), turned)
    torch.testing.assert_close(recoloured(muted, 0.8, 1.2, 0.7, 0.1, 0.0), grey)


def test_no_colour_is_greyscale(muted):
    theirs = tvf.rgb_to_grayscale(muted, num_output_channels=3)
    torch.testing.assert_close(recoloured(muted, colour=0.0), theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shift", [-0.1, -0.05, 0.05, 0.1])
def test_hue_turns_as_torchvisions_does(muted, shift):
    """A linear turn is not HSV's: the same way, nearer than no turn, far from the other way."""
    theirs = tvf.adjust_hue(muted, shift)
    ours = recoloured(muted, hue=shift)
    change = (theirs - muted).abs().mean()
    assert (ours - theirs).abs().mean() < 0.9 * change
    assert (recoloured(muted, hue=-shift) - theirs).abs().mean() > 1.8 * change
    torch.testing.assert_close(ours.mean(1), muted.mean(1))


@pytest.mark.parametrize("shift", [-0.1, 0.04, 0.1])
def test_hue_turns_every_colour_by_the_angle_torchvision_does(shift):
    start = torch.arange(60) / 60
    colours = torch.tensor([colorsys.hsv_to_rgb(float(h), 0.3, 0.5) for h in start])  # (60, 3)
    ours = recoloured(colours[:, :, None, None], hue=shift)[:, :, 0, 0]
    turned = torch.tensor([colorsys.rgb_to_hsv(*c.tolist())[0] for c in ours]) - start
    turned = (turned + 0.5) % 1 - 0.5
    assert turned.mean() == pytest.approx(shift, abs=0.001)
    assert (turned - shift).abs().max() < 0.01


def test_a_whole_turn_of_hue_and_unit_factors_change_nothing(muted):
    torch.testing.assert_close(recoloured(muted, hue=1.0), muted, atol=2e-4, rtol=0)
    torch.testing.assert_close(recoloured(muted), muted, atol=1e-6, rtol=0)


def test_one_channel_is_treated_as_grey(muted):
    grey = muted[:, :1]
    colour = recoloured(grey.expand(-1, 3, -1, -1), 0.8, 1.3, 0.5, 0.1)
    torch.testing.assert_close(recoloured(grey, 0.8, 1.3, 0.5, 0.1), colour[:, :1])


def test_colour_factors_have_torchvisions_distribution():
    n = 3000
    draws = torch.rand(6, n, generator=seeded(3))
    brightness, contrast, saturation, hue, colour = views.colour_factors(draws, SIMCLR)
    torch.manual_seed(4)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = np.array(
        [
            jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[1:]
            for _ in range(n)
        ]
    ).T
    changed = brightness != 1
    assert torch.equal(changed, contrast != 1)
    assert torch.equal(changed, hue != 0)  # all or none
    assert changed.float().mean() == pytest.approx(0.8, abs=0.03)
    assert (1 - colour).mean() == pytest.approx(0.2, abs=0.03)
    assert set(colour.tolist()) == {0.0, 1.0}
    ours = [f[changed] for f in (brightness, contrast, saturation, hue / (2 * np.pi))]
    for mine, reference in zip(ours, theirs, strict=True):
        assert ks_2samp(mine, reference).pvalue > 0.01
    assert abs(np.corrcoef(brightness[changed], contrast[changed])[0, 1]) < 0.06


# --- blur -------------------------------------------------------------------------------------


def test_blur_agrees_with_torchvision_per_image(photo):
    sigma = torch.tensor([0.3, 0.7, 1.1, 2.0])
    chosen = torch.tensor([True, True, False, True])
    ours = views.smooth(photo.expand(4, -1, -1, -1), sigma, chosen)
    for i in range(4):
        theirs = tvf.gaussian_blur(photo, [3, 3], [float(sigma[i])] * 2) if chosen[i] else photo
        torch.testing.assert_close(ours[i], theirs, atol=1e-5, rtol=0)


def test_blur_frequency_and_strength():
    spike = torch.zeros(4000, 1, 3, 3)
    spike[:, :, 1, 1] = 1
    centre = augment(spike, only(blur=0.5), seeded())[:, 0, 1, 1]
    blurred = centre < 1 - 1e-4
    invisible = (0.23 - 0.1) / 1.9  # sigma below 0.23: the centre keeps more than 1 - 1e-4
    assert blurred.float().mean() == pytest.approx(0.5 * (1 - invisible), abs=0.03)

    def sigma(peak):  # peak = (1 / (1 + 2 near))², near = exp(-1 / 2σ²)
        near = (peak**-0.5 - 1) / 2
        return np.sqrt(-0.5 / np.log(near))

    found = sigma(centre[blurred].double().numpy())
    assert kstest(found, "uniform", args=(0.23, 2.0 - 0.23)).pvalue > 0.01


# --- the whole view ---------------------------------------------------------------------------


def test_nothing_is_the_identity():
    x = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8, generator=seeded())
    torch.testing.assert_close(augment(x, NOTHING, seeded()), x / 255, atol=1e-5, rtol=0)


def test_flip_and_grey_frequencies():
    ramp = (
        torch.linspace(0, 1, 16).expand(4000, 3, 16, 16)
        * torch.tensor([1, 0.5, 0.2])[:, None, None]
    )
    x = augment(ramp, SIMCLR, seeded())
    mirrored = x.mean(1)[:, 8, -1] < x.mean(1)[:, 8, 0]
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.03)
    grey = (x - x.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert grey.float().mean() == pytest.approx(0.2, abs=0.03)
    assert (mirrored & grey).float().mean() == pytest.approx(0.1, abs=0.02)  # independent


def test_views_of_a_photograph_look_like_torchvisions(photo):
    """Brightness, contrast, colourfulness and sharpness of many views, same law within the eye."""

    def describe(x):  # (n, 3, 32, 32) → four numbers a view
        grey = x.mean(1)
        return (
            grey.mean((1, 2)),
            grey.std((1, 2)),
            (x - grey[:, None]).abs().mean((1, 2, 3)),
            (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2)),
            x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)),
        )

    n = 600
    torch.manual_seed(0)
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(3, (0.1, 2.0))], 0.5),
            transforms.ToTensor(),
        ]
    )
    picture = tvf.to_pil_image(photo)
    theirs = torch.stack([reference(picture) for _ in range(n)])
    ours = augment(photo.expand(4 * n, -1, -1, -1), SIMCLR, seeded())
    for mine, reference_value in zip(describe(ours), describe(theirs), strict=True):
        assert ks_2samp(mine, reference_value).statistic < 0.09  # 5 % level of equal laws: 0.062
    plain = augment(photo.expand(4 * n, -1, -1, -1), only(scale=(0.08, 1.0)), seeded())
    assert ks_2samp(describe(plain)[2], describe(theirs)[2]).statistic > 0.15


def test_every_image_has_its_own_draws(photo):
    same = augment(photo.expand(64, -1, -1, -1), SIMCLR, seeded())
    assert len({view.numpy().tobytes() for view in same}) == 64
    batch = torch.rand(8, 3, 32, 32, generator=seeded(1))
    before = augment(batch, SIMCLR, seeded())
    batch[3] = photo
    after = augment(batch, SIMCLR, seeded())
    differs = (before != after).flatten(1).any(1)
    assert differs.tolist() == [i == 3 for i in range(8)]


def test_draws_come_from_the_generator_alone(photo):
    x = photo.expand(4, -1, -1, -1)
    state = torch.get_rng_state()
    first = augment(x, SIMCLR, seeded(5))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, augment(x, SIMCLR, seeded(5)))
    assert not torch.equal(first, augment(x, SIMCLR, seeded(6)))
    generator = seeded(5)
    augment(x, SIMCLR, generator)
    assert not torch.equal(first, augment(x, SIMCLR, generator))
    twin = seeded(5)
    torch.rand(DRAWS, 4, generator=twin)
    assert torch.equal(augment(x, SIMCLR, generator), augment(x, SIMCLR, _advanced(twin)))


def _advanced(generator):
    torch.rand(DRAWS, 4, generator=generator)
    return generator


@pytest.mark.parametrize("augmentation", [SIMCLR, GENTLE])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_float_in_the_unit_interval_and_leave_x_alone(augmentation, channels):
    x = torch.randint(0, 256, (32, channels, 8, 8), dtype=torch.uint8, generator=seeded())
    copy = x.clone()
    view = augment(x, augmentation, seeded())
    assert view.dtype == torch.float32
    assert view.shape == x.shape
    assert view.min() >= 0
    assert view.max() <= 1
    assert torch.equal(x, copy)
    floats = x / 255
    augment(floats, augmentation, seeded())
    assert torch.equal(floats, x / 255)


def test_gentle_views_do_not_mirror():
    ramp = torch.linspace(0, 1, 8).expand(500, 1, 8, 8)
    x = augment(ramp, GENTLE, seeded())
    assert (x[:, 0, 4, -1] > x[:, 0, 4, 0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip"),
        ({"gray": -0.1}, "gray"),
        ({"hue": 0.7}, "0.5"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.2)}, "whole area"),
        ({"sigma": (0.0, 1.0)}, "sigma"),
        ({"brightness": 2.0}, "brightness"),
        ({"rotation": 200.0}, "180"),
        ({"side": 0}, "side"),
    ],
)
def test_impossible_augmentations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="1 or 3"):
        augment(torch.rand(shape), SIMCLR, seeded())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_views_equal_cpu_views(photo):
    x = photo.expand(16, -1, -1, -1)
    cpu = augment(x, SIMCLR, seeded())
    torch.testing.assert_close(augment(x.cuda(), SIMCLR, seeded()).cpu(), cpu, atol=1e-4, rtol=0)
    own = torch.Generator("cuda").manual_seed(0)
    assert augment(x.cuda(), SIMCLR, own).is_cuda
