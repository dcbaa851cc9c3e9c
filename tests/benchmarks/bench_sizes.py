"""What collections of some sizes take of a machine, and how soon a killed server is back with them: `make bench-sizes`.

Prints, for each number of items: bytes on the disk, memory beyond that of the server without them, seconds until it is
ready again after SIGKILL beyond what it takes without them, and the median milliseconds of a search. An item has an
embedding and a caption, and no picture.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bench_serving import Server, drive, serving
from peer import write_weights

from app.collection import NewItem
from app.engine import Engine
from app.loading import load_engine
from app.settings import Settings
from app.sqlite_collections import SQLiteCollections

_BATCH = 1000


def rows(count: int, dimensions: int) -> Iterator[np.ndarray]:
    """Unit rows around a hundred directions, `_BATCH` at a time."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, dimensions), dtype=np.float32)
    for _ in range(0, count, _BATCH):
        batch = centres[rng.integers(0, 100, _BATCH)] + 0.7 * rng.standard_normal(
            (_BATCH, dimensions), dtype=np.float32
        )
        yield batch / np.linalg.norm(batch, axis=1, keepdims=True)


def fill(store: Path, engine: Engine, count: int) -> tuple[float, float]:
    """A collection of so many items. -> seconds until all were on the disk, and until the graph covers them."""
    with SQLiteCollections(store) as collections:
        made = collections.create("big", model=engine.name, fingerprint=engine.fingerprint, dimensions=engine.embed_dim)
        began, numbers = time.perf_counter(), itertools.count()
        for batch in rows(count, engine.embed_dim):
            made.add([NewItem("text", row, f"i{(number := next(numbers))}", f"item {number}") for row in batch])
        written = time.perf_counter() - began
        while count >= 50_000 and made.info().indexed < 0.95 * count:
            time.sleep(0.5)
        return written, time.perf_counter() - began


def size(folder: Path) -> int:
    """Bytes of all files below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(start: Any, store: Path, engine: Engine, count: int, bare: tuple[float, int], seconds: float) -> None:
    """A row of the table. bare: seconds until the server was ready without items, and its bytes then."""
    written, covered = fill(store, engine, count)
    taken = size(store)
    with start(store):  # and killed
        pass
    with start(store) as server:
        known = httpx.get(f"{server.url}/collections/big", timeout=60).json()
        assert known["count"] == count, known  # what is measured is all there
        body = {"query": {"item": "i0"}, "collection": "big"}
        hits = httpx.post(f"{server.url}/search", json=body, timeout=60).json()["hits"]
        assert hits[0]["id"] == "i0", hits[:2]
        asked = itertools.cycle(
            (f"{server.url}/search", json.dumps(body | {"query": {"item": f"i{number}"}}).encode())
            for number in range(0, count, max(1, count // 500))
        )
        alone, many = (asyncio.run(drive(asked, at_once, seconds)) for at_once in (1, 32))
        print(
            f"| {count:,} | {known['index']} | {written:.0f} s, {covered:.0f} s | {taken / 2**20:,.0f} MiB | "
            f"{(server.bytes() - bare[1]) / 2**20:,.0f} MiB | {server.started - bare[0]:.1f} s | "
            f"{alone.middle:.1f} ms | {many.rate:,.0f}/s |",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """A table of sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--model", help="a checkpoint folder; default: a random ViT-B/32, of 512 numbers")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        reference = options.model
        if reference is None:
            write_weights(place)
            reference = f"open_clip:ViT-B-32/{place / 'vit.safetensors'}"
        engine = load_engine("model", reference, Settings())
        models = ("--checkpoints", str(place / "none"), "--model", f"model={reference}")

        def start(store: Path) -> AbstractContextManager[Server]:
            return serving(
                "ours", lambda **given: ("", given), sys.executable, "-m", "app", "serve", *models, "--data", str(store)
            )

        for _ in range(2):  # the second start finds its files in the page cache, as those do that it is compared with
            with start(place / "empty") as server:
                bare = server.started, server.bytes()
        print(f"{engine.embed_dim} numbers an item; without items ready in {bare[0]:.1f} s, {bare[1] / 2**20:,.0f} MiB")
        print("| items | index | written, covered | on the disk | in memory | ready again | a search | 32 at once |")
        print("|---|---|---|---|---|---|---|---|")
        for count in options.items:
            measure(start, place / str(count), engine, count, bare, options.seconds)


if __name__ == "__main__":
    main()
