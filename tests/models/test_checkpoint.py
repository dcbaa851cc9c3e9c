"""Checkpoint folders: what is written is what is read, and nothing damaged, foreign or newer is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from support import tiny_clip

from models.checkpoint import load_checkpoint, load_model, save_checkpoint
from models.errors import CheckpointError


def _change(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tiny_clip(), tmp_path / "clip", provenance={"seed": 3, "metrics": {"r1": 0.5}})


def test_round_trip_is_exact(folder: Path) -> None:
    model, loaded = tiny_clip(), load_checkpoint(folder)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer(["a red star", "two hearts", "ünïcode ✓"])
    assert torch.equal(loaded.tokenizer(["a red star", "two hearts", "ünïcode ✓"]), tokens)
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
    assert loaded.preprocess == model.preprocess
    assert not loaded.training


def test_half_precision_halves_the_file_and_keeps_the_embedding(tmp_path: Path, folder: Path) -> None:
    model = tiny_clip()
    half = save_checkpoint(model, tmp_path / "half", dtype=torch.float16)
    sizes = [(place / "model.safetensors").stat().st_size for place in (half, folder)]
    assert sizes[0] < 0.6 * sizes[1]
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    cosines = (load_checkpoint(half).encode_image(images) * model.encode_image(images)).sum(-1)
    assert cosines.min() > 0.999


def test_fingerprint_tells_weights_and_preprocess_apart_and_survives_a_copy(tmp_path: Path, folder: Path) -> None:
    same = save_checkpoint(tiny_clip(), tmp_path / "renamed", provenance={"seed": 4})
    other = save_checkpoint(tiny_clip(seed=1), tmp_path / "other")
    model = tiny_clip()
    model.preprocess = type(model.preprocess)(size=32, resize="squash")
    squashed = save_checkpoint(model, tmp_path / "squashed")
    prints = [load_checkpoint(place).fingerprint for place in (folder, same, other, squashed)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_model_card_carries_the_figures(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "| r1 | 0.5 |" in card
    assert "seed: 3" in card


def test_replacing_a_folder_leaves_no_rest(folder: Path) -> None:
    save_checkpoint(tiny_clip(seed=1), folder)
    assert [entry.name for entry in folder.parent.iterdir()] == ["clip"]
    expected = tiny_clip(seed=1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_checkpoint(folder).state_dict().items())


def test_every_damaged_byte_is_noticed(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 40)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            load_checkpoint(folder)
    file.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="copy the folder again"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, this version reads up to 1: upgrade"),
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"architecture": "os.system"}, "known: clip"),
        ({"config": {"image": {}, "text": {}, "depth": 3}}, "depth"),
        ({"preprocess": {"size": 32, "zoom": 2}}, "zoom"),
        ({"files": {"../../etc/passwd": "0"}}, "lists other files"),
        ({"files": {}}, "lists other files"),
        ({"format": "one"}, "no format number"),
    ],
)
def test_changed_configs_are_refused_by_name(folder: Path, changes: dict[str, object], message: str) -> None:
    _change(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_weights_of_other_shapes_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    _change(folder, config=config["config"] | {"embed_dim": 12})
    with pytest.raises(CheckpointError, match="do not fit architecture 'clip'"):
        load_checkpoint(folder)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"weights\.pt would have to be unpickled"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "exploded").exists()


def test_missing_folder_and_truncated_config(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        load_checkpoint(tmp_path / "absent")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(folder)


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path, folder: Path) -> None:
    """A folder of pictures that is named by mistake keeps them."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    save_checkpoint(load_checkpoint(folder), pictures)  # empty: nothing is lost
    save_checkpoint(load_checkpoint(folder), pictures)
    (pictures / "config.json").write_text("{}")
    for place in (pictures, pictures / "config.json"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match="is no checkpoint folder: name another"):
            save_checkpoint(load_checkpoint(folder), place)
        assert sorted(tmp_path.rglob("*")) == before
