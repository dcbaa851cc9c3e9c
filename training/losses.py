"""Contrastive image-text losses. Images and texts: (B, D), any norm; row i of one belongs to row i of the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.distributed import gather, gather_without_gradient, rank


def wide(rows: Tensor) -> Tensor:
    """float32, or float64 where it is that already: losses are decided by small differences."""
    return rows if rows.dtype == torch.float64 else rows.float()


class CLIPLoss(nn.Module):
    """Symmetric InfoNCE, fig. 3 of arXiv:2103.00020. (B, D), (B, D), exp(scale) -> scalar.

    Negatives come from all ranks, with gradient.
    captions: int64 (B, K), ids of the captions that each image goes by, the first that of its text. A text that is one
    of an image's captions is no negative of it, whichever row it came with: the target is spread evenly over all that
    match (UniCL, eq. 3 of arXiv:2204.03610). None: rows match alone.
    chunk_size: rows of the similarity matrix that exist at a time, so that memory grows with B and not with B^2.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        logit_scale: Tensor | float,
        captions: Tensor | None = None,
    ) -> Tensor:
        images, texts = F.normalize(image_embeddings, dim=-1), F.normalize(text_embeddings, dim=-1)
        captions = _own(images) if captions is None else captions
        all_images, all_texts, all_captions = gather(images), gather(texts), gather_without_gradient(captions)
        step = self.chunk_size or len(images)
        total = images.new_zeros(())
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            for queries, keys, image_queries in ((images[rows], all_texts, True), (texts[rows], all_images, False)):
                arguments = (queries, keys, captions[rows], all_captions, image_queries, logit_scale)
                if self.chunk_size is None:
                    total = total + _soft_cross_entropy(*arguments)
                else:  # the chunk's matrix is computed again on the way back instead of kept
                    total = total + checkpoint(_soft_cross_entropy, *arguments, use_reentrant=False)
        return total / (2 * len(images))


def _soft_cross_entropy(
    queries: Tensor, keys: Tensor, own: Tensor, others: Tensor, image_queries: bool, scale: Tensor | float
) -> Tensor:
    """Sum over queries of the cross entropy to an even spread over the keys that match. own, others: their captions."""
    log_probabilities = (queries @ keys.T * scale).log_softmax(-1)
    same = _match(own, others[:, 0]) if image_queries else _match(others, own[:, 0]).T
    return -(log_probabilities * same / same.sum(-1, keepdim=True)).sum()


def _own(images: Tensor) -> Tensor:
    """An id for every row of every rank: (B, 1)."""
    return torch.arange(len(images), device=images.device)[:, None] + rank() * len(images)


def _match(captions: Tensor, texts: Tensor) -> Tensor:
    """Whether each text is among each image's captions. (B, K), (N,) -> bool (B, N); never (B, K, N) at a time."""
    same = captions[:, :1] == texts[None, :]
    for column in captions[:, 1:].unbind(1):
        same |= column[:, None] == texts[None, :]
    return same


class SigLIPLoss(nn.Module):
    """Pairwise sigmoid loss, eq. 1 of arXiv:2303.15343. (B, D), (B, D), exp(scale), bias -> scalar.

    Every pair of an image and a text is its own binary question. captions and ranks: as in CLIPLoss.
    """

    def forward(
        self,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        captions: Tensor | None = None,
    ) -> Tensor:
        images, texts = F.normalize(image_embeddings, dim=-1), F.normalize(text_embeddings, dim=-1)
        captions = _own(images) if captions is None else captions
        logits = images @ gather(texts).T * logit_scale + logit_bias
        same = _match(captions, gather_without_gradient(captions[:, 0].contiguous()))
        return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(images)


def matryoshka(
    loss: nn.Module, lengths: tuple[int, ...], images: Tensor, texts: Tensor, *args: Tensor | None
) -> Tensor:
    """Mean of a loss over prefixes of the embeddings (arXiv:2205.13147, eq. 1 with equal weights)."""
    return torch.stack([loss(images[:, :length], texts[:, :length], *args) for length in lengths]).mean()
