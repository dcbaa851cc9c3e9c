"""Contrastive image-text losses. Images and texts: (B, D), any norm; row i of one belongs to row i of the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.distributed import gather, gather_without_gradient, rank


class CLIPLoss(nn.Module):
    """Symmetric InfoNCE, fig. 3 of arXiv:2103.00020. (B, D), (B, D), exp(scale) -> scalar.

    Negatives come from all ranks, with gradient. groups (B,): rows with the same id share their caption, and the target
    is spread evenly over them (UniCL, eq. 3 of arXiv:2204.03610) in place of calling a copy a negative.
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
        groups: Tensor | None = None,
    ) -> Tensor:
        images, texts = F.normalize(image_embeddings, dim=-1), F.normalize(text_embeddings, dim=-1)
        ids = torch.arange(len(images), device=images.device) + rank() * len(images) if groups is None else groups
        all_images, all_texts, all_ids = gather(images), gather(texts), gather_without_gradient(ids)
        step = self.chunk_size or len(images)
        total = images.new_zeros(())
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            for queries, keys in ((images[rows], all_texts), (texts[rows], all_images)):
                arguments = (queries, keys, ids[rows], all_ids, logit_scale)
                if self.chunk_size is None:
                    total = total + _soft_cross_entropy(*arguments)
                else:  # the chunk's matrix is computed again on the way back instead of kept
                    total = total + checkpoint(_soft_cross_entropy, *arguments, use_reentrant=False)
        return total / (2 * len(images))


def _soft_cross_entropy(
    queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor, scale: Tensor | float
) -> Tensor:
    """Sum over queries of the cross entropy to an even spread over the keys of the same id."""
    log_probabilities = (queries @ keys.T * scale).log_softmax(-1)
    same = (query_ids[:, None] == key_ids[None, :]).to(log_probabilities.dtype)
    return -(log_probabilities * same / same.sum(-1, keepdim=True)).sum()


class SigLIPLoss(nn.Module):
    """Pairwise sigmoid loss, eq. 1 of arXiv:2303.15343. (B, D), (B, D), exp(scale), bias -> scalar.

    Every pair of an image and a text is its own binary question. groups and ranks: as in CLIPLoss.
    """

    def forward(
        self,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        groups: Tensor | None = None,
    ) -> Tensor:
        images, texts = F.normalize(image_embeddings, dim=-1), F.normalize(text_embeddings, dim=-1)
        ids = torch.arange(len(images), device=images.device) + rank() * len(images) if groups is None else groups
        logits = images @ gather(texts).T * logit_scale + logit_bias
        same = ids[:, None] == gather_without_gradient(ids)[None, :]
        return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(images)


def matryoshka(
    loss: nn.Module, lengths: tuple[int, ...], images: Tensor, texts: Tensor, *args: Tensor | None
) -> Tensor:
    """Mean of a loss over prefixes of the embeddings (arXiv:2205.13147, eq. 1 with equal weights)."""
    return torch.stack([loss(images[:, :length], texts[:, :length], *args) for length in lengths]).mean()
