"""BYOL: bootstrap your own latent (arXiv:2006.07733).

from training.methods.byol import train_byol
folder = train_byol(data=["./photos"], encoder="resnet18", image_size=96, out="checkpoints/byol")
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision import EncoderModel
from training.data import ArraySource
from training.ema import cosine_decay, update_ema
from training.figures import evaluate_model
from training.heads import ProjectedEncoder, mlp
from training.losses import wide
from training.method import Batch, Losses, option
from training.pretraining import CIFAR10, CIFAR10_GPU, DEMO, PretrainingOptions, ViewMethod, pretrain
from training.views import BYOL, BYOL_SMALL, ViewTransform

BYOLDataset = ArraySource


class BYOLTransform(ViewTransform):
    """uint8 (B, 3 or 4, H, W) -> two float views (B, 3, size, size), normalised; table 6 of the paper.

    The views differ in blur and solarization. Up to 64 pixels nothing is blurred.
    """

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, BYOL_SMALL if size <= 64 else BYOL, **options)


class BYOLLoss(nn.Module):
    """The symmetric loss, eq. 2 of the paper. p1, p2: predictions, z1, z2: target projections, (B, D) -> scalar.

    2 - 2 cos(p1, z2) plus 2 - 2 cos(p2, z1), the mean over the batch. Targets get no gradient.
    """

    def forward(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        forth = F.cosine_similarity(p1, z2.detach(), dim=-1)
        back = F.cosine_similarity(p2, z1.detach(), dim=-1)
        return (4 - 2 * forth - 2 * back).mean()


class BYOLModel(ProjectedEncoder):
    """images (B, 3, S, S) -> features (B, D), projections (B, projection_dim).

    encoder: a model with `feature_dim`, or an encoder's name. hidden_dim: 0 for the features' length.
    """

    def __init__(
        self,
        encoder: nn.Module | str = "resnet18",
        *,
        image_size: int = 32,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
    ) -> None:
        super().__init__(encoder, image_size, (hidden_dim, projection_dim))


class BYOLMethod(ViewMethod):
    """batch {"views": (2, B, 3, S, S)} -> {"loss", "embeddings", ...}. ema_decay: the target's, up to 1 on a cosine."""

    def __init__(
        self,
        model: EncoderModel,
        transform: ViewTransform,
        *,
        ema_decay: float = 0.996,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
    ) -> None:
        super().__init__(BYOLModel(model, hidden_dim=hidden_dim, projection_dim=projection_dim), transform)
        self.ema_decay = ema_decay
        self.loss = BYOLLoss()
        self.target = deepcopy(self.online).requires_grad_(False)
        self.predictor = mlp((projection_dim, hidden_dim or model.embed_dim, projection_dim))

    def forward(self, batch: Batch) -> Losses:
        first, second = (view.contiguous(memory_format=torch.channels_last) for view in batch["views"])
        features, one = self.online(first)
        two = self.online(second)[1]
        with torch.no_grad():
            target_one, target_two = (wide(self.target(view)[1]) for view in (first, second))
        loss = self.loss(wide(self.predictor(one)), wide(self.predictor(two)), target_one, target_two)
        return {"loss": loss, "embeddings": features}

    def after_step(self, progress: float) -> None:
        update_ema(self.target, self.online, cosine_decay(self.ema_decay, progress), buffers=False)


@dataclass(frozen=True)
class BYOLOptions(PretrainingOptions):
    """Train an image encoder with BYOL, on pictures without labels."""

    out: str = option("checkpoints/byol", "checkpoint folder to write")
    hidden_dim: int = option(4096, "width of the heads' hidden layers, 0: that of the features", least=0)
    projection_dim: int = option(256, "length of the projections that the loss sees", least=1)
    target_decay: float = option(0.996, "start of the target's moving average, which ends at 1", least=0, most=1)


def presets() -> dict[str, BYOLOptions]:
    """Settings to start from; any option given beside one wins over it."""
    return {
        "cifar10": BYOLOptions(**CIFAR10, hidden_dim=1024, target_decay=0.99),
        "cifar10-gpu": BYOLOptions(**CIFAR10_GPU, hidden_dim=1024, target_decay=0.99),
        "demo": BYOLOptions(**DEMO, out="checkpoints/demo/byol", hidden_dim=1024, target_decay=0.99),
    }


def train_byol(config: BYOLOptions | None = None, **keywords: Any) -> Path:
    """Train an encoder from options (or their keywords) and return the checkpoint folder. See BYOLOptions."""
    options = config or BYOLOptions(**keywords)

    def build(model: EncoderModel) -> BYOLMethod:
        size = model.preprocess.size
        chosen = options.recipes(*(BYOL_SMALL if size <= 64 else BYOL))
        return BYOLMethod(
            model,
            ViewTransform(size, chosen, preprocess=model.preprocess, compile=options.trainer.compile),
            ema_decay=options.target_decay,
            hidden_dim=options.hidden_dim,
            projection_dim=options.projection_dim,
        )

    return pretrain("byol", options, build)


# What the command line finds here, as in every method's file.
evaluate_byol = evaluate_model
Options = BYOLOptions
Transform = BYOLTransform
train = train_byol
