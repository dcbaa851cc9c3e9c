"""What is SQLite's alone: one process at a time, its files, and a disk that refuses."""

from __future__ import annotations

import queue
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest
from support import new_item, unit_rows, wait_for

from app.locking import lock
from app.migration import reading
from app.pictures import file_of
from app.sqlite_collections import SQLiteCollections
from models.errors import NotFoundError, StorageError
from models.retrieval import Hit


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "data"


def _create(collections: SQLiteCollections) -> Any:
    return collections.create("c", model="m", fingerprint="f", dimensions=8)


def test_an_item_that_is_replaced_between_index_and_database_is_found(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([new_item(1), new_item(2)])
        search, asked = made._searches.search, []

        def then_replaced(*arguments: Any) -> Any:
            hits = search(*arguments)
            if not asked:
                made.add([new_item(1)])
            asked.append(1)
            return hits

        monkeypatch.setattr(made._searches, "search", then_replaced)
        assert {hit.item.id for hit in made.search(unit_rows(1)[0], 10)} == {"i1", "i2"}
        assert len(asked) == 2


def test_an_item_whose_next_row_was_seen_too_soon_and_too_late_is_found(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 11 replaces 10 and is not committed at the first look; at the second, 12 has replaced it just after the index
    was asked."""
    looks = [([10, 11, 2], {10, 2}), ([11, 2], {2}), ([12, 2], {12, 2})]
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([new_item(1), new_item(2)])
        first, second = made.page(2)
        monkeypatch.setattr(made._searches, "search", lambda *_: [[Hit(row, 0.5) for row in looks[0][0]]])
        monkeypatch.setattr(made, "_items", lambda _: {row: second if row == 2 else first for row in looks.pop(0)[1]})
        assert [hit.item.id for hit in made.search(unit_rows(1)[0], 10)] == ["i1", "i2"]
        assert not looks


def test_a_picture_stays_for_who_adds_it_in_the_commit_that_deletes_its_last_item(store: Path) -> None:
    with SQLiteCollections(store) as collections, ThreadPoolExecutor(3) as pool:
        made = _create(collections)
        for first, then in (("i0", "i1"), ("i1", "i0")):
            old, new = new_item(int(first[1:]), picture=b"the same"), new_item(int(then[1:]), picture=b"the same")
            made.add([old])
            running, held = threading.Event(), threading.Event()

            def hold(_: Any, running: threading.Event = running, held: threading.Event = held) -> None:
                running.set()
                held.wait(30)

            waiting = [pool.submit(collections._database.write, hold)]
            assert running.wait(30)  # what comes now is one commit
            for number, work in enumerate((partial(made.delete, first), partial(made.add, [new])), 1):
                waiting.append(pool.submit(work))
                wait_for(lambda number=number: collections._database._jobs.qsize() == number)  # type: ignore[misc]
            held.set()
            for each in waiting:
                each.result()
            assert made.picture(then) == b"the same"
            made.delete(then)
        assert not [path for path in (store / "pictures").rglob("*") if path.is_file()]


def test_a_collection_that_others_delete_while_it_is_made_is_made(store: Path) -> None:
    with SQLiteCollections(store) as collections, ThreadPoolExecutor(4) as pool:

        def make() -> None:
            for _ in range(150):
                assert collections.create("c", model="m", fingerprint="f", dimensions=8).name == "c"

        def delete() -> None:
            for _ in range(150):
                with suppress(NotFoundError):
                    collections.delete("c")

        for each in [pool.submit(work) for work in (make, delete, make, delete)]:
            each.result(60)


def test_a_write_that_comes_as_the_store_closes_is_answered(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coming = threading.Event()

    class Queue(queue.SimpleQueue[Any]):
        def put(self, item: Any, *rest: Any) -> None:
            if item is not None and coming.is_set():  # the second job: others may be sooner
                coming.clear()
                time.sleep(0.3)
            super().put(item, *rest)

    shim = SimpleNamespace(SimpleQueue=Queue, LifoQueue=queue.LifoQueue, Empty=queue.Empty)
    monkeypatch.setattr("app.database.queue", shim)
    with SQLiteCollections(store) as collections:
        made = _create(collections)

        def add() -> None:
            with suppress(StorageError):
                made.add([new_item(1)])

        coming.set()
        adding = threading.Thread(target=add, daemon=True)
        adding.start()
        wait_for(lambda: not coming.is_set(), 10)
        collections.close()
        adding.join(10)
        assert not adding.is_alive()


def test_a_second_process_is_told_who_holds_the_folder(store: Path) -> None:
    with SQLiteCollections(store, note="http://127.0.0.1:1"), pytest.raises(StorageError, match=r"127\.0\.0\.1:1"):
        SQLiteCollections(store)
    SQLiteCollections(store).close()


def test_row_38_damage_is_named_and_refused(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        _create(collections).add([new_item(i) for i in range(50)])
    file = store / "store.db"
    content = bytearray(file.read_bytes())
    content[16384 : 16384 * 2] = b"\xff" * 16384
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"store\.db .*restore it from a backup"):
        SQLiteCollections(store)
    file.write_bytes(b"no database, but long enough to have a header of a hundred bytes" * 10)
    with pytest.raises(StorageError, match=r"store\.db"):
        SQLiteCollections(store)


def test_row_38_a_database_that_is_gone_or_empty_takes_no_picture_with_it(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        _create(collections).add([new_item(i, picture=b"picture %d" % i) for i in range(5)])
    kept = (store / "store.db").read_bytes()
    pictures = {file: file.read_bytes() for file in (store / "pictures").glob("*/*")}
    assert len(pictures) == 5
    for change in (lambda file: file.unlink(), lambda file: file.write_bytes(b"")):
        change(store / "store.db")
        for _ in range(2):
            with pytest.raises(StorageError, match=r"store\.db is missing or empty; restore it from a backup"):
                SQLiteCollections(store)
        with pytest.raises((StorageError, NotFoundError), match=r"store\.db"), reading(store, None):
            pass
        assert not (store / "store.db").exists() or not (store / "store.db").stat().st_size
    assert {file: file.read_bytes() for file in (store / "pictures").glob("*/*")} == pictures
    for left in store.glob("store.db*"):
        left.unlink()
    (store / "store.db").write_bytes(kept)
    with SQLiteCollections(store) as collections:
        assert len(collections.get("c")) == 5


def test_a_newer_format_is_refused(store: Path) -> None:
    SQLiteCollections(store).close()
    connection = sqlite3.connect(store / "store.db")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(StorageError, match="format 2, this version reads up to 1: upgrade"):
        SQLiteCollections(store)


def test_the_database_is_as_durable_as_it_promises(store: Path) -> None:
    with SQLiteCollections(store) as collections, collections._database.read() as connection:
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("synchronous") == 2
        assert connection.pragma("page_size") == 16384


def test_pictures_that_nothing_refers_to_are_swept_up(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        _create(collections).add([new_item(1)])
    stray = store / "pictures" / "ab"
    stray.mkdir(exist_ok=True)
    (stray / "abandoned").write_bytes(b"x")
    with SQLiteCollections(store) as collections:
        assert not (stray / "abandoned").exists()
        assert collections.get("c").picture("i1") == b"picture 1"


@pytest.mark.parametrize("damaged", [b"", b"picture", b"picture 0"])
def test_a_damaged_picture_is_mended_by_whoever_adds_it_again(store: Path, damaged: bytes) -> None:
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([new_item(1)])
        digest = made.get("i1").picture
        file = file_of(store / "pictures", digest)
        file.write_bytes(damaged)
        file.with_suffix(".64").write_bytes(b"of what was damaged")
        made.add([new_item(1, id="again")])
        assert made.picture("i1") == b"picture 1"
        assert sorted(file.parent.iterdir()) == [file]


def test_thumbnails_are_made_once_and_go_with_their_picture(store: Path) -> None:
    made: list[bytes] = []

    def make(picture: bytes) -> bytes:
        made.append(picture)
        return b"small " + picture + b"\xff\xd9"

    with SQLiteCollections(store) as collections:
        collection = _create(collections)
        collection.add([new_item(1), new_item(2)])
        first, second = (item.id for item in collection.page(2))
        for _ in range(3):
            assert collection.picture(first, 64, make) == b"small " + collection.picture(first) + b"\xff\xd9"
        assert len(made) == 1
        collection.picture(first, 65, make)  # a size nobody asks for often is made, and not kept
        collection.picture(first, 1024, make)
        collection.picture(second, 64, make)
        kept = sorted(store.glob("pictures/*/*.64"))
        assert len(made) == 4
        assert len(list(store.glob("pictures/*/*.*"))) == len(kept) == 2
        kept[0].write_bytes(b"")  # as a power cut may leave it
        for each in (first, second):
            assert collection.picture(each, 64, make).startswith(b"small ")
        assert len(made) == 5
        collection.delete(first)
        assert len(list(store.glob("pictures/*/*.64"))) == 1
        stray = kept[0].parent / f"{'0' * 64}.64"
        stray.write_bytes(b"of nothing")
    with SQLiteCollections(store) as collections:
        assert not stray.exists()
        assert len(list(store.glob("pictures/*/*.64"))) == 1


def test_row_35_a_full_disk_refuses_the_write_keeps_searching_and_recovers(store: Path) -> None:
    """Row 35, by SQLite's own limit of pages."""
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([new_item(1)])
        connection = collections._database._connection
        connection.pragma("max_page_count", connection.pragma("page_count") + 1)
        with pytest.raises(StorageError, match="nothing of it kept"):
            made.add([new_item(i, metadata={"long": "x" * 8000}) for i in range(2, 60)])
        assert [hit.item.id for hit in made.search(unit_rows(1, 1)[0], 10)] == ["i1"]
        connection.pragma("max_page_count", 1 << 20)
        made.add([new_item(2)])
        assert made.info().count == 2


class _Unsynced(apsw.VFS):
    """The files of the system, whose next `failures` syncs are refused once everything was written."""

    failures = 0

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _UnsyncedFile(self, name, flags)


class _UnsyncedFile(apsw.VFSFile):
    def __init__(self, vfs: _Unsynced, name: Any, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        self._vfs = vfs

    def xSync(self, flags: int) -> None:
        if self._vfs.failures:
            self._vfs.failures -= 1
            raise apsw.IOError("the disk refuses")
        super().xSync(flags)


@pytest.mark.parametrize(("failures", "said"), [(1, "nothing of"), (3, "nothing of"), (9, "the next start shows")])
def test_a_write_that_could_not_be_synced_does_not_come_back(store: Path, failures: int, said: str) -> None:
    """Its frames are in the log all the same; only what is written over them keeps a kill from making them a commit."""
    vfs = _Unsynced("unsynced", "unix", makedefault=True)
    try:
        with SQLiteCollections(store) as collections:
            made = _create(collections)
            made.add([new_item(1)])
            vfs.failures = failures
            with pytest.raises(StorageError, match=said):
                made.add([new_item(i) for i in range(2, 60)])
            vfs.failures = 0
            shutil.copytree(store, store.parent / "killed")
            assert made.info().count == 1
        with SQLiteCollections(store.parent / "killed") as collections:
            there = [item.id for item in collections.get("c").page(100)]
        assert there == ["i1"] or said == "the next start shows"
    finally:
        vfs.unregister()


def test_a_reader_that_cannot_be_opened_is_an_error_of_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the process has too many files open; one that is open already goes on."""
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        database = collections._database

        def refused() -> apsw.Connection:
            raise apsw.CantOpenError("unable to open database file")

        monkeypatch.setattr(database, "_connect", refused)
        with ExitStack() as stack:
            for _ in range(database._readers.qsize()):
                stack.enter_context(database.read())
            with pytest.raises(StorageError, match="cannot be read: unable to open"):
                made.page(10)
        assert made.page(10) == []


def test_what_was_to_take_the_place_of_a_collection_never_outlives_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the process is killed while it deletes them: nobody would see it, and it has the pictures."""
    with SQLiteCollections(store) as collections:
        name = _create(collections).name
        collections.stage(name, "n", "g", 8)
        delete, deleted = collections._delete, list[Any]()

        def delete_one(collection: Any) -> None:
            if deleted:
                raise KeyboardInterrupt
            deleted.append(collection)
            delete(collection)

        monkeypatch.setattr(collections, "_delete", delete_one)
        with pytest.raises(KeyboardInterrupt):
            collections.delete(name)
    with SQLiteCollections(store) as collections:
        assert name in collections.names()
        assert collections.staged(name) is None
        collections.delete(name)
        assert collections.names() == []


def test_a_folder_that_cannot_be_written_to_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()  # as a read-only one, which root may write to
    with pytest.raises(StorageError, match=r"cannot be written to \(Is a directory\); make it writable"):
        lock(tmp_path, "")
