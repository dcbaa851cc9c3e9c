"""JPEGs decoded on a GPU: which are, and in what batches. Pillow stands in for nvJPEG."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from support import problem, wait_for
from torch import Tensor

import app.nvjpeg
from app import images, service
from app.images import Limits
from app.loading import load_engine
from app.nvjpeg import GpuDecoder, decoder_of
from app.settings import Settings
from models.errors import CheckpointError, ImageError, TooLargeError
from models.preprocess import Preprocess
from models.torchvision import load_torchvision

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS).resize((90, 60), Image.Resampling.BICUBIC)


def _file(picture: Image.Image = PICTURE, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _file(exif=exif)


class StandIn:
    """Decodes as torchvision's decode_jpeg, and notes how many at once; a file of zeros is beyond it."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, files: Sequence[Tensor], *_: Any) -> list[Tensor]:
        self.batches.append(len(files))
        assert self.may_go.wait(5)
        if any(not file.any() for file in files):
            raise RuntimeError("nvjpegDecode failed")
        pictures = [Image.open(io.BytesIO(file.numpy().tobytes())).convert("RGB") for file in files]
        return [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in pictures]


def test_threads_that_come_meanwhile_are_decoded_together_and_a_bad_file_alone_fails() -> None:
    nvjpeg = StandIn()
    decoder, good = GpuDecoder(nvjpeg), _file()
    nvjpeg.may_go.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(decoder, good)
        wait_for(lambda: nvjpeg.batches)
        others = [pool.submit(decoder, each) for each in (good, bytes(9), good)]
        wait_for(lambda: len(decoder._waiting) == 3)
        nvjpeg.may_go.set()
        found = [each.result(5) for each in (first, *others)]
    assert nvjpeg.batches == [1, 3, 1, 1, 1]
    assert [each is None for each in found] == [False, False, True, False]
    assert torch.equal(found[0], found[3])  # type: ignore[arg-type]


def test_plain_jpegs_are_decoded_there_and_others_by_pillow() -> None:
    nvjpeg = StandIn()
    gpu = GpuDecoder(nvjpeg)
    pixels = images.pixels(_file(), Limits(), 8, gpu)
    assert isinstance(pixels, Tensor)
    assert pixels.shape == (3, 60, 90)
    assert isinstance(images.pixels(_file(progressive=True), Limits(), 8, gpu), Tensor)
    assert isinstance(images.pixels(_file(), Limits(), 8), Image.Image)
    nvjpeg.batches.clear()
    grey, cmyk = PICTURE.convert("L"), PICTURE.convert("CMYK")
    for data in (_file(kind="PNG"), _turned(), _file(grey), _file(cmyk), _file() + b"more"):
        assert isinstance(images.pixels(data, Limits(), 8, gpu), Image.Image)
    with pytest.raises(ImageError):
        images.pixels(_file()[:-200], Limits(), 8, gpu)
    for limits in (Limits(max_pixels=100), Limits(max_bytes=100)):
        with pytest.raises(TooLargeError):
            images.pixels(_file(), limits, 8, gpu)
    assert not nvjpeg.batches


def test_what_nvjpeg_cannot_decode_is_pillows() -> None:
    def fails(files: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("out of memory")

    assert isinstance(images.pixels(_file(), Limits(), 8, GpuDecoder(fails)), Image.Image)


def test_an_error_of_another_kind_reaches_everyone() -> None:
    began, may_go = threading.Event(), threading.Event()

    def fails(files: list[Tensor]) -> list[Tensor]:
        began.set()
        assert may_go.wait(5)
        raise ValueError("a mistake")

    decoder = GpuDecoder(fails)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(decoder, _file())
        assert began.wait(5)
        others = [pool.submit(decoder, _file()) for _ in range(2)]
        may_go.set()
        for each in (first, *others):
            assert isinstance(each.exception(5), ValueError)


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (33, 33), (5, 7)])
def test_pixels_are_made_ready_as_pictures_are(resize: Any, size: tuple[int, int]) -> None:
    preprocess, picture = Preprocess(size=32, resize=resize), PICTURE.resize(size)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(preprocess(pixels), preprocess(picture))


def test_a_server_embeds_what_was_decoded_there_beside_what_was_not(
    start: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvjpeg = StandIn()
    gpu = GpuDecoder(nvjpeg)
    monkeypatch.setattr(service, "decoder_of", lambda settings: gpu)
    inputs = [{"image": base64.b64encode(each).decode()} for each in (_file(), _file(kind="PNG"), _file(quality=30))]

    def vectors(client: TestClient, sent: list[dict[str, str]]) -> np.ndarray:
        answer = client.post("/embed", json={"input": sent})
        assert answer.status_code == 200, answer.text
        return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)

    client = start(jpeg_decoder="nvjpeg")
    found = vectors(client, inputs)
    assert sum(nvjpeg.batches) == 2
    monkeypatch.setattr(service, "decoder_of", lambda settings: None)
    assert (found * vectors(client, inputs)).sum(1).min() > 0.999
    monkeypatch.setattr(service, "decoder_of", lambda settings: gpu)
    cut = base64.b64encode(_file()[:-200]).decode()
    answer = client.post("/embed", json={"input": [*inputs, {"image": cut}]})
    assert problem(answer, 422, "damaged or incomplete")["input"] == 3
    nvjpeg.batches.clear()
    client.put("/collections/default", json={})
    answer = client.post("/collections/default/items", json={"items": [inputs[0]]})
    assert answer.status_code == 200, answer.text
    assert sum(nvjpeg.batches) == 1  # what is stored is Pillow's


def test_it_needs_a_gpu_and_a_torchvision_that_can(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(jpeg_decoder="nvjpeg", device="cpu")
    with pytest.raises(CheckpointError, match="needs a CUDA device"):
        load_engine("clip", str(checkpoints / "clip"), settings)
    load_torchvision()
    from torchvision import io as torchvision_io

    def fails(*_: Any) -> list[Tensor]:
        raise RuntimeError("built without nvJPEG")

    monkeypatch.setattr(app.nvjpeg, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torchvision_io, "decode_jpeg", StandIn())
    try:
        assert decoder_of(settings) is decoder_of(settings)
        app.nvjpeg._nvjpeg.cache_clear()
        for wrong in (lambda files, *_: [torch.zeros(3, 48, 64)], fails):
            monkeypatch.setattr(torchvision_io, "decode_jpeg", wrong)
            with pytest.raises(CheckpointError, match="cannot decode on the GPU"):
                decoder_of(settings)
    finally:
        app.nvjpeg._nvjpeg.cache_clear()
    assert decoder_of(Settings()) is None
