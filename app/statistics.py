"""What a collection holds, in numbers: kinds, metadata, and how near its items are to one another."""

from __future__ import annotations

from typing import Any

import apsw
import numpy as np

from app.database import rows
from app.index import VectorIndex

KEYS, VALUES = 100, 10  # of the metadata, the most frequent
_SAMPLE = 500  # items whose cosines are looked at
_SHARES = (0.05, 0.5, 0.95, 0.99)

# A row a key and type of value, for one pass over the items.
_METADATA = """
    SELECT key, type, COUNT(*), COUNT(DISTINCT value), MIN(value), MAX(value)
    FROM items, json_each(items.metadata) WHERE collection = ? GROUP BY key, type
"""
_VALUES = """
    SELECT value, COUNT(*) AS times FROM items, json_each(items.metadata)
    WHERE collection = ? AND key = ? AND type = 'text' GROUP BY value ORDER BY times DESC, value LIMIT ?
"""


def kinds(connection: apsw.Connection, collection: int) -> dict[str, int]:
    """Items of each kind, and pictures that are kept."""
    found = dict(rows(connection, "SELECT kind, COUNT(*) FROM items WHERE collection = ? GROUP BY kind", collection))
    pictures = rows(connection, "SELECT COUNT(DISTINCT picture) FROM items WHERE collection = ?", collection)[0][0]
    return {"image": found.get("image", 0), "text": found.get("text", 0), "pictures": pictures}


def metadata(connection: apsw.Connection, collection: int) -> list[dict[str, Any]]:
    """Of each key, the most frequent first: how many items have it, its values, their range and the most frequent."""
    found: dict[str, dict[str, Any]] = {}
    for key, kind, items, distinct, low, high in rows(connection, _METADATA, collection):
        entry = found.setdefault(key, {"key": key, "items": 0, "values": 0, "min": None, "max": None, "frequent": []})
        entry["items"] += items
        entry["values"] += distinct
        if kind in ("integer", "real"):
            entry["min"] = low if entry["min"] is None else min(low, entry["min"])
            entry["max"] = high if entry["max"] is None else max(high, entry["max"])
    shown = sorted(found.values(), key=lambda entry: (-entry["items"], entry["key"]))[:KEYS]
    for entry in shown:
        frequent = rows(connection, _VALUES, collection, entry["key"], VALUES)
        entry["frequent"] = [{"value": value, "items": times} for value, times in frequent]
    return shown


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
