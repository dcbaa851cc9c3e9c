"""What FAISS makes of a collection's vectors, to say where to look: a graph (HNSW), or codes (IVF-PQ).

Codes are searched, and what they need is trained, on a GPU where FAISS has one (the extra `gpu`). A GPU knows no graph
of this kind, takes one search at a time and cannot pass over ids, so the codes stay in memory, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from app.index import ExactIndex, Ids, Vectors

log = logging.getLogger(__name__)

# How many candidates a graph may be asked for, and with how many of the best of its own items it must find by them.
_BREADTHS, _RECALL = (64, 128, 256, 512, 1024), 0.99
_TRIED, _NEAREST, _AT_ONCE = (
    64,
    10,
    8,
)  # items that it is tried with, their neighbours, and searches that are made as one
_GPU_MOST = 2048  # candidates, and lists, that FAISS looks at on a GPU


@dataclass(frozen=True)
class Graph:
    """What FAISS built, and the ids of all vectors that it ever took. breadth: candidates that it is asked for at
    least (efSearch of HNSW)."""

    kind: str
    index: Any
    ids: Ids
    breadth: int = _BREADTHS[0]
    gpu: OnGpu | None = None


def built(kind: str, index: Any, ids: Ids, breadth: int) -> Graph:
    """With a copy on a GPU, if there is one that can take it."""
    if kind != "ivfpq" or not load_faiss().get_num_gpus():
        return Graph(kind, index, ids, breadth)
    try:
        return Graph(kind, index, ids, breadth, OnGpu(index))
    except Exception:  # FAISS raises RuntimeError for memory and for code sizes that it has no kernel for
        log.warning("the index does not go on the GPU and is searched on the processor", exc_info=True)
        return Graph(kind, index, ids, breadth)


def breadth_of(kind: str, index: Any, exact: ExactIndex, ids: Ids) -> int:
    """The least breadth with which a graph over `ids` finds nearly all of the ten nearest to some of its own items.

    How many it takes is the data's matter: 64 for most embeddings of pictures, 1,000 where no direction is preferred,
    of whose ten nearest 64 find four (60,000 x 192).
    """
    if kind != "hnsw":
        return _BREADTHS[0]
    _, queries = exact.vectors(np.random.default_rng(0).permutation(ids)[:_TRIED])
    starts = range(0, len(queries), _AT_ONCE)  # who adds waits for a search to end
    hits = [found for at in starts for found in exact.search(queries[at : at + _AT_ONCE], _NEAREST + 1)]
    best = [np.array([hit.id for hit in found], np.int64) for found in hits]
    best = [found[np.isin(found, ids)] for found in best]  # what has come since it has not seen
    for breadth in _BREADTHS:
        near = _followed(index, queries, breadth, None)
        found = sum(np.isin(wanted, row).sum() for wanted, row in zip(best, near, strict=True))
        if found >= _RECALL * sum(map(len, best)):
            return breadth
    return _BREADTHS[-1]


def width_of(graph: Graph, k: int) -> int:
    """Candidates that a search for the k nearest takes."""
    if graph.kind == "ivfpq":
        return max(256, 16 * k)  # codes of a sixteenth of the bytes tell near ones apart badly
    return max(graph.breadth, 4 * k)


class OnGpu:
    """A copy of an index on the first GPU; searches take turns."""

    def __init__(self, index: Any) -> None:
        faiss = load_faiss()
        options = faiss.GpuClonerOptions()
        options.useFloat16 = True  # of the tables that codes are looked up in: in float32 long codes have no room
        self._resources = faiss.StandardGpuResources()
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, index, options)
        self._lock = threading.Lock()

    def search(self, queries: Vectors, width: int, lists: int) -> Ids:
        """(Q, D) -> (Q, width) ids, -1 where there are no more."""
        with self._lock:
            _, found = self._index.search(queries, width, params=load_faiss().SearchParametersIVF(nprobe=lists))
        return found


def empty(kind: str, exact: ExactIndex, ids: Ids) -> Any:
    """An index of FAISS without vectors, trained on those of `exact` where it must be."""
    faiss, size = load_faiss(), exact.dimensions
    if kind == "hnsw":
        # Half precision says well enough where to look, and needs no training on what may not be typical.
        graph = faiss.IndexHNSWSQ(size, faiss.ScalarQuantizer.QT_fp16, 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 100
        return faiss.IndexIDMap(graph)
    lists = max(1, min(int(4 * len(ids) ** 0.5), len(ids) // 39))
    codes = next(parts for parts in range(max(1, size // 8), 0, -1) if size % parts == 0)
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(size), size, lists, codes, 8, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(ids)[: max(10_000, 50 * lists)]
    if faiss.get_num_gpus():  # the search for the lists' centres, which is most of the training
        index.clustering_index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatIP(size))
    index.train(exact.vectors(sample)[1])
    index.clustering_index = None
    return index


def candidates(graph: Graph, queries: Vectors, k: int, allowed: Ids | None, gone: Ids) -> list[Ids]:
    """The ids near each query by the graph's own measure, without those that are gone or not allowed."""
    faiss, selector = load_faiss(), None
    width, lists = width_of(graph, k), 0
    if graph.kind == "ivfpq":
        lists = max(16, graph.index.nlist // 8)
    wider = 2 * width if len(gone) else width  # where it cannot pass over what is gone, of which a third is the most
    if graph.gpu is not None and allowed is None and max(wider, lists) <= _GPU_MOST:
        found = graph.gpu.search(queries, wider, lists)
        there = (found >= 0) & ~np.isin(found, gone)
        return [row[kept] for row, kept in zip(found, there, strict=True)]
    if allowed is not None:
        selector = faiss.IDSelectorBatch(allowed)
    elif len(gone):
        of_gone = faiss.IDSelectorBatch(gone)
        selector = faiss.IDSelectorNot(of_gone)
    if graph.kind == "hnsw":
        return _followed(graph.index, queries, width, selector)
    faiss.omp_set_num_threads(1)  # as below
    _, found = graph.index.search(queries, width, params=faiss.SearchParametersIVF(nprobe=lists, sel=selector))
    return [row[row >= 0] for row in found]  # FAISS fills up with id -1


def _followed(index: Any, queries: Vectors, width: int, selector: Any) -> list[Ids]:
    """What HNSW leads to."""
    faiss = load_faiss()
    # Of this thread's work alone. Two threads wait for each other: 8 ms a query in place of 0.4 where cores are busy.
    faiss.omp_set_num_threads(1)
    _, found = index.search(queries, width, params=faiss.SearchParametersHNSW(efSearch=width, sel=selector))
    return [row[row >= 0] for row in found]


def load_faiss() -> Any:
    """It takes a while to import, it may not be there, and its types are those of C++."""
    return importlib.import_module("faiss")


def has_faiss() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("faiss") is not None
