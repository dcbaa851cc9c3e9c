"""The random views that self-supervised methods compare, in batches, on the device the batch is on.

Every picture has its own parameters. They are sampled first (`sample_views`) and applied after (`apply_views`), so that
a draw can be replayed, and so that the application has neither branches nor random numbers and compiles whole.
Given the same parameters, each operation equals torchvision's on float pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.preprocess import Preprocess

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rounding of Rec. 601
_TRIES = 10  # crops that are drawn before the largest one in the middle is taken, as torchvision does
_PIXELS_AT_ONCE = 2**17  # of views; in float32 the three channels are 1.5 MiB
_COMPILED: dict[str, Any] = {
    "dynamic": False,
    "options": {"cpp.enable_floating_point_contract_flag": "fast"},  # products and sums as one instruction on a CPU
}
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


@dataclass(frozen=True)
class Recipe:
    """How views are drawn; probabilities, or ends of ranges.

    crop: range of the crop's share of the area. ratio: of its aspect, log-uniform. flip: probability of a horizontal
    flip. jitter: probability of the four colour changes, in random order: factors from 1-x to 1+x of brightness,
    contrast and saturation, and hue turns of the circle either way. grayscale: probability. blur: probability of a
    gaussian blur whose deviation is drawn from `sigma`, in pixels of the view.
    solarize: probability that values from one half on are inverted.
    """

    crop: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop
        if not 0 < low <= high <= 1 or not 0 <= self.hue <= 0.5 or self.sigma[0] <= 0:
            raise ValueError(
                f"crop {self.crop}, hue {self.hue}, sigma {self.sigma}: the crop is a range of shares of the area, the "
                "hue at most half a turn, sigma above 0"
            )

    def scaled(self, strength: float) -> Recipe:
        """The same with the colour changes multiplied by SimCLR's strength s."""
        return replace(
            self,
            brightness=self.brightness * strength,
            contrast=self.contrast * strength,
            saturation=self.saturation * strength,
            hue=min(0.5, self.hue * strength),
        )


