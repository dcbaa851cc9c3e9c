"""What image tokenizers leave of pictures, how their codes are used, and how well a generator foresees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.generation import Sampling, generate_ids
from models.retrieval import embed_images, embed_texts
from models.tokenizers import ImageTokenizer, TextTokenizer
from training.data import file_name, resized
from training.evaluation import FeatureStatistics, frechet_distance
from training.oracle import SceneReader, read_right, scene_figures, shares_right
from training.scenes import Scenes, held_out_colour

STATISTICS = "runs/statistics"  # where the mean and covariance of real pictures' embeddings are kept
_BATCH = 128


def psnr(images: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, the mean over pictures. Both float (B, 3, S, S) in 0..1 -> scalar."""
    error = (images.float() - pixels.float()).square().mean((1, 2, 3)).clamp(min=1e-10)
    return (-10 * error.log10()).mean()


def code_figures(codes: Tensor, count: int) -> dict[str, Tensor]:
    """How evenly `count` codes are used: the exponential of the entropy of their shares (1 when one is all of them,
    `count` when all are alike), and how many occur. codes: int64, any shape."""
    shares = torch.bincount(codes.flatten(), minlength=count).float() / codes.numel()
    entropy = -torch.xlogy(shares, shares).sum()
    return {"perplexity": entropy.exp(), "codes_used": (shares > 0).sum().float()}


@torch.inference_mode()
def reconstruction_figures(model: Any, images: Tensor, name: str) -> dict[str, float]:
    """PSNR of what a DiscreteVAE leaves of pictures, uint8 (N, 3, S, S), and the use of its codes over all of them."""
    device = next(model.parameters()).device
    codes = torch.cat([model.encode(part.to(device)) for part in images.split(_BATCH)])
    pairs = zip(codes.split(_BATCH), images.split(_BATCH), strict=True)
    ratios = [float(psnr(model.decode(c), part.to(device) / 255)) * len(part) for c, part in pairs]
    used = {figure: float(value) for figure, value in code_figures(codes, model.codes).items()}
    return {f"{name}_psnr": sum(ratios) / len(images)} | {f"{name}_{figure}": value for figure, value in used.items()}


@torch.inference_mode()
def generation_figures(model: Any, images: Tensor, texts: Sequence[str], name: str) -> dict[str, float]:
    """Perplexity of each segment under a DALLETransformer: the exponential of the nats a token. images: uint8
    (N, 3, S, S), with a caption each."""
    device = next(model.parameters()).device
    nats, counts = [0.0, 0.0], [0, 0]
    for start in range(0, len(images), _BATCH):
        text = model.tokens_of(list(texts[start : start + _BATCH])).to(device)
        ids = model.dvae.encode(images[start : start + _BATCH].to(device)).flatten(1)
        logits = model(text, ids)
        for part, (scores, targets) in enumerate(zip(logits, (text[:, 1:], ids), strict=True)):
            kept = targets != TextTokenizer.pad_id if part == 0 else torch.ones_like(targets, dtype=torch.bool)
            nats[part] += float(F.cross_entropy(scores[kept].float(), targets[kept], reduction="sum"))
            counts[part] += int(kept.sum())
    return {
        f"{name}_{segment}_perplexity": math.exp(total / count)
        for segment, total, count in zip(("text", "image"), nats, counts, strict=True)
    }


@torch.inference_mode()
def judged_figures(
    model: Any,
    judge: Any,
    images: Tensor,
    texts: Sequence[str],
    name: str,
    *,
    seen: Tensor | None = None,
    statistics: str | Path = STATISTICS,
    guidance_scale: float = 2.0,
) -> dict[str, float]:
    """Pictures that a DALLETransformer draws of these texts, one each by the seeds 0, 1, ..., judged by a model that
    embeds both.

    clip_score: mean cosine of picture and text; real_clip_score: that of the real pictures. frechet_distance: of the
    embeddings of drawn and real pictures. nearest_training: mean cosine of a drawn picture and the training picture
    nearest to it, which shows copying beside real_nearest_training, that of real pictures never trained on.
    images: uint8 (N, 3, S, S), the real ones. seen: unit rows (M, D), embeddings of the training pictures.
    """
    drawn = _drawn(model, texts, 0, guidance_scale)
    made, real = (embed_images(judge, resized(pixels, judge.preprocess.size)) for pixels in (drawn, images))
    prompts = embed_texts(judge, texts)
    figures = {"frechet_distance": _distance(judge, made, real, name, statistics)}
    for prefix, rows in (("", made), ("real_", real)):
        figures[f"{prefix}clip_score"] = float((rows * prompts).sum(-1).mean())
        if seen is not None:
            figures[f"{prefix}nearest_training"] = float((rows @ seen.T).amax(1).mean())
    return {f"{name}_{figure}": value for figure, value in figures.items()}


