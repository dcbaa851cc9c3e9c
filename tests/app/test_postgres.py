"""What is PostgreSQL's alone: several servers at once, its graph, and a database that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import psycopg
import pytest
from databases import MilvusServer, PostgresServer
from support import new_item, unit_rows, wait_for

from app import postgres_index
from app.collection import Collection
from app.filters import Condition
from app.milvus import MilvusIndex, collections_of
from app.postgres import Postgres
from app.postgres_collections import PostgresCollections
from app.postgres_index import TableIndex
from models.errors import BusyError, ConflictError, InputError, NotFoundError, StorageError

Pair = tuple[PostgresCollections, PostgresCollections]


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.database()


@pytest.fixture
def pair(url: str) -> Iterator[Pair]:
    """Two servers of one database."""
    with ExitStack() as stack:
        yield stack.enter_context(PostgresCollections(url)), stack.enter_context(PostgresCollections(url))


def _create(collections: PostgresCollections, name: str = "c", size: int = 8, index: str = "auto") -> Collection:
    return collections.create(name, model="m", fingerprint="f", dimensions=size, index=index)


def _soon(collections: PostgresCollections, name: str) -> Collection:
    """A collection that another server made, as the service looks for it: again where it is not known."""
    try:
        return collections.get(name)
    except NotFoundError:
        collections.refresh()
        return collections.get(name)


def test_what_one_server_was_answered_for_another_shows(pair: Pair) -> None:
    here, there = pair
    _create(here).add([new_item(i) for i in range(5)])
    theirs = _soon(there, "c")
    assert [hit.item.id for hit in theirs.search(unit_rows(1, 3)[0], 1)] == ["i3"]
    assert theirs.picture("i4") == b"picture 1"
    theirs.delete("i3")
    assert [hit.item.id for hit in here.get("c").search(unit_rows(1, 3)[0], 5)] != ["i3"]
    with pytest.raises(NotFoundError, match="holds 4"):
        here.get("c").get("i3")
    with pytest.raises(ConflictError, match="model 'm'"):
        there.create("c", model="n", fingerprint="g", dimensions=8)


def test_a_collection_that_another_server_deleted_or_replaced_is_noticed(pair: Pair) -> None:
    here, there = pair
    _create(here).add([new_item(1)])
    stale = _soon(there, "c")
    here.delete("c")
    for call in (lambda: stale.add([new_item(2)]), lambda: stale.page(5), lambda: stale.search(unit_rows(1)[0], 1)):
        with pytest.raises(NotFoundError, match="has been deleted"):
            call()
    assert there.names() == []
    _create(here).add([new_item(7)])
    assert [item.id for item in _soon(there, "c").page(5)] == ["i7"]
    staged = here.stage("c", "n", "g", 8)
    staged.add([new_item(7, vector=unit_rows(1, 70)[0])])
    before = there.get("c")
    assert here.switch("c")
    with pytest.raises(NotFoundError):
        before.get("i7")
    assert there.get("c").model == "n"


def test_what_is_deleted_while_another_takes_the_place_is_not_in_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = pair
    items = [new_item(i) for i in range(3)]
    _create(here).add(items)
    here.stage("c", "n", "g", 8).add(items)
    old, outcome = _soon(there, "c"), list[BaseException]()
    drop = here._drop

    def delete() -> None:
        try:
            old.delete("i1")
        except BaseException as error:
            outcome.append(error)

    deleting = threading.Thread(target=delete)

    def meanwhile(connection: psycopg.Connection[object], key: int) -> None:
        deleting.start()
        deleting.join(0.5)
        assert deleting.is_alive()  # it waits
        drop(connection, key)

    monkeypatch.setattr(here, "_drop", meanwhile)
    assert here.switch("c")
    deleting.join()
    assert isinstance(outcome[0], NotFoundError)  # by which the service looks for what has taken its place
    assert _soon(there, "c").get("i1").id == "i1"


def test_servers_tell_each_other_without_being_asked(pair: Pair) -> None:
    here, there = pair
    _create(here)
    wait_for(lambda: there.names() == ["c"], 5)


def test_a_graph_is_built_by_one_server_and_used_by_all(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(postgres_index._LEAST, "auto", 1_000)
    vectors = unit_rows(2_000, size=32)
    filters = [Condition("i", bounds=((">=", 1_980),))]  # so few that no path of the graph may lead to them
    with ExitStack() as stack:
        here, there = (stack.enter_context(PostgresCollections(url)) for _ in range(2))
        made = _create(here, size=32)
        ours = made._index
        assert isinstance(ours, TableIndex)
        for start in range(0, 2_000, 500):
            made.add([new_item(i, vector=vectors[i], picture=None) for i in range(start, start + 500)])
            ours.wait()
        theirs = _soon(there, "c")
        wait_for(lambda: theirs.info().index == "hnsw", 5)
        assert theirs.coverage == (2_000, 2_000)
        right = 0
        for query in unit_rows(50, seed=7, size=32):
            hits = theirs.search(query, 10)
            scores = vectors @ query
            right += len({hit.item.id for hit in hits} & {f"i{i}" for i in np.argsort(-scores)[:10]})
            assert [hit.score for hit in hits] == pytest.approx(
                [scores[hit.item.metadata["i"]] for hit in hits], abs=1e-6
            )
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            among = [hit.item.metadata["i"] for hit in theirs.search(query, 10, filters=filters)]
            assert among == (1_980 + np.argsort(-scores[1_980:])[:10]).tolist()
        assert right >= 0.95 * 500
        asked = "EXPLAIN SELECT number FROM items_1 ORDER BY vector::halfvec(32) <#> %s::halfvec LIMIT 10"

        def plan(connection: psycopg.Connection[object]) -> str:
            connection.execute("SET LOCAL enable_seqscan = off")  # which so few rows would be looked at by
            return str(connection.execute(asked, (vectors[0],)).fetchall())

        assert "items_1_hnsw" in here._postgres.run(plan, transaction=True)
        # What comes later is in the graph at once, and what goes is not found.
        made.add([new_item(5_000, vector=vectors[3])])
        theirs.delete("i3")
        assert made.search(vectors[3], 1)[0].item.id == "i5000"


def test_what_a_crash_left_of_a_graph_is_made_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(postgres_index._LEAST, "auto", 10)
    monkeypatch.setattr(postgres_index, "_LOOK", 10)
    with PostgresCollections(url) as collections:
        made = _create(collections)
        index = made._index
        assert isinstance(index, TableIndex)
        made.add([new_item(i) for i in range(20)])
        index.wait()
        assert index.built
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'semblance.items_1_hnsw'::regclass"
        )
    with PostgresCollections(url) as collections:
        made = collections.get("c")
        index = made._index
        assert isinstance(index, TableIndex)
        assert made.info().index == "flat"
        made.add([new_item(30)])
        index.wait()
        assert made.info().index == "hnsw"


def test_a_graph_that_is_due_is_built_though_nothing_is_added(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a stop while it was being built."""
    with PostgresCollections(url) as collections:
        _create(collections).add([new_item(i) for i in range(50)])
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ANALYZE semblance.items_1")  # as PostgreSQL does by itself
    monkeypatch.setitem(postgres_index._LEAST, "auto", 10)
    monkeypatch.setattr(postgres_index, "_LOOK", 10)
    with PostgresCollections(url) as collections:
        index = collections.get("c")._index
        assert isinstance(index, TableIndex)
        index.wait()
        assert collections.get("c").info().index == "hnsw"


