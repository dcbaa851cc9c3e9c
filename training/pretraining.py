"""What the self-supervised methods share: options, and the run from data sets to a checkpoint of the encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.readers import BadRows
from models.vision import EncoderModel
from training.analysis import picture_sheet
from training.data import ArraySource, PictureBatches
from training.distributed import world_size
from training.figures import nearest_of_source
from training.heads import ProjectedEncoder
from training.method import Batch, Method, discover, option
from training.options import EncoderOptions
from training.pictures import open_source
from training.run import batch_options, open_data, run_training, starting_model
from training.trainer import TrainerConfig
from training.views import Recipe, ViewTransform


@dataclass(frozen=True)
class PretrainingOptions(EncoderOptions):
    """Options of every method that learns from views of pictures without labels."""

    held_size: int = option(
        0, "side at which pictures are held, 0: a quarter above image_size, so that crops are sharp", least=0
    )
    hidden_dim: int = option(0, "width of the heads' hidden layers, 0: that of the features", least=0)
    projection_dim: int = option(128, "length of the projections that the loss sees", least=1)
    crop: float | None = option(
        None, "smallest share of the area that a view may show (default: the recipe's)", above=0, most=1
    )
    colour: float = option(1.0, "how much of the recipe's colour changes is taken", least=0)
    blur: float | None = option(None, "probability of a blur (default: the recipe's)", least=0, most=1)

    def recipes(self, *recipes: Recipe) -> tuple[Recipe, ...]:
        """A method's recipes as these options change them."""
        changes: dict[str, Any] = {}
        if self.crop is not None:
            changes["crop"] = (self.crop, 1.0)
        if self.blur is not None:
            changes["blur"] = self.blur
        return tuple(replace(recipe.scaled(self.colour), **changes) for recipe in recipes)


# What the methods' `cifar10` presets have in common: half an hour on two cores. A ResNet-18 sees an eighth as many
# pictures in that time: 81 a second and 663, in SimCLR steps of 256 with AVX512-BF16.
CIFAR10: dict[str, Any] = {
    "data": ("cifar10",),
    "encoder_options": {"channels": 64, "blocks": [1, 1, 1], "depth": 0, "stem_stride": 1},
    "image_size": 32,
    "held_size": 32,
    "batch_size": 256,
    "chunk": 256,
    "trainer": TrainerConfig(steps=8000, lr=2e-3, warmup=400, weight_decay=0.05, time_limit=1800, threads=2),
}

# For one GPU: the recipe of lightly's benchmarks (SGD, no clipping), compiled.
CIFAR10_GPU: dict[str, Any] = {
    "data": ("cifar10",),
    "encoder": "resnet18",
    "image_size": 32,
    "held_size": 32,
    "batch_size": 512,
    "chunk": 512,
    "trainer": TrainerConfig(
        steps=60_000, lr=0.24, warmup=200, optimizer="sgd", weight_decay=5e-4, clip_norm=0.0, compile=True, workers=4,
        log_every=200, save_every=0, time_limit=600,
    ),
}  # fmt: skip

# On two cores, the `demo` presets: pictures whose licences allow a checkpoint to be given away, and a small one.
DEMO: dict[str, Any] = {
    "data": ("emoji=2", "openclipart=2", "usda=1", "grocery=1.5", "crawl=0.5", "caltech101=1.5"),
    "encoder_options": {"channels": 48, "blocks": [1, 1, 1], "depth": 0, "fine_blocks": 1},
    "batch_size": 256,
    "chunk": 32,
    "trainer": TrainerConfig(
        steps=8000, lr=2e-3, warmup=400, weight_decay=0.05, ema_decay=0.999, time_limit=1200, threads=2
    ),
}


class ViewMethod(Method):
    """A method over views: `prepare` draws them, `online` learns, and its encoder is what is kept."""

    exported = "online.encoder"

    def __init__(self, online: ProjectedEncoder, transform: ViewTransform) -> None:
        """online: around an EncoderModel."""
        super().__init__()
        self.online = online
        self.transform = transform

    @property
    def model(self) -> EncoderModel:
        """The encoder."""
        return self.online.encoder  # type: ignore[return-value]

    def prepare(self, batch: Batch) -> Batch:
        """{"images": uint8 (B, 3, H, W)} -> {"views": float (V, B, 3, S, S)}."""
        return {"views": self.transform(batch["images"])}


def pretrain(name: str, options: PretrainingOptions, build: Callable[[EncoderModel], ViewMethod]) -> Path:
    """Train the method that `build` makes around an encoder, and write the encoder's checkpoint folder.

    Raises DataError, CheckpointError, DivergedError or ValueError with the way out.
    """
    if options.batch_size < 2 * world_size():
        raise ValueError(
            f"--batch-size {options.batch_size}: every process needs two pictures at least, for a batch's statistics"
        )
    torch.manual_seed(options.trainer.seed)
    model = starting_model(options, EncoderModel)
    if model is None:
        model = EncoderModel(
            image={"name": options.encoder, "image_size": options.image_size, **options.encoder_options},
            truncatable=options.matryoshka,
        )
    size = model.preprocess.size
    method = build(model)
    data = open_data(options, side=options.held_size or size * 5 // 4, captioned=False)
    batches = PictureBatches(data.sources, data.weights, size=data.side, **batch_options(options))
    labelled = next((s for s in data.sources if isinstance(s, ArraySource) and s.labels), None)
    evaluate = None if labelled is None else lambda trained: nearest_of_source(trained, labelled)
    return run_training(name, options, method, batches, data, evaluate)


def views_sheet(
    method: str,
    data: str,
    out: str | Path,
    *,
    data_root: str | None = None,
    image_size: int = 96,
    count: int = 8,
    draws: int = 4,
    seed: int = 0,
) -> Path:
    """A contact sheet: each row has a picture and `draws` pairs of the views that a method would learn from."""
    held = image_size * 5 // 4
    source, weight = open_source(data, held, BadRows(), data_root, captioned=False)
    batch = PictureBatches([source], [weight], size=held, batch_size=count, steps=1, chunk=count, seed=seed)[0]
    transform = discover()[method].Transform(image_size, generator=torch.Generator().manual_seed(seed))
    drawn = [view for _ in range(draws) for view in transform.views(batch["images"])]
    pixels = torch.stack([view.mul(255).round().byte() for view in drawn], 1)
    small = torch.nn.functional.interpolate(batch["images"].float(), image_size, mode="bilinear", antialias=True)
    rows = torch.cat([small.round().byte()[:, None], pixels], 1)
    return picture_sheet(list(rows), out, side=image_size)
