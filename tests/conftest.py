"""What several tests need: small models made here, pictures, and the folder of real data."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_clip

from models.checkpoint import save_checkpoint

# A shell starts what it puts into the background with Ctrl-C ignored, and all that is started from there with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint, `clip`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(tiny_clip(), folder / "clip", provenance={"data": "none", "metrics": {"r1": 0.25}})
    return folder


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Makes a picture: smooth, so that it survives JPEG, and different for every seed."""

    def make(seed: int = 0, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (4, 4, len(mode)), dtype=np.uint8).squeeze()
        return Image.fromarray(small, mode=None).resize(size, Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def encoded(picture: Callable[..., Image.Image]) -> Callable[..., bytes]:
    """Makes a picture's file: its bytes in a format."""

    def make(seed: int = 0, format: str = "JPEG", size: tuple[int, int] = (48, 40), **options: object) -> bytes:
        out = io.BytesIO()
        picture(seed, size).save(out, format, **options)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def data() -> Path:
    """The real pictures. Tests that need them fail without, unless SEMBLANCE_DATA says in so many words: none."""
    root = os.environ.get("SEMBLANCE_DATA", "../shared/data")
    if root == "none":
        pytest.skip("SEMBLANCE_DATA=none: the tests on real pictures were left out on purpose")
    assert Path(root).is_dir(), "set SEMBLANCE_DATA to the folder of the data sets, or to `none` to leave them out"
    return Path(root)
