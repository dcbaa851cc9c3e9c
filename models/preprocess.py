"""The one evaluation-time image transform, the same for indexing, queries and measuring."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Preprocess:
    """Picture -> uint8 tensor, and uint8 batch -> normalised float batch.

    size: side of the square in pixels. resize: "crop" scales the shorter side and crops the centre (CLIP), "pad" scales
    the longer side and centres it on `fill` (nothing is cut off), "squash" ignores the aspect. mean, std: of pixels in
    0..1.
    """

    size: int = 64
    resize: Literal["crop", "pad", "squash"] = "pad"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    fill: int = 255

    def __post_init__(self) -> None:
        if self.resize not in ("crop", "pad", "squash") or self.interpolation not in _INTERPOLATIONS or self.size < 1:
            raise ValueError(
                f"size {self.size}, resize {self.resize!r}, interpolation {self.interpolation!r}: the size must be at "
                "least 1, resize crop, pad or squash, interpolation bicubic or bilinear"
            )

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """One picture of any size and mode, or uint8 (3, H, W) -> uint8 (3, size, size), on the pixels' device.

        Transparency is laid on `fill`.
        """
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(flatten_alpha(image, self.fill))).permute(2, 0, 1)
        pixels, (height, width) = image, image.shape[1:]
        if self.resize == "squash" or width == height:
            return self._scaled(pixels, self.size, self.size).contiguous()
        scale = self.size / (min(width, height) if self.resize == "crop" else max(width, height))
        # torchvision's Resize truncates the longer side, CenterCrop rounds its offset, and open_clip rounds the shorter
        # side when it keeps the whole picture; so do we, for parity.
        whole = int if self.resize == "crop" else round
        width, height = (max(1, whole(side * scale)) for side in (width, height))
        if self.resize == "crop":
            # The shorter side is `size` by definition, whatever the product was rounded to.
            width, height = (
                (self.size, max(self.size, height)) if width < height else (max(self.size, width), self.size)
            )
            left, top = (round((side - self.size) / 2) for side in (width, height))
            scaled = self._scaled(pixels, width, height)
            return scaled[:, top : top + self.size, left : left + self.size].contiguous()
        canvas = torch.full((3, self.size, self.size), self.fill, dtype=torch.uint8, device=pixels.device)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        canvas[:, top : top + height, left : left + width] = self._scaled(pixels, width, height)
        return canvas

    def _scaled(self, pixels: Tensor, width: int, height: int) -> Tensor:
        """uint8 (3, H, W) -> uint8 (3, height, width); Pillow's filters, by torch in a quarter of Pillow's time."""
        if pixels.shape[1:] == (height, width):
            return pixels
        if pixels.is_cuda:  # which filters floats alone
            scaled = F.interpolate(pixels[None].float(), (height, width), mode=self.interpolation, antialias=True)[0]
            return scaled.round_().clamp_(0, 255).to(torch.uint8)
        return F.interpolate(pixels[None], (height, width), mode=self.interpolation, antialias=True)[0]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float (B, 3, H, W), (x / 255 - mean) / std; a float batch is taken as normalised."""
        return images if images.is_floating_point() else self.standardize(images.float() / 255)

    def standardize(self, pixels: Tensor) -> Tensor:
        """Float (B, 3, H, W) in 0..1 -> (x - mean) / std."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        scale = torch.tensor([1 / std for std in self.std], device=pixels.device).view(3, 1, 1)
        return (pixels - mean) * scale

    def to_config(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocess:
        """From the values of a checkpoint; raises TypeError for an unknown key."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
        return cls(**values)


def flatten_alpha(image: Image.Image, fill: int = 255) -> Image.Image:
    """RGB, with anything transparent laid on the grey value `fill`."""
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (fill, fill, fill, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def orientation(source: Image.Image) -> int:
    """How a picture lies, as its EXIF says: 1 is upright."""
    try:
        found = source.getexif().get(_ORIENTATION, 1)
    except Exception:  # a picture with a damaged EXIF block is still a picture
        return 1
    return found if found in _TURNS else 1


def upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """`image`, which was made of `source`, turned as the EXIF orientation of `source` says."""
    turn = _TURNS.get(orientation(source))
    return image if turn is None else image.transpose(turn)