@torch.inference_mode()
def reconstruction_distance(
    model: Any, judge: Any, images: Tensor, name: str, statistics: str | Path = STATISTICS
) -> dict[str, float]:
    """Frechet distance of pictures, uint8 (N, 3, S, S), and what a DiscreteVAE leaves of them, by a model's
    embeddings."""
    pairs = (_left_of(model, images), images)
    left, real = (embed_images(judge, resized(pixels, judge.preprocess.size)) for pixels in pairs)
    return {f"{name}_reconstruction_frechet_distance": _distance(judge, left, real, name, statistics)}


@torch.inference_mode()
def reconstruction_read(model: Any, oracle: SceneReader, drawn: Scenes) -> dict[str, float]:
    """Share of scenes that an oracle reads right from what a DiscreteVAE leaves of them: what a generator on its codes
    can reach."""
    figures = scene_figures(oracle, _left_of(model, drawn.images), drawn.key)
    return {f"scenes_oracle_{name}": value for name, value in figures.items()}


def _left_of(model: Any, images: Tensor) -> Tensor:
    tokenizer, device = ImageTokenizer(model), next(model.parameters()).device
    return torch.cat([tokenizer.decode(tokenizer.encode(part.to(device))).cpu() for part in images.split(_BATCH)])


def _distance(judge: Any, made: Tensor, real: Tensor, name: str, folder: str | Path) -> float:
    """From embeddings. Those of the real pictures are kept in the folder as their mean and covariance, under the data's
    name, the number of pictures and the judge's hash; where they are there, these very numbers are compared with."""
    file = Path(folder) / f"{file_name(name)}-{len(real)}-{judge.fingerprint}.safetensors"
    if judge.fingerprint and file.is_file():
        statistics = FeatureStatistics.load(file)
    else:
        statistics = FeatureStatistics.of(real)
        if judge.fingerprint:
            statistics.save(file, data=name, judge=judge.fingerprint)
    return frechet_distance(FeatureStatistics.of(made), statistics)


@torch.inference_mode()
def oracle_figures(
    model: Any,
    oracle: SceneReader,
    drawn: Scenes,
    judge: Any = None,
    *,
    samples: int = 4,
    guidance_scale: float = 2.0,
) -> dict[str, float]:
    """Share of pictures that show what the canonical captions of scenes ask for, by an oracle that reads them.

    One picture of each caption: "all", "one", "two" and "three" by the number of objects, "heldout" for captions with a
    colour that its shape never has in training. "reranked_...": the best of `samples` pictures by a judge that embeds
    both.
    """
    count = len(drawn.canonical)
    number = 1 if judge is None else samples
    draws = [_drawn(model, drawn.canonical, draw * count, guidance_scale) for draw in range(number)]
    heldout = (drawn.key.colours == held_out_colour(drawn.key.shapes)) & (drawn.key.shapes >= 0)
    right, rows = read_right(oracle, draws[0], drawn.key), heldout.any(1)
    figures = shares_right(right, drawn.key)
    if rows.any():
        figures["heldout"] = float(right[rows].mean())
    if judge is not None:
        prompts = embed_texts(judge, drawn.canonical)
        scores = [(embed_images(judge, resized(each, judge.preprocess.size)) * prompts).sum(-1) for each in draws]
        best = torch.stack(scores).argmax(0).cpu()
        chosen = torch.stack(draws)[best, torch.arange(count)]
        figures |= {f"reranked_{name}": value for name, value in scene_figures(oracle, chosen, drawn.key).items()}
    return {f"scenes_oracle_{name}": value for name, value in figures.items()}


def _drawn(model: Any, texts: Sequence[str], seed: int, guidance_scale: float) -> Tensor:
    """A picture of each text by the seeds `seed`, `seed` + 1, ... -> uint8 (N, 3, S, S)."""
    tokenizer, sampling, drawn = ImageTokenizer(model.dvae), Sampling(guidance_scale=guidance_scale), []
    for start in range(0, len(texts), _BATCH):
        part = list(texts[start : start + _BATCH])
        steps = list(generate_ids(model, part, range(seed + start, seed + start + len(part)), sampling))
        drawn.append(tokenizer.decode(torch.stack(steps, 1)).cpu())
    return torch.cat(drawn)