# arXiv:2002.05709, appendix A (strength 1, at 224 pixels) and B.9 (strength 0.5 and no blur, at 32).
SIMCLR = Recipe(crop=(0.08, 1.0))
SIMCLR_SMALL = replace(SIMCLR.scaled(0.5), crop=(0.2, 1.0), blur=0.0)
# arXiv:1911.05722, section 4, and arXiv:2003.04297, section 3.
MOCO_V1 = Recipe(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, blur=0.0)
MOCO_V2 = Recipe(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
# arXiv:2006.07733, table 6: the two views differ in blur and solarization. MoCo v3 and VICReg take the same pair.
BYOL = (
    Recipe(crop=(0.08, 1.0), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0),
    Recipe(crop=(0.08, 1.0), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.1, solarize=0.2),
)
BYOL_SMALL = (
    replace(BYOL[0], crop=(0.2, 1.0), blur=0.0),
    replace(BYOL[1], crop=(0.2, 1.0), blur=0.0),
)


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for B views.

    box: (B, 4) top, left, height, width of the crop in pixels. flip: (B,) bool. factors: (B, 4) of brightness, contrast
    and saturation, and the turn of the hue. order: (B, 4) which of these four comes first to last. gray: (B,) bool.
    sigma: (B,) of the blur in pixels of the view, 0 for none. solarize: (B,) bool. The last two are None where a recipe
    never blurs or solarizes.
    """

    box: Tensor
    flip: Tensor
    factors: Tensor
    order: Tensor
    gray: Tensor
    sigma: Tensor | None
    solarize: Tensor | None

    def colours(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """All that follows the crop."""
        return self.factors, self.order, self.gray, self.sigma, self.solarize


class ViewTransform:
    """uint8 (B, 3 or 4, H, W) -> normalised views (V, B, 3, size, size), one a recipe. A fourth channel is opacity.

    preprocess: whose normalisation views get, that of the model which will see them. generator: where parameters are
    drawn from, None for torch's own on the batch's device. compile: fuse the operations, for batches of one shape.
    """

    def __init__(
        self,
        size: int,
        recipes: tuple[Recipe, ...],
        preprocess: Preprocess | None = None,
        generator: torch.Generator | None = None,
        compile: bool = False,
    ) -> None:
        self.size, self.recipes = size, recipes
        self.preprocess = preprocess or Preprocess(size=size)
        self.generator = generator
        self._crop = torch.compile(_crop_lines, **_COMPILED) if compile else _crop_lines
        self._make = torch.compile(self._make_views, **_COMPILED) if compile else self._make_views

    def __call__(self, images: Tensor) -> Tensor:
        """-> (V, B, 3, size, size), a view a recipe."""
        return self._views(images, normalized=True)

    def views(self, images: Tensor) -> Tensor:
        """The same in 0..1, to look at."""
        return self._views(images, normalized=False)

    def _views(self, images: Tensor, normalized: bool) -> Tensor:
        count, _, height, width = images.shape
        views = torch.empty(len(self.recipes), count, 3, self.size, self.size, device=images.device).mT
        # On a CPU as many pictures at a time as its caches hold from one operation to the next: with 512 at once the
        # same takes two to three times as long.
        part = max(4, _PIXELS_AT_ONCE // self.size**2) if images.device.type == "cpu" else max(1, count)
        drawn = []
        for view, recipe in zip(views, self.recipes, strict=True):
            sampled = sample_views(count, height, width, recipe, self.generator, images.device)
            rows, columns = self._crop(sampled.box, sampled.flip, height, width, self.size)
            drawn.append(_split((view, *rows, *columns, *sampled.colours()), part))
        for pixels, *parts in zip(images.split(part), *drawn, strict=True):
            # Once for all views. Compiled, a CPU without AVX-512 loads eight bytes through memory, at the price of all
            # that is done to them in one blend of colours.
            pixels = pixels.float()
            for view_parts in parts:
                self._make(normalized, pixels, *view_parts)
        return views

    def _make_views(self, normalized: bool, images: Tensor, out: Tensor, *drawn: Any) -> None:
        """drawn: rows, columns and colours, as plain tensors, for dozens of small calls a batch have to cost little."""
        planes = _coloured(_cropped(on_white(images), _Lines(*drawn[:2]), _Lines(*drawn[2:4])), *drawn[4:])
        # Preprocess.standardize a plane at a time, so that it is part of the last sweep and no sweep of its own.
        mean_and_std = zip(self.preprocess.mean, self.preprocess.std, strict=True)
        for place, plane, (mean, std) in zip(out.unbind(1), planes, mean_and_std, strict=True):
            place.copy_(((plane - mean) * (1 / std) if normalized else plane).mT)


def _split(tensors: Sequence[Tensor | None], part: int) -> Iterator[tuple[Any, ...]]:
    return zip(*(repeat(None) if each is None else each.split(part) for each in tensors), strict=False)


def on_white(images: Tensor) -> Tensor:
    """(B, 3 or 4, H, W) in 0..255 -> float (B, 3, H, W) in 0..1, transparency on white."""
    pixels = images.float() * (1 / 255)  # a division takes a vector unit ten times as long
    if images.shape[1] == 3:
        return pixels
    return pixels[:, :3] * pixels[:, 3:] + (1 - pixels[:, 3:])


def sample_views(
    count: int,
    height: int,
    width: int,
    recipe: Recipe,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> ViewParameters:
    """Draw the parameters of `count` views of pictures of height x width pixels."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*(shape or (count,)), generator=generator, device=device) * (high - low) + low

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator, device=device) < probability

    jittered = chance(recipe.jitter)
    factors = [uniform(max(0.0, 1 - x), 1 + x) for x in (recipe.brightness, recipe.contrast, recipe.saturation)]
    neutral = torch.ones((), device=device)
    low, high = recipe.ratio
    areas, log_ratios = uniform(*recipe.crop, count, _TRIES), uniform(math.log(low), math.log(high), count, _TRIES)
    return ViewParameters(
        box=_boxes(areas, log_ratios, uniform(0, 1, count, 2), height, width, recipe.ratio),
        flip=chance(recipe.flip),
        factors=torch.stack(
            [*(torch.where(jittered, x, neutral) for x in factors), jittered * uniform(-recipe.hue, recipe.hue)], 1
        ),
        order=uniform(0, 1, count, 4).argsort(1),
        gray=chance(recipe.grayscale),
        sigma=chance(recipe.blur) * uniform(*recipe.sigma) if recipe.blur else None,
        solarize=chance(recipe.solarize) if recipe.solarize else None,
    )


