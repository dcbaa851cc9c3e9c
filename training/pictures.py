"""Data sets by name: where their pictures lie under SEMBLANCE_DATA, how they are captioned and augmented."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.errors import DataError
from models.readers import BadRows, Record, decode, read
from training.augment import Augmentation
from training.data import ArraySource, SceneSource, Source, StreamSource

# A shop's shelf looks the same from both sides, in any light and from any distance; an arrow or a flag does not.
# Crops are as often larger than the picture as smaller, so that things are on average as large as in a whole picture:
# otherwise a model is trained on larger ones than it is shown later (arXiv:1906.06423).
PHOTO = Augmentation((0.55, 1.4), (0.75, 1.33), 0.5, 12, 0.35, 0.35, 0.35, 0.03)
SHELF = replace(PHOTO, collage=0.5)  # a few thousand photographs are learned by heart otherwise
DRAWING = Augmentation((0.7, 1.5), (0.85, 1.18), 0.0, 10, 0.2, 0.2, 0.25, 0.02, 0.05, background=0.4)
PAINTING = Augmentation((0.6, 1.1), (0.85, 1.18), 0.5, 10, 0.2, 0.2, 0.2, 0.02)


def _emoji(record: Record) -> list[str]:
    meta = record.meta
    name, style = meta["name"], meta["vendor"].replace("-", " ")
    article = "an" if style[0] in "aeiou" else "a"
    keywords = ", ".join([*meta["keywords"][:4]])
    return [
        name,
        name,
        f"{name} emoji",
        f"{article} {style} emoji of {name}",
        f"{name}: {keywords}" if keywords else name,
    ]


def _grocery(record: Record) -> list[str]:
    coarse = coarse_grocery(record)
    return [*record.captions, fine_grocery(record), f"a photo of {coarse}", f"{coarse} in a grocery store", coarse]


def _usda(record: Record) -> list[str]:
    common = species_usda(record)
    extra = [common, f"a watercolor painting of {common}"] if common else []
    return [*record.captions, *extra]


def own_label(record: Record) -> str | None:
    """The class that the data set itself gives a picture."""
    return record.label


def fine_grocery(record: Record) -> str:
    """The product, such as "Royal Gala Apple"."""
    return record.captions[0].removeprefix("a photo of ")


def coarse_grocery(record: Record) -> str:
    """The kind of product, such as "Apple"."""
    return str(record.meta["coarse"]).replace("-", " ")


def species_usda(record: Record) -> str | None:
    """The common name, None for the few paintings without."""
    return record.meta.get("common")


def _captions(record: Record) -> list[str]:
    return record.captions or ([record.label] if record.label else [])


@dataclass(frozen=True)
class PictureSet:
    """A named data set: shards under SEMBLANCE_DATA, its captions, augmentation and default share of a mixture.

    label: the class of a picture, for probes of its features; None where it has none.
    """

    shards: tuple[str, ...]
    captions: Callable[[Record], list[str]] = _captions
    augmentation: Augmentation = field(default_factory=lambda: PHOTO)
    weight: float = 1.0
    license: str = ""
    label: Callable[[Record], str | None] = own_label


_STYLES = ("noto", "twemoji", "blobmoji", "fluent-3d", "fluent-flat", "fluent-mono", "fxemoji")
EMOJI_LICENSE = "emoji: OFL 1.1 / Apache 2.0 (Noto, Blobmoji), CC BY 4.0 (Twemoji, FxEmojis), MIT (Fluent)"
SETS: dict[str, PictureSet] = {
    "emoji": PictureSet(
        tuple(f"emoji/{s}.tar.gz" for s in _STYLES), _emoji, DRAWING, 4.0, EMOJI_LICENSE, lambda r: r.meta["group"]
    ),
    "openclipart": PictureSet(("openclipart/openclipart.tar.gz",), _captions, DRAWING, 1.4, "OpenClipart: CC0"),
    "usda": PictureSet(("usda-pomological/usda.tar.gz",), _usda, PAINTING, 0.6, "USDA: public domain", species_usda),
    "grocery": PictureSet(
        ("grocery/grocery-train.tar.gz", "grocery/grocery-val.tar.gz"),
        _grocery,
        SHELF,
        3.2,
        "Grocery: MIT",
        fine_grocery,
    ),
    "crawl": PictureSet(
        ("crawl-tiles/crawl-tiles.tar.gz",), _captions, DRAWING, 0.4, "crawl tiles: CC0", lambda r: r.meta["kind"]
    ),
    "caltech101": PictureSet(("caltech101/caltech101.tar.gz",), _captions, PHOTO, 1.0, "Caltech-101: CC BY 4.0"),
    "cifar10": PictureSet(("cifar10/cifar10-train.tar.gz",), _captions, PHOTO, 1.0, "CIFAR-10: none stated"),
}
SCENES_WEIGHT = 4.0


def data_root(option: str | None = None) -> Path:
    """The folder of the named data sets: the option, else SEMBLANCE_DATA. Raises DataError with the way out."""
    root = option or os.environ.get("SEMBLANCE_DATA")
    if not root or not Path(root).is_dir():
        raise DataError(f"data folder {root!r} does not exist: give --data-root or set SEMBLANCE_DATA")
    return Path(root)


def records_of(name: str, root: Path, split: str, bad: BadRows) -> list[Record]:
    """The records of a named set whose split is "train" or "val".

    Some emoji styles draw two concepts alike, one of either split: such a picture counts as validation alone.
    """
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    for shard in SETS[name].shards:
        # Most sets write the split into each record; the others list the keys of the validation split in their index.
        index = root / Path(shard).parent / "index.json"
        held = set(json.loads(index.read_text()).get("val_keys", ())) if index.is_file() else set()
        for record in read(str(root / shard), bad):
            of = record.meta.get("split") or ("val" if record.meta["key"] in held else "train")
            splits[of].append(record)
    validation = {record.image for record in splits["val"]}
    splits["train"] = [record for record in splits["train"] if record.image not in validation]
    return splits[split]


def unseen_drawing(record: Record) -> bool:
    """Whether this emoji is kept from training though other styles of it are seen: one in twenty, by its key."""
    return zlib.crc32(record.meta["key"].encode()) % 20 == 0


def name_and_weight(spec: str) -> tuple[str, float | None]:
    """What "name[=weight]" says; a file or folder may have = in its own name. Raises DataError for a wrong weight."""
    if "=" not in spec or Path(spec).expanduser().exists():
        return spec, None
    name, _, share = spec.rpartition("=")
    try:
        weight = float(share)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"{spec!r} is no file or folder, and the weight after = must be a number above 0")
    return name, weight


def open_source(
    spec: str, size: int, bad: BadRows, root: str | None = None, hold: float = 4.0, *, captioned: bool = True
) -> tuple[Source, float]:
    """A source and its weight from "name[=weight]": "scenes", a named set, or anything that `readers.read` takes.

    size: side in pixels at which pictures are held, somewhat above the model's, so that crops stay sharp.
    hold: gigabytes of decoded pictures that are held; a larger set is decoded as it is drawn. captioned: a picture
    without a caption is a bad row.
    """
    name, weight = name_and_weight(spec)
    if name == "scenes":
        return SceneSource(), weight or SCENES_WEIGHT
    if name in SETS:
        kind = SETS[name]
        records = records_of(name, data_root(root), "train", bad)
        if name == "emoji":
            records = [record for record in records if not unseen_drawing(record)]
    else:
        kind = PictureSet(())
        records = list(read(name, bad))
    if captioned:
        for record in records:
            if not kind.captions(record):
                bad.add(record.where, "has no caption")
        records = [record for record in records if kind.captions(record)]
    if len(records) * 4 * size * size > hold * 1e9:
        captions = [kind.captions(record) for record in records]
        return StreamSource(name, records, captions, size, bad, kind.augmentation), weight or kind.weight
    images, kept = decode(records, size, bad)
    labels = [kind.label(record) or "" for record in kept]
    source = ArraySource(
        name, images, [kind.captions(record) for record in kept], kind.augmentation, labels if all(labels) else None
    )
    return source, weight or kind.weight
