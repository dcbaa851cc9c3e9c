"""`semblance migrate-store`: from a data folder into PostgreSQL and back, also while it is written to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from databases import PostgresServer
from support import new_item, unit_rows

from app.__main__ import main
from app.collections import Collections
from app.migration import Pass, migrate, reading
from app.pictures import file_of
from app.postgres_collections import PostgresCollections
from app.sqlite_collections import SQLiteCollections
from models.errors import ConflictError, StorageError

Main = Callable[..., tuple[int, str, str]]


def _same(first: Collections, second: Collections, name: str = "c") -> None:
    ours, theirs = first.get(name), second.get(name)
    assert ours.page(10_000) == theirs.page(10_000)
    ids = [item.id for item in ours.page(10_000)]
    assert np.array_equal(ours.vectors(ids), theirs.vectors(ids))
    for item in ours.page(10_000):
        if item.picture is not None and item.place is None:
            assert ours.picture(item.id) == theirs.picture(item.id)


def test_a_folder_goes_into_postgresql_and_back_to_the_bit(
    postgres: PostgresServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, place = postgres.database(), tmp_path / "place.jpg"
    with SQLiteCollections(tmp_path / "data") as collections:
        made = collections.create("c", model="m", fingerprint="f", dimensions=8, index="ivfpq")
        made.add([new_item(i, vector=5 * unit_rows(1, i)[0]) for i in range(150)])
        made.add([new_item(200, kind="text", picture=None, metadata={}), new_item(201, picture=place)])
        collections.create("other", model="n", fingerprint="g", dimensions=4, index="flat")
        collections.stage("other", "m", "f", 8)  # a reindexing that is under way is not copied
        # It is held by this process, as by one that serves it.
        assert main(["migrate-store", url, "--data", str(tmp_path / "data")]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[:2] == ["c: 152 items, 152 copied, 0 deleted", "c: 152 items, 0 copied, 0 deleted"]
        assert said[2].startswith("c: the same in both, 152 items, SHA-256 ")
        assert said[-1].startswith("other: the same in both, 0 items")
        with PostgresCollections(url) as copied:
            assert {name: copied.get(name).kind for name in copied.names()} == {"c": "auto", "other": "flat"}
            _same(collections, copied)
            made.delete("i7")
            made.add([new_item(8, caption="another")])
        # Again, and what differs is all that is done.
        assert main(["migrate-store", url, "--data", str(tmp_path / "data"), "--collection", "c"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "c: 151 items, 1 copied, 1 deleted"
        assert said[-1].startswith("c: the same in both")
        collections.create("gone", model="m", fingerprint="f", dimensions=8)
        assert main(["migrate-store", url, "--data", str(tmp_path / "data"), "--collection", "gone"]) == 0
        collections.delete("gone")
        capsys.readouterr()
        assert main(["migrate-store", url, "--data", str(tmp_path / "data")]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("gone: only where the others went, and left there")
        with PostgresCollections(url) as copied:
            copied.delete("gone")
    monkeypatch.setenv("SEMBLANCE_DATABASE", url)
    assert main(["migrate-store", str(tmp_path / "back")]) == 0
    with SQLiteCollections(tmp_path / "back") as back, SQLiteCollections(tmp_path / "data") as collections:
        _same(collections, back)


def test_it_ends_with_the_same_in_both_while_others_write(postgres: PostgresServer, tmp_path: Path) -> None:
    stop, failures = threading.Event(), list[BaseException]()
    with SQLiteCollections(tmp_path / "data") as collections, PostgresCollections(postgres.database()) as target:
        made = collections.create("c", model="m", fingerprint="f", dimensions=8)
        made.add([new_item(i) for i in range(500)])

        def write() -> None:
            number = 0
            try:
                while not stop.wait(0.002):
                    made.add([new_item(number % 700, caption=f"of {number}")])
                    if number % 7 == 0:
                        made.delete(f"i{number % 700}")
                    number += 1
            except BaseException as error:
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        passes = list[Pass]()

        def after(found: Pass) -> None:
            passes.append(found)
            if len(passes) == 3:
                stop.set()
                writer.join()

        with reading(tmp_path / "data", None) as known:
            found = migrate(known["c"], target, after)
        assert not failures
        assert len(passes) > 3
        assert found.checksums[0] == found.checksums[1]
        assert found.items == made.info().count
        _same(collections, target)


def test_what_cannot_be_is_said(postgres: PostgresServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = postgres.database()
    assert main(["migrate-store", url, "--data", str(tmp_path / "nothing")]) == 1
    assert "is no data folder" in capsys.readouterr().err
    with SQLiteCollections(tmp_path / "data") as collections, PostgresCollections(url) as target:
        made = collections.create("c", model="m", fingerprint="f", dimensions=8)
        made.add([new_item(1)])
        target.create("c", model="n", fingerprint="g", dimensions=8)
        with pytest.raises(ConflictError, match="model 'n'"), reading(tmp_path / "data", None) as known:
            migrate(known["c"], target, print)
        target.delete("c")
        made_so = {"model": "m", "fingerprint": "f", "dimensions": 8}
        collections.create("exact", index="flat", **made_so).add([new_item(1)])
        target.create("exact", **made_so)  # its own kind of index stays
        with reading(tmp_path / "data", None) as known:
            assert migrate(known["exact"], target, print).items == 1
        assert target.get("exact").kind == "auto"

        def meddle(found: Pass) -> None:
            made.add([new_item(1, caption=str(found.checksums))])

        with pytest.raises(ConflictError, match="faster than it is copied"), reading(tmp_path / "data", None) as known:
            migrate(known["c"], target, meddle)
        assert main(["migrate-store", url, "--data", str(tmp_path / "data"), "--collection", "d"]) == 1
        assert "no collection 'd'; there are: c" in capsys.readouterr().err


def test_a_collection_that_another_models_replaces_meanwhile_is_no_empty_one(tmp_path: Path) -> None:
    """It was said to be the same in both, with no items, and what had been copied was deleted."""
    with SQLiteCollections(tmp_path / "data") as collections, SQLiteCollections(tmp_path / "to") as target:
        old = collections.create("c", model="m", fingerprint="f", dimensions=8)
        old.add([new_item(i) for i in range(5)])

        def switch(_: Pass) -> None:
            collections.stage("c", "n", "g", 8).add([new_item(i) for i in range(5)])
            assert collections.switch("c")

        with reading(tmp_path / "data", None) as known, pytest.raises(ConflictError, match="made again with another"):
            migrate(known["c"], target, switch)
        assert len(target.get("c")) == 5


def test_a_picture_that_is_lost_is_named_with_its_item(tmp_path: Path) -> None:
    """The collection was said to change faster than it is copied, also where nobody wrote to it."""
    with SQLiteCollections(tmp_path / "data") as collections, SQLiteCollections(tmp_path / "to") as target:
        collections.create("c", model="m", fingerprint="f", dimensions=8).add([new_item(i) for i in range(3)])
        digest = collections.get("c").get("i1").picture or ""
        file_of(tmp_path / "data/pictures", digest).unlink()
        with (
            reading(tmp_path / "data", None) as known,
            pytest.raises(StorageError, match="'i1' of collection 'c': its p"),
        ):
            migrate(known["c"], target, print)
