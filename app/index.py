"""Search over the vectors of one collection: cosine of unit rows, exact."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.errors import InputError
from models.retrieval import Hit

KINDS = ("auto", "flat")
Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


class VectorIndex(Protocol):
    """Unit vectors by id. Thread-safe; a search sees every add and remove that returned before it began."""

    kind: str

    def __len__(self) -> int: ...
    def add(self, ids: Ids, vectors: Vectors) -> None:
        """ids (N,), none of them present yet; vectors (N, D)."""
        ...

    def remove(self, ids: Ids) -> None:
        """Forget these; unknown ids are passed over."""
        ...

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> list[list[Hit]]:
        """The k best of (Q, D) each, or all there are, best first, equal scores by id; `allowed` narrows the choice."""
        ...


def make_index(kind: str, dimensions: int) -> VectorIndex:
    """An empty index. "auto" and "flat": exact, by FAISS where it is installed, else by numpy.

    Raises InputError for a kind that this version does not build.
    """
    if kind not in KINDS:
        raise InputError(f"index {kind!r} is not built by this version; choose one of {', '.join(KINDS)}")
    if importlib.util.find_spec("faiss") is not None:
        return FaissIndex(dimensions)
    return ExactIndex(dimensions)


class FaissIndex:
    """IndexFlatIP with ids. FAISS must not add and search at once, and checks little: both are seen to here."""

    kind = "flat"

    def __init__(self, dimensions: int) -> None:
        import faiss

        self._faiss: Any = faiss
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimensions))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        with self._lock:
            self._index.add_with_ids(_rows(vectors, self._index.d), np.ascontiguousarray(ids, np.int64))

    def remove(self, ids: Ids) -> None:
        with self._lock:
            self._index.remove_ids(self._faiss.IDSelectorBatch(np.ascontiguousarray(ids, np.int64)))

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> list[list[Hit]]:
        queries = _rows(queries, self._index.d)
        with self._lock:
            count = min(k, len(self) if allowed is None else len(allowed))
            if count <= 0:
                return [[] for _ in queries]
            options = None
            if allowed is not None:
                selector = self._faiss.IDSelectorBatch(np.ascontiguousarray(allowed, np.int64))
                options = self._faiss.SearchParameters(sel=selector)
            scores, ids = self._index.search(queries, count, params=options)
        return [_ordered(*row) for row in zip(ids, scores, strict=True)]


class ExactIndex:
    """The same by a matrix product, for installations without FAISS."""

    kind = "flat"

    def __init__(self, dimensions: int) -> None:
        self._vectors: Vectors = np.empty((16, dimensions), np.float32)
        self._ids: Ids = np.empty(16, np.int64)
        self._places: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        vectors = _rows(vectors, self._vectors.shape[1])
        with self._lock:
            start, end = len(self), len(self) + len(ids)
            if end > len(self._ids):
                room = max(end, 2 * len(self._ids))
                self._vectors = np.resize(self._vectors, (room, self._vectors.shape[1]))
                self._ids = np.resize(self._ids, room)
            self._vectors[start:end], self._ids[start:end] = vectors, ids
            self._places.update(zip(map(int, ids), range(start, end), strict=True))

    def remove(self, ids: Ids) -> None:
        with self._lock:
            for each in map(int, ids):
                if each not in self._places:
                    continue
                place, last = self._places.pop(each), len(self._places)
                if place != last:  # the last row moves into the gap
                    self._vectors[place], self._ids[place] = self._vectors[last], self._ids[last]
                    self._places[int(self._ids[place])] = place

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> list[list[Hit]]:
        queries = _rows(queries, self._vectors.shape[1])
        with self._lock:
            ids, vectors = self._ids[: len(self)], self._vectors[: len(self)]
            if allowed is not None:
                places = [self._places[each] for each in map(int, allowed) if each in self._places]
                ids, vectors = ids[places], vectors[places]
            scores, ids = queries @ vectors.T, ids.copy()
        hits = []
        for row in scores:
            best = np.argpartition(-row, k - 1)[:k] if k < len(row) else np.arange(len(row))
            hits.append(_ordered(ids[best], row[best]))
        return hits


def _rows(vectors: Vectors, dimensions: int) -> Vectors:
    """Contiguous float32 (N, D). Raises InputError for other dimensions or numbers that are not finite."""
    rows = np.ascontiguousarray(vectors, np.float32)
    if rows.ndim != 2 or rows.shape[1] != dimensions:
        raise InputError(f"vectors of shape {rows.shape} given, (N, {dimensions}) expected")
    if not np.isfinite(rows).all():
        raise InputError("vectors must be finite numbers")
    return rows


def _ordered(ids: Sequence[int] | Ids, scores: Any) -> list[Hit]:
    """Hits best first; FAISS fills up with id -1 where it found nothing."""
    hits = [Hit(int(each), float(score)) for each, score in zip(ids, scores, strict=True) if each >= 0]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))
