"""The oracle: a small detector that reads a scene back into its key, to judge pictures that a generator drew.

It is trained on renders alone, some of them blurred and noised as image tokenizers do, and never sees a generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.errors import CheckpointError
from models.preprocess import Preprocess
from models.vision import ResidualBlock
from training import scenes
from training.data import resized
from training.method import Batch, Losses, Method
from training.trainer import Trainer, TrainerConfig

SIDE, GRID = 64, 16  # of the pictures it reads, in pixels, and of its maps, in cells
LAYERS = 2  # outer objects, then all others: an object and what lies inside it share their centre
_OUTER = scenes.SIZES.index("outer")
_SHAPES, _COLOURS = len(scenes.SHAPES), len(scenes.COLOURS)
CONFIG = TrainerConfig(steps=3000, lr=2e-3, warmup=100, weight_decay=0.05, ema_decay=0.998, save_every=0)


@dataclass(frozen=True)
class Reading:
    """What a picture shows, as a SceneKey has it: kind (an index into KINDS), shapes and colours of its one to three
    objects, slot by slot. None is what no arrangement is."""

    kind: int | None
    shapes: tuple[int, ...]
    colours: tuple[int, ...]


class SceneReader(nn.Module):
    """uint8 or normalised (B, 3, 64, 64) -> maps (B, layers, 1 + shapes + colours, 16, 16): centre, shape, colour."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(inplace=True),
            ResidualBlock(width // 2, width // 2),
            ResidualBlock(width // 2, width, 2),
            ResidualBlock(width, width),
        )
        self.coarse = nn.Sequential(
            ResidualBlock(width, 2 * width, 2), ResidualBlock(2 * width, 2 * width), ResidualBlock(2 * width, 2 * width)
        )
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Sequential(ResidualBlock(width, width), nn.Conv2d(width, LAYERS * (1 + _SHAPES + _COLOURS), 1))
        nn.init.constant_(self.head[1].bias[:: 1 + _SHAPES + _COLOURS], -4.0)  # type: ignore[index]
        self.preprocess = Preprocess(size=SIDE)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.preprocess.normalize(images))
        wide = F.interpolate(self.merge(self.coarse(fine)), scale_factor=2.0, mode="nearest")
        return self.head(fine + wide).unflatten(1, (LAYERS, -1))

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[Reading]:
        """uint8 (B, 3, S, S), of any side -> what each shows."""
        found: list[Reading] = []
        for part in resized(images, SIDE).split(256):
            maps = self(part.to(self.merge.weight.device)).float().cpu()
            # One peak an object: cells beside its centre are free to have one too, and centres of a layer are at least
            # four cells apart. As logits, for sure ones are all 1 as probabilities.
            centres = maps[:, :, 0]
            peaks = (centres > 0) & (centres == F.max_pool2d(centres, 7, 1, 3))
            shapes, colours = (x.argmax(2) for x in maps[:, :, 1:].split([_SHAPES, _COLOURS], 2))
            for row in range(len(part)):
                layer, y, x = peaks[row].nonzero().unbind(1)
                places = (row, layer, y, x)
                objects = zip(*(v.tolist() for v in (layer, y, x, shapes[places], colours[places])), strict=True)
                found.append(_arranged([_Object(*each) for each in objects]))
        return found


@dataclass(frozen=True)
class _Object:
    layer: int
    y: int
    x: int
    shape: int
    colour: int


def _arranged(objects: list[_Object]) -> Reading:
    """The objects in the order of the slots of their arrangement."""
    kind = _kind(objects)
    if kind in ("beside", "row"):
        objects = sorted(objects, key=lambda each: each.x)
    elif kind in ("stacked", "column"):
        objects = sorted(objects, key=lambda each: each.y)
    elif kind == "inside":
        objects = sorted(objects, key=lambda each: each.layer)
    shapes, colours = tuple(each.shape for each in objects), tuple(each.colour for each in objects)
    return Reading(None if kind is None else scenes.KINDS.index(kind), shapes, colours)


def _kind(objects: Sequence[_Object]) -> str | None:
    if not 1 <= len(objects) <= 3:
        return None
    if len(objects) == 1:
        return "single"
    across, along = np.ptp([each.x for each in objects]), np.ptp([each.y for each in objects])
    if len(objects) == 3:
        return "row" if across > along else "column"
    if {each.layer for each in objects} == {0, 1} and max(across, along) <= 2:
        return "inside"
    return "beside" if across > along else "stacked"


def scene_figures(reader: SceneReader, images: Tensor, key: scenes.SceneKey) -> dict[str, float]:
    """Share of pictures that show what their key says: every object's colour and shape, and the relation between them.

    images: uint8 (N, 3, S, S). -> "all", and "one", "two" and "three" for pictures of so many objects.
    """
    return shares_right(read_right(reader, images, key), key)


def read_right(reader: SceneReader, images: Tensor, key: scenes.SceneKey) -> np.ndarray:
    """Which pictures, uint8 (N, 3, S, S), show what their key says: bool (N,)."""
    return np.array([reading == wanted(key, row) for row, reading in enumerate(reader.read(images))])


def shares_right(right: np.ndarray, key: scenes.SceneKey) -> dict[str, float]:
    """The figures of `scene_figures`, of what was read already."""
    counts = scenes.COUNTS[key.kind]
    figures = {"all": float(right.mean())}
    for count, name in ((1, "one"), (2, "two"), (3, "three")):
        if (counts == count).any():
            figures[name] = float(right[counts == count].mean())
    return figures


