"""Search over the vectors of one collection: cosine of unit rows. Exact, and of large ones first narrowed by FAISS."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from app import graphs, snapshots
from models.errors import InputError
from models.retrieval import Hit

log = logging.getLogger(__name__)

KINDS = ("auto", "flat", "hnsw", "ivfpq")
Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

_BLOCK = 65_536  # rows whose scores are held at once
_STEP = 64  # rows that are looked at in a row in the time that a graph takes for one of its candidates
_BUILD = 1_000  # rows that a graph takes in one call; between two it can be stopped
_PATIENCE = 5.0  # seconds that a close waits for a build; FAISS's training cannot be stopped, and dies with the process
_NO_IDS: Ids = np.empty(0, np.int64)
# From how many vectors on each kind is built: FAISS wants 39 for every centroid of a code, and few need no graph.
_LEAST = {"hnsw": 1_000, "ivfpq": 10_000}
# Where "auto" goes over: one search of 50,000 exactly is some milliseconds, and links take more memory than codes.
_AUTO = {"ivfpq": 2_000_000, "hnsw": 50_000}


class VectorIndex(Protocol):
    """Unit vectors by id. Thread-safe; a search sees every add and remove that returned before it began."""

    @property
    def dimensions(self) -> int:
        """D of every vector."""
        ...

    @property
    def kind(self) -> str:
        """How it searches now: flat, hnsw or ivfpq."""
        ...

    @property
    def indexed(self) -> int:
        """How many of its vectors a graph or codes cover; the others are looked at one by one."""
        ...

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

    def ids(self) -> Ids:
        """Every id, in no order."""
        ...

    def vectors(self, ids: Ids) -> tuple[Ids, Vectors]:
        """Those of the ids that are there, with their vectors."""
        ...

    def close(self) -> None:
        """Stop what goes on in the background."""
        ...


def make_index(
    kind: str, dimensions: int, ids: Ids = _NO_IDS, vectors: Vectors | None = None, snapshot: Path | None = None
) -> VectorIndex:
    """An index of these vectors. "flat" is exact; "hnsw" and "ivfpq" are narrowed by a graph or by codes of FAISS once
    there are enough vectors; "auto" goes from the first to the second and the third as it grows.

    snapshot: where what was built is kept, without a suffix, so that it need not be built again.
    Raises InputError as check_kind does.
    """
    check_kind(kind)
    exact = ExactIndex(dimensions)
    if vectors is not None:
        exact.add(ids, vectors)
    return GrowingIndex(kind, exact, snapshot) if kind != "flat" and graphs.has_faiss() else exact


def check_kind(kind: str) -> None:
    """Raises InputError for an unknown kind of index, and for one that needs FAISS where it is not installed."""
    if kind not in KINDS:
        raise InputError(f"index {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if kind in _LEAST and not graphs.has_faiss():
        raise InputError(f"index {kind!r} needs FAISS, which is not installed; choose flat, or install semblance[cpu]")


class ExactIndex:
    """A product with all vectors, in rows that a removed one's place is filled from the end of.

    FAISS's IndexFlatIP takes 1.2 to 2.3 times as long for one query and 7 times for 64 (100,000 x 512, two cores), and
    a removal from it moves everything behind.
    """

    kind, indexed = "flat", 0

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._vectors: Vectors = np.empty((16, dimensions), np.float32)
        self._ids: Ids = np.empty(16, np.int64)
        self._places: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        vectors = checked_rows(vectors, self.dimensions)
        with self._lock:
            start, end = len(self), len(self) + len(ids)
            if end > len(self._ids):
                room = max(end, 2 * len(self._ids))
                grown = np.empty((room, self.dimensions), np.float32), np.empty(room, np.int64)
                grown[0][:start], grown[1][:start] = self._vectors[:start], self._ids[:start]
                self._vectors, self._ids = grown
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
        queries = checked_rows(queries, self.dimensions)
        found: list[list[Hit]] = [[] for _ in queries]
        with self._lock:
            count = len(self)
            places = None if allowed is None else np.flatnonzero(np.isin(self._ids[:count], allowed))
            for start in range(0, count if places is None else len(places), _BLOCK):
                block: Any = slice(start, min(start + _BLOCK, count))
                if places is not None:
                    block = places[start : start + _BLOCK]
                ids = self._ids[block]
                for hits, scores in zip(found, queries @ self._vectors[block].T, strict=True):
                    hits += _best(ids, scores, k)
        return [_ordered(hits)[:k] for hits in found]

    def ids(self) -> Ids:
        with self._lock:
            return self._ids[: len(self)].copy()

    def vectors(self, ids: Ids) -> tuple[Ids, Vectors]:
        with self._lock:
            places = [self._places[each] for each in ids.tolist() if each in self._places]
            return self._ids[places], self._vectors[places]

    def close(self) -> None:
        """Nothing goes on in the background."""


@dataclass(frozen=True)
class _State:
    """What a search goes by; replaced as a whole when a graph has been built. gone: removed since."""

    graph: graphs.Graph | None
    recent: ExactIndex
    gone: Ids = field(default_factory=lambda: _NO_IDS)


class GrowingIndex:
    """An exact index, and beside it what FAISS made of it in the background, which says where to look.

    Every vector is in the exact index, and only what is there is ever found, with its exact score. A graph covers what
    was there when it was built, for FAISS must not add and search at once and HNSW cannot forget. What came since is
    searched exactly (`recent`), what went is passed over (`gone`). Once much has come, a copy of the graph takes it in;
    once much has gone, a new one is built of all; searches go on meanwhile.
    """

    def __init__(self, kind: str, exact: ExactIndex, snapshot: Path | None = None) -> None:
        """kind: auto, hnsw or ivfpq. exact: with the vectors there are. snapshot: as make_index takes it."""
        self._asked, self._exact, self._snapshot = kind, exact, snapshot
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._builder: threading.Thread | None = None
        self._state = _State(None, ExactIndex(exact.dimensions))
        if snapshot is not None and len(exact) and (kept := snapshots.load(snapshot, exact)) is not None:
            kind, index, ids, breadth = kept
            self._take(graphs.built(kind, index, ids, breadth or graphs.breadth_of(kind, index, exact, ids)))
        with self._lock:
            self._maintain()

    @property
    def dimensions(self) -> int:
        return self._exact.dimensions

    @property
    def kind(self) -> str:
        graph = self._state.graph
        return "flat" if graph is None else graph.kind

    @property
    def indexed(self) -> int:
        with self._lock:
            return 0 if self._state.graph is None else max(0, len(self._exact) - len(self._state.recent))

    def __len__(self) -> int:
        return len(self._exact)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        with self._lock:
            self._exact.add(ids, vectors)
            if self._state.graph is not None:
                self._state.recent.add(ids, vectors)
            self._maintain()

    def remove(self, ids: Ids) -> None:
        with self._lock:
            self._exact.remove(ids)
            if self._state.graph is not None:
                never, _ = self._state.recent.vectors(ids)  # were in the graph, which is not worn by them
                self._state.recent.remove(never)
                self._state = replace(self._state, gone=np.append(self._state.gone, ids[~np.isin(ids, never)]))
            self._maintain()

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> list[list[Hit]]:
        queries = checked_rows(queries, self.dimensions)
        with self._lock:
            state, count = self._state, len(self._exact)
        wanted = min(k, count if allowed is None else len(allowed))
        # Few allowed ones, or very many wanted ones, are found faster by looking at each.
        if state.graph is None or self._is_slow(state.graph, k) or (allowed is not None and 20 * len(allowed) < count):
            return self._exact.search(queries, k, allowed)
        near = graphs.candidates(state.graph, queries, k, allowed, state.gone)
        found = []
        for query, ids, hits in zip(queries, near, state.recent.search(queries, k, allowed), strict=True):
            known, vectors = self._exact.vectors(ids)
            found.append(_ordered(hits + _best(known, vectors @ query, k))[:k])
        short = [place for place, hits in enumerate(found) if len(hits) < wanted]
        for place, hits in zip(short, self._exact.search(queries[short], k, allowed) if short else [], strict=True):
            found[place] = hits  # a filter leaves parts of a graph that no path leads to
        return found

    def _is_slow(self, graph: graphs.Graph, k: int) -> bool:
        cost = _STEP * graphs.width_of(graph, k) if graph.kind == "hnsw" else 20 * k
        return cost > len(self)

    def ids(self) -> Ids:
        return self._exact.ids()

    def vectors(self, ids: Ids) -> tuple[Ids, Vectors]:
        return self._exact.vectors(ids)

    def close(self) -> None:
        """Stop building; what is not finished is begun again at the next start."""
        self._stop.set()
        if (builder := self._builder) is not None:
            builder.join(_PATIENCE)

    def wait(self) -> None:
        """Until there is nothing left to build."""
        while (builder := self._builder) is not None:
            builder.join()

    def _wanted(self) -> str | None:
        """The kind that this many vectors should have; None: no graph."""
        if self._asked == "auto":
            return next((kind for kind, least in _AUTO.items() if len(self) >= least), None)
        return self._asked if len(self) >= _LEAST[self._asked] else None

    def _due(self) -> bool:
        graph = self._state.graph
        if graph is None:
            return self._wanted() is not None
        return len(self._state.recent) > max(_BUILD, len(graph.ids) // 20) or self._worn()

    def _worn(self) -> bool:
        """Whether so much of the graph is gone that searches look at it in vain."""
        graph = self._state.graph
        return graph is not None and 3 * len(self._state.gone) > len(graph.ids)

    def _maintain(self) -> None:
        """Start building if it is time; call with the lock held."""
        if self._builder is None and not self._stop.is_set() and self._due():
            self._builder = threading.Thread(target=self._build_all, name="index", daemon=True)
            self._builder.start()

    def _build_all(self) -> None:
        try:
            # Of this thread's work alone; the rest of the machine is the searches'.
            graphs.load_faiss().omp_set_num_threads(1)
            while True:
                with self._lock:
                    if self._stop.is_set() or not self._due():
                        self._builder = None
                        return
                    kind, worn = self._wanted(), self._worn()
                self._build(kind, fresh=worn)
        except Exception:
            log.exception("an index could not be built; searches stay exact until the next start")
            self._stop.set()
            self._builder = None

    def _build(self, kind: str | None, *, fresh: bool) -> None:
        old = self._state.graph
        if kind is None:
            self._take(None)
            return
        if old is None or old.kind != kind or fresh:
            todo, covered = self._exact.ids(), [_NO_IDS]
            index = graphs.empty(kind, self._exact, todo)
        else:
            todo, covered = self._state.recent.ids(), [old.ids]
            index = graphs.load_faiss().clone_index(old.index)
        for start in range(0, len(todo), _BUILD):
            if self._stop.is_set():
                return
            ids, vectors = self._exact.vectors(todo[start : start + _BUILD])
            if len(ids):
                index.add_with_ids(vectors, ids)
                covered.append(ids)
        took = np.concatenate(covered)
        graph = graphs.built(kind, index, took, graphs.breadth_of(kind, index, self._exact, took))
        self._take(graph)
        if self._snapshot is not None and not self._stop.is_set():
            snapshots.save(self._snapshot, graph, self._exact)

    def _take(self, graph: graphs.Graph | None) -> None:
        """Search by this graph from now on."""
        with self._lock:
            recent, gone = ExactIndex(self.dimensions), _NO_IDS
            if graph is not None:
                there = self._exact.ids()
                recent.add(*self._exact.vectors(there[~np.isin(there, graph.ids)]))
                gone = graph.ids[~np.isin(graph.ids, there)]
            self._state = _State(graph, recent, gone)


@dataclass(eq=False)
class _Asked:
    queries: Vectors
    k: int
    answer: Future[list[list[Hit]]] = field(default_factory=Future)


class SharedSearch:
    """Searches of everything that come while one runs, made as one: of 64 at once each costs a twelfth."""

    def __init__(self, index: VectorIndex) -> None:
        self._index = index
        self._asked: list[_Asked] = []
        self._searching = False
        self._turn = threading.Condition()

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> list[list[Hit]]:
        """As VectorIndex.search."""
        if allowed is not None:
            return self._index.search(queries, k, allowed)
        mine = _Asked(checked_rows(queries, self._index.dimensions), k)
        with self._turn:
            self._asked.append(mine)
            self._turn.wait_for(lambda: mine.answer.done() or not self._searching)
            if mine.answer.done():  # another took this search along
                return mine.answer.result()
            self._searching = True
            asked, self._asked = self._asked, []
        try:
            queries, k = np.concatenate([each.queries for each in asked]), max(each.k for each in asked)
            found = iter(self._index.search(queries, k))
            for each in asked:
                each.answer.set_result([next(found)[: each.k] for _ in each.queries])
        except BaseException as error:
            for each in asked:
                if not each.answer.done():
                    each.answer.set_exception(error)
        with self._turn:
            self._searching = False
            self._turn.notify_all()
        return mine.answer.result()


def checked_rows(vectors: Vectors, dimensions: int) -> Vectors:
    """Contiguous float32 (N, D). Raises InputError for other dimensions or numbers that are not finite."""
    rows = np.ascontiguousarray(vectors, np.float32)
    if rows.ndim != 2 or rows.shape[1] != dimensions:
        raise InputError(f"vectors of shape {rows.shape} given, (N, {dimensions}) expected")
    if not np.isfinite(rows).all():
        raise InputError("vectors must be finite numbers")
    return rows


def _best(ids: Ids, scores: NDArray[np.float32], k: int) -> list[Hit]:
    """At least the k best, and all that are as good as the last of them, so that ids decide among equals."""
    if k < len(scores):
        places = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
        ids, scores = ids[places], scores[places]
    return [Hit(each, score) for each, score in zip(ids.tolist(), scores.tolist(), strict=True)]


def _ordered(hits: list[Hit]) -> list[Hit]:
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))
