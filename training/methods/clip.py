"""CLIP: contrastive language-image pre-training (arXiv:2103.00020), with SigLIP's loss (arXiv:2303.15343) as an option.

from training.methods.clip import train_clip
folder = train_clip(data=["./photos"], out="checkpoints/photos", steps=5000)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.checkpoint import load_model, save_checkpoint
from models.clip import CLIPModel
from models.preprocess import Preprocess
from models.readers import BadRows
from models.tokenizers import TextTokenizer
from training.data import ArraySource, Mixture, SceneSource
from training.distributed import rank, world_size
from training.evaluation import evaluate_data, evaluate_retrieval_source, evaluate_scenes
from training.export import SKELETON
from training.losses import CLIPLoss, SigLIPLoss, matryoshka
from training.method import Batch, Losses, Method
from training.options import CLIPOptions, presets
from training.pictures import open_source
from training.provenance import provenance
from training.trainer import Trainer

CLIPDataset = ArraySource


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
            loss = matryoshka(self.loss, self.lengths, _wide(images), _wide(texts), *arguments, captions)
        chance = math.log(len(images) * world_size())
        return {
            "loss": loss,
            "logit_scale": arguments[0],
            "chance_loss": loss.new_tensor(chance),
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

    def export(self) -> nn.Module:
        return self.model


def _wide(rows: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return rows if rows.dtype == torch.float64 else rows.float()


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

    See CLIPOptions for every option. Raises DataError, DivergedError or ValueError with the way out.
    """
    options = config or CLIPOptions(**keywords)
    torch.manual_seed(options.trainer.seed)
    bad = BadRows(options.max_bad)
    held = options.image_size * 5 // 4
    opened = [open_source(spec, held, bad, options.data_root, options.hold) for spec in options.data]
    sources = [source for source, _ in opened]
    corpus = [text for source in sources for text in source.corpus()]
    tokenizer = TextTokenizer.train(corpus, options.vocab_size, options.context_length)
    model = build_clip(options, tokenizer)
    data = Mixture(
        sources,
        [weight for _, weight in opened],
        tokenizer,
        size=options.image_size,
        batch_size=options.batch_size,
        steps=options.trainer.steps * options.trainer.accumulate,
        chunk=options.chunk,
        seed=options.trainer.seed,
        rank=rank(),
        world_size=world_size(),
    )
    method = CLIPMethod(
        model,
        loss=options.loss,
        micro_batch=options.micro_batch,
        chunk_size=options.chunk_size,
        lengths=options.matryoshka,
    )
    run = Path(options.run_dir or f"runs/{Path(options.out).name}")
    sizes = [f"{source.name}: {source.size() or 'unlimited'}" for source in sources]
    record = provenance("clip", options, sizes)  # now, for the code on the disk may be another when the run ends
    if rank() == 0:
        save_checkpoint(model, run / SKELETON, provenance=record)
    trainer = Trainer(
        method,
        data,
        options.trainer,
        run,
        evaluate=_quick_evaluation(sources),
        extra={"data": list(options.data), "batch_size": options.batch_size, "model": model.config},
    )
    trained = trainer.fit()
    out = Path(options.out)
    if rank() != 0:
        return out
    record |= {"steps": trainer.step, "training_seconds": round(trainer.spent), "skipped_rows": len(bad.rows)}
    save_checkpoint(trained, out, provenance=record, dtype=torch.float16)
    if options.evaluate:
        # What is measured is what was written, rounded to half precision.
        record["metrics"] = evaluate_clip(out, data=options.data, data_root=options.data_root)
        save_checkpoint(trained, out, provenance=record, dtype=torch.float16)
    return out


def _quick_evaluation(sources: Sequence[Any]) -> Any:
    """Retrieval on a little of what is at hand, for the log: unseen scenes, else the first data set that is held."""

    if any(isinstance(source, SceneSource) for source in sources):
        return lambda model: evaluate_scenes(model, count=500)
    held = next((source for source in sources if isinstance(source, ArraySource)), None)
    return None if held is None else lambda model: evaluate_retrieval_source(model, held)


def evaluate_clip(
    model: Any, data: Sequence[str] = ("scenes",), data_root: str | None = None, seed: int = 0
) -> dict[str, float]:
    """Figures of a model (or of a checkpoint folder or reference) on each data set, by name. Shares are 0..1.

    Named sets are judged on their validation split; other data on what it is, which is training data if it was trained
    on. See training/evaluation.py for what each figure means.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model)
    metrics: dict[str, float] = {}
    for spec in data:
        metrics |= evaluate_data(model, spec.partition("=")[0], data_root, seed)
    return metrics


# What the command line finds here, as in every method's file.
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
