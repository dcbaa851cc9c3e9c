"""The only place that opens pictures: rows 1 to 9 of the reliability table, by pixel."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from support import png_header, png_of

from app.images import FORMATS, Limits, decode, decode_mask, media_type, reencode, thumbnail
from models.errors import ImageError, MediaTypeError, TooLargeError

LIMITS = Limits()
Encoded = Callable[..., bytes]


def _bytes(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_that_is_promised(encoded: Encoded, format: str) -> None:
    image = decode(encoded(1, format), LIMITS)
    assert (image.mode, image.size) == ("RGB", (48, 40))
    assert media_type(encoded(1, format)) == f"image/{format.lower()}"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_row_1_truncated(encoded: Encoded, format: str, share: float) -> None:
    content = encoded(1, format, size=(200, 200))
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(content[: int(len(content) * share)], LIMITS)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"<html>hello</html>", b"plain text"])
def test_row_2_no_picture(content: bytes) -> None:
    with pytest.raises(MediaTypeError, match="JPEG, PNG") as caught:
        decode(content, LIMITS)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("size", [(50_000, 50_000), (12_000, 12_000), (9_000, 9_000), (1, 60_000), (1_000_000, 1)])
def test_row_3_bombs_are_refused_before_any_pixel(size: tuple[int, int]) -> None:
    content = png_header(*size)
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="pixels"):
        decode(content, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_row_3_too_many_bytes(encoded: Encoded) -> None:
    with pytest.raises(TooLargeError, match="at most 10 are read"):
        decode(encoded(), Limits(max_bytes=10))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_row_4_thin_pictures(encoded: Encoded, size: tuple[int, int]) -> None:
    assert decode(encoded(1, "PNG", size=size), LIMITS).size == size
    assert decode(encoded(1, "PNG", size=size), LIMITS, target=32).size == size


def test_row_5_other_formats() -> None:
    image = Image.new("RGB", (8, 8))
    foreign = [_bytes(image, format) for format in ("TIFF", "ICO", "EPS", "JPEG2000", "PPM", "TGA")]
    foreign += [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"SIMPLE  =   T"]
    for content in foreign:
        with pytest.raises(MediaTypeError):
            decode(content, LIMITS)


def test_row_6_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for format in ("GIF", "WEBP", "PNG"):
        content = _bytes(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(content, LIMITS).getpixel((4, 4)) == (255, 0, 0)
    mpo = _bytes(frames[0].resize((64, 64)), "MPO", save_all=True, append_images=[frames[1].resize((64, 64))])
    red, green, blue = decode(mpo, LIMITS).getpixel((4, 4))  # type: ignore[misc]
    assert (red > 240, green < 15, blue < 15) == (True, True, True)


def test_row_7_cmyk_and_16_bits() -> None:
    cmyk = decode(_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), LIMITS)
    assert np.abs(np.asarray(cmyk)[8, 8].astype(int) - [254, 0, 0]).max() <= 6
    ramp = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    deep = decode(_bytes(Image.fromarray(ramp), "PNG"), LIMITS)
    assert np.asarray(deep)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_row_7_orientation(orientation: int) -> None:
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).convert("RGB")
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in undo.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(_bytes(stored, "PNG", exif=exif), LIMITS)), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_row_7_transparency_is_white_and_hides_its_colour(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        content = _bytes(image, "PNG", transparency=1)
    else:
        content = _bytes(Image.new(mode, (8, 8), (200, 0, 0, 0) if mode == "RGBA" else (0, 0)), "PNG")
    assert np.asarray(decode(content, LIMITS)).min() == 255
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert abs(int(np.asarray(decode(_bytes(half, "PNG"), LIMITS))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(
    ("bits", "kind", "levels"),
    [
        (1, 0, [1]),
        (2, 0, [2]),
        (4, 0, [7]),
        (8, 0, [10]),
        (16, 0, [0x1234]),
        (8, 2, [10, 20, 30]),
        (16, 2, [0x1234, 0x5678, 0x9ABC]),
        (16, 2, [18, 18, 18]),
    ],
)
def test_row_7_a_colour_that_a_png_has_as_transparent(bits: int, kind: int, levels: list[int]) -> None:
    other = [level ^ 1 << max(0, bits - 8) for level in levels]  # differs in what is left of it in 8 bits
    packed = [sum(level << bits * place for place, level in enumerate((row * 8)[::-1])) for row in (levels, other)]
    body = b"".join(b"\0" + row.to_bytes(bits * len(levels)) for row in packed)
    header, colour = struct.pack(">IIBBBBB", 8, 2, bits, kind, 0, 0, 0), struct.pack(f">{len(levels)}H", *levels)
    content = png_of(IHDR=header, tRNS=colour, IDAT=zlib.compress(body))
    pixels, opaque = (
        np.asarray(decode(each, LIMITS)) for each in (content, png_of(IHDR=header, IDAT=zlib.compress(body)))
    )
    assert pixels[0].min() == 255
    assert np.array_equal(pixels[1], opaque[1])
    alpha = np.asarray(decode_mask(content, LIMITS))[..., 3]
    assert (alpha == [[0] * 8, [255] * 8]).all()


def test_row_8_hostile_metadata(encoded: Encoded) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 100_000_000, zip=True)
    content = _bytes(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)
    with suppress(ImageError):  # either answer will do, a crash or a wait will not
        decode(content, LIMITS)
    decode(_bytes(Image.new("RGB", (8, 8)), "JPEG", icc_profile=b"no profile at all"), LIMITS)


def test_row_9_polyglots_lose_what_is_not_picture(encoded: Encoded) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("payload.html", "<script>alert(1)</script>")
    image = decode(encoded(1) + archive.getvalue(), LIMITS)
    clean = reencode(image, 1024)
    assert b"payload" not in clean
    assert not zipfile.is_zipfile(io.BytesIO(clean))


def test_reduced_decoding_is_close_and_never_below_twice_the_target(encoded: Encoded) -> None:
    for format in ("JPEG", "PNG"):
        content = encoded(1, format, size=(1200, 900))
        small, full = decode(content, LIMITS, target=64), decode(content, LIMITS)
        assert 128 <= min(small.size) < 400
        assert full.size == (1200, 900)
        difference = np.asarray(small.resize((64, 64)), int) - np.asarray(full.resize((64, 64)), int)
        assert np.abs(difference).mean() < 2


def test_thumbnails_keep_the_aspect(encoded: Encoded) -> None:
    assert Image.open(io.BytesIO(thumbnail(encoded(1, size=(600, 300)), 100, LIMITS))).size == (100, 50)
    assert Image.open(io.BytesIO(thumbnail(encoded(1, size=(60, 30)), 100, LIMITS))).size == (60, 30)
