"""What features are worth: extraction, linear and kNN evaluation; the figures of whole data sets are in figures.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.views import Recipe, ViewTransform


@torch.inference_mode()
def extract_features(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features of every image in a loader of (images, labels) -> ((N, D) float32, (N,)) on the CPU.

    A model with `encode_image` gives its embeddings; another is called, and the first of a tuple is its features.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    features, labels = [], []
    encode = getattr(model, "encode_image", model)
    for images, targets in loader:
        output = encode(images.to(device))
        features.append((output[0] if isinstance(output, tuple) else output).float().cpu())
        labels.append(torch.as_tensor(targets))
    model.train(was_training)
    return torch.cat(features), torch.cat(labels)


@torch.inference_mode(False)  # evaluations run in inference mode, and this one needs gradients
@torch.enable_grad()
def linear_evaluation(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    decays: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    validation: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """Multinomial logistic regression on frozen features with L-BFGS (arXiv:2103.00020, appendix A.3).

    Features (N, D) are standardised by the training mean and deviation; the L2 decay is chosen on a share `validation`
    of the training rows, never on the test rows. -> {"accuracy", "validation_accuracy", "decay"}.
    """
    train_labels = train_labels.clone()  # a tensor of inference mode could not take part in a backward pass
    mean, std = train_features.mean(0), train_features.std(0).clamp(min=1e-6)
    train, test = (train_features - mean) / std, (test_features - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    cut = max(1, int(len(train) * validation))
    held, kept = order[:cut], order[cut:]
    classes = int(max(train_labels.max(), test_labels.max())) + 1

    def accuracy(weights: Tensor, rows: Tensor, labels: Tensor) -> float:
        return float(((rows @ weights[:-1] + weights[-1]).argmax(1) == labels).float().mean())

    scores = [
        accuracy(_logistic(train[kept], train_labels[kept], classes, decay), train[held], train_labels[held])
        for decay in decays
    ]
    best = int(np.argmax(scores))
    weights = _logistic(train, train_labels, classes, decays[best])
    return {
        "accuracy": accuracy(weights, test, test_labels),
        "validation_accuracy": scores[best],
        "decay": decays[best],
    }


def _logistic(rows: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """Weights (D + 1, C), the last row being the biases."""
    weights = torch.zeros(rows.shape[1] + 1, classes, device=rows.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(rows @ weights[:-1] + weights[-1], labels) + decay * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def knn_evaluation(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> dict[str, float]:
    """Weighted k nearest neighbours by cosine, votes exp(cosine / temperature) (arXiv:1805.01978, section 3.4)."""
    train, test = F.normalize(train_features, dim=-1), F.normalize(test_features, dim=-1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for rows, labels in zip(test.split(512), test_labels.split(512), strict=True):
        cosines, nearest = (rows @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, train_labels[nearest], (cosines / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return {"accuracy": right / len(test)}


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,) and covariance (D, D) of features, in float64, and of how many: what a Frechet distance is made of."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Of rows (N, D)."""
        rows = features.double().cpu()
        return cls(rows.mean(0), torch.cov(rows.T), len(rows))

    def save(self, file: str | Path, **about: str) -> None:
        """As safetensors, with what they are of."""
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean, "covariance": self.covariance.contiguous(), "count": torch.tensor(self.count)}
        save_file(tensors, file, metadata=about)

    @classmethod
    def load(cls, file: str | Path) -> FeatureStatistics:
        """What `save` wrote."""
        tensors = load_file(file)
        return cls(tensors["mean"], tensors["covariance"], int(tensors["count"]))


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Distance of two sets of features as if each were normally distributed, eq. 6 of arXiv:1706.08500.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). It is biased upwards for few rows, so compare only figures of equal
    numbers. With an encoder of one's own it is no FID of the literature, whose network is Inception.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # S1 S2 has the eigenvalues of this symmetric product.
    shared = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    squared = (one.mean - other.mean).square().sum()
    return float(squared + one.covariance.trace() + other.covariance.trace() - 2 * shared)


def fine_tuning_evaluation(
    model: nn.Module,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    share: float = 0.1,
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Semi-supervised accuracy: a copy of the model and a new linear layer, trained on a share of the labels.

    Labels are drawn evenly from the classes, one of each at least (arXiv:2002.05709, section 4.2, with 1 and 10 %).
    Images: uint8 (N, 3, S, S), which get random crops and flips. model: any of `models` that encodes images.
    -> {"accuracy", "labels"}, the latter the number that was used.
    """
    torch.manual_seed(seed)
    kept = _share_of_each(train_labels, share, seed)
    device = next(model.parameters()).device
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    network = _Classifier(deepcopy(model).requires_grad_(True), classes).to(device).train()
    steps = max(1, epochs * -(-len(kept) // batch_size))
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    crops = Recipe(crop=(0.3, 1.0), jitter=0, grayscale=0, blur=0)
    transform = ViewTransform(train_images.shape[-1], (crops,), model.preprocess)  # type: ignore[arg-type]
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < min(batch_size, len(kept)):
            order = kept[torch.randperm(len(kept))]
        rows, order = order[:batch_size], order[batch_size:]
        (views,) = transform(train_images[rows].to(device))
        loss = F.cross_entropy(network(views), train_labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        choice = torch.cat([network(part.to(device)).argmax(1).cpu() for part in test_images.split(512)])
    return {"accuracy": float((choice == test_labels).float().mean()), "labels": float(len(kept))}


class _Classifier(nn.Module):
    """A linear layer over a model's embeddings, whose coordinates have a mean square of one."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.scale = model, int(model.embed_dim) ** 0.5  # type: ignore[arg-type]
        self.linear = nn.Linear(int(model.embed_dim), classes)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.scale * self.model.encode_image(images))  # type: ignore[operator]


def _share_of_each(labels: Tensor, share: float, seed: int) -> Tensor:
    """Rows of a share of each class, at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        count = max(1, round(share * len(mine)))
        rows.append(mine[torch.randperm(len(mine), generator=generator)[:count]])
    return torch.cat(rows)