def wanted(key: scenes.SceneKey, row: int) -> Reading:
    """What a reader should see in a scene."""
    count = int(scenes.COUNTS[key.kind[row]])
    shapes, colours = (tuple(int(v) for v in values[row, :count]) for values in (key.shapes, key.colours))
    return Reading(int(key.kind[row]), shapes, colours)


class OracleMethod(Method):
    """batch {"images", "objects", "colours", "shapes"} -> {"loss"}. objects: int64 (B, 3, 3), the layer, row and column
    of each, -1 where a slot is not used."""

    def __init__(self, model: SceneReader) -> None:
        super().__init__()
        self.model = model

    def prepare(self, batch: Batch) -> Batch:
        return batch | {"images": _spoiled(batch["images"])}

    def forward(self, batch: Batch) -> Losses:
        pixels = self.model.preprocess.standardize(batch["images"]).contiguous(memory_format=torch.channels_last)
        maps = self.model(pixels).float()
        row, slot = (batch["objects"][..., 0] >= 0).nonzero().unbind(1)
        layer, y, x = batch["objects"][row, slot].unbind(1)
        centre, weight = torch.zeros_like(maps[:, :, 0]), torch.ones_like(maps[:, :, 0])
        losses = {"shape": maps.new_zeros(()), "colour": maps.new_zeros(())}
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                # A peak may fall a cell beside the centre: its neighbours are no mistakes, and know shape and colour.
                near = (row, layer, (y + dy).clamp(0, GRID - 1), (x + dx).clamp(0, GRID - 1))
                weight[near] = 0
                shape, colour = maps[near[0], near[1], 1:, near[2], near[3]].split([_SHAPES, _COLOURS], 1)
                losses["shape"] = losses["shape"] + F.cross_entropy(shape, batch["shapes"][row, slot]) / 9
                losses["colour"] = losses["colour"] + F.cross_entropy(colour, batch["colours"][row, slot]) / 9
        centre[row, layer, y, x] = weight[row, layer, y, x] = 1
        found = F.binary_cross_entropy_with_logits(maps[:, :, 0], centre, weight, reduction="sum") / len(row)
        return {"loss": found + losses["shape"] + losses["colour"], "centre": found, **losses}


def _spoiled(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) -> float in 0..1; half of them blurred by way of a smaller side, half with more noise."""
    pixels = images.float() / 255
    smaller = F.interpolate(pixels, scale_factor=0.5, mode="area")
    blurred = F.interpolate(smaller, pixels.shape[-2:], mode="bicubic").clamp(0, 1)
    chance = torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device)
    pixels = torch.where(chance[0] < 0.5, blurred, pixels)
    noise = torch.randn_like(pixels) * 0.06 * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
    return torch.where(chance[1] < 0.5, (pixels + noise).clamp(0, 1), pixels)


class _Renders(Dataset[Batch]):
    """Scenes with any pair of colour and shape, drawn afresh for every step."""

    def __init__(self, steps: int, batch_size: int, seed: int) -> None:
        self.steps, self.batch_size, self.seed = steps, batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        drawn = scenes.sample(
            self.batch_size, size=SIDE, seed=2_000_003 + self.seed * 1_000_003 + step, holdout="any", captions=0
        )
        key = drawn.key
        used = torch.from_numpy(key.shapes >= 0)
        cells = torch.from_numpy(np.nan_to_num(key.positions) * GRID).long().clamp(0, GRID - 1)
        layer = torch.from_numpy((key.sizes != _OUTER).astype(np.int64))
        objects = torch.stack([layer, cells[..., 1], cells[..., 0]], 2)
        objects = torch.where(used[..., None], objects, -1)
        shapes, colours = (torch.from_numpy(v.astype(np.int64)) for v in (key.shapes, key.colours))
        return {"images": drawn.images, "objects": objects, "shapes": shapes, "colours": colours}


def train_oracle(
    out: str | Path = "runs/oracle", *, config: TrainerConfig = CONFIG, batch_size: int = 128, width: int = 48
) -> Path:
    """Train a reader and keep its weights in `out`/oracle.safetensors; the log has its share of scenes read right.

    -> that file. Raises DivergedError.
    """
    torch.manual_seed(config.seed)

    def evaluate(model: Any) -> dict[str, float]:
        drawn = scenes.sample(1000, size=SIDE, seed=3_000_003 + config.seed, holdout="any", captions=0)
        return scene_figures(model, drawn.images, drawn.key)

    data = _Renders(config.steps, batch_size, config.seed)
    trained = Trainer(OracleMethod(SceneReader(width)), data, config, Path(out), evaluate=evaluate).fit()
    file = Path(out) / "oracle.safetensors"
    save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, file)
    return file


def load_oracle(file: str | Path) -> SceneReader:
    """The reader that `train_oracle` kept. Raises CheckpointError for anything else."""
    try:
        weights = load_file(file)
        reader = SceneReader(len(weights["merge.weight"]))
        reader.load_state_dict(weights)
    except Exception as error:
        raise CheckpointError(f"{file} holds no oracle; train one with `semblance-train oracle`") from error
    return reader.eval()
