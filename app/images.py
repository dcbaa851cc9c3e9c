"""Bytes -> safe decoded pixels: the only place that opens an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from models.errors import ImageError, MediaTypeError, TooLargeError
from models.preprocess import orientation, upright

_END = b"\xff\xd9"  # of a JPEG
# What Pillow multiplies the levels of a PNG's pixels by, by how they lie in the file.
_SCALES = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP")


@dataclass(frozen=True)
class Limits:
    """What one picture may cost: bytes of its file, pixels in all, pixels a side."""

    max_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    max_side: int = 16_384


def decode(data: bytes, limits: Limits, target: int | None = None) -> Image.Image:
    """The first frame as upright RGB: alpha on white, 16 bits scaled to 8.

    With `target` the picture may come back smaller, its shorter side at least twice `target` pixels, which costs
    a fraction of a full decode and leaves the resize to `target` something to average over.

    Raises:
        MediaTypeError: not one of the formats that are read. ImageError: one of them, but broken.
        TooLargeError: more bytes or pixels than the limits allow; found before any pixel is decoded.
    """
    return _decoded(data, limits, lambda image: _shrunk(_to_rgb(image), target), target)


def pixels(
    data: bytes, limits: Limits, target: int, gpu: Callable[[bytes], Tensor | None] | None = None
) -> Image.Image | Tensor:
    """What a model of `target` pixels a side is given: as `decode`, or uint8 (3, H, W) where a plain JPEG can be
    decoded by `gpu` (app/nvjpeg.py). Raises what `decode` raises."""
    found = gpu(data) if gpu is not None and _is_plain_jpeg(data, limits) else None
    return decode(data, limits, target) if found is None else found


def decode_mask(data: bytes, limits: Limits) -> Image.Image:
    """The first frame as upright RGBA, for what is asked of its transparency. Raises what `decode` raises."""
    return _decoded(data, limits, lambda image: image.convert("RGBA"))


def _decoded(
    data: bytes, limits: Limits, convert: Callable[[Image.Image], Image.Image], target: int | None = None
) -> Image.Image:
    if len(data) > limits.max_bytes:
        raise TooLargeError(f"the picture has {len(data):,} bytes, at most {limits.max_bytes:,} are read")
    with _open(data) as image:
        _check_pixels(image.size, limits)
        try:
            if target is not None:
                image.draft(None, (2 * target, 2 * target))
            _scale_transparency(image)
            image.load()
            return upright(convert(_in_eight_bits(image)), image)
        except Exception as error:  # decoders raise nearly anything for hostile bytes
            raise ImageError(f"the picture cannot be decoded ({image.format}): it is damaged or incomplete") from error


def reencode(image: Image.Image, longest: int) -> bytes:
    """RGB pixels -> a JPEG that holds nothing else; the longer side is at most `longest` pixels."""
    if max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = BytesIO()
    # Small pictures are drawings more often than photos, and full colour resolution costs them little.
    image.save(out, "JPEG", quality=90, subsampling="4:4:4" if max(image.size) <= 256 else "4:2:0")
    return out.getvalue()


def png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """A picture that was made here -> a PNG with texts in it, such as what it was made from."""
    info, out = PngInfo(), BytesIO()
    for key, value in texts.items():
        info.add_itxt(key, value)
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def thumbnail(data: bytes, size: int, limits: Limits) -> bytes:
    """A stored picture's bytes -> a JPEG whose longer side is at most `size` pixels. Raises what `decode` raises."""
    return reencode(decode(data, limits), size)


def media_type(data: bytes) -> str | None:
    """The media type the first bytes claim, or None if they are no picture that is read."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "image/gif"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "image/avif"
    return "image/bmp" if data.startswith(b"BM") else None


def _open(data: bytes) -> ImageFile.ImageFile:
    claimed = media_type(data)
    if claimed is None:
        raise MediaTypeError(f"not a picture that is read; send one of {', '.join(FORMATS)}")
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError("the picture has more pixels than are read") from error
    except Exception as error:  # as in decode
        raise ImageError(f"the picture cannot be decoded ({claimed}): it is damaged or incomplete") from error


def _is_plain_jpeg(data: bytes, limits: Limits) -> bool:
    """Whether it is within the limits, upright, whole and in the colours that every decoder takes it to be in."""
    if media_type(data) != "image/jpeg" or len(data) > limits.max_bytes or not data.endswith(_END):
        return False
    with _open(data) as image:
        _check_pixels(image.size, limits)
        colours = image.format == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
        return colours and orientation(image) == 1


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise TooLargeError(
            f"the picture is {width} x {height} pixels; at most {limits.max_pixels:,} in all "
            f"and {limits.max_side:,} a side are read"
        )


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Scale a PNG's transparent colour, which Pillow leaves as it is, as the pixels that it compares with it; those of
    16-bit RGB are the upper 8 bits. Before the pixels are loaded."""
    colour = image.info.get("transparency")
    scale = _SCALES.get(str(image.tile[0][3])) if image.format == "PNG" else None
    if scale and isinstance(colour, tuple):
        image.info["transparency"] = tuple(int(scale * level) for level in colour)
    elif scale and colour is not None:
        image.info["transparency"] = int(scale * colour)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, which Pillow would clip to 255 -> 8, with alpha where a level is transparent; others stay."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64).clip(0, 65535)
    scaled = Image.fromarray((levels // 257).astype(np.uint8))
    if (level := image.info.get("transparency")) is not None:
        scaled.putalpha(Image.fromarray(np.where(levels == level, 0, 255).astype(np.uint8)))
    return scaled


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB. Hidden colours under alpha never show: they are blended onto white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image.convert("RGB")


def _shrunk(image: Image.Image, target: int | None) -> Image.Image:
    """Box-average by a whole factor while the shorter side stays >= 2 x target: what draft does for JPEG."""
    factor = 1 if target is None else min(image.size) // (2 * target)
    return image.reduce(factor) if factor > 1 else image