def test_a_graph_that_is_being_built_does_not_hold_up_a_close(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(postgres_index._LEAST, "auto", 10)
    monkeypatch.setattr(postgres_index, "_LOOK", 10)
    monkeypatch.setattr(postgres_index, "_SETTLE", 0.1)
    with psycopg.connect(url) as blocking, PostgresCollections(url) as collections:
        made = _create(collections)
        blocking.execute("SELECT txid_current(), (SELECT count(*) FROM semblance.items_1)")
        made.add([new_item(i) for i in range(20)])  # whose graph waits for that transaction to end
        time.sleep(0.5)
        began = time.monotonic()
        made.close()
        assert time.monotonic() - began < 4


def test_a_database_that_is_killed_and_comes_back_is_waited_for() -> None:
    server = PostgresServer()
    try:
        with PostgresCollections(server.database()) as collections:
            made = _create(collections)
            added, failures, done = list[str](), list[BaseException](), threading.Event()

            def write() -> None:
                number = 0
                try:
                    while not done.is_set():
                        added.extend(made.add([new_item(number)]))
                        number += 1
                except BaseException as error:
                    failures.append(error)

            writer = threading.Thread(target=write)
            writer.start()
            for _ in range(2):
                time.sleep(0.3)
                server.kill()
                server.start()
            time.sleep(0.5)
            done.set()
            writer.join()
            assert not failures
            assert {item.id for item in made.page(100_000)} == set(added)
            assert len(added) > 10
            _create(collections, "later")  # told to the others by a new connection
    finally:
        server.stop()


def test_a_database_that_stays_away_is_named_and_can_be_asked_again() -> None:
    server = PostgresServer()
    postgres = Postgres(server.database())
    try:
        server.kill()
        began = time.monotonic()
        with pytest.raises(BusyError, match=rf"127\.0\.0\.1:{server.port}/d[0-9a-f]+ is away"):
            postgres.run(lambda connection: connection.execute("SELECT 1"), patience=0.5)
        assert time.monotonic() - began < 5
        server.start()
        assert postgres.run(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
    finally:
        postgres.close()
        server.stop()


def test_a_wrong_address_is_told_without_its_password(url: str) -> None:
    for wrong in ("postgresql://somebody:secret@127.0.0.1:1/db", "postgresql://u:secret@h:what/db", "sqlite:secret"):
        with pytest.raises(StorageError) as caught:
            PostgresCollections(wrong)
        assert "secret" not in str(caught.value)


def test_a_newer_format_is_refused(url: str) -> None:
    PostgresCollections(url).close()
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO semblance.format (version) VALUES (2)")
    with pytest.raises(StorageError, match="format 2, this version reads up to 1: upgrade"):
        PostgresCollections(url)


def test_what_postgresql_does_not_have_is_refused_in_words(url: str) -> None:
    with PostgresCollections(url) as collections:
        with pytest.raises(InputError, match="auto, flat, hnsw"):
            _create(collections, index="ivfpq")
        made = _create(collections)
        for wrong in ({"caption": "a\0b"}, {"metadata": {"a": "b\0"}}, {"metadata": {"\0": 1}}):
            with pytest.raises(InputError, match=r"U\+0000") as caught:
                made.add([new_item(1), new_item(2, **wrong)])
            assert caught.value.index == 1
        assert made.info().count == 0
        with pytest.raises(InputError, match="does not take it"):
            made.get("a\0b")
        for condition in (Condition("a", ("\0",)), Condition("\0"), Condition("a", bounds=((">", "\0"),))):
            with pytest.raises(InputError, match="does not take it"):
                made.search(unit_rows(1)[0], 3, filters=[condition])
        # A backslash and what looks like it are no such character.
        made.add([new_item(1, metadata={"path": "\\u0000"})])
        assert made.get("i1").metadata == {"path": "\\u0000"}


def test_a_full_disk_refuses_the_write_and_keeps_searching(url: str) -> None:
    """By PostgreSQL's own limit on a role, which is of the same class of errors."""
    with PostgresCollections(url) as collections:
        made = _create(collections)
        made.add([new_item(1)])

        def full(connection: psycopg.Connection[object]) -> None:
            connection.execute("DO $$ BEGIN RAISE EXCEPTION 'no space' USING ERRCODE = 'disk_full'; END $$")

        with pytest.raises(StorageError, match="nothing of it is kept: no space"):
            collections._postgres.run(full, transaction=True)
        assert [hit.item.id for hit in made.search(unit_rows(1, 1)[0], 10)] == ["i1"]


def test_milvus_is_made_to_agree_when_a_server_starts(url: str, milvus: MilvusServer) -> None:
    """What a crash between the two may leave: rows too many, rows too few, and a collection that is no more."""
    with PostgresCollections(url, milvus=milvus.uri) as collections:
        made = _create(collections)
        made.add([new_item(i) for i in range(50)])
        made.delete("i7")
        _create(collections, "gone")
        index, gone = made._index, collections.get("gone")._index
        assert isinstance(index, MilvusIndex)
        assert isinstance(gone, MilvusIndex)
        rows = np.sort(index.ids())
        index.remove(rows[:5])
        index.add(np.array([100_000, 2**40]), unit_rows(2))
        assert made.info().count == 49  # of the table, which is the truth
        with psycopg.connect(url) as connection:
            connection.execute("SET search_path = semblance; DROP TABLE items_2; DELETE FROM collections WHERE key = 2")
        names = collections_of(milvus.uri, gone._name)
        assert names == {gone._name}
    with PostgresCollections(url, milvus=milvus.uri) as collections:
        made = collections.get("c")
        index = made._index
        assert isinstance(index, MilvusIndex)
        # What is above every number that was given out is of nobody yet.
        assert set(index.ids().tolist()) - set(rows.tolist()) <= {100_000, 2**40}
        assert set(rows.tolist()) <= set(index.ids().tolist())
        assert len(made.search(unit_rows(1)[0], 100)) == 49
        assert not collections_of(milvus.uri, names.pop())
        collections.delete("c")
        wait_for(lambda: not collections_of(milvus.uri, index._name), 10)
