"""JPEGs decoded on a GPU by nvJPEG, those of several threads at once."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from PIL import Image
from torch import Tensor

from app.backends import choose_device
from app.images import reencode
from app.settings import Settings
from models.errors import CheckpointError
from models.torchvision import load_torchvision


class GpuDecoder:
    """Files -> pixels. Threads that come while others' files are decoded have theirs decoded together after that.

    decode: files, uint8 (N,) each -> pixels, uint8 (3, H, W) each; raises RuntimeError if one of them is beyond it.
    """

    def __init__(self, decode: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
        self._decode = decode
        self._waiting: list[tuple[Tensor, Future[Tensor | None]]] = []
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def __call__(self, data: bytes) -> Tensor | None:
        """uint8 (3, H, W), or None if nvJPEG cannot read it: another decoder says then what is wrong with it."""
        answer: Future[Tensor | None] = Future()
        with self._lock:
            self._waiting.append((torch.frombuffer(bytearray(data), dtype=torch.uint8), answer))
        with self._turn:  # who has it decodes what all have brought, so most find theirs done
            with self._lock:
                batch, self._waiting = self._waiting, []
            if batch:
                self._answer(batch)
        return answer.result()

    def _answer(self, batch: list[tuple[Tensor, Future[Tensor | None]]]) -> None:
        try:
            found = self._pixels([file for file, _ in batch])
            for (_, answer), pixels in zip(batch, found, strict=True):
                answer.set_result(pixels)
        except BaseException as error:  # nobody is left waiting
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)

    def _pixels(self, files: list[Tensor]) -> Sequence[Tensor | None]:
        try:
            return self._decode(files)
        except RuntimeError:  # that the GPU's memory is full is one, too
            if len(files) == 1:
                return [None]
        return [pixels for file in files for pixels in self._pixels([file])]


def decoder_of(settings: Settings) -> GpuDecoder | None:
    """What decodes JPEGs on the GPU, if the settings ask for it. Raises CheckpointError where it cannot."""
    return _nvjpeg(settings.device) if settings.jpeg_decoder == "nvjpeg" else None


@functools.cache
def _nvjpeg(name: str) -> GpuDecoder:
    device = choose_device(name)
    if device.type != "cuda":
        raise CheckpointError("JPEG_DECODER=nvjpeg needs a CUDA device; leave it out, or set DEVICE")
    load_torchvision()
    from torchvision.io import ImageReadMode, decode_jpeg

    decoder = GpuDecoder(lambda files: decode_jpeg(files, ImageReadMode.RGB, device))
    red = decoder(reencode(Image.new("RGB", (64, 48), (255, 0, 0)), 64))
    if red is None or red.shape != (3, 48, 64) or not _is_red(red):
        raise CheckpointError("JPEG_DECODER=nvjpeg: this torchvision cannot decode on the GPU; leave it out")
    return decoder


def _is_red(pixels: Tensor) -> bool:
    means = pixels.float().mean((1, 2)).cpu()
    return bool((means - torch.tensor([255.0, 0.0, 0.0])).abs().max() < 8)
