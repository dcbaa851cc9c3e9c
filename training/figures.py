"""The figures of each data set that a model card shows: zero-shot accuracy, retrieval, binding, kNN and linear probes.

Shares are 0..1. Named data sets are judged on their validation split, which training never reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import load_model
from models.dalle import DALLETransformer
from models.dvae import DiscreteVAE
from models.errors import DataError
from models.readers import BadRows, Record, decode, read
from models.retrieval import compute_similarity, embed_images, embed_texts, image_text_retrieval, label_embeddings
from training import scenes
from training.data import ArraySource, resized
from training.evaluation import fine_tuning_evaluation, knn_evaluation, linear_evaluation
from training.oracle import SceneReader
from training.pictures import (
    SETS,
    coarse_grocery,
    data_root,
    fine_grocery,
    name_and_weight,
    own_label,
    records_of,
    species_usda,
    unseen_drawing,
)
from training.reconstruction import (
    STATISTICS,
    generation_figures,
    judged_figures,
    oracle_figures,
    reconstruction_distance,
    reconstruction_figures,
    reconstruction_read,
)
from training.scene_captions import swapped_colours, swapped_relation

GROCERY_TEMPLATES = ("a photo of {}", "{} in a grocery store", "{}")
USDA_TEMPLATES = ("a watercolor painting of {}", "{}")
_UNSEEN_SEED = 1_000_003  # scenes of evaluation come from their own streams


def evaluate_model(
    model: Any,
    data: Sequence[str] = ("scenes",),
    data_root: str | None = None,
    seed: int = 0,
    judge: Any = None,
    oracle: SceneReader | None = None,
    statistics: str | Path = STATISTICS,
) -> dict[str, float]:
    """Figures of a model (or of a checkpoint folder or reference) on each data set, by name. Shares are 0..1.

    Named sets are judged on their validation split; other data on what it is, which is training data if it was trained
    on. A model that takes text is judged by zero-shot and retrieval, an image encoder by kNN and a linear probe, an
    image tokenizer by what it leaves of pictures, a generator by its perplexities and, given a `judge` that embeds
    pictures and texts (or its reference), by the pictures that it draws; on scenes, given an `oracle`, by what these
    show. Judge and oracle look at what an image tokenizer leaves of pictures, too. statistics: folder where the mean
    and covariance of real pictures' embeddings are kept.
    """
    model, judge = (load_model(each) if isinstance(each, (str, Path)) else each for each in (model, judge))
    metrics: dict[str, float] = {}
    for spec in data:
        name = name_and_weight(spec)[0]
        metrics |= evaluate_data(model, name, data_root, seed)
        if judge is not None:
            metrics |= _judged(model, judge, name, data_root, seed, statistics)
        if oracle is not None and name == "scenes":
            unseen = _distinct(500, model.preprocess.size, _UNSEEN_SEED + 10 * seed + 8, "any")
            if isinstance(model, DALLETransformer):
                metrics |= oracle_figures(model, oracle, unseen, judge)
            elif isinstance(model, DiscreteVAE):
                metrics |= reconstruction_read(model, oracle, unseen)
    return metrics


def _judged(model: Any, judge: Any, name: str, root: str | None, seed: int, statistics: str | Path) -> dict[str, float]:
    if isinstance(model, DiscreteVAE):
        return reconstruction_distance(model, judge, _pictures(model, name, root, seed), name, statistics)
    if not isinstance(model, DALLETransformer):
        return {}
    seen = None if name == "scenes" else embed_images(judge, training_pictures(judge, name, root))
    pictures, texts = _captioned(model, name, root, seed, 256)
    return judged_figures(model, judge, pictures, texts, name, seen=seen, statistics=statistics)


def evaluate_data(model: Any, name: str, root: str | None = None, seed: int = 0) -> dict[str, float]:
    """The figures of one data set, each named after it. Raises DataError for one that cannot judge this model."""
    if isinstance(model, DALLETransformer):
        return generation_figures(model, *_captioned(model, name, root, seed), name)
    if isinstance(model, DiscreteVAE):
        return reconstruction_figures(model, _pictures(model, name, root, seed), name)
    if model.tokenizer is None:
        return _features(model, name, root, seed)
    if name == "scenes":
        return evaluate_scenes(model, seed=seed)
    if name in _EVALUATIONS:
        return _EVALUATIONS[name](model, data_root(root))
    if name in SETS:
        return _labels_of_set(model, name, data_root(root))
    images, records = _decoded(model, read(name, BadRows()))
    source = ArraySource(name, images, [record.captions for record in records], labels=[r.label or "" for r in records])
    return evaluate_retrieval_source(model, source)


def _captioned(model: Any, name: str, root: str | None, seed: int, count: int = 1000) -> tuple[Tensor, list[str]]:
    """Pictures, uint8 (N, 3, S, S), and a caption of each, that a generator was not trained on."""
    if name == "scenes":
        # Without noise, as a generator is trained on them.
        drawn = _distinct(count, model.preprocess.size, _UNSEEN_SEED + 10 * seed + 7, "exclude", noise=0.0)
        return drawn.images, drawn.canonical
    named = SETS.get(name)
    records = list(read(name, BadRows())) if named is None else records_of(name, data_root(root), "val", BadRows())
    texts = named.captions if named else (lambda record: record.captions)
    images, records = _decoded(model, [record for record in records if texts(record)][:count])
    return images, [texts(record)[0] for record in records]


def _pictures(model: Any, name: str, root: str | None, seed: int) -> Tensor:
    """Pictures to judge a model by that takes no notice of texts and classes: uint8 (N, 3, S, S)."""
    if name != "scenes":
        return labelled_pictures(model, name, root)[0]
    return scenes.sample(1000, size=model.preprocess.size, seed=_UNSEEN_SEED + 10 * seed + 6, captions=0).images


def training_pictures(model: Any, name: str, root: str | None = None) -> Tensor:
    """A named set's train split, or all of other data, by the model's preprocess: uint8 (N, 3, S, S).

    Raises DataError for scenes, which are drawn afresh for every step.
    """
    if name == "scenes":
        raise DataError("scenes are drawn afresh, none was trained on twice; name another data set")
    named = name in SETS
    records = records_of(name, data_root(root), "train", BadRows()) if named else list(read(name, BadRows()))
    return _decoded(model, records)[0]


def unseen_texts(model: Any, name: str, root: str | None, seed: int, count: int) -> list[str]:
    """Captions that a generator was not trained on, of a set's validation split or of fresh scenes, drawn at random."""
    texts = list(dict.fromkeys(_captioned(model, name, root, seed)[1]))
    return [texts[row] for row in np.random.default_rng(seed).permutation(len(texts))[:count]]


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


