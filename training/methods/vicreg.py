"""VICReg: variance-invariance-covariance regularization (arXiv:2105.04906).

from training.methods.vicreg import train_vicreg
folder = train_vicreg(data=["./photos"], encoder="resnet18", image_size=96, out="checkpoints/vicreg")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision import EncoderModel
from training.distributed import gather
from training.figures import evaluate_model
from training.heads import ProjectedEncoder
from training.losses import wide
from training.method import Batch, Losses, option
from training.pretraining import PretrainingOptions, ViewMethod, pretrain
from training.views import BYOL, BYOL_SMALL, ViewTransform


class VICRegTransform(ViewTransform):
    """uint8 (B, 3 or 4, H, W) -> two float views (B, 3, size, size), normalised; BYOL's pair (appendix C.1)."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, BYOL_SMALL if size <= 64 else BYOL, **options)


class VICRegLoss(nn.Module):
    """Eq. 6 of the paper. z1, z2: (B, D) -> scalar; statistics are those of all ranks' rows, with gradient.

    The variance term is the mean over both views, as in the authors' code that made the figures; eq. 6 has their sum.
    invariance, variance, covariance: the weights lambda, mu and nu.
    """

    def __init__(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__()
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        z1, z2 = gather(z1), gather(z2)
        spread, correlation = z1.new_zeros(()), z1.new_zeros(())
        for rows in (z1, z2):
            spread = spread + F.relu(1 - (rows.var(0) + 1e-4).sqrt()).mean()
            centred = rows - rows.mean(0)
            covariance = centred.T @ centred / (len(rows) - 1)
            correlation = (
                correlation + (covariance.square().sum() - covariance.diagonal().square().sum()) / rows.shape[1]
            )
        return self.invariance * F.mse_loss(z1, z2) + self.variance * spread / 2 + self.covariance * correlation


class VICRegMethod(ViewMethod):
    """batch {"views": (2, B, 3, S, S)} -> {"loss", "embeddings"}."""

    def __init__(self, online: ProjectedEncoder, transform: ViewTransform, loss: VICRegLoss) -> None:
        super().__init__(online, transform)
        self.loss = loss

    def forward(self, batch: Batch) -> Losses:
        views = batch["views"].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, expanded = self.online(views)
        first, second = wide(expanded).chunk(2)
        return {"loss": self.loss(first, second), "embeddings": features[: len(first)].clone()}


@dataclass(frozen=True)
class VICRegOptions(PretrainingOptions):
    """Train an image encoder with VICReg, on pictures without labels."""

    out: str = option("checkpoints/vicreg", "checkpoint folder to write")
    hidden_dim: int = option(2048, "width of the expander's hidden layers, 0: that of the features", least=0)
    projection_dim: int = option(2048, "length of the expanded rows that the loss sees", least=1)
    invariance: float = option(25.0, "weight of the distance between views", least=0)
    variance: float = option(25.0, "weight of the hinge on each column's deviation", least=0)
    covariance: float = option(1.0, "weight of the covariances between columns", least=0)


def presets() -> dict[str, VICRegOptions]:
    """None yet."""
    return {}


def train_vicreg(config: VICRegOptions | None = None, **keywords: Any) -> Path:
    """Train an encoder from options (or their keywords) and return the checkpoint folder. See VICRegOptions."""
    options = config or VICRegOptions(**keywords)

    def build(model: EncoderModel) -> VICRegMethod:
        size = model.preprocess.size
        chosen = options.recipes(*(BYOL_SMALL if size <= 64 else BYOL))
        loss = VICRegLoss(options.invariance, options.variance, options.covariance)
        transform = ViewTransform(size, chosen, preprocess=model.preprocess, compile=options.trainer.compile)
        online = ProjectedEncoder(model, size, (options.hidden_dim, options.hidden_dim, options.projection_dim))
        return VICRegMethod(online, transform, loss)

    return pretrain("vicreg", options, build)


# What the command line finds here, as in every method's file.
evaluate_vicreg = evaluate_model
Options = VICRegOptions
Transform = VICRegTransform
train = train_vicreg
