"""The random views that self-supervised methods compare, in batches, on the device the batch is on.

Every picture has its own parameters. They are sampled first (`sample_views`) and applied after (`apply_views`), so that
a draw can be replayed, and so that the application has neither branches nor random numbers and compiles whole.
Given the same parameters, each operation equals torchvision's on float pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from models.preprocess import Preprocess

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rounding of Rec. 601
_TRIES = 10  # crops that are drawn before the largest one in the middle is taken, as torchvision does
_PIXELS_AT_ONCE = 2**16  # of views; in float32 the three channels are 768 KiB
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
    and saturation, and the turn of the hue. order: (B, 4) which of these four comes first to last. gray, solarize: (B,)
    bool. sigma: (B,) of the blur in pixels of the view, 0 for none.
    """

    box: Tensor
    flip: Tensor
    factors: Tensor
    order: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor

    def __getitem__(self, rows: slice) -> ViewParameters:
        return ViewParameters(*(getattr(self, field.name)[rows] for field in fields(self)))


class ViewTransform:
    """uint8 (B, 3 or 4, H, W) -> one normalised float view (B, 3, size, size) a recipe; a fourth channel is opacity.

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
        self._apply = torch.compile(apply_views, dynamic=False) if compile else apply_views

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.preprocess.standardize(view) for view in self.views(images))

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        """The views as float (B, 3, size, size) in 0..1, to look at."""
        pixels = on_white(images)
        height, width = pixels.shape[-2:]
        draws = (
            sample_views(len(images), height, width, recipe, self.generator, images.device) for recipe in self.recipes
        )
        return tuple(self._in_parts(pixels, drawn) for drawn in draws)

    def _in_parts(self, pixels: Tensor, drawn: ViewParameters) -> Tensor:
        """Apply what was drawn; on a CPU to as many pictures at a time as its caches hold between two operations, which
        is two to three times as fast as to 512 at once."""
        part = max(4, _PIXELS_AT_ONCE // self.size**2) if pixels.device.type == "cpu" else len(pixels)
        starts = range(0, max(1, len(pixels)), part)
        parts = [self._apply(pixels[at : at + part], self.size, drawn[at : at + part]) for at in starts]
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def on_white(images: Tensor) -> Tensor:
    """uint8 (B, 3 or 4, H, W) -> float (B, 3, H, W) in 0..1, transparency on white."""
    pixels = images.float() / 255
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
        sigma=chance(recipe.blur) * uniform(*recipe.sigma),
        solarize=chance(recipe.solarize),
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
    middle = top.new_tensor([(height - middle_height) // 2, (width - middle_width) // 2, middle_height, middle_width])
    return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, tall, wide], 1), middle)


def apply_views(pixels: Tensor, size: int, parameters: ViewParameters) -> Tensor:
    """Float (B, 3, H, W) in 0..1 -> (B, 3, size, size) in 0..1."""
    p = parameters
    rows = _resampling(p.box[:, 0], p.box[:, 2], pixels.shape[2], size)
    columns = _resampling(p.box[:, 1], p.box[:, 3], pixels.shape[3], size)
    columns = torch.where(p.flip[:, None, None], columns.flip(1), columns)
    views = _between(rows, pixels, columns).clamp(0, 1)  # crop, flip and scale together
    views = _jitter(views, p.factors, p.order)
    views = torch.where(p.gray[:, None, None, None], _luma(views), views)
    views = _blur(views, p.sigma)
    return torch.where(p.solarize[:, None, None, None] & (views >= 0.5), 1 - views, views)


def _between(left: Tensor, pixels: Tensor, right: Tensor) -> Tensor:
    """left (B, S, H) times each channel of pixels (B, 3, H, W) times right (B, S, W) transposed -> (B, 3, S, S)."""
    count, channels, height, width = pixels.shape
    size = left.shape[1]
    # Channels side by side make one product a picture of three.
    half = left @ pixels.transpose(1, 2).reshape(count, height, channels * width)
    whole = half.view(count, size * channels, width) @ right.mT
    return whole.view(count, size, channels, size).transpose(1, 2).contiguous()


def _resampling(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights (B, size, source) of an antialiased bilinear resize of `length` pixels from `start` on."""
    scale = (length / size)[:, None, None]
    places = torch.arange(source, device=start.device)[None, None, :]
    inside = places - start[:, None, None]  # the pixel's number within the crop
    centres = (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    weights = (1 - ((inside + 0.5 - centres) / scale.clamp(min=1)).abs()).clamp(min=0)
    weights = weights * ((inside >= 0) & (inside < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def _luma(views: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 1, S, S)."""
    red, green, blue = views.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def _jitter(views: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each picture in its own order.

    The first three blend a picture with black, with its mean grey and with its grey, and differ in nothing else. So
    what comes before the hue is up to three blends, then all hues are turned at once, then come the other blends: the
    one dear operation is computed once and not at four places.
    """
    place = order.argsort(1)  # of each change, 0 to 3
    for position in range(3):
        views = _blend(views, factors, order[:, position], position < place[:, _HUE])
    views = _turn_hue(views, factors[:, _HUE])
    for position in range(1, 4):
        views = _blend(views, factors, order[:, position], position > place[:, _HUE])
    return views


def _blend(views: Tensor, factors: Tensor, kinds: Tensor, active: Tensor) -> Tensor:
    """factor * picture + (1 - factor) * black, mean grey or grey, by each picture's kind. kinds, active: (B,)."""
    factor = factors.gather(1, kinds[:, None])
    factor = torch.where(active[:, None], factor, 1.0)[..., None, None]
    kind = kinds[:, None, None, None]
    gray = _luma(views)
    target = torch.where(kind == _SATURATION, gray, (kind == _CONTRAST) * gray.mean((2, 3), keepdim=True))
    return (factor * views + (1 - factor) * target).clamp(0, 1)


def _turn_hue(views: Tensor, turns: Tensor) -> Tensor:
    """HSV with the hue moved by `turns` (B,) of the circle.

    A channel is V - V S max(0, min(k, 4 - k, 1)) with k = (n + 6 H) mod 6 and n = 5, 3, 1 for red, green and blue,
    which is HSV without its six cases.
    """
    red, green, blue = views.unbind(1)
    value, low = views.amax(1), views.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sixth[:, None] + 6 * turns[:, None, None, None]
    k = torch.remainder(hue + hue.new_tensor([5.0, 3.0, 1.0])[None, :, None, None], 6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of the views whose sigma is above 0; the kernel spans a tenth of the side, as SimCLR's does.

    Edges are mirrored. Rows and columns are products with a band matrix, which at these sides costs less than a
    convolution with a kernel for every picture.
    """
    size = views.shape[-1]
    radius = max(1, size // 20)
    offsets = torch.arange(-radius, radius + 1, device=views.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = torch.arange(size, device=views.device)[:, None] + offsets
    source = torch.where(source < 0, -source, torch.where(source >= size, 2 * size - 2 - source, source))
    band = torch.zeros(len(views), size, size, device=views.device, dtype=views.dtype)
    band = band.scatter_add(2, source.expand(len(views), -1, -1), kernel[:, None, :].expand(-1, size, -1))
    return torch.where((sigma > 0)[:, None, None, None], _between(band, views, band), views)