def _boxes(
    areas: Tensor, log_ratios: Tensor, place: Tensor, height: int, width: int, ratio: tuple[float, float]
) -> Tensor:
    """Crops as torchvision's RandomResizedCrop draws them: the first of several tries that fits, else the largest one
    of an allowed aspect in the middle. areas, log_ratios: (B, tries). place: (B, 2) in 0..1. -> (B, 4)."""
    area, aspect = areas * (height * width), log_ratios.exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    tall, wide = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    middle_height, middle_width = float(height), float(width)
    if width / height < ratio[0]:
        middle_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        middle_width = round(height * ratio[1])
    top = (place[:, 0] * (height - tall + 1)).floor().clamp(max=height - tall)
    left = (place[:, 1] * (width - wide + 1)).floor().clamp(max=width - wide)
    # Numbers, for a tensor of them would be copied from the host in every step.
    middle = ((height - middle_height) // 2, (width - middle_width) // 2, middle_height, middle_width)
    found, drawn = fits.any(1), (top, left, tall, wide)
    return torch.stack([torch.where(found, one, other) for one, other in zip(drawn, middle, strict=True)], 1)


def apply_views(pixels: Tensor, size: int, parameters: ViewParameters) -> Tensor:
    """Float (B, 3, H, W) in 0..1 -> (B, 3, size, size) in 0..1."""
    height, width = pixels.shape[2:]
    rows, columns = _crop_lines(parameters.box, parameters.flip, height, width, size)
    return torch.stack(_coloured(_cropped(pixels, rows, columns), *parameters.colours()), 1).mT


class _Lines(NamedTuple):
    """What each place of a resized side is made of: numbers of lines, int64 (B, taps, size), and their shares."""

    numbers: Tensor
    shares: Tensor


def _crop_lines(box: Tensor, flip: Tensor, height: int, width: int, size: int) -> tuple[_Lines, _Lines]:
    """The rows and columns that make crop, flip and scale together."""
    rows = _lines(box[:, 0], box[:, 2], height, size, torch.zeros_like(flip))
    return rows, _lines(box[:, 1], box[:, 3], width, size, flip)


def _lines(start: Tensor, length: Tensor, source: int, size: int, flip: Tensor) -> _Lines:
    """An antialiased bilinear resize of `length` of `source` lines from `start` on, in reverse where `flip`.

    How many lines make a place is a picture's own, so the largest number there can be is taken, and the rest weigh
    nothing. A product with the whole band matrix costs two to four times as much, compiled.
    """
    scale = (length / size)[:, None, None]
    reach = scale.clamp(min=1)
    places = torch.arange(size, device=start.device) + 0.5
    centres = torch.where(flip[:, None], size - places, places)[:, None, :] * scale
    taps = torch.arange(math.ceil(2 * max(1, source / size)), device=start.device)
    near = (centres - reach + 0.5).floor() + taps[:, None]  # (B, taps, size), numbers within the crop
    shares = (1 - ((near + 0.5 - centres) / reach).abs()).clamp(min=0) * ((near >= 0) & (near < length[:, None, None]))
    numbers = (near + start[:, None, None]).long().clamp(0, source - 1)
    return _Lines(numbers, shares / shares.sum(1, keepdim=True))


def _cropped(pixels: Tensor, rows: _Lines, columns: _Lines) -> Tensor:
    """(B, 3, H, W) -> (B, 3, S, S), columns first: what is read is always lines that lie in a row in memory, and
    turning the picture back at the end would cost as much as a resampling."""
    half = _resampled(pixels.transpose(1, 2), rows)
    turned = torch.stack([half[:, :, channel].mT for channel in range(3)], 2)
    return _resampled(turned, columns).transpose(1, 2)


def _resampled(lines: Tensor, of: _Lines) -> Tensor:
    """(B, N, C, M) -> (B, size, C, M)."""
    batch = torch.arange(len(lines), device=lines.device)[:, None]
    shares = of.shares[..., None, None]
    total = shares[:, 0] * lines[batch, of.numbers[:, 0]]
    for tap in range(1, of.numbers.shape[1]):
        total = torch.addcmul(total, shares[:, tap], lines[batch, of.numbers[:, tap]])
    return total


_Planes = tuple[Tensor, Tensor, Tensor]  # red, green, blue, (B, S, S) each: apart, one sweep makes a blend and a mean


def _coloured(
    views: Tensor, factors: Tensor, order: Tensor, gray: Tensor, sigma: Tensor | None, solarize: Tensor | None
) -> _Planes:
    """All that follows the crop. (B, 3, S, S) in 0..1 -> the same as planes."""
    red, green, blue = views.unbind(1)
    planes = _jitter((red, green, blue), factors, order)
    luma = _luma(planes)
    red, green, blue = (torch.where(gray[:, None, None], luma, plane) for plane in planes)
    if sigma is not None:
        red, green, blue = _blur(torch.stack([red, green, blue], 1), sigma).unbind(1)
    if solarize is not None:
        inverted = solarize[:, None, None]
        red, green, blue = (torch.where(inverted & (x >= 0.5), 1 - x, x) for x in (red, green, blue))
    return red, green, blue


def _luma(planes: _Planes) -> Tensor:
    red, green, blue = planes
    return (_LUMA[0] * red).add(green, alpha=_LUMA[1]).add(blue, alpha=_LUMA[2])


def _jitter(planes: _Planes, factors: Tensor, order: Tensor) -> _Planes:
    """Brightness, contrast, saturation and hue, each picture in its own order.

    The first three blend a picture with black, with its mean grey and with its grey, and differ in nothing else. So
    what comes before the hue is up to three blends, then all hues are turned at once, then come the other blends: the
    one dear operation is computed once and not at four places.
    """
    place = torch.arange(4, device=order.device)
    of_hue = (order == _HUE).long().argmax(1, keepdim=True)
    before, after = (_blends(factors, order, active) for active in (place < of_hue, place > of_hue))
    for position in range(3):
        planes = _blend(planes, before[:, position])
    planes = _turn_hue(planes, factors[:, _HUE])
    for position in range(1, 4):
        planes = _blend(planes, after[:, position])
    return planes


def _clamped(values: Tensor) -> Tensor:
    """In 0..1, in place. As relu, for a maximum looks for NaN, which takes a vector unit three instructions."""
    return values.relu_().clamp_(max=1)


def _blends(factors: Tensor, order: Tensor, active: Tensor) -> Tensor:
    """(B, 4) each -> (B, 4, 3): at each position the shares of the picture, of its grey and of its mean grey."""
    kept = torch.where(active, factors.gather(1, order), 1.0)
    return torch.stack([kept, (1 - kept) * (order == _SATURATION), (1 - kept) * (order == _CONTRAST)], 2)


def _blend(planes: _Planes, shares: Tensor) -> _Planes:
    kept, of_gray, of_mean = shares[:, :, None, None].unbind(1)
    gray = _luma(planes)
    added = torch.addcmul(of_mean * gray.mean((1, 2), keepdim=True), of_gray, gray)
    red, green, blue = (_clamped(torch.addcmul(added, kept, plane)) for plane in planes)
    return red, green, blue


def _turn_hue(planes: _Planes, turns: Tensor) -> _Planes:
    """HSV with the hue moved by `turns` (B,) of the circle.

    A channel is V - V S max(0, min(k, 4 - k, 1)) with k = (n + 6 H) mod 6 and n = 5, 3, 1 for red, green and blue,
    which is HSV without its six cases.
    """
    red, green, blue = planes
    value, low = red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)
    chroma = value - low
    is_red, is_green = value == red, value == green
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    start = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)) + 6 * turns[:, None, None]
    sixth = start + difference / chroma.clamp(min=1e-12)

    def channel(n: float) -> Tensor:
        k = sixth + n
        k = k - 6 * (k * (1 / 6)).floor()  # several times as fast as a remainder, which becomes a call of fmod
        return value - chroma * _clamped(2 - (k - 2).abs())

    return channel(5), channel(3), channel(1)


