"""SimCLR: a simple framework for contrastive learning of visual representations (arXiv:2002.05709).

from training.methods.simclr import train_simclr
folder = train_simclr(data=["./photos"], encoder="resnet18", image_size=96, out="checkpoints/simclr")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision import EncoderModel
from training.data import ArraySource
from training.distributed import gather, rank, world_size
from training.figures import evaluate_model
from training.heads import ProjectedEncoder
from training.losses import wide
from training.method import Batch, Losses, option
from training.pretraining import CIFAR10, CIFAR10_GPU, DEMO, PretrainingOptions, ViewMethod, pretrain
from training.trainer import TrainerConfig
from training.views import SIMCLR, SIMCLR_SMALL, Recipe, ViewTransform

SimCLRDataset = ArraySource
Variant = Literal["ntxent", "dcl", "debiased", "hard"]


class SimCLRTransform(ViewTransform):
    """uint8 (B, 3 or 4, H, W) -> `views` float views (B, 3, size, size), normalised; appendix A of the paper.

    Up to 64 pixels the recipe is that of appendix B.9: half the colour changes, no blur.
    """

    def __init__(self, size: int, views: int = 2, recipe: Recipe | None = None, **options: Any) -> None:
        super().__init__(size, (recipe or (SIMCLR_SMALL if size <= 64 else SIMCLR),) * views, **options)


class SimCLRModel(ProjectedEncoder):
    """images (B, 3, S, S) -> features (B, D), projections (B, projection_dim).

    encoder: a model with `feature_dim`, or an encoder's name. hidden_dim: 0 for the features' length. layers: 2, or 3
    as in SimCLR v2.
    """

    def __init__(
        self,
        encoder: nn.Module | str = "resnet18",
        *,
        image_size: int = 32,
        hidden_dim: int = 0,
        projection_dim: int = 128,
        layers: int = 2,
    ) -> None:
        super().__init__(encoder, image_size, (*[hidden_dim] * (layers - 1), projection_dim))


class SimCLRLoss(nn.Module):
    """NT-Xent, eq. 1 of arXiv:2002.05709. z1, z2, ...: (B, D), any norm -> scalar.

    Negatives come from all ranks, with gradient. With more than two views every ordered pair of views of a picture is a
    positive, each against the views of the other pictures; with two this is eq. 1.
    learnable: the temperature is a parameter (its logarithm), as in CLIP.
    variant: "dcl" leaves the positive out of the denominator (arXiv:2110.06848); "debiased" corrects for negatives of
    the same class, of which there are a share `tau_plus` (eq. 8 of arXiv:2007.00224); "hard" weighs negatives by
    exp(beta * similarity / temperature) as well (eq. 4 of arXiv:2010.04592).
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        variant: Variant = "ntxent",
        learnable: bool = False,
        tau_plus: float = 0.1,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if temperature <= 0 or variant not in ("ntxent", "dcl", "debiased", "hard"):
            raise ValueError(
                f"temperature {temperature} must be above 0, variant {variant!r} one of ntxent, dcl, debiased, hard"
            )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learnable else None
        self._temperature = temperature
        self.variant, self.tau_plus, self.beta = variant, tau_plus, beta

    @property
    def temperature(self) -> Tensor | float:
        """What similarities are divided by."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, *views: Tensor) -> Tensor:
        count, rows = len(views), len(views[0])
        local = F.normalize(torch.stack(views, 1), dim=-1)  # (B, V, D)
        everyone = gather(local)
        total = len(everyone)
        logits = local.flatten(0, 1) @ everyone.flatten(0, 1).T / self.temperature
        picture = torch.arange(total, device=local.device).repeat_interleave(count)
        mine = picture[rows * count * rank() : rows * count * (rank() + 1)]
        same = mine[:, None] == picture[None, :]
        # For each picture, its views against its views: (B, V, V), the anchors themselves on the diagonal.
        order = torch.arange(rows, device=local.device)
        own = logits.view(rows, count, total, count)[order, :, rank() * rows + order]
        negatives = self._negatives(logits, same, own)
        positive = ~torch.eye(count, dtype=torch.bool, device=local.device)
        if self.variant == "dcl":
            terms = negatives - own
        else:
            terms = torch.logaddexp(own, negatives.expand_as(own)) - own
        return torch.where(positive, terms, 0.0).sum() / (rows * count * (count - 1))

    def _negatives(self, logits: Tensor, same: Tensor, own: Tensor) -> Tensor:
        """Logarithm of the negatives' sum for each anchor and positive: (B, V, V), or (B, V, 1) where all share it."""
        rows, count = own.shape[:2]
        if self.variant in ("ntxent", "dcl"):
            return logits.masked_fill(same, -torch.inf).logsumexp(1).view(rows, count, 1)
        number = logits.shape[1] - count
        sums = logits.exp().masked_fill(same, 0.0)
        if self.variant == "hard":
            weights = (self.beta * logits).exp().masked_fill(same, 0.0)
            sums = weights * sums / (weights.sum(1, keepdim=True) / number)
        unbiased = (sums.sum(1).view(rows, count, 1) - self.tau_plus * number * own.exp()) / (1 - self.tau_plus)
        # The least that the sum can be: all negatives opposite to the anchor.
        least = torch.as_tensor(-1 / self.temperature, dtype=own.dtype, device=own.device).exp()
        return unbiased.clamp(min=number * least).log()


