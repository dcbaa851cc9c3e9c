"""Figures of features against their definitions, maps and sheets as files, fine-tuning on few labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.checkpoint import save_checkpoint
from models.errors import DataError
from models.vision import EncoderModel
from training.__main__ import main
from training.analysis import analyze_features, neighbour_sheet, project_features, visualize_features
from training.evaluation import fine_tuning_evaluation


def _clusters(each: int = 20, size: int = 8) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(size)[:3] * 3
    rows = torch.cat([centre + 0.3 * torch.randn(each, size, generator=generator) for centre in centres])
    return rows, [name for name in ("ant", "bee", "cow") for _ in range(each)]


def test_figures_are_their_definitions() -> None:
    rows, labels = _clusters(6)
    found = analyze_features(rows, labels, k=3)
    unit = F.normalize(rows.double(), dim=-1)
    pairs = [(i, j) for i in range(18) for j in range(18) if i != j]
    distances = {pair: float((unit[pair[0]] - unit[pair[1]]).square().sum()) for pair in pairs}
    uniformity = math.log(sum(math.exp(-2 * d) for d in distances.values()) / len(pairs))
    assert found["uniformity"] == pytest.approx(uniformity, abs=1e-5)
    alike = [d for (i, j), d in distances.items() if labels[i] == labels[j]]
    assert found["alignment"] == pytest.approx(sum(alike) / len(alike), abs=1e-5)
    near = {i: sorted((j for j in range(18) if j != i), key=lambda j: distances[i, j])[:3] for i in range(18)}
    counts = torch.tensor([sum(i in found_by for found_by in near.values()) for i in range(18)], dtype=torch.float64)
    skewness = ((counts - counts.mean()) ** 3).mean() / counts.std(unbiased=False) ** 3
    assert found["hubness"] == pytest.approx(float(skewness), abs=1e-4)
    assert found["never_found"] == pytest.approx(float((counts == 0).double().mean()))
    ants = [1 - d / 2 for (i, j), d in distances.items() if labels[i] == labels[j] == "ant"]
    assert found["classes"]["ant"]["cohesion"] == pytest.approx(sum(ants) / len(ants), abs=1e-5)
    bees = [1 - d / 2 for (i, j), d in distances.items() if (labels[i], labels[j]) == ("ant", "bee")]
    cows = [1 - d / 2 for (i, j), d in distances.items() if (labels[i], labels[j]) == ("ant", "cow")]
    means = {"bee": sum(bees) / len(bees), "cow": sum(cows) / len(cows)}
    nearest = max(means, key=lambda name: means[name])
    assert found["classes"]["ant"]["nearest_class"] == nearest
    assert found["classes"]["ant"]["separation"] == pytest.approx(means[nearest], abs=1e-5)


def test_positives_are_other_views() -> None:
    rows, _ = _clusters()
    assert analyze_features(rows, positives=2 * rows)["alignment"] == pytest.approx(0, abs=1e-9)
    assert analyze_features(rows, positives=-rows)["alignment"] == pytest.approx(4, abs=1e-5)


def test_few_dimensions_are_told_from_many() -> None:
    generator = torch.Generator().manual_seed(0)
    wide, flat = torch.randn(500, 16, generator=generator), torch.randn(500, 16, generator=generator)
    flat[:, 3:] *= 0.001
    assert analyze_features(wide)["effective_dimensions"] > 14
    assert analyze_features(flat)["effective_dimensions"] < 3.1
    assert analyze_features(wide)["uniformity"] < analyze_features(flat)["uniformity"]
    with pytest.raises(DataError, match="too few"):
        analyze_features(wide[:2])


def test_maps_keep_classes_together_and_are_the_same_again(tmp_path: Path) -> None:
    rows, labels = _clusters()
    for method in ("pca", "tsne"):
        places = torch.from_numpy(project_features(rows, method))  # type: ignore[arg-type]
        assert places.shape == (60, 2)
        assert torch.equal(places, torch.from_numpy(project_features(rows, method)))  # type: ignore[arg-type]
        centres = torch.stack([places[start : start + 20].mean(0) for start in (0, 20, 40)])
        choice = torch.cdist(places, centres).argmin(1)
        assert float((choice == torch.arange(3).repeat_interleave(20)).float().mean()) > 0.9
    with pytest.raises(ValueError, match="choose pca, tsne or umap"):
        project_features(rows, "lda")  # type: ignore[arg-type]
    with Image.open(visualize_features(rows, labels, out=tmp_path / "map.png")) as picture:
        assert picture.size[0] > 500
    page = visualize_features(rows, labels, out=tmp_path / "map.html").read_text()
    assert "ant" in page
    assert "<script src=" not in page  # it works without a network


@pytest.mark.filterwarnings("ignore")  # numba's and umap's own
def test_umap_keeps_classes_together() -> None:
    rows, _ = _clusters()
    places = torch.from_numpy(project_features(rows, "umap"))
    centres = torch.stack([places[start : start + 20].mean(0) for start in (0, 20, 40)])
    assert float((torch.cdist(places, centres).argmin(1) == torch.arange(3).repeat_interleave(20)).float().mean()) > 0.9


def test_neighbour_sheets_show_the_query_first(tmp_path: Path) -> None:
    images = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    images[:6, 0], images[6:, 2] = 255, 255
    features = F.one_hot(torch.arange(12) // 6, 2).float()
    with Image.open(neighbour_sheet(features, images, tmp_path / "sheet.png", queries=12, k=5)) as file:
        sheet = file.copy()
    for row in range(12):
        colours = {sheet.getpixel((4 + place * 100 + 48, row * 100 + 4 + 48)) for place in range(6)}
        assert len(colours) == 1


def test_fine_tuning_takes_a_share_of_each_class() -> None:
    images = torch.zeros(60, 3, 16, 16, dtype=torch.uint8)
    labels = torch.arange(60) % 3
    for label in range(3):
        images[labels == label, label] = 200
    torch.manual_seed(0)
    encoder = EncoderModel(image={"name": "conv", "image_size": 16, "channels": 8, "blocks": [1], "depth": 0})
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = fine_tuning_evaluation(encoder, images, labels, images, labels, share=0.2, epochs=60, batch_size=6, lr=0.01)
    assert found == {"accuracy": 1.0, "labels": 12.0}
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert fine_tuning_evaluation(encoder, images, labels, images, labels, share=0.001, epochs=1)["labels"] == 3


def test_analysis_and_contact_sheets_from_the_command_line(
    tmp_path: Path, encoded: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(12):
        folder = tmp_path / "photos" / ("cats" if index % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(encoded(index))
    model = EncoderModel(image={"name": "conv", "image_size": 16, "channels": 8, "blocks": [1], "depth": 0})
    save_checkpoint(model, tmp_path / "model")
    out = tmp_path / "analysis"
    assert main(["analyze", f"{tmp_path}/model", "--data", f"{tmp_path}/photos", "--out", str(out)]) == 0
    assert set(json.loads((out / "analysis.json").read_text())["classes"]) == {"cats", "dogs"}
    assert {file.name for file in out.iterdir()} == {"analysis.json", "pca.png", "pca.html", "neighbours.png"}
    sheet = str(tmp_path / "views.png")
    for method in ("simclr", "moco", "byol", "vicreg"):
        arguments = ["views", method, "--data", f"{tmp_path}/photos", "--out", sheet, "--image-size", "48"]
        assert main([*arguments, "--count", "3", "--draws", "2"]) == 0
        with Image.open(sheet) as picture:
            assert picture.size == (5 * 52 + 4, 3 * 52 + 4)
    assert "views.png" in capsys.readouterr().out
