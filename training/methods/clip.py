"""CLIP: contrastive language-image pre-training (arXiv:2103.00020), with SigLIP's loss (arXiv:2303.15343) as an option.

from training.methods.clip import train_clip
folder = train_clip(data=["./photos"], out="checkpoints/photos", steps=5000)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.clip import CLIPModel
from models.errors import CheckpointError
from models.preprocess import Preprocess
from models.tokenizers import TextTokenizer
from training.data import ArraySource, Mixture, SceneSource
from training.distributed import world_size
from training.figures import evaluate_model, evaluate_retrieval_source, evaluate_scenes
from training.losses import CLIPLoss, SigLIPLoss, matryoshka, wide
from training.method import Batch, Losses, Method, option
from training.options import EncoderOptions
from training.run import batch_options, open_data, run_training, starting_model
from training.trainer import TrainerConfig

CLIPDataset = ArraySource


@dataclass(frozen=True)
class CLIPOptions(EncoderOptions):
    """Train CLIP on pictures with captions."""

    out: str = option("checkpoints/clip", "checkpoint folder to write")
    resize: Literal["pad", "crop", "squash"] = option("pad", "how pictures become square")
    embed_dim: int = option(256, "length of the embeddings", least=1)
    text_width: int = option(192, "width of the text transformer", least=1)
    text_depth: int = option(4, "its number of blocks", least=1)
    context_length: int = option(48, "tokens a text may have, longer ones are cut", least=3)
    vocab_size: int = option(8192, "entries of the tokenizer that is learned from the captions, at most")
    loss: Literal["infonce", "siglip"] = option("infonce", "infonce (CLIP) or siglip")
    micro_batch: int = option(
        0, "encode this many rows at a time and again on the way back (GradCache): less memory, more time", least=0
    )
    chunk_size: int | None = option(None, "rows of the similarity matrix held at a time", least=1)


def presets() -> dict[str, CLIPOptions]:
    """Settings that were measured (training/README.md); any option given beside one wins over it."""
    tiny = CLIPOptions(
        data=("scenes",),
        out="checkpoints/tiny-cpu",
        encoder_options={"channels": 32, "blocks": [1, 1, 1], "depth": 1, "fine_blocks": 1},
        text_width=128,
        text_depth=2,
        embed_dim=128,
        vocab_size=1024,
        batch_size=128,
        chunk=128,
        trainer=TrainerConfig(steps=3000, lr=1.5e-3, warmup=100, ema_decay=0.998, time_limit=275, save_every=0),
    )
    demo = CLIPOptions(
        data=("scenes", "emoji", "openclipart", "usda", "grocery", "crawl"),
        out="runs/demo/first",
        run_dir="runs/demo",
        encoder_options={"channels": 64, "blocks": [1, 1, 1], "depth": 1, "fine_blocks": 1},
        vocab_size=6144,
        embed_dim=192,
        text_depth=3,
        batch_size=192,
        chunk=16,
        trainer=TrainerConfig(
            steps=12000, lr=1.5e-3, warmup=200, ema_decay=0.999, evaluate_every=2000, time_limit=5400, threads=2
        ),
    )
    # The first run has many real pictures and few scenes in a batch, so few of them tell each other apart.
    finish = replace(
        demo,
        data=("scenes=6", "emoji=2.6", "openclipart=0.8", "usda=0.4", "grocery=3.4", "crawl=0.2"),
        init="runs/demo/first",
        out="runs/demo/second",
        run_dir="runs/demo-finish",
        batch_size=256,
        trainer=replace(demo.trainer, lr=8e-4, warmup=150, time_limit=1200),
    )
    refine = replace(
        finish,
        init="runs/demo/second",
        out="runs/demo/third",
        run_dir="runs/demo-refine",
        batch_size=192,
        trainer=replace(finish.trainer, lr=1e-3, evaluate_every=500, time_limit=3000),
    )
    return {"tiny-cpu": tiny, "demo": demo, "demo-finish": finish, "demo-refine": refine}


class CLIPMethod(Method):
    """Two encoders, one loss. batch: {"images": (B, 3, S, S), "tokens": (B, L)} -> {"loss", "embeddings", ...}.

    "captions" (B, K) in the batch: the ids of all captions an image has, see CLIPLoss.

    loss: "infonce" or "siglip". micro_batch: encode this many rows at a time and encode them again on the way back, as
    GradCache does (arXiv:2101.06983), so that the batch of negatives may outgrow memory; 0 for all at once.
    lengths: Matryoshka prefixes.
    """

    def __init__(
        self,
        model: CLIPModel,
        *,
        loss: str = "infonce",
        micro_batch: int = 0,
        chunk_size: int | None = None,
        lengths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if loss not in ("infonce", "siglip"):
            raise ValueError(f"unknown loss {loss!r}; choose infonce or siglip")
        if loss == "siglip" and chunk_size is not None:
            raise ValueError("--chunk-size is of infonce alone: siglip's loss has no row that must be seen whole")
        if loss == "siglip" and model.logit_bias is None:
            raise ValueError("the siglip loss needs a model with logit_bias (the paper starts at -10)")
        self.model = model
        self.loss: nn.Module = SigLIPLoss() if loss == "siglip" else CLIPLoss(chunk_size)
        self.micro_batch = micro_batch
        self.lengths = lengths or (model.embed_dim,)

    def forward(self, batch: Batch) -> Losses:
        pixels = self.model.preprocess.normalize(batch["images"]).contiguous(memory_format=torch.channels_last)
        images = self._encode(self.model.encode_image, pixels)
        texts = self._encode(self.model.encode_text, batch["tokens"])
        arguments = [self.model.logit_scale.exp()]
        if self.model.logit_bias is not None:
            arguments.append(self.model.logit_bias)
        captions = batch.get("captions")
        # The loss is a small part of the arithmetic and decided by small differences: always float32.
        with torch.autocast(images.device.type, enabled=False):
            loss = matryoshka(self.loss, self.lengths, wide(images), wide(texts), *arguments, captions)
        chance = math.log(len(images) * world_size())
        return {
            "loss": loss,
            "logit_scale": arguments[0],
            "chance_loss": loss.new_full((), chance),
            "embeddings": images,
        }

    def _encode(self, encode: Any, rows: Tensor) -> Tensor:
        if not self.micro_batch or len(rows) <= self.micro_batch or not torch.is_grad_enabled():
            return encode(rows)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in rows.split(self.micro_batch)])

    def after_step(self, progress: float) -> None:
        # Section 2.5 of the paper: the scale is kept from exceeding 100, or training becomes unstable.
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, self.model.MAX_LOGIT_SCALE)


def build_clip(options: CLIPOptions, tokenizer: TextTokenizer) -> CLIPModel:
    """The model that the options describe."""
    model = CLIPModel(
        image={"name": options.encoder, "image_size": options.image_size, **options.encoder_options},
        text={
            "vocab_size": tokenizer.vocab_size,
            "context_length": options.context_length,
            "width": options.text_width,
            "depth": options.text_depth,
            "heads": max(1, options.text_width // 64),
        },
        embed_dim=options.embed_dim,
        logit_bias=-10.0 if options.loss == "siglip" else None,
        logit_scale=math.log(10) if options.loss == "siglip" else math.log(1 / 0.07),
        truncatable=options.matryoshka,
    )
    model.preprocess = Preprocess(size=options.image_size, resize=options.resize)
    model.tokenizer = tokenizer
    return model


def train_clip(config: CLIPOptions | None = None, **keywords: Any) -> Path:
    """Train a CLIP model from options (or their keywords) and return the checkpoint folder.

    See CLIPOptions for every option. Raises DataError, CheckpointError, DivergedError or ValueError with the way out.
    """
    options = config or CLIPOptions(**keywords)
    torch.manual_seed(options.trainer.seed)
    model = starting_model(options, CLIPModel)
    size = model.preprocess.size if model else options.image_size
    # Held at twice the side, crops are as sharp as the pictures that the model is shown later.
    data = open_data(options, side=2 * size)
    if model is None:
        corpus = (text for source in data.sources for text in source.corpus())
        model = build_clip(options, TextTokenizer.train(corpus, options.vocab_size, options.context_length))
    if model.tokenizer is None:
        raise CheckpointError(f"{options.init} has no tokenizer; train from random weights, or give another checkpoint")
    method = CLIPMethod(
        model,
        loss=options.loss,
        micro_batch=options.micro_batch,
        chunk_size=options.chunk_size,
        lengths=options.matryoshka,
    )
    batches = Mixture(data.sources, data.weights, model.tokenizer, size=size, **batch_options(options))
    return run_training("clip", options, method, batches, data, _quick_evaluation(data.sources))


def _quick_evaluation(sources: Sequence[Any]) -> Any:
    """Retrieval on a little of what is at hand, for the log: unseen scenes, else the first data set that is held."""

    if any(isinstance(source, SceneSource) for source in sources):
        return lambda model: evaluate_scenes(model, count=500)
    held = next((source for source in sources if isinstance(source, ArraySource)), None)
    return None if held is None else lambda model: evaluate_retrieval_source(model, held)


# What the command line finds here, as in every method's file.
evaluate_clip = evaluate_model
Options = CLIPOptions
train = train_clip
__all__ = [
    "CLIPDataset",
    "CLIPLoss",
    "CLIPMethod",
    "Options",
    "SigLIPLoss",
    "evaluate_clip",
    "presets",
    "train",
    "train_clip",
]
