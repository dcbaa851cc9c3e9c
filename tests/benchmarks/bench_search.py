"""Search by each kind of index beside FAISS called directly, in one run: `make bench-search`.

Prints milliseconds and ratios; nothing here passes or fails. Vectors of 512 numbers are random around centres, about a
thousand around each, and queries are drawn alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from app.index import GrowingIndex, SharedSearch, make_index

SIZE, K = 512, 10


def drawn(count: int, centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors around the centres."""
    rows = rng.standard_normal((count, SIZE), dtype=np.float32) * (0.7 / SIZE**0.5)
    rows += centres[rng.integers(0, len(centres), count)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def seconds(work: Callable[[np.ndarray], object], queries: np.ndarray) -> float:
    """Median of one query alone."""
    taken = []
    for query in queries:
        start = time.perf_counter()
        work(query[None])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def together(work: Callable[[np.ndarray], object], queries: np.ndarray, threads: int = 16) -> float:
    """Queries a second of several threads that ask at once."""
    parts = np.array_split(queries, threads)
    asking = [threading.Thread(target=lambda part=part: [work(each[None]) for each in part]) for part in parts]
    start = time.perf_counter()
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    return len(queries) / (time.perf_counter() - start)


def main() -> None:
    """FAISS's own flat index, then ours of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", default=["flat", "hnsw", "ivfpq"])
    arguments = parser.parse_args()
    count, kinds = arguments.count, arguments.kinds
    rng = np.random.default_rng(0)
    centres = drawn(max(1, count // 1000), np.zeros((1, SIZE), np.float32), rng)
    vectors, queries = drawn(count, centres, rng), drawn(160, centres, rng)
    theirs = faiss.IndexIDMap2(faiss.IndexFlatIP(SIZE))
    theirs.add_with_ids(vectors, np.arange(count))
    turn = threading.Lock()

    def by_faiss(query: np.ndarray) -> object:
        with turn:  # FAISS must not add and search at once
            return theirs.search(query, K)

    alone, many = seconds(by_faiss, queries[:40]), together(by_faiss, queries)
    print(f"FAISS IndexFlatIP, {count:,} vectors: {alone * 1e3:.1f} ms a query, {many:,.0f} queries/s of 16 threads")
    _, best = theirs.search(queries, K)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            index = make_index(kind, SIZE, np.arange(count), vectors, Path(folder) / "1")
            if isinstance(index, GrowingIndex):
                index.wait()
            built = time.perf_counter() - start
            shared = SharedSearch(index)

            def ours(query: np.ndarray, shared: SharedSearch = shared) -> object:
                return shared.search(query, K)

            found = index.search(queries, K)
            recall = np.mean(
                [len({hit.id for hit in hits} & {*row}) / K for hits, row in zip(found, best, strict=True)]
            )
            once, at_once = seconds(ours, queries[:40]), together(ours, queries)
            index.close()
            start = time.perf_counter()
            make_index(kind, SIZE, np.arange(count), vectors, Path(folder) / "1").close()
            again = time.perf_counter() - start
        print(
            f"{index.kind}: {once * 1e3:.1f} ms a query ({alone / once:.1f} x), {at_once:,.0f} queries/s of 16 threads "
            f"({at_once / many:.1f} x), recall@{K} {recall:.3f}; made in {built:.1f} s, at a start in {again:.1f} s"
        )


if __name__ == "__main__":
    main()