def _blur(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of the views whose sigma is above 0; the kernel spans a tenth of the side, as SimCLR's does.

    Edges are mirrored. On a GPU rows and columns are sums of shifted pictures, which compile into a sweep each. On a
    CPU they are products with a band matrix, which at these sides cost less than that, and less than a convolution
    with a kernel for every picture.
    """
    size = views.shape[-1]
    radius = max(1, size // 20)
    offsets = torch.arange(-radius, radius + 1, device=views.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    blurred = _swept(views, kernel) if views.is_cuda else _multiplied(views, kernel, offsets)
    return torch.where((sigma > 0)[:, None, None, None], blurred, views)


def _swept(views: Tensor, kernel: Tensor) -> Tensor:
    """(B, 3, S, S), (B, 2 r + 1) -> the views blurred."""
    size, radius = views.shape[-1], kernel.shape[1] // 2
    for axis in (2, 3):
        sides = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        wide, total = F.pad(views, sides, mode="reflect"), torch.zeros_like(views)
        for tap, shares in enumerate(kernel[:, :, None, None, None].unbind(1)):
            total = torch.addcmul(total, shares, wide.narrow(axis, tap, size))
        views = total
    return views


def _multiplied(views: Tensor, kernel: Tensor, offsets: Tensor) -> Tensor:
    """The same."""
    size = views.shape[-1]
    source = torch.arange(size, device=views.device)[:, None] + offsets
    source = torch.where(source < 0, -source, torch.where(source >= size, 2 * size - 2 - source, source))
    band = torch.zeros(len(views), size, size, device=views.device, dtype=views.dtype)
    band = band.scatter_add(2, source.expand(len(views), -1, -1), kernel[:, None, :].expand(-1, size, -1))
    count, channels = views.shape[:2]
    # Channels side by side make one product a picture of three.
    half = band @ views.transpose(1, 2).reshape(count, size, channels * size)
    return (half.view(count, size * channels, size) @ band.mT).view(count, size, channels, size).transpose(1, 2)
