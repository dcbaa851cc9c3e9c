"""Views: the same as torchvision's, for the same parameters and in distribution."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from models.preprocess import Preprocess
from models.torchvision import load_torchvision
from training.views import (
    BYOL,
    SIMCLR,
    SIMCLR_SMALL,
    Recipe,
    ViewTransform,
    _multiplied,
    _swept,
    apply_views,
    on_white,
    sample_views,
)

STRONG = Recipe(crop=(0.05, 1.0), grayscale=0.3, blur=0.6, solarize=0.3, sigma=(0.1, 3.0))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=_generator(1)).byte()


@pytest.mark.parametrize(("height", "width", "size"), [(50, 70, 32), (32, 32, 32), (40, 30, 64)])
def test_pixels_are_torchvisions_for_the_same_parameters(height: int, width: int, size: int) -> None:
    load_torchvision()
    from torchvision.transforms.v2 import functional as reference

    pixels = on_white(_pictures(60, height, width))
    drawn = sample_views(60, height, width, STRONG, _generator())
    views = apply_views(pixels, size, drawn)
    changes = [
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    ]
    kernel = [2 * max(1, size // 20) + 1] * 2
    for row, view in enumerate(views):
        top, left, tall, wide = (int(value) for value in drawn.box[row])
        expected = reference.resized_crop(pixels[row], top, left, tall, wide, [size, size], antialias=True)
        if drawn.flip[row]:
            expected = reference.horizontal_flip(expected)
        for change in drawn.order[row].tolist():
            expected = changes[change](expected, float(drawn.factors[row, change]))
        if drawn.gray[row]:
            expected = reference.rgb_to_grayscale(expected, 3)
        assert drawn.sigma is not None
        assert drawn.solarize is not None
        if drawn.sigma[row] > 0:
            expected = reference.gaussian_blur(expected, kernel, [float(drawn.sigma[row])] * 2)
        settled = torch.ones_like(view, dtype=torch.bool)
        if drawn.solarize[row]:  # a value at the threshold may fall on either side of it
            settled = (expected - 0.5).abs() > 1e-5
            expected = reference.solarize(expected, 0.5)
        assert (view - expected)[settled].abs().max() < 5e-6, row


@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_gpu_blurs_as_a_cpu_does(size: int) -> None:
    views = torch.rand(4, 3, size, size, dtype=torch.float64, generator=_generator())
    radius = max(1, size // 20)
    kernel = torch.rand(4, 2 * radius + 1, dtype=torch.float64, generator=_generator())
    offsets = torch.arange(-radius, radius + 1)
    torch.testing.assert_close(_swept(views, kernel), _multiplied(views, kernel, offsets), atol=1e-12, rtol=0)


def _ks(ours: Tensor, theirs: Tensor) -> float:
    """The two-sample Kolmogorov-Smirnov distance."""
    both = torch.cat([ours, theirs]).sort().values
    shares = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (ours, theirs)]
    return float((shares[0] - shares[1]).abs().max())


def test_parameters_are_distributed_as_torchvisions() -> None:
    """4,000 of each: the distance of two samples of one distribution passes 0.043 once in 1,000 times."""
    load_torchvision()
    from torchvision.transforms import v2

    count, height, width = 4000, 60, 80
    torch.manual_seed(0)
    drawn = sample_views(count, height, width, SIMCLR, _generator())
    picture = torch.zeros(3, height, width)
    crop = v2.RandomResizedCrop(32, scale=SIMCLR.crop)
    boxes = [crop.make_params([picture]) for _ in range(count)]
    reference = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in boxes]).float()
    for column in range(4):
        assert _ks(drawn.box[:, column], reference[:, column]) < 0.05
    areas, ratios = (lambda b: b[:, 2] * b[:, 3]), (lambda b: (b[:, 3] / b[:, 2]).log())
    assert _ks(areas(drawn.box), areas(reference)) < 0.05
    assert _ks(ratios(drawn.box), ratios(reference)) < 0.05
    jitter = v2.ColorJitter(SIMCLR.brightness, SIMCLR.contrast, SIMCLR.saturation, SIMCLR.hue)
    drawings = [jitter.make_params([picture]) for _ in range(count)]
    changed = drawn.factors[drawn.factors[:, 0] != 1]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for column, name in enumerate(names):
        assert _ks(changed[:, column], torch.tensor([d[name] for d in drawings])) < 0.05
    blur = v2.GaussianBlur(23, (0.1, 2.0))
    assert drawn.sigma is not None
    sigmas = torch.tensor([blur.make_params([picture])["sigma"][0] for _ in range(count)])
    assert _ks(drawn.sigma[drawn.sigma > 0], sigmas) < 0.06
    for share, seen in ((0.5, drawn.flip), (0.2, drawn.gray), (0.5, drawn.sigma > 0), (0.8, drawn.factors[:, 0] != 1)):
        assert abs(float(seen.float().mean()) - share) < 0.03
    orders = {tuple(order) for order in drawn.order.tolist()}
    assert len(orders) == 24


def test_a_crop_that_cannot_fit_is_the_largest_one_in_the_middle() -> None:
    drawn = sample_views(50, 10, 400, replace(SIMCLR, crop=(0.9, 1.0)), _generator())
    assert drawn.box.tolist() == [[0, 193, 10, 13]] * 50  # round(10 * 4/3) = 13 wide


def test_every_picture_has_its_own_parameters_and_a_seed_replays_them() -> None:
    images = _pictures(1, 40, 40).expand(8, -1, -1, -1)
    one, two = (ViewTransform(32, (STRONG, STRONG), generator=_generator(5))(images) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert len({tuple(view.flatten().tolist()) for view in (*one[0], *one[1])}) == 16
    assert one[0].shape == (8, 3, 32, 32)


def test_a_row_does_not_depend_on_its_company() -> None:
    pixels = on_white(_pictures(6, 40, 40))
    drawn = sample_views(6, 40, 40, STRONG, _generator())
    alone = type(drawn)(**{item.name: getattr(drawn, item.name)[2:3] for item in fields(drawn)})
    assert torch.allclose(apply_views(pixels[2:3], 32, alone), apply_views(pixels, 32, drawn)[2:3], atol=1e-6)


def test_views_are_normalised_and_transparency_is_white() -> None:
    images = torch.zeros(2, 4, 16, 16, dtype=torch.uint8)
    plain = Recipe(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, grayscale=0, blur=0)
    (view,) = ViewTransform(16, (plain,), Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3))(images)
    assert torch.allclose(view, torch.full_like(view, 2.0))


def test_the_application_compiles_whole_and_gives_the_same() -> None:
    pixels = on_white(_pictures(4, 40, 40))
    drawn = sample_views(4, 40, 40, STRONG, _generator())
    compiled = torch.compile(apply_views, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(pixels, 32, drawn), apply_views(pixels, 32, drawn), atol=1e-6)


def test_recipes() -> None:
    assert SIMCLR.scaled(0.5).hue == SIMCLR_SMALL.hue == 0.1
    assert BYOL[0].blur == 1 and BYOL[1].solarize == 0.2  # noqa: PT018
    with pytest.raises(ValueError, match="shares of the area"):
        Recipe(crop=(0.5, 2.0))
