"""A server that was killed and comes back: the short form of `make bench-sizes`, which has the seconds."""

from __future__ import annotations

from pathlib import Path

import httpx
from support import running, unit_rows, wait_for

from app.collection import NewItem
from app.sqlite_collections import SQLiteCollections
from models.checkpoint import load_checkpoint

ITEMS = 3000


def test_a_killed_server_has_its_items_and_their_graph_when_it_is_ready_again(
    checkpoints: Path, tmp_path: Path
) -> None:
    model = load_checkpoint(checkpoints / "clip")
    with SQLiteCollections(tmp_path / "data") as collections:
        made = collections.create("big", model="clip", fingerprint=model.fingerprint, dimensions=24, index="hnsw")
        made.add([NewItem("text", row, f"i{number}") for number, row in enumerate(unit_rows(ITEMS, size=24))])
        wait_for(lambda: made.info().indexed == ITEMS)
    with running(checkpoints, tmp_path / "data") as server:
        gone = f"{server.url}/collections/big/items/i7"
        assert httpx.delete(gone).status_code == 204
        server.kill()
    with running(checkpoints, tmp_path / "data") as server:
        known = httpx.get(f"{server.url}/collections/big").json()  # the first request: nothing was built since
        assert (known["count"], known["index"]) == (ITEMS - 1, "hnsw")
        assert known["indexed"] >= ITEMS - 1
        hits = httpx.post(f"{server.url}/search", json={"query": {"item": "i8"}, "collection": "big"}).json()["hits"]
        assert (hits[0]["id"], len(hits)) == ("i8", 10)
        assert "i7" not in {hit["id"] for hit in hits}