def _distinct(count: int, size: int, seed: int, holdout: Any, noise: float = scenes.NOISE) -> scenes.Scenes:
    drawn = scenes.sample(count + count // 4, size=size, seed=seed, holdout=holdout, captions=0, noise=noise)
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
        metrics |= _probes_of_a_fifth(source.name, embedded, labels)
    return metrics


def _probes_of_a_fifth(name: str, embedded: Tensor, labels: Sequence[str], linear: bool = True) -> dict[str, float]:
    kept, held = _fifth(len(labels))
    train_labels, test_labels = ([labels[row] for row in rows.tolist()] for rows in (kept, held))
    return _probes(name, embedded[kept], embedded[held], train_labels, test_labels, linear)


def _fifth(count: int) -> tuple[Tensor, Tensor]:
    """Rows of four fifths and of a fifth, always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: count * 4 // 5], order[count * 4 // 5 :]


def _numbered(*parts: list[str]) -> list[Tensor]:
    """Class names as numbers, the same in every part."""
    places = {label: place for place, label in enumerate(sorted(set().union(*parts)))}
    return [torch.tensor([places[label] for label in labels]) for labels in parts]


def _probes(
    name: str, train: Tensor, test: Tensor, train_labels: list[str], test_labels: list[str], linear: bool = True
) -> dict[str, float]:
    """kNN and linear accuracy on frozen embeddings; test rows of a class that training rows lack count as wrong."""
    targets = [each.to(train.device) for each in _numbered(train_labels, test_labels)]
    arguments = (train.float(), targets[0], test.float(), targets[1])
    metrics = {f"{name}_knn": knn_evaluation(*arguments, k=min(20, len(train)))["accuracy"]}
    if linear:
        metrics[f"{name}_linear"] = linear_evaluation(*arguments)["accuracy"]
    return metrics


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

    return {
        f"grocery_{name}_zero_shot": _zero_shot(
            model, embedded, [of(r) for r in records], [of(r) for r in [*train, *records]], GROCERY_TEMPLATES
        )
        for name, of in (("fine", fine_grocery), ("coarse", coarse_grocery))
    }


def _usda(model: Any, root: Path) -> dict[str, float]:
    """Zero-shot among all species of the collection (common names), on the validation paintings."""
    bad = BadRows()
    named = [record for record in records_of("usda", root, "val", bad) if species_usda(record)]
    species = [name for r in [*records_of("usda", root, "train", bad), *named] if (name := species_usda(r))]
    images, named = _decoded(model, named)
    truth = [species_usda(record) or "" for record in named]
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
    train, (images, labels) = _train_and_test(model, name, str(root))
    test = embed_images(model, images)
    zero_shot = {f"{name}_zero_shot": _zero_shot(model, test, labels)}
    return zero_shot | _probes(name, embed_images(model, train[0]), test, train[1], labels)


def _features(model: Any, name: str, root: str | None, seed: int) -> dict[str, float]:
    """kNN and linear accuracy of an image encoder."""
    if name == "scenes":
        return _single_object_probes(model, seed)
    (train, train_labels), (test, test_labels) = _train_and_test(model, name, root)
    return _probes(name, embed_images(model, train), embed_images(model, test), train_labels, test_labels)


def fine_tuned(model: Any, name: str, root: str | None = None, share: float = 0.1, seed: int = 0) -> dict[str, float]:
    """Accuracy on a data set after a copy of the model was fine-tuned on a share of its training labels."""
    (train, train_labels), (test, test_labels) = _train_and_test(model, name, root)
    targets = _numbered(train_labels, test_labels)
    found = fine_tuning_evaluation(model, train, targets[0], test, targets[1], share=share, seed=seed)
    return {f"{name}_fine_tuned_{100 * share:g}_percent": found["accuracy"]}


def _train_and_test(model: Any, name: str, root: str | None) -> list[tuple[Tensor, list[str]]]:
    """Pictures uint8 (N, 3, S, S) with a class, and the classes: a named set's two splits, or four fifths and a fifth.

    Raises DataError where there are no classes.
    """
    if name not in SETS:
        images, labels = labelled_pictures(model, name)
        if labels is None or len(set(labels)) < 2:
            raise DataError(f"{name} has no classes: give a folder whose subfolders are labels, or another data set")
        return [(images[rows], [labels[row] for row in rows.tolist()]) for rows in _fifth(len(labels))]
    parts, label = [], SETS[name].label
    for split in ("train", "val"):
        records = [record for record in records_of(name, data_root(root), split, BadRows()) if label(record)]
        if not records:
            raise DataError(f"{name} has no classes to judge a model's features by; choose another data set")
        images, records = _decoded(model, records)
        parts.append((images, [label(record) or "" for record in records]))
    return parts


def labelled_pictures(model: Any, name: str, root: str | None = None) -> tuple[Tensor, list[str] | None]:
    """Pictures uint8 (N, 3, S, S) by the model's preprocess, of a named set's validation split or of all of other data,
    and their classes; None where not every picture has one."""
    if name in SETS:
        label, records = SETS[name].label, records_of(name, data_root(root), "val", BadRows())
    else:
        label, records = own_label, list(read(name, BadRows()))
    images, records = _decoded(model, records)
    labels = [label(record) for record in records]
    return images, [str(each) for each in labels] if all(labels) else None


def nearest_of_source(model: Any, source: ArraySource, limit: int = 4000) -> dict[str, float]:
    """kNN accuracy among the first `limit` pictures of a labelled source, a fifth against the others: cheap enough for
    during training. They are training pictures, without their labels."""
    embedded = embed_images(model, _on_white(source.images[:limit], model.preprocess.size))
    return _probes_of_a_fifth(source.name, embedded, (source.labels or [])[:limit], linear=False)


def _single_object_probes(model: Any, seed: int, count: int = 2000) -> dict[str, float]:
    """Linear probes of the colour and the shape of single objects in scenes."""
    drawn = [
        scenes.sample(
            count, size=model.preprocess.size, seed=_UNSEEN_SEED + 10 * seed + part, captions=0, kinds=("single",)
        )
        for part in (4, 5)
    ]
    train, test = (embed_images(model, part.images).float().cpu() for part in drawn)
    metrics = {}
    for name in ("colours", "shapes"):
        labels = [torch.from_numpy(getattr(part.key, name)[:, 0].astype(np.int64)) for part in drawn]
        metrics[f"scenes_{name[:-1]}_linear"] = float(linear_evaluation(train, labels[0], test, labels[1])["accuracy"])
    return metrics


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
    return resized(pixels, size)
