"""Similarity, ranking, zero-shot classification and retrieval, for any model with `encode_image` and `encode_text`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.preprocess import Preprocess

TEMPLATES = ("a photo of a {}",)

Images = Tensor | Sequence[Image.Image]


class Hit(NamedTuple):
    """One search result: what was found and its cosine similarity."""

    id: Any
    score: float


class Scale(NamedTuple):
    """What turns a model's cosines into logits: their factor, and the learned bias of a SigLIP model."""

    logit_scale_value: float
    logit_bias: float | None

    @classmethod
    def of(cls, model: Any) -> Scale:
        """A model's; of one that embeds pictures alone, 1."""
        bias = getattr(model, "logit_bias", None)
        return cls(float(getattr(model, "logit_scale_value", 1.0)), None if bias is None else float(bias))


class ImageTextModel(Protocol):
    """What retrieval needs of a model; CLIPModel and OpenCLIPModel are ones."""

    preprocess: Preprocess
    tokenizer: Any
    logit_scale_value: float

    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, tokens: Tensor) -> Tensor: ...


def compute_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every pair. (A, D), (B, D), any norm -> (A, B)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def rank_results(similarity: Tensor, k: int) -> list[list[Hit]]:
    """The k best columns of each row, best first; equal scores in column order. (Q, N) -> Q lists of min(k, N) hits."""
    if k <= 0:
        raise ValueError(f"k must be at least 1, not {k}")
    # A stable sort is what makes ties deterministic; topk gives no order among equals.
    scores, columns = torch.sort(similarity, dim=1, descending=True, stable=True)
    return [
        [Hit(column, score) for column, score in zip(row_columns, row_scores, strict=True)]
        for row_columns, row_scores in zip(columns[:, :k].tolist(), scores[:, :k].tolist(), strict=True)
    ]


def embed_images(model: ImageTextModel, images: Images, batch_size: int = 256) -> Tensor:
    """Pictures or a batch (B, 3, S, S) (uint8, or normalised float) -> unit rows (B, D)."""
    if not isinstance(images, Tensor):
        images = torch.stack([model.preprocess(image) for image in images])
    device = _device(model)
    with torch.inference_mode():
        return torch.cat([model.encode_image(part.to(device)) for part in images.split(batch_size)])


def embed_texts(model: ImageTextModel, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Texts -> unit rows (B, D)."""
    if model.tokenizer is None:
        raise ValueError("this model encodes images only; use one that was trained with texts")
    device = _device(model)
    parts = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    with torch.inference_mode():
        return torch.cat([model.encode_text(model.tokenizer(part).to(device)) for part in parts])


def label_embeddings(model: ImageTextModel, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """One unit row a label: the mean over templates of its prompts' embeddings (arXiv:2103.00020, 3.1.4). -> (C, D).

    Each template holds one {}; another form raises ValueError.
    """
    if not labels or not templates:
        raise ValueError("zero-shot classification needs at least one label and one template")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold {{}} exactly once, where the label goes")
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    return F.normalize(embed_texts(model, prompts).view(len(labels), len(templates), -1).mean(1), dim=-1)


def zero_shot_classification(
    model: ImageTextModel,
    images: Images,
    labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    multi_label: bool = False,
) -> Tensor:
    """Probability of each label for each image, by the model's own scale. -> (B, C), rows sum to 1.

    multi_label: each label on its own, as the sigmoid of its scaled cosine (plus the learned bias of a SigLIP model).
    """
    similarity = embed_images(model, images) @ label_embeddings(model, labels, templates).T
    return label_probabilities(model, similarity, multi_label=multi_label)


def label_probabilities(model: ImageTextModel | Scale, similarity: Tensor, *, multi_label: bool = False) -> Tensor:
    """Cosines (B, C) -> probabilities (B, C) by the model's own scale.

    Without a learned bias a sigmoid would call every label likely, for cosines are rarely negative enough; the mean
    of each row's logits stands in for the bias then.
    """
    logits = similarity * model.logit_scale_value
    if not multi_label:
        return logits.softmax(-1)
    bias = getattr(model, "logit_bias", None)
    return torch.sigmoid(logits - logits.mean(-1, keepdim=True) if bias is None else logits + bias)


def text_to_image_retrieval(
    model: ImageTextModel, texts: Sequence[str], image_embeddings: Tensor, k: int = 10
) -> list[list[Hit]]:
    """The k images nearest to each text. image_embeddings: (N, D) -> a list of hits a text, ids are rows."""
    return rank_results(compute_similarity(embed_texts(model, texts), image_embeddings), k)


def image_to_text_retrieval(
    model: ImageTextModel, images: Images, text_embeddings: Tensor, k: int = 10
) -> list[list[Hit]]:
    """The k texts nearest to each image. text_embeddings: (N, D) -> a list of hits an image, ids are rows."""
    return rank_results(compute_similarity(embed_images(model, images), text_embeddings), k)


def image_text_retrieval(
    image_embeddings: Tensor, text_embeddings: Tensor, owners: Tensor | np.ndarray | None = None
) -> dict[str, float]:
    """Retrieval both ways. image_embeddings (N, D), text_embeddings (M, D), owners (M,): the image of each text.

    owners may be left out when M = N and text i belongs to image i. Gives R@1, R@5, R@10 (shares, 0..1) and the median
    rank (1 is best) both ways; an image counts as found by the best ranked of its texts. Ties count against the model.
    """
    similarity = compute_similarity(text_embeddings, image_embeddings)
    count = len(image_embeddings)
    if owners is None and len(text_embeddings) != count:
        raise ValueError(f"{len(text_embeddings)} texts for {count} images: owners must say whose they are")
    owner = torch.arange(count) if owners is None else torch.as_tensor(owners)
    owner = owner.to(similarity.device)
    rows = torch.arange(len(similarity), device=similarity.device)
    own = similarity[rows, owner]
    text_ranks = (similarity >= own[:, None]).sum(1)
    best = torch.full((count,), -2.0, device=own.device, dtype=own.dtype).scatter_reduce(0, owner, own, "amax")
    others = similarity.T.masked_fill(owner[None, :] == torch.arange(count, device=owner.device)[:, None], -2.0)
    image_ranks = (others >= best[:, None]).sum(1) + 1
    result: dict[str, float] = {}
    for name, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks[best > -2])):
        for k in (1, 5, 10):
            result[f"{name}_r{k}"] = float((ranks <= k).float().mean())
        result[f"{name}_median_rank"] = float(ranks.float().median())
    return result


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
