"""The checkpoints that a fresh clone serves: small, measured, and as good as their card says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.__main__ import main as semblance
from models.checkpoint import load_checkpoint
from models.generation import Sampling, generate_image
from training.figures import evaluate_data
from training.scenes import BACKGROUNDS, COLOURS

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
IMAGE_ENCODERS = ("byol", "moco", "simclr")


def test_everything_together_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 41_000_000
    assert sum(file.stat().st_size for file in (DEMO / "dalle").iterdir()) <= 16_000_000
    assert (DEMO / "clip" / "model.safetensors").stat().st_size <= 12_000_000


@pytest.mark.parametrize("name", IMAGE_ENCODERS)
def test_an_image_encoder_is_smaller_still(name: str) -> None:
    assert sum(file.stat().st_size for file in (DEMO / name).iterdir()) <= 3_000_000


def _again(checkpoint: str, data: str, root: str | None, rel: float | None = None) -> None:
    """Measures a data set once more and holds the card to it; a processor without bfloat16 rounds otherwise."""
    model = load_checkpoint(DEMO / checkpoint)
    figures, card = evaluate_data(model, data, root), model.provenance["metrics"]
    assert figures
    for figure, value in figures.items():
        assert card[figure] == pytest.approx(value, rel=rel, abs=0.01), figure
        assert f"| {figure} |" in (DEMO / checkpoint / "README.md").read_text()


def test_the_card_holds_on_scenes() -> None:
    _again("clip", "scenes", None)


@pytest.mark.data
@pytest.mark.parametrize("name", ["emoji", "grocery", "usda", "openclipart"])
def test_the_card_holds_on_real_pictures(name: str, data: Path) -> None:
    _again("clip", name, str(data))


@pytest.mark.data
@pytest.mark.parametrize("checkpoint", IMAGE_ENCODERS)
def test_an_image_encoders_card_holds(checkpoint: str, data: Path) -> None:
    _again(checkpoint, "grocery", str(data))


@pytest.mark.data
def test_the_generators_card_holds(data: Path) -> None:
    _again("dalle", "emoji", str(data), rel=0.01)
    card = load_checkpoint(DEMO / "dalle").provenance["metrics"]
    assert {"scenes_oracle_one", "scenes_oracle_two", "scenes_oracle_reranked_two", "emoji_clip_score"} <= card.keys()
    assert card["scenes_oracle_one"] >= 0.9
    assert card["scenes_oracle_two"] >= 0.6
    assert card["scenes_oracle_reranked_one"] > card["scenes_oracle_one"]
    assert card["scenes_oracle_reranked_two"] > card["scenes_oracle_two"]


def test_the_generator_draws_what_it_is_asked_for() -> None:
    """Colour, place and ground of eight pictures each: a large square fills a third of the half that it is in."""
    model = load_checkpoint(DEMO / "dalle")
    colours, grounds = ("red", "green", "blue", "white"), ("navy", "mint", "gray", "maroon")
    prompts = [
        f"a large {c} square on the left on a plain {g} background" for c, g in zip(colours, grounds, strict=True)
    ]
    pictures = generate_image(model, prompts, n=8, seed=0, sampling=Sampling(guidance_scale=3.0))
    right = 0
    for number, picture in enumerate(pictures):
        pixels = np.asarray(picture, np.float64)
        near = [
            np.abs(pixels - asked).max(-1) < 45
            for asked in (COLOURS[colours[number // 8]], BACKGROUNDS[grounds[number // 8]])
        ]
        right += near[0][:, :32].mean() > 0.2 and near[0][:, 40:].mean() < 0.02 and near[1][:, 40:].mean() > 0.9
    assert right >= 29, f"{right} of {len(pictures)}"


@pytest.mark.parametrize("checkpoint", ["clip", "dalle", *IMAGE_ENCODERS])
def test_the_card_names_licences_command_and_hardware(checkpoint: str) -> None:
    provenance = load_checkpoint(DEMO / checkpoint).provenance
    for key in ("license", "command", "hardware", "data"):
        assert provenance[key]
    assert "MIT" in provenance["license"]
    assert "cifar" not in str(provenance).lower()  # nobody has licensed those pictures


def test_a_red_star_is_found_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--checkpoints", str(DEMO), "--data", str(tmp_path), "--threads", "2"]
    assert semblance(["index", str(DEMO / "scenes.tar.gz"), *place]) == 0
    capsys.readouterr()
    assert semblance(["search", "a red star", "--json", *place]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    shown = ["red star" in hit["caption"] for hit in hits]
    assert all(shown[:5])
    assert sum(shown) >= 7  # of the fourteen that the collection has


@pytest.mark.parametrize("name", IMAGE_ENCODERS)
def test_a_picture_finds_its_like(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--checkpoints", str(DEMO), "--data", str(tmp_path / "data"), "--threads", "2"]
    shutil.unpack_archive(DEMO / "scenes.tar.gz", tmp_path / "scenes", filter="data")
    wanted = sorted((tmp_path / "scenes").rglob("*.jpg"))[7]
    with Image.open(wanted) as picture:
        width, height = picture.size
        picture.crop((1, 1, width - 2, height)).resize((90, 90)).save(tmp_path / "query.png")
    assert semblance(["index", str(DEMO / "scenes.tar.gz"), "--collection", "mine", "--embedder", name, *place]) == 0
    capsys.readouterr()
    query = str(tmp_path / "query.png")
    assert semblance(["search", query, "--image", "--collection", "mine", "--json", *place]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert hits[0]["id"].startswith(wanted.stem)
    assert semblance(["embed", query, "--image", "--embedder", name, *place]) == 0
    row = torch.tensor(json.loads(capsys.readouterr().out)["embedding"])
    assert row.shape == (load_checkpoint(DEMO / name).embed_dim,)
    assert row.norm() == pytest.approx(1, abs=1e-4)
