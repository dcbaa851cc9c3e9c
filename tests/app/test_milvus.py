"""Milvus as an index: what an exact one finds, in the same order; and agreement with the truth after a crash.

Against milvus-lite; `make milvus` does it against a server of the package `milvus` too, whose Python is MILVUS_SERVER.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from databases import MilvusServer, PostgresServer
from support import unit_rows, wait_for

from app import milvus as milvus_module
from app import reconciliation
from app.collection import NewItem
from app.index import ExactIndex
from app.milvus import MilvusIndex
from app.postgres_collections import PostgresCollections
from app.reconciliation import reconcile
from models.errors import ConflictError, InputError, StorageError

SIZE = 16
Make = Callable[..., MilvusIndex]
SERVERS = ["milvus-lite", *(["milvus"] if os.environ.get("MILVUS_SERVER") else [])]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    running = MilvusServer(request.param, tmp_path_factory.mktemp("milvus") / "data")
    yield running
    running.kill()


@pytest.fixture
def make(server: MilvusServer) -> Iterator[Make]:
    """Opens an index, in a new collection unless it is named; all are dropped at the end."""
    opened: dict[str, MilvusIndex] = {}

    def made(kind: str = "flat", dimensions: int = SIZE, name: str = "") -> MilvusIndex:
        name = name or f"c_{uuid.uuid4().hex}"
        opened[name] = MilvusIndex(server.uri, name, dimensions, kind)
        return opened[name]

    yield made
    for index in opened.values():
        index.drop()


def _kinds(server: MilvusServer) -> list[str]:
    return ["flat", "hnsw", *(["ivfpq"] if server.what == "milvus" else [])]


def _agree(index: MilvusIndex, exact: ExactIndex, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> None:
    for mine, theirs in zip(index.search(queries, k, allowed), exact.search(queries, k, allowed), strict=True):
        assert [hit.id for hit in mine] == [hit.id for hit in theirs]
        assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-6)


def test_it_agrees_with_an_exact_index_through_adds_replacements_removes_and_filters(
    server: MilvusServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_module, "_CHUNK", 64)  # so that pages and expressions are several
    vectors, queries, rng = unit_rows(400, 0, SIZE), unit_rows(6, 1, SIZE), np.random.default_rng(0)
    for kind in _kinds(server):
        index, exact = make(kind), ExactIndex(SIZE)
        assert (index.kind, index.dimensions, len(index), index.ids().tolist()) == (kind, SIZE, 0, [])
        assert index.search(queries, 3) == [[] for _ in queries]
        assert index.vectors(np.array([4]))[1].shape == (0, SIZE)
        for step in range(4):
            fresh = rng.permutation(100) + 100 * step
            index.add(fresh, vectors[fresh])
            exact.add(fresh, vectors[fresh])
            gone = rng.choice(100 * step + 100, 30, replace=False)
            index.remove(np.append(gone, 99_999))
            exact.remove(gone)
            there = np.sort(exact.ids())
            assert len(index) == len(there)
            assert index.ids().tolist() == there.tolist()
            few, many = rng.choice(there, 10, replace=False), rng.permutation(there)[: len(there) // 2]
            # Some that are not there, and more than a chunk; none.
            for allowed in (None, few, np.append(many, [77_777]), rng.permutation(there), there[:0]):
                for k in (1, 10, 1000):
                    _agree(index, exact, queries, k, allowed)
        known, stored = index.vectors(np.array([99_999, *there[::-1]]))
        assert known.tolist() == there[::-1].tolist()
        np.testing.assert_array_equal(stored, vectors[known])
        assert 0 <= index.indexed <= len(index)


def test_equal_scores_come_by_id_wherever_the_cut_is(
    server: MilvusServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_module, "_MOST", 80)  # and so they do where Milvus does not give enough of them
    same = np.repeat(unit_rows(1, 0, SIZE), 200, 0)
    for kind in ("flat", "hnsw"):
        index = make(kind)
        index.add(np.random.default_rng(0).permutation(200), same)
        for k in (1, 7, 39, 100, 300):
            assert [hit.id for hit in index.search(same[:1], k)[0]] == list(range(min(k, 200)))
        assert [hit.id for hit in index.search(same[:1], 3, np.arange(150, 170))[0]] == [150, 151, 152]


def test_an_added_a_replaced_and_a_removed_vector_are_seen_at_once_also_by_others(
    server: MilvusServer, make: Make
) -> None:
    name, vectors = f"c_{uuid.uuid4().hex}", unit_rows(60, 0, SIZE)
    index, other = make("hnsw", name=name), MilvusIndex(server.uri, name, SIZE)
    assert other.kind == "hnsw"
    for row in range(20):
        index.add(np.array([row]), vectors[[row]])
        assert other.search(vectors[[row]], 1)[0][0].id == row
        index.add(np.array([row]), vectors[[row + 20]])
        hit = other.search(vectors[[row + 20]], 1)[0][0]
        assert (hit.id, hit.score) == (row, pytest.approx(1, abs=1e-6))
        assert len(other) == (row + 1) // 2 + 1
        if row % 2:
            index.remove(np.array([row]))
            assert row not in [hit.id for hit in other.search(vectors[[row + 20]], 60)[0]]
    other.close()


def test_many_candidates_do_not_go_into_one_message(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_module, "_MESSAGE", 1000)
    index, exact, vectors = make(), ExactIndex(SIZE), unit_rows(100, 0, SIZE)
    for each in (index, exact):
        each.add(np.arange(100), vectors)
    _agree(index, exact, unit_rows(5, 1, SIZE), 20, None)


def test_what_is_wrong_is_said(server: MilvusServer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"c_{uuid.uuid4().hex}"
    index = make("flat", name=name)
    with pytest.raises(InputError, match="expected"):
        index.add(np.array([1]), unit_rows(1, size=4))
    with pytest.raises(InputError, match="finite"):
        index.search(np.full((1, SIZE), np.nan, np.float32), 1)
    with pytest.raises(ConflictError, match="vectors of 16 numbers, not row, vector and 8"):
        MilvusIndex(server.uri, name, 8)
    with pytest.raises(ConflictError, match="an index FLAT, not HNSW"):
        MilvusIndex(server.uri, name, SIZE, "hnsw")
    with pytest.raises(InputError, match="auto, flat, hnsw, ivfpq"):
        MilvusIndex(server.uri, name, SIZE, "annoy")
    if server.what == "milvus-lite":
        with pytest.raises(InputError, match="choose flat or hnsw"):
            make("ivfpq")
    other = MilvusIndex(server.uri, name, SIZE)
    other.drop()
    with pytest.raises(StorageError, match="no collection"):
        index.search(unit_rows(1, 0, SIZE), 1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(StorageError, match=f"{address} did not answer in 1 s.*see that it runs"):
            MilvusIndex(address, name, SIZE, patience=lambda: 1)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(StorageError, match=r"pip install 'semblance\[milvus\]'"):
        MilvusIndex(server.uri, name, SIZE)


def test_reconciling_makes_the_keys_of_both_equal(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_module, "_CHUNK", 16)
    monkeypatch.setattr(reconciliation, "_PART", 10)
    vectors, rng, index = unit_rows(300, 0, SIZE), random.Random(0), make()
    shapes: list[tuple[list[int], list[int]]] = [
        ([], []),
        (list(range(100)), []),
        ([], list(range(100))),
        (list(range(100)), list(range(100, 200))),
        (list(range(100, 200)), list(range(100))),
    ]
    shapes += [
        (sorted(rng.sample(range(300), rng.randrange(300))), rng.sample(range(300), rng.randrange(300)))
        for _ in range(6)
    ]
    for truth, there in shapes:
        index.remove(index.ids())
        index.add(np.array(there, np.int64), vectors[there])
        size = rng.randrange(1, 60)
        rows = [np.array(truth[start : start + size], np.int64) for start in range(0, len(truth), size)]
        counts = reconcile(index, rows, lambda ids: (ids, vectors[ids]))
        assert counts == (len(set(truth) - set(there)), len(set(there) - set(truth)))
        assert index.ids().tolist() == truth
        np.testing.assert_array_equal(index.vectors(np.array(truth, np.int64))[1], vectors[truth])
    for wrong in ([np.array([3, 2])], [np.array([1, 2]), np.array([2])]):
        with pytest.raises(InputError, match="ascend"):
            reconcile(index, wrong, lambda ids: (ids, vectors[ids]))


def test_a_server_that_is_killed_in_mid_writing_holds_the_truth_once_it_is_reconciled(server: MilvusServer) -> None:
    vectors, truth = unit_rows(3000, 0, SIZE), dict[int, np.ndarray]()
    name, stop = f"c_{uuid.uuid4().hex}", threading.Event()
    index = MilvusIndex(server.uri, name, SIZE, "flat", patience=lambda: 120)
    failed: list[Exception] = []

    def write() -> None:
        """As the truth does: first the index, then what counts; and removed from the index after it."""
        try:
            for start in range(0, 3000, 20):
                if stop.is_set():
                    return
                ids = np.arange(start, start + 20)
                index.add(ids, vectors[ids])
                truth.update(zip(ids.tolist(), vectors[ids], strict=True))
                if start % 60 == 0:
                    gone = ids[:5]
                    for each in gone.tolist():
                        del truth[each]
                    index.remove(gone)
        except Exception as error:
            failed.append(error)

    def until(holds: Callable[[], bool], writer: threading.Thread) -> None:
        wait_for(lambda: holds() or not writer.is_alive(), 180)

    for _ in range(2):
        writer = threading.Thread(target=write)
        stop.clear()
        writer.start()
        before = len(truth)
        until(lambda before=before: len(truth) >= before + 200, writer)  # type: ignore[misc]
        server.kill()
        assert not failed
        server.start()  # the writer waits for it, and goes on
        waited = len(truth)
        until(lambda waited=waited: len(truth) != waited, writer)  # type: ignore[misc]
        stop.set()
        writer.join()
        assert not failed
        # What the index took before the truth was told, and what it lost, if it does.
        index.add(np.array([9_000]), vectors[:1])
        index.remove(np.array(sorted(truth))[:3])
        rows = np.array(sorted(truth))
        added, removed = reconcile(
            index, [rows[:100], rows[100:]], lambda ids: (ids, np.stack([truth[i] for i in ids.tolist()]))
        )
        assert added >= 3
        assert removed >= 1
        assert index.ids().tolist() == rows.tolist()
        np.testing.assert_array_equal(index.vectors(rows)[1], np.stack([truth[row] for row in rows.tolist()]))
        index.remove(rows)
        truth.clear()
    index.drop()


def test_what_one_server_changes_another_finds_at_once(
    server: MilvusServer, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though searches do not wait for Milvus' clock once nothing was written for a while."""
    stale = 6.0 if server.what == "milvus" else 0.2  # the first has a clock, and shows what is five seconds old
    monkeypatch.setattr(milvus_module, "_STALE", stale)
    levels: list[str] = []
    call = MilvusIndex._call

    def recorded(self: MilvusIndex, method: str, *arguments: Any, **options: Any) -> Any:
        levels.extend([options["consistency_level"]] if method == "search" else [])
        return call(self, method, *arguments, **options)

    monkeypatch.setattr(MilvusIndex, "_call", recorded)
    vectors, database = unit_rows(8, 0, SIZE), postgres.database()
    with (
        PostgresCollections(database, milvus=server.uri) as one,
        PostgresCollections(database, milvus=server.uri) as other,
    ):
        mine = one.create("c", model="m", fingerprint="f", dimensions=SIZE)
        mine.add([NewItem("image", vector, f"old {number}") for number, vector in enumerate(vectors[:4])])
        other.refresh()
        theirs = other.get("c")

        def best(place: int) -> str:
            return theirs.search(vectors[place], 1)[0].item.id

        def settle() -> None:
            best(0)
            time.sleep(stale)
            levels.clear()
            best(0)
            assert levels == ["Bounded"]
            levels.clear()

        for place in (4, 5):
            settle()
            mine.add([NewItem("image", vectors[place], "new")])  # the second time in the other's place
            assert best(place) == "new"
            assert levels == ["Strong"]
        assert {hit.item.id for hit in theirs.search(vectors[4], 8)} == {*(f"old {i}" for i in range(4)), "new"}
        settle()
        mine.delete("new")
        assert best(5) != "new"
        assert levels[0] == "Strong"
        one.delete("c")
