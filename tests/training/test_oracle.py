"""The oracle that reads scenes: how it arranges what it finds, how it learns, and what it says of a generator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny_clip, tiny_dalle
from torch import Tensor

from models.errors import CheckpointError
from training import scenes
from training.__main__ import main
from training.oracle import (
    CONFIG,
    GRID,
    OracleMethod,
    SceneReader,
    load_oracle,
    scene_figures,
    train_oracle,
    wanted,
)
from training.oracle import _Renders as Renders
from training.reconstruction import oracle_figures


class _Certain(SceneReader):
    """A reader whose maps say what a key says, whatever the pixels are. beside: cells on either side of a centre that
    are as sure of it, or surer."""

    def __init__(self, key: scenes.SceneKey, beside: int = 0) -> None:
        super().__init__(8)
        self.key, self.beside = key, beside

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.full((len(images), 2, 21, GRID, GRID), -5.0)
        for row, slot in zip(*np.nonzero(self.key.shapes >= 0), strict=True):
            x, y = (self.key.positions[row, slot] * GRID).astype(int)
            layer = int(scenes.SIZES[self.key.sizes[row, slot]] != "outer")
            for away in range(-self.beside, self.beside + 1):
                cell = (row, layer, slice(None), y, min(max(x + away, 0), GRID - 1))
                maps[cell][0] = 5 + 40 * abs(away) + away  # as a probability in float32, 1 on either side
                maps[cell][1 + self.key.shapes[row, slot]] = 5
                maps[cell][11 + self.key.colours[row, slot]] = 5
        return maps


def test_objects_are_arranged_as_the_key_has_them() -> None:
    drawn = scenes.sample(250, size=8, seed=3, holdout="any", captions=0)
    reader = _Certain(drawn.key)
    readings = reader.read(drawn.images)
    assert readings == [wanted(drawn.key, row) for row in range(250)]
    assert scene_figures(reader, drawn.images, drawn.key) == {"all": 1, "one": 1, "two": 1, "three": 1}
    exchanged = drawn.key.take(np.arange(250))
    exchanged.colours[:, [0, 1]] = exchanged.colours[:, [1, 0]]
    alike = float((exchanged.colours[:, 0] == exchanged.colours[:, 1]).mean())
    assert scene_figures(reader, drawn.images, exchanged)["all"] == pytest.approx(alike)


def test_an_object_that_several_cells_are_sure_of_is_one_object() -> None:
    """Training leaves the cells beside a centre free to be peaks, and a trained reader has such."""
    drawn = scenes.sample(250, size=8, seed=3, holdout="any", captions=0)
    assert _Certain(drawn.key, beside=1).read(drawn.images) == [wanted(drawn.key, row) for row in range(250)]


def test_a_picture_without_objects_is_no_scene() -> None:
    empty = scenes.sample(1, size=8, seed=0, captions=0).key
    empty.shapes[:] = -1
    (reading,) = _Certain(empty).read(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert (reading.kind, reading.shapes, reading.colours) == (None, (), ())


def test_a_few_scenes_are_read_after_overfitting() -> None:
    torch.manual_seed(0)
    method = OracleMethod(SceneReader(16))
    optimizer = torch.optim.AdamW(method.parameters(), 5e-3)
    batch = Renders(1, 12, 0)[0]
    key = scenes.sample(12, size=64, seed=2_000_003, holdout="any", captions=0).key
    assert scene_figures(method.model.eval(), batch["images"], key)["all"] < 0.2
    method.train()
    for _ in range(120):
        loss = method(method.prepare(batch))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert scene_figures(method.model.eval(), batch["images"], key)["all"] >= 0.8  # which ones differs by processor


def test_a_reader_is_kept_and_judges_a_generator(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=2, warmup=1, precision="fp32", device="cpu", threads=1, log_every=1)
    reader = load_oracle(train_oracle(tmp_path, config=config, batch_size=8, width=8))
    assert not reader.training
    drawn = scenes.sample(6, size=16, seed=1, holdout="any", captions=0)
    figures = oracle_figures(tiny_dalle(), reader, drawn, tiny_clip(), samples=2)
    assert {"scenes_oracle_all", "scenes_oracle_one", "scenes_oracle_reranked_all"} <= figures.keys()
    assert all(0 <= value <= 1 for value in figures.values())
    assert "scenes_oracle_reranked_all" not in oracle_figures(tiny_dalle(), reader, drawn)


def test_what_is_no_oracle_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="semblance-train oracle"):
        load_oracle(tmp_path / "other")
    assert main(["evaluate", "open_clip:x", "--oracle", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err
