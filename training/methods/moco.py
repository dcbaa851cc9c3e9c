"""MoCo: momentum contrast, v1 (arXiv:1911.05722), v2 (arXiv:2003.04297) and v3 (arXiv:2104.02057).

from training.methods.moco import train_moco
folder = train_moco(data=["./photos"], version="v2", encoder="resnet18", image_size=96, out="checkpoints/moco")
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision import EncoderModel, ViT
from training.data import ArraySource
from training.distributed import gather_without_gradient, rank, world_size
from training.ema import cosine_decay, update_ema
from training.figures import evaluate_model
from training.heads import ProjectedEncoder, mlp, split_batch_norm
from training.losses import wide
from training.method import Batch, Losses, option
from training.pretraining import CIFAR10, DEMO, PretrainingOptions, ViewMethod, pretrain
from training.views import BYOL, BYOL_SMALL, MOCO_V1, MOCO_V2, Recipe, ViewTransform

MoCoDataset = ArraySource
Version = Literal["v1", "v2", "v3"]
BatchNorms = Literal["shuffle", "split", "sync"]


def recipes(version: str, size: int) -> tuple[Recipe, Recipe]:
    """The two views' recipes: v1 and v2 of their papers, v3 those of BYOL. Up to 64 pixels nothing is blurred."""
    if version == "v3":
        return BYOL_SMALL if size <= 64 else BYOL
    recipe = MOCO_V1 if version == "v1" else MOCO_V2
    recipe = replace(recipe, blur=0.0) if size <= 64 else recipe
    return recipe, recipe


class MoCoTransform(ViewTransform):
    """uint8 (B, 3 or 4, H, W) -> two float views (B, 3, size, size), normalised; by the version's recipe."""

    def __init__(self, size: int, version: Version = "v2", **options: Any) -> None:
        super().__init__(size, recipes(version, size), **options)