class SimCLRMethod(ViewMethod):
    """batch {"views": (V, B, 3, S, S)} -> {"loss", "embeddings", ...}. lengths: Matryoshka prefixes of the features."""

    def __init__(
        self, online: SimCLRModel, transform: ViewTransform, loss: SimCLRLoss, lengths: tuple[int, ...] = ()
    ) -> None:
        super().__init__(online, transform)
        self.loss = loss
        self.lengths = lengths or (self.model.embed_dim,)

    def forward(self, batch: Batch) -> Losses:
        views = batch["views"]
        features = self.model(views.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        losses = []
        for length in self.lengths:
            # A prefix is projected as the features with nothing after it (arXiv:2205.13147, with one shared head).
            kept = F.pad(features[:, :length], (0, max(0, features.shape[1] - length)))
            projections = wide(self.online.projector(kept))
            losses.append(self.loss(*projections.view(len(views), -1, projections.shape[1])))
        loss = torch.stack(losses).mean()
        negatives = world_size() * views.shape[0] * views.shape[1] - 1
        return {
            "loss": loss,
            "temperature": torch.as_tensor(self.loss.temperature),
            "chance_loss": loss.new_full((), math.log(negatives)),
            "embeddings": features[: views.shape[1]].clone(),  # FSDP2 warns of views
        }


@dataclass(frozen=True)
class SimCLROptions(PretrainingOptions):
    """Train an image encoder with SimCLR, on pictures without labels."""

    out: str = option("checkpoints/simclr", "checkpoint folder to write")
    views: int = option(2, "views of each picture", least=2)
    layers: Literal[2, 3] = option(2, "layers of the projector")
    temperature: float = option(0.5, "what similarities are divided by (the start of it, if learned)", above=0)
    learn_temperature: bool = option(False, "learn the temperature")
    variant: Variant = option("ntxent", "loss: ntxent, dcl, debiased or hard (negatives)")
    tau_plus: float = option(
        0.1, "debiased and hard: share of negatives that are of the anchor's class", least=0, below=1
    )
    beta: float = option(1.0, "hard: how much near negatives outweigh far ones", least=0)


def presets() -> dict[str, SimCLROptions]:
    """Settings to start from; any option given beside one wins over it."""
    lars = TrainerConfig(
        steps=40_000, lr=2.0, warmup=800, optimizer="lars", weight_decay=1e-4, clip_norm=0.0, save_every=2000
    )
    large = {"encoder": "resnet18", "encoder_options": {}, "batch_size": 512, "chunk": 512, "trainer": lars}
    return {
        "cifar10": SimCLROptions(**CIFAR10, hidden_dim=512, temperature=0.2),
        "cifar10-gpu": SimCLROptions(**CIFAR10_GPU, hidden_dim=512, temperature=0.2),
        "cifar10-lars": SimCLROptions(**CIFAR10 | large),
        "demo": SimCLROptions(**DEMO, out="checkpoints/demo/simclr", hidden_dim=512, temperature=0.2),
    }


def train_simclr(config: SimCLROptions | None = None, **keywords: Any) -> Path:
    """Train an encoder from options (or their keywords) and return the checkpoint folder. See SimCLROptions."""
    options = config or SimCLROptions(**keywords)

    def build(model: EncoderModel) -> SimCLRMethod:
        size = model.preprocess.size
        recipe = options.recipes(SIMCLR_SMALL if size <= 64 else SIMCLR)[0]
        online = SimCLRModel(
            model, hidden_dim=options.hidden_dim, projection_dim=options.projection_dim, layers=options.layers
        )
        return SimCLRMethod(
            online,
            SimCLRTransform(size, options.views, recipe, preprocess=model.preprocess, compile=options.trainer.compile),
            SimCLRLoss(
                options.temperature,
                variant=options.variant,
                learnable=options.learn_temperature,
                tau_plus=options.tau_plus,
                beta=options.beta,
            ),
            options.matryoshka,
        )

    return pretrain("simclr", options, build)


# What the command line finds here, as in every method's file.
evaluate_simclr = evaluate_model
Options = SimCLROptions
Transform = SimCLRTransform
train = train_simclr
