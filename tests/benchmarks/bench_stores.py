"""The stores of collections beside each other and FAISS called directly, in one run: `make bench-stores`.

Through the collection's own face, durable writes included: items a second in calls of 64 and of 1,000, milliseconds of
one search, searches a second of 16 threads, a filtered search (a tenth of the items), recall@10 beside an exact search,
and seconds until the graph covers all. Prints; nothing here passes or fails. Vectors are those of bench_search.py.
Milvus is a server where `make milvus` has installed one, else milvus-lite.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
from bench_search import SIZE, K, drawn, seconds, together

sys.path.insert(0, str(Path(__file__).parents[1]))

from databases import MilvusServer, PostgresServer

from app.collection import Collection, NewItem
from app.collections import Collections
from app.filters import Condition
from app.postgres_collections import PostgresCollections
from app.sqlite_collections import SQLiteCollections

SERVER = Path(__file__).parents[2] / ".venv-milvus" / "bin" / "python"
SINGLE, AT_ONCE = 3_000, 1_000
TENTH = [Condition("tenth", (3,))]


@contextmanager
def opened(store: str) -> Iterator[Collections]:
    """A store that is empty, as compose runs it."""
    with tempfile.TemporaryDirectory() as folder:
        if store == "sqlite":
            with SQLiteCollections(Path(folder) / "data") as collections:
                yield collections
            return
        postgres = PostgresServer(shared_buffers="512MB", maintenance_work_mem="1GB")
        milvus = None
        try:
            if store == "milvus":
                if SERVER.is_file():
                    os.environ["MILVUS_SERVER"] = str(SERVER)
                milvus = MilvusServer("milvus" if SERVER.is_file() else "milvus-lite", Path(folder) / "milvus")
            with PostgresCollections(postgres.database(), milvus=milvus and milvus.uri) as collections:
                yield collections
        finally:
            if milvus is not None:
                milvus.kill()
            postgres.stop()


def items_a_second(made: Collection, vectors: np.ndarray, first: int, size: int) -> float:
    """Of all these vectors, in calls of so many."""
    begun = time.perf_counter()
    for start in range(0, len(vectors), size):
        numbers = range(first + start, first + min(start + size, len(vectors)))
        made.add([NewItem("image", vectors[i - first], f"i{i}", f"c{i}", {"tenth": i % 10}) for i in numbers])
    return len(vectors) / (time.perf_counter() - begun)


def covered(made: Collection) -> float:
    """Seconds until a graph covers all but what came since the last was begun; nan if it covers no more for two
    minutes, as that of Milvus while it holds its last segments open."""
    begun = moved = time.perf_counter()
    covers = 0
    while (info := made.info()).indexed < 0.95 * info.count:
        if info.indexed > covers:
            covers, moved = info.indexed, time.perf_counter()
        if time.perf_counter() - moved > 120:
            return float("nan")
        time.sleep(0.5)
    return time.perf_counter() - begun


def main() -> None:
    """FAISS first, then each store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--stores", nargs="+", default=["sqlite", "postgres", "milvus"])
    arguments = parser.parse_args()
    count = arguments.count
    rng = np.random.default_rng(0)
    centres = drawn(max(1, count // 1000), np.zeros((1, SIZE), np.float32), rng)
    vectors, queries = drawn(count, centres, rng), drawn(160, centres, rng)
    flat = faiss.IndexFlatIP(SIZE)
    flat.add(vectors)
    alone = seconds(lambda query: flat.search(query, K), queries[:40])
    print(f"FAISS IndexFlatIP, {count:,} x {SIZE}: {alone * 1e3:.1f} ms a query", flush=True)
    _, best = flat.search(queries, K)
    for store in arguments.stores:
        with opened(store) as collections:
            made = collections.create("c", model="m", fingerprint="f", dimensions=SIZE, index="hnsw")
            small = items_a_second(made, vectors[:SINGLE], 0, 64)
            large = items_a_second(made, vectors[SINGLE:], SINGLE, AT_ONCE)
            waited = covered(made)
            found = [made.search(query, K) for query in queries]
            right = [len({int(h.item.id[1:]) for h in hits} & {*row}) for hits, row in zip(found, best, strict=True)]
            once = seconds(lambda query, made=made: made.search(query[0], K), queries[:40])
            many = together(lambda query, made=made: made.search(query[0], K), queries)
            narrow = seconds(lambda query, made=made: made.search(query[0], K, filters=TENTH), queries[:20])
            print(
                f"{store}: {small:,.0f} items/s by 64, {large:,.0f} by 1,000, covered {waited:.0f} s later; "
                f"{once * 1e3:.1f} ms a search ({alone / once:.1f} x FAISS flat), {many:,.0f}/s of 16 threads, "
                f"{narrow * 1e3:.1f} ms with a filter; recall@{K} {statistics.mean(right) / K:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
