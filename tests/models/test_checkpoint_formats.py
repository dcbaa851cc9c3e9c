"""Checkpoint folders that earlier versions wrote: one of each architecture and format is kept here with what it gave.

A new format (models/checkpoint.py) adds its own archive, made by `keep` in the version that introduces it.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_clip, tiny_dalle

from models.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from models.vision import EncoderModel

ARCHIVES = Path(__file__).parent.parent / "formats"
PIXELS = torch.from_numpy(np.arange(3 * 32 * 32, dtype=np.int64).reshape(1, 3, 32, 32) * 37 % 256).to(torch.uint8)


@torch.inference_mode()
def gives(model: Any) -> list[float]:
    """A few numbers that everything a folder holds has a part in."""
    if model.architecture == "dalle":
        text = model.tokens_of(["a red star"])
        _, logits = model(text, torch.arange(16)[None])
        return logits[0, :4, 0].tolist() + gives(model.dvae)
    if model.architecture == "dvae":
        return model.decode(model.encode(PIXELS[:, :, :16, :16])).flatten()[:4].tolist()
    rows = model.encode_image(PIXELS)[0, :4].tolist()
    return rows + (model.encode_text(model.tokenizer(["a red star"]))[0, :4].tolist() if model.tokenizer else [])


def keep(place: Path) -> Path:
    """Write this version's archive."""
    torch.manual_seed(0)
    encoder = EncoderModel(image={"name": "conv", "image_size": 32, "channels": 8, "blocks": [1], "depth": 0})
    dalle = tiny_dalle()
    models = {"clip": tiny_clip(), "encoder": encoder.eval(), "dvae": dalle.dvae, "dalle": dalle}
    for name, model in models.items():
        save_checkpoint(model, place / name, provenance={"data": "none", "license": "Apache-2.0"}, dtype=torch.float16)
    gave = {name: gives(load_checkpoint(place / name)) for name in models}
    (place / "gave.json").write_text(json.dumps(gave))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for file in sorted(path for path in place.rglob("*") if path.is_file()):
            tar.add(file, file.relative_to(place).as_posix())
    archive = ARCHIVES / f"checkpoint-{FORMAT}.tar.xz"
    archive.write_bytes(lzma.compress(content.getvalue(), preset=9))
    return archive


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_folders_of_each_format(version: int, tmp_path: Path) -> None:
    with tarfile.open(ARCHIVES / f"checkpoint-{version}.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    for name, numbers in json.loads((tmp_path / "gave.json").read_text()).items():
        assert gives(load_checkpoint(tmp_path / name)) == pytest.approx(numbers, abs=1e-4), name
