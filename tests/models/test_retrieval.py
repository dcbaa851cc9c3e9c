"""Retrieval maths against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from support import tiny_clip

from models.retrieval import (
    compute_similarity,
    embed_images,
    embed_texts,
    image_text_retrieval,
    image_to_text_retrieval,
    label_probabilities,
    rank_results,
    text_to_image_retrieval,
    zero_shot_classification,
)


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_similarity_is_the_cosine_whatever_the_norms() -> None:
    a, b = torch.randn(3, 5).double(), torch.randn(4, 5).double()
    expected = torch.tensor([[_cosine(x, y) for y in b.tolist()] for x in a.tolist()]).double()
    assert torch.allclose(compute_similarity(a, b), expected, atol=1e-12)
    assert torch.allclose(compute_similarity(3 * a, 0.1 * b), expected, atol=1e-12)


def test_rank_results_orders_and_breaks_ties_by_column() -> None:
    hits = rank_results(torch.tensor([[0.5, 0.9, 0.9, -1.0]]), 3)
    assert [(hit.id, round(hit.score, 3)) for hit in hits[0]] == [(1, 0.9), (2, 0.9), (0, 0.5)]
    assert len(rank_results(torch.zeros(2, 3), 10)[1]) == 3
    with pytest.raises(ValueError, match="at least 1"):
        rank_results(torch.zeros(1, 1), 0)


def test_recall_and_median_rank_against_a_loop() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(20, 8), torch.randn(50, 8)
    owners = torch.cat([torch.arange(20), torch.randint(0, 20, (30,))])
    texts += images[owners]
    got = image_text_retrieval(images, texts, owners)
    similarity = compute_similarity(texts, images)
    text_ranks = [sum(s >= row[owner] for s in row).item() for row, owner in zip(similarity, owners, strict=True)]
    image_ranks = []
    for image in range(20):
        mine = max(float(similarity[t, image]) for t in range(50) if owners[t] == image)
        image_ranks.append(1 + sum(float(similarity[t, image]) >= mine for t in range(50) if owners[t] != image))
    for name, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        for k in (1, 5, 10):
            assert got[f"{name}_r{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
        assert got[f"{name}_median_rank"] == float(torch.tensor(ranks).float().median())


def test_a_constant_model_gets_no_recall() -> None:
    assert image_text_retrieval(torch.ones(10, 4), torch.ones(10, 4))["text_to_image_r1"] == 0


def test_owners_must_be_given_when_counts_differ() -> None:
    with pytest.raises(ValueError, match="owners"):
        image_text_retrieval(torch.ones(2, 4), torch.ones(3, 4))


def test_zero_shot_probabilities_are_a_softmax_over_averaged_templates() -> None:
    model = tiny_clip()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels, templates = ["star", "heart", "ring"], ["a {}", "a photo of a {}"]
    got = zero_shot_classification(model, images, labels, templates)
    rows = []
    for label in labels:
        mean = embed_texts(model, [template.replace("{}", label) for template in templates]).mean(0)
        rows.append(mean / mean.norm())
    logits = embed_images(model, images) @ torch.stack(rows).T * model.logit_scale_value
    assert torch.allclose(got, logits.softmax(-1), atol=1e-6)
    assert torch.allclose(got.sum(-1), torch.ones(2))
    free = zero_shot_classification(model, images, labels, templates, multi_label=True)
    assert ((free > 0) & (free < 1)).all()


def test_multi_label_uses_the_learned_bias_of_siglip() -> None:
    model = tiny_clip(logit_bias=-3.0)
    similarity = torch.tensor([[0.2, -0.4]])
    expected = torch.sigmoid(similarity * model.logit_scale_value - 3)
    assert torch.allclose(label_probabilities(model, similarity, multi_label=True), expected)


def test_retrieval_functions_find_what_they_were_made_from() -> None:
    model = tiny_clip()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    embedded = embed_images(model, images)
    texts = embed_texts(model, ["a", "red star", "two"])
    assert [hits[0].id for hits in image_to_text_retrieval(model, images, embedded, 1)] == list(range(6))
    assert [hits[0].id for hits in text_to_image_retrieval(model, ["a", "red star", "two"], texts, 1)] == [0, 1, 2]
