"""What a collection holds, in numbers: kinds, metadata, and how near its items are to one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from app.index import VectorIndex

KEYS, VALUES = 100, 10  # of the metadata, the most frequent
_SAMPLE = 500  # items whose cosines are looked at
_SHARES = (0.05, 0.5, 0.95, 0.99)


def counts(
    of_kind: Mapping[str, int],
    pictures: int,
    of_metadata: Iterable[tuple[str, bool, int, int, Any, Any]],
    frequent: Callable[[str], Iterable[tuple[str, int]]],
) -> dict[str, Any]:
    """`kinds` and `metadata` of what a store has counted.

    of_metadata: of every key and type of value: key, whether they are numbers, items, different values, the least and
    the greatest. frequent: a key's most frequent texts, VALUES at most, with their items.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, numbers, items, distinct, low, high in of_metadata:
        entry = found.setdefault(key, {"key": key, "items": 0, "values": 0, "min": None, "max": None, "frequent": []})
        entry["items"] += items
        entry["values"] += distinct
        if numbers:
            entry["min"] = low if entry["min"] is None else min(low, entry["min"])
            entry["max"] = high if entry["max"] is None else max(high, entry["max"])
    shown = sorted(found.values(), key=lambda entry: (-entry["items"], entry["key"]))[:KEYS]
    for entry in shown:
        entry["frequent"] = [{"value": value, "items": times} for value, times in frequent(entry["key"])]
    kinds = {"image": of_kind.get("image", 0), "text": of_kind.get("text", 0), "pictures": pictures}
    return {"kinds": kinds, "metadata": shown}


def cosines(index: VectorIndex) -> dict[str, dict[str, float]]:
    """Quantiles of the cosines of items to others drawn at random, and to the nearest other, of a sample that is always
    the same. Empty for fewer than two items. What a search's best score is worth shows beside these."""
    ids = np.sort(index.ids())
    if len(ids) < 2:
        return {}
    chosen = np.random.default_rng(0).permutation(ids)[:_SAMPLE]
    known, vectors = index.vectors(chosen)
    if len(known) < 2:
        return {}
    pairs = (vectors @ vectors.T)[np.triu_indices(len(known), 1)]
    found = index.search(vectors, 2)
    # The first that is another; what was deleted meanwhile has none.
    others = ((hit.score for hit in hits if hit.id != own) for own, hits in zip(known.tolist(), found, strict=True))
    nearest = [score for scores in others if (score := next(scores, None)) is not None]
    return {name: _quantiles(values) for name, values in (("random", pairs), ("nearest", nearest)) if len(values)}


def _quantiles(values: Any) -> dict[str, float]:
    return {f"p{share * 100:.0f}": float(np.quantile(values, share)) for share in _SHARES}
