"""The checkpoints that a fresh clone serves: small, measured, and as good as their card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.__main__ import main as semblance
from models.checkpoint import load_checkpoint
from training.figures import evaluate_data

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"


def test_everything_together_is_small() -> None:
    sizes = [file.stat().st_size for file in DEMO.rglob("*") if file.is_file()]
    assert sum(sizes) <= 25_000_000
    assert (DEMO / "clip" / "model.safetensors").stat().st_size <= 12_000_000


def _again(name: str, root: str | None) -> None:
    """Measures a data set once more and holds the card to it; a processor without bfloat16 rounds otherwise."""
    model = load_checkpoint(DEMO / "clip")
    figures, card = evaluate_data(model, name, root), model.provenance["metrics"]
    assert figures
    for figure, value in figures.items():
        assert card[figure] == pytest.approx(value, abs=0.01), figure
        assert f"| {figure} |" in (DEMO / "clip" / "README.md").read_text()


def test_the_card_holds_on_scenes() -> None:
    _again("scenes", None)


@pytest.mark.data
@pytest.mark.parametrize("name", ["emoji", "grocery", "usda", "openclipart"])
def test_the_card_holds_on_real_pictures(name: str, data: Path) -> None:
    _again(name, str(data))


def test_the_card_names_licences_command_and_hardware() -> None:
    provenance = load_checkpoint(DEMO / "clip").provenance
    for key in ("license", "command", "hardware", "data"):
        assert provenance[key]
    assert "MIT" in provenance["license"]


def test_a_red_star_is_found_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--checkpoints", str(DEMO), "--data", str(tmp_path), "--threads", "2"]
    assert semblance(["index", str(DEMO / "scenes.tar.gz"), *place]) == 0
    capsys.readouterr()
    assert semblance(["search", "a red star", "--json", *place]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    shown = ["red star" in hit["caption"] for hit in hits]
    assert all(shown[:5])
    assert sum(shown) >= 7  # of the fourteen that the collection has