class MoCoLoss(nn.Module):
    """InfoNCE of queries against their keys. q, k: (B, D), any norm -> scalar.

    With a queue (K, D): eq. 1 of arXiv:1911.05722, the negatives being the queue's rows. With None: v3's in-batch form,
    where the keys of all ranks are the negatives, times 2 temperature (algorithm 1 of arXiv:2104.02057). Keys get no
    gradient.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} must be above 0")
        self.temperature = temperature

    def forward(self, q: Tensor, k: Tensor, queue: Tensor | None = None) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k.detach(), dim=-1)
        if queue is None:
            target = torch.arange(len(q), device=q.device) + rank() * len(q)
            loss = F.cross_entropy(q @ gather_without_gradient(k).T / self.temperature, target)
            return 2 * self.temperature * loss
        positive = (q * k).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ queue.to(q.dtype).T], 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


class MoCoModel(ProjectedEncoder):
    """images (B, 3, S, S) -> features (B, D), projections (B, projection_dim).

    encoder: a model with `feature_dim`, or an encoder's name. The head is linear in v1, of two layers in v2, and of
    three with a last batch norm in v3; hidden_dim 0 is the length of the features.
    """

    def __init__(
        self,
        encoder: nn.Module | str = "resnet18",
        *,
        version: Version = "v2",
        image_size: int = 32,
        hidden_dim: int = 0,
        projection_dim: int = 128,
    ) -> None:
        if version not in ("v1", "v2", "v3"):
            raise ValueError(f"unknown version {version!r} of MoCo; choose v1, v2 or v3")
        hidden = [hidden_dim] * {"v1": 0, "v2": 1, "v3": 2}[version]
        super().__init__(encoder, image_size, (*hidden, projection_dim), last_norm=version == "v3")


class MoCoMethod(ViewMethod):
    """batch {"views": (2, B, 3, S, S)} -> {"loss", "embeddings", ...}.

    v1, v2: queries against keys and a queue of `queue_size` older keys, a ring buffer whose size is a multiple of what
    a step adds (`keys_per_step`, of all ranks and accumulated batches). v3: a predictor, both directions, and no queue.
    batch_norm: "shuffle" gives each key other company than its query had (section 3.3 of the paper), across ranks, or
    across `splits` parts of the batch on one; "split" only takes statistics of the parts; "sync" takes the whole
    batch's. ema_decay: of the key encoder; v3's goes up to 1 on a cosine.
    """

    queue: Tensor
    place: Tensor

    def __init__(
        self,
        model: EncoderModel,
        transform: ViewTransform,
        *,
        version: Version = "v2",
        temperature: float = 0.2,
        ema_decay: float = 0.999,
        queue_size: int = 4096,
        keys_per_step: int = 256,
        batch_norm: BatchNorms = "shuffle",
        splits: int = 8,
        hidden_dim: int = 0,
        projection_dim: int = 128,
    ) -> None:
        online = MoCoModel(model, version=version, hidden_dim=hidden_dim, projection_dim=projection_dim)
        super().__init__(online, transform)
        if version != "v3" and queue_size % keys_per_step:
            raise ValueError(
                f"a queue of {queue_size} is no multiple of the {keys_per_step} keys that a step adds: choose "
                f"{max(1, round(queue_size / keys_per_step)) * keys_per_step}, or another batch size"
            )
        self.version, self.ema_decay, self.batch_norm = version, ema_decay, batch_norm
        self.sync_batch_norm = batch_norm == "sync"
        self.loss = MoCoLoss(temperature)
        trunk = model.encoder.trunk
        if version == "v3" and isinstance(trunk, ViT):
            trunk.patch.requires_grad_(False)  # section 4.1 of v3: a random patch projection steadies the training
        if batch_norm != "sync":
            split_batch_norm(self.online, splits)
        self.target = deepcopy(self.online).requires_grad_(False)
        self.predictor: nn.Module = nn.Identity()
        if version == "v3":
            self.predictor = mlp((projection_dim, hidden_dim or model.embed_dim, projection_dim), last_norm=True)
        rows = F.normalize(torch.randn(0 if version == "v3" else queue_size, projection_dim), dim=-1)
        self.register_buffer("queue", rows)
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._keys: list[Tensor] = []  # of the step that is under way

    def forward(self, batch: Batch) -> Losses:
        first, second = batch["views"]
        if self.version == "v3":
            features, query = self._query(first)
            _, other = self._query(second)
            loss = self.loss(query, self._key(second)) + self.loss(other, self._key(first))
            negatives = len(first) * world_size()
            chance = 4 * self.loss.temperature * math.log(negatives)
        else:
            features, query = self._query(first)
            keys = self._key(second)
            loss = self.loss(query, keys, self.queue)
            self._keys.append(keys)
            chance = math.log(len(self.queue) + 1)
        return {"loss": loss, "chance_loss": loss.new_full((), chance), "embeddings": features}

    def _query(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, projections = self.online(images.contiguous(memory_format=torch.channels_last))
        return features, wide(self.predictor(projections))

    @torch.no_grad()
    def _key(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if self.batch_norm != "shuffle":
            return F.normalize(wide(self.target(images)[1]), dim=-1)
        everyone = gather_without_gradient(images)
        # A permutation; an index that is torch.randperm itself ends torch 2.13's compiler with an error.
        order = torch.rand(len(everyone), device=images.device).argsort()
        if world_size() > 1:
            dist.broadcast(order, 0)
        mine = slice(rank() * len(images), (rank() + 1) * len(images))
        keys = F.normalize(wide(self.target(everyone[order[mine]])[1]), dim=-1)
        return gather_without_gradient(keys)[order.argsort()[mine]]

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        decay = cosine_decay(self.ema_decay, progress) if self.version == "v3" else self.ema_decay
        update_ema(self.target, self.online, decay, buffers=False)
        if self._keys:
            keys = gather_without_gradient(torch.cat(self._keys))
            self._keys.clear()
            start = int(self.place)
            self.queue[start : start + len(keys)] = keys.to(self.queue.dtype)
            self.place.fill_((start + len(keys)) % len(self.queue))


@dataclass(frozen=True)
class MoCoOptions(PretrainingOptions):
    """Train an image encoder with MoCo v1, v2 or v3, on pictures without labels."""

    out: str = option("checkpoints/moco", "checkpoint folder to write")
    version: Version = option("v2", "of the method")
    temperature: float = option(0.2, "what similarities are divided by", above=0)
    key_decay: float = option(0.999, "of the key encoder's moving average (v3: its start)", least=0, most=1)
    queue_size: int = option(4096, "keys that are kept as negatives (v1, v2), a multiple of the batch", least=1)
    batch_norm: BatchNorms = option("shuffle", "statistics of keys: shuffle, split or sync")
    splits: int = option(8, "parts of a process's batch that have statistics of their own (shuffle, split)", least=1)


def presets() -> dict[str, MoCoOptions]:
    """Settings to start from; any option given beside one wins over it."""
    return {
        "cifar10": MoCoOptions(**CIFAR10, hidden_dim=512, key_decay=0.99),
        "demo": MoCoOptions(**DEMO, out="checkpoints/demo/moco", hidden_dim=512, key_decay=0.99),
    }


def train_moco(config: MoCoOptions | None = None, **keywords: Any) -> Path:
    """Train an encoder from options (or their keywords) and return the checkpoint folder. See MoCoOptions."""
    options = config or MoCoOptions(**keywords)

    def build(model: EncoderModel) -> MoCoMethod:
        size = model.preprocess.size
        chosen = options.recipes(*recipes(options.version, size))
        return MoCoMethod(
            model,
            ViewTransform(size, chosen, preprocess=model.preprocess, compile=options.trainer.compile),
            version=options.version,
            temperature=options.temperature,
            ema_decay=options.key_decay,
            queue_size=options.queue_size,
            keys_per_step=options.batch_size * options.trainer.accumulate,
            batch_norm=options.batch_norm,
            splits=options.splits,
            hidden_dim=options.hidden_dim,
            projection_dim=options.projection_dim,
        )

    return pretrain("moco", options, build)


# What the command line finds here, as in every method's file.
evaluate_moco = evaluate_model
Options = MoCoOptions
Transform = MoCoTransform
train = train_moco
