"""What a trained model is worth: zero-shot accuracy, retrieval, kNN and linear probes, and figures of each data set.

Shares are 0..1. Named data sets are judged on their validation split, which training never reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import DataError
from models.readers import BadRows, Record, decode, read
from models.retrieval import compute_similarity, embed_images, embed_texts, image_text_retrieval, label_embeddings
from training import scenes
from training.data import ArraySource
from training.pictures import SETS, data_root, records_of, unseen_drawing
from training.scene_captions import swapped_colours, swapped_relation

GROCERY_TEMPLATES = ("a photo of {}", "{} in a grocery store", "{}")
USDA_TEMPLATES = ("a watercolor painting of {}", "{}")
_UNSEEN_SEED = 1_000_003  # scenes of evaluation come from their own streams


def evaluate_data(model: Any, name: str, root: str | None = None, seed: int = 0) -> dict[str, float]:
    """The figures of one data set, each named after it."""
    if name == "scenes":
        return evaluate_scenes(model, seed=seed)
    if name in _EVALUATIONS:
        return _EVALUATIONS[name](model, data_root(root))
    if name in SETS:
        return _labels_of_set(model, name, data_root(root))
    images, records = _decoded(model, read(name, BadRows()))
    source = ArraySource(name, images, [record.captions for record in records], labels=[r.label or "" for r in records])
    return evaluate_retrieval_source(model, source)


def evaluate_scenes(model: Any, count: int = 1000, seed: int = 0) -> dict[str, float]:
    """Retrieval among `count` unseen scenes with distinct captions, binding, and zero-shot colours and shapes.

    r1: text-to-image R@1. heldout_r1: the same where every scene has a colour x shape pair that training never shows.
    swap_*: share of pairs whose true caption is nearer than the same with colours or places exchanged. zero_shot: the
    colour and shape of single objects among all 100 "a <colour> <shape>"; zero_shot_shape and _colour: its halves.
    """
    size = model.preprocess.size
    metrics: dict[str, float] = {}
    for index, (prefix, holdout) in enumerate((("scenes", "exclude"), ("scenes_heldout", "only"))):
        drawn = _distinct(count, size, _UNSEEN_SEED + 10 * seed + index, holdout)
        ranks = image_text_retrieval(embed_images(model, drawn.images), embed_texts(model, drawn.canonical))
        metrics[f"{prefix}_r1"] = ranks["text_to_image_r1"]
        metrics[f"{prefix}_image_to_text_r1"] = ranks["image_to_text_r1"]
    return metrics | _binding(model, count, seed) | _single_objects(model, count, seed)


def _distinct(count: int, size: int, seed: int, holdout: Any) -> scenes.Scenes:
    drawn = scenes.sample(count + count // 4, size=size, seed=seed, holdout=holdout, captions=0)
    rows = np.array(list({text: row for row, text in reversed(list(enumerate(drawn.canonical)))}.values())[:count])
    if len(rows) < count:
        raise DataError(f"only {len(rows)} distinct captions among the scenes, {count} wanted")
    return scenes.Scenes(drawn.images[rows], drawn.key.take(rows), [], [drawn.canonical[row] for row in rows])


def _binding(model: Any, count: int, seed: int) -> dict[str, float]:
    drawn = scenes.sample(
        count,
        size=model.preprocess.size,
        seed=_UNSEEN_SEED + 10 * seed + 2,
        captions=0,
        kinds=("beside", "stacked", "inside"),
    )
    images, true = embed_images(model, drawn.images), embed_texts(model, drawn.canonical)
    own = (images * true).sum(-1)
    result = {}
    for name, swap in (("colours", swapped_colours), ("relation", swapped_relation)):
        wrong = [swap(drawn.key, row) for row in range(count)]
        differs = torch.tensor([a != b for a, b in zip(wrong, drawn.canonical, strict=True)])
        better = own > (images * embed_texts(model, wrong)).sum(-1)
        result[f"scenes_swap_{name}"] = float(better[differs].float().mean())
    return result


def _single_objects(model: Any, count: int, seed: int) -> dict[str, float]:
    drawn = scenes.sample(
        count,
        size=model.preprocess.size,
        seed=_UNSEEN_SEED + 10 * seed + 3,
        holdout="any",
        captions=0,
        kinds=("single",),
    )
    labels = [f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]
    texts = label_embeddings(model, labels, ("a {}",))
    choice = compute_similarity(embed_images(model, drawn.images), texts).argmax(1).numpy()
    colour, shape = choice // 10 == drawn.key.colours[:, 0], choice % 10 == drawn.key.shapes[:, 0]
    return {
        "scenes_zero_shot": float((colour & shape).mean()),
        "scenes_zero_shot_colour": float(colour.mean()),
        "scenes_zero_shot_shape": float(shape.mean()),
    }


def evaluate_retrieval_source(model: Any, source: Any, limit: int = 1000) -> dict[str, float]:
    """Retrieval both ways among the first `limit` pictures of a source; where labelled, zero-shot, kNN and linear
    accuracy as well, the latter two on a fifth of the pictures after fitting on the others."""
    images = _on_white(source.images[:limit], model.preprocess.size)
    captions = source.captions[: len(images)]
    owners = torch.tensor([row for row, texts in enumerate(captions) for _ in texts])
    embedded = embed_images(model, images)
    texts = embed_texts(model, [text for row in captions for text in row])
    metrics = {f"{source.name}_{name}": value for name, value in image_text_retrieval(embedded, texts, owners).items()}
    if source.labels and len(set(source.labels)) > 1:
        labels = source.labels[: len(images)]
        metrics[f"{source.name}_zero_shot"] = _zero_shot(model, embedded, labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        cut = len(labels) * 4 // 5
        kept, held = order[:cut], order[cut:]
        metrics |= _probes(source.name, embedded[kept], embedded[held], *(_pick(labels, rows) for rows in (kept, held)))
    return metrics


def _pick(labels: Sequence[str], rows: Tensor) -> list[str]:
    return [labels[row] for row in rows.tolist()]


def _probes(
    name: str, train: Tensor, test: Tensor, train_labels: list[str], test_labels: list[str]
) -> dict[str, float]:
    """kNN and linear accuracy on frozen embeddings; test rows of a class that training rows lack count as wrong."""
    places = {label: place for place, label in enumerate(sorted({*train_labels, *test_labels}))}
    targets = [torch.tensor([places[label] for label in labels]) for labels in (train_labels, test_labels)]
    arguments = (train.float().cpu(), targets[0], test.float().cpu(), targets[1])
    near = knn_evaluation(*arguments, k=min(20, len(train)))
    return {f"{name}_knn": near["accuracy"], f"{name}_linear": linear_evaluation(*arguments)["accuracy"]}


def _zero_shot(
    model: Any,
    images: Tensor,
    truth: Sequence[str],
    labels: Sequence[str] | None = None,
    templates: Sequence[str] = ("a photo of a {}", "{}"),
) -> float:
    names = sorted(set(labels or truth))
    choice = compute_similarity(
        images, label_embeddings(model, [n.replace("_", " ") for n in names], templates)
    ).argmax(1)
    return float(np.mean([names[c] == t for c, t in zip(choice.tolist(), truth, strict=True)]))


def _emoji(model: Any, root: Path) -> dict[str, float]:
    """val_*: name to picture among the unseen concepts of one style, mean over styles. seen_r1: the name of a picture
    among all concepts' names, for pictures of seen concepts; unseen_drawing_r1: the same for drawings that were kept
    from training while other styles of the concept were seen."""
    bad = BadRows()
    images, records = _decoded(model, records_of("emoji", root, "val", bad))
    embedded = embed_images(model, images)
    styles = np.array([record.meta["vendor"] for record in records])
    parts = []
    for style in sorted(set(styles)):
        rows = np.flatnonzero(styles == style)
        texts = embed_texts(model, [records[row].meta["name"] for row in rows])
        parts.append(image_text_retrieval(embedded[torch.from_numpy(rows)], texts))
    seen = records_of("emoji", root, "train", bad)
    names = sorted({record.meta["name"] for record in [*records, *seen]})
    texts = embed_texts(model, names)
    images, seen = _decoded(model, seen)
    choice = compute_similarity(embed_images(model, images), texts).argmax(1).tolist()
    right = np.array([names[c] == record.meta["name"] for c, record in zip(choice, seen, strict=True)])
    unseen = np.array([unseen_drawing(record) for record in seen])
    return {
        "emoji_val_r1": float(np.mean([part["text_to_image_r1"] for part in parts])),
        "emoji_val_r10": float(np.mean([part["text_to_image_r10"] for part in parts])),
        "emoji_seen_r1": float(right[~unseen].mean()),
        "emoji_unseen_drawing_r1": float(right[unseen].mean()),
    }


def _grocery(model: Any, root: Path) -> dict[str, float]:
    """Zero-shot among 81 fine and 42 coarse names, on the validation photographs."""
    bad = BadRows()
    train = records_of("grocery", root, "train", bad)
    images, records = _decoded(model, records_of("grocery", root, "val", bad))
    embedded = embed_images(model, images)

    def fine(record: Record) -> str:
        return record.captions[0].removeprefix("a photo of ")

    def coarse(record: Record) -> str:
        return str(record.meta["coarse"]).replace("-", " ")

    return {
        f"grocery_{name}_zero_shot": _zero_shot(
            model, embedded, [of(r) for r in records], [of(r) for r in [*train, *records]], GROCERY_TEMPLATES
        )
        for name, of in (("fine", fine), ("coarse", coarse))
    }


def _usda(model: Any, root: Path) -> dict[str, float]:
    """Zero-shot among all species of the collection (common names), on the validation paintings."""
    bad = BadRows()
    named = [record for record in records_of("usda", root, "val", bad) if record.meta.get("common")]
    species = [r.meta["common"] for r in [*records_of("usda", root, "train", bad), *named] if r.meta.get("common")]
    images, named = _decoded(model, named)
    truth = [record.meta["common"] for record in named]
    return {"usda_species_zero_shot": _zero_shot(model, embed_images(model, images), truth, species, USDA_TEMPLATES)}


def _titles(name: str) -> Any:
    def evaluate(model: Any, root: Path) -> dict[str, float]:
        images, records = _decoded(model, records_of(name, root, "val", BadRows()))
        texts = embed_texts(model, [record.captions[0] for record in records])
        ranks = image_text_retrieval(embed_images(model, images), texts)
        return {f"{name}_val_r1": ranks["text_to_image_r1"], f"{name}_val_r10": ranks["text_to_image_r10"]}

    return evaluate


def _labels_of_set(model: Any, name: str, root: Path) -> dict[str, float]:
    """Zero-shot, kNN and linear accuracy on the validation split of a labelled set."""

    def embedded(split: str) -> tuple[Tensor, list[str]]:
        images, records = _decoded(model, records_of(name, root, split, BadRows()))
        return embed_images(model, images), [str(record.label or record.captions[0]) for record in records]

    train, train_labels = embedded("train")
    test, test_labels = embedded("val")
    zero_shot = {f"{name}_zero_shot": _zero_shot(model, test, test_labels)}
    return zero_shot | _probes(name, train, test, train_labels, test_labels)


_EVALUATIONS = {
    "emoji": _emoji,
    "grocery": _grocery,
    "usda": _usda,
    "openclipart": _titles("openclipart"),
    "crawl": _titles("crawl"),
}


def _decoded(model: Any, records: Iterable[Record]) -> tuple[Tensor, list[Record]]:
    """Pictures through the model's own evaluation preprocess: uint8 (N, 3, S, S), and the records that were read."""
    images, kept = decode(records, model.preprocess.size, BadRows(), prepare=model.preprocess)
    return images, kept


def _on_white(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 3 or 4, H, W) on white -> uint8 (N, 3, size, size)."""
    pixels = images.float()
    if images.shape[1] == 4:
        pixels = pixels[:, :3] * (pixels[:, 3:] / 255) + 255 - pixels[:, 3:]
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).round().clamp(0, 255).byte()


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
    weights = torch.zeros(rows.shape[1] + 1, classes, requires_grad=True)
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
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, train_labels[nearest], (cosines / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return {"accuracy": right / len(test)}
