"""Losses against plain loops from the papers' equations, and against open_clip in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.torchvision import load_torchvision
from training.losses import CLIPLoss, SigLIPLoss, matryoshka


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(2, 12, 8, dtype=torch.float64)
    return rows[0].requires_grad_(), rows[1].requires_grad_()


def _info_nce_loop(images: Tensor, texts: Tensor, scale: float) -> float:
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    total = 0.0
    for one, other in ((images, texts), (texts, images)):
        for i in range(len(one)):
            scores = [scale * float((one[i] * other[j]).sum()) for j in range(len(other))]
            total -= scores[i] - math.log(sum(math.exp(score) for score in scores))
    return total / (2 * len(images))


def test_clip_loss_is_the_loop(pairs: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        assert float(CLIPLoss()(*pairs, 10.0)) == pytest.approx(_info_nce_loop(*pairs, 10.0), abs=1e-12)


def test_clip_loss_and_gradient_equal_open_clip(pairs: tuple[Tensor, Tensor]) -> None:
    load_torchvision()
    from open_clip.loss import ClipLoss

    ours = CLIPLoss()(*pairs, 10.0)
    theirs = ClipLoss()(F.normalize(pairs[0], dim=-1), F.normalize(pairs[1], dim=-1), 10.0)
    assert abs(float((ours - theirs).detach())) < 1e-10
    for a, b in zip(torch.autograd.grad(ours, pairs), torch.autograd.grad(theirs, pairs), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_siglip_loss_and_gradient_equal_open_clip(pairs: tuple[Tensor, Tensor]) -> None:
    load_torchvision()
    from open_clip.loss import SigLipLoss

    ours = SigLIPLoss()(*pairs, 10.0, -10.0)
    theirs = SigLipLoss()(F.normalize(pairs[0], dim=-1), F.normalize(pairs[1], dim=-1), 10.0, -10.0)
    assert abs(float((ours - theirs).detach())) < 1e-10
    for a, b in zip(torch.autograd.grad(ours, pairs), torch.autograd.grad(theirs, pairs), strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 100])
def test_chunks_change_neither_loss_nor_gradient(pairs: tuple[Tensor, Tensor], chunk: int) -> None:
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    captions = torch.tensor(
        [[0, 1], [1, 9], [1, 1], [2, 0], [3, 3], [4, 5], [5, 5], [5, 6], [5, 4], [6, 6], [7, 8], [8, 7]]
    )
    whole = CLIPLoss()(*pairs, scale, captions)
    parts = CLIPLoss(chunk)(*pairs, scale, captions)
    assert abs(float((whole - parts).detach())) < 1e-12
    gradients = [torch.autograd.grad(loss, (*pairs, scale)) for loss in (whole, parts)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_memory_of_the_chunked_loss_does_not_hold_the_matrix() -> None:
    """The largest tensor that is kept for the way back: (B, B) whole, (chunk, B) never."""
    rows = torch.randn(256, 8, requires_grad=True)
    largest = {}
    for chunk in (None, 16):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            CLIPLoss(chunk)(rows, rows * 2, 10.0)
        largest[chunk] = max(sizes)
    assert largest[None] >= 256 * 256
    assert largest[16] <= 256 * 8


@pytest.mark.parametrize("loss", [CLIPLoss(), CLIPLoss(5), SigLIPLoss()])
def test_invariances(pairs: tuple[Tensor, Tensor], loss: torch.nn.Module) -> None:
    extra = (-5.0,) if isinstance(loss, SigLIPLoss) else ()
    images, texts = (rows.detach() for rows in pairs)
    before = images.clone()
    value = loss(images, texts, 10.0, *extra)
    order = torch.randperm(12)
    assert torch.allclose(loss(images[order], texts[order], 10.0, *extra), value)
    assert torch.allclose(loss(3 * images, 0.2 * texts, 10.0, *extra), value)
    assert torch.equal(images, before)
    if not extra:
        assert torch.allclose(loss(texts, images, 10.0), value)


def test_rows_of_the_same_caption_are_no_negatives() -> None:
    rows = F.normalize(torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]], dim=-1)
    captions = torch.tensor([[7], [7], [8], [9]])
    assert CLIPLoss()(rows, rows, 100.0, captions) < CLIPLoss()(rows, rows, 100.0) + 1e-9
    perfect = float(CLIPLoss()(rows, rows, 1000.0, captions))
    assert perfect == pytest.approx(0.5 * math.log(2), abs=1e-9)  # the best: an even spread over two copies
    assert float(SigLIPLoss()(rows, rows, 100.0, -50.0, captions)) < float(SigLIPLoss()(rows, rows, 100.0, -50.0))


def test_a_text_among_an_images_captions_is_no_negative_of_it() -> None:
    """Image 0 came as "apple" (1) and is also a "gala" (2), image 1 came as "gala", image 2 is a "pear" (3) alone."""
    captions = torch.tensor([[1, 2], [2, 1], [3, 3]])
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, texts = torch.eye(3, dtype=torch.float64), F.normalize(logits.T, dim=-1)
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    sharp = 5 * (images @ texts.T)
    expected = (F.cross_entropy(sharp, target) + F.cross_entropy(sharp.T, target)) / 2
    assert abs(float(CLIPLoss()(images, texts, 5.0, captions) - expected)) < 1e-12
    one_way = torch.tensor([[1, 2], [2, 2], [3, 3]])  # image 1 is not known as an "apple"
    target = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    back = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    expected = (F.cross_entropy(sharp, target) + F.cross_entropy(sharp.T, back)) / 2
    assert abs(float(CLIPLoss()(images, texts, 5.0, one_way) - expected)) < 1e-12


def test_matryoshka_is_the_mean_over_prefixes(pairs: tuple[Tensor, Tensor]) -> None:
    got = matryoshka(CLIPLoss(), (2, 8), *pairs, torch.tensor(5.0), None)
    expected = (CLIPLoss()(pairs[0][:, :2], pairs[1][:, :2], 5.0) + CLIPLoss()(*pairs, 5.0)) / 2
    assert torch.allclose(got, expected)
