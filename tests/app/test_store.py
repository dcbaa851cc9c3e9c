"""The store: all or nothing, durable under kill -9, one process at a time."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest
from support import unit_rows

from app.collection import Collection, NewItem
from app.sqlite_collections import SQLiteCollections
from models.errors import ConflictError, InputError, NotFoundError, StorageError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "data"


def _create(collections: SQLiteCollections, name: str = "c") -> Collection:
    return collections.create(name, model="m", fingerprint="f", dimensions=8)


def _item(i: int, **changes: object) -> NewItem:
    values = {"kind": "image", "vector": unit_rows(1, i)[0], "id": f"i{i}", "picture": b"picture %d" % (i % 3)}
    return NewItem(**(values | {"caption": f"c{i}", "metadata": {"i": i}} | changes))  # type: ignore[arg-type]


def test_everything_is_there_after_a_restart(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        assert made.add([_item(i) for i in range(20)]) == [f"i{i}" for i in range(20)]
        made.add([_item(3, vector=unit_rows(1, 100)[0], caption="new")])
        made.delete("i7")
        before = made.search(unit_rows(1, 5)[0], 100)
        info = made.info()
    with SQLiteCollections(store) as collections:
        again = collections.get("c")
        after = again.search(unit_rows(1, 5)[0], 100)
        assert [hit.item for hit in after] == [hit.item for hit in before]
        # A row that has moved may be summed in another order.
        assert [hit.score for hit in after] == pytest.approx([hit.score for hit in before], abs=1e-6)
        assert again.info() == info
        assert again.info().count == 19
        assert again.get("i3").caption == "new"
        assert again.picture("i4") == b"picture 1"
        with pytest.raises(NotFoundError, match="holds 19"):
            again.get("i7")


def test_a_batch_is_stored_whole_or_not_at_all(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        for wrong, message in (
            ([_item(1), _item(2, vector=np.zeros(8, np.float32))], "zero"),
            ([_item(1), _item(2, vector=np.full(8, np.nan, np.float32))], "not finite"),
            ([_item(1), _item(2, vector=np.ones(4, np.float32))], "shape"),
            ([_item(1), _item(2), _item(1)], "given twice"),
        ):
            with pytest.raises(InputError, match=message) as caught:
                made.add(wrong)
            assert caught.value.index == len(wrong) - 1
        assert made.info().count == 0
        assert made.add([]) == []


def test_replacing_leaves_one_row_and_unused_pictures_go(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([_item(0), _item(1), _item(3)])  # 0 and 3 share their picture
        made.delete("i0")
        assert made.picture("i3") == b"picture 0"
        made.add([_item(3, picture=b"other"), _item(1, kind="text", picture=None)])
        files = [path for path in (store / "pictures").rglob("*") if path.is_file()]
        assert [path.read_bytes() for path in files] == [b"other"]
        assert made.info().count == 2
        collections.delete("c")
        assert not [path for path in (store / "pictures").rglob("*") if path.is_file()]
        assert collections.names() == []


def test_what_is_written_to_a_deleted_collection_is_refused(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        made, other = _create(collections), _create(collections, "other")
        collections.delete("c")
        with pytest.raises(NotFoundError, match="has been deleted"):
            made.add([_item(1)])
        other.add([_item(1)])
        assert other.info().count == 1


def test_a_replaced_item_is_never_missed(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([_item(1), _item(2)])
        done, missed = threading.Event(), []

        def look() -> None:
            while not done.is_set():
                if {hit.item.id for hit in made.search(unit_rows(1)[0], 10)} != {"i1", "i2"}:
                    missed.append(1)
                if [hit.item.id for hit in made.search(unit_rows(1, 1)[0], 1)] != ["i1"]:
                    missed.append(2)

        reader = threading.Thread(target=look)
        reader.start()
        for _ in range(100):
            made.add([_item(1)])
        done.set()
        reader.join()
        assert not missed


def test_an_item_that_is_replaced_between_index_and_database_is_found(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([_item(1), _item(2)])
        search, asked = made._searches.search, []

        def then_replaced(*arguments: Any) -> Any:
            hits = search(*arguments)
            if not asked:
                made.add([_item(1)])
            asked.append(1)
            return hits

        monkeypatch.setattr(made._searches, "search", then_replaced)
        assert {hit.item.id for hit in made.search(unit_rows(1)[0], 10)} == {"i1", "i2"}
        assert len(asked) == 2


def test_names_models_and_missing_collections(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        first = _create(collections, "a")
        assert _create(collections, "a") is first
        with pytest.raises(ConflictError, match="model 'm'"):
            collections.create("a", model="n", fingerprint="g", dimensions=8)
        for name in ("", "../x", "a/b", ".hidden", "x" * 65, "ü"):
            with pytest.raises(InputError, match="name"):
                _create(collections, name)
        with pytest.raises(NotFoundError, match="there are: a"):
            collections.get("b")


def test_a_second_process_is_told_who_holds_the_folder(store: Path) -> None:
    with SQLiteCollections(store, note="http://127.0.0.1:1"), pytest.raises(StorageError, match=r"127\.0\.0\.1:1"):
        SQLiteCollections(store)
    SQLiteCollections(store).close()


def test_row_38_damage_is_named_and_refused(store: Path) -> None:
    with SQLiteCollections(store) as collections:
        _create(collections).add([_item(i) for i in range(50)])
    file = store / "store.db"
    content = bytearray(file.read_bytes())
    content[16384 : 16384 * 2] = b"\xff" * 16384
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"store\.db .*restore it from a backup"):
        SQLiteCollections(store)
    file.write_bytes(b"no database, but long enough to have a header of a hundred bytes" * 10)
    with pytest.raises(StorageError, match=r"store\.db"):
        SQLiteCollections(store)


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
        _create(collections).add([_item(1)])
    stray = store / "pictures" / "ab"
    stray.mkdir(exist_ok=True)
    (stray / "abandoned").write_bytes(b"x")
    with SQLiteCollections(store) as collections:
        assert not (stray / "abandoned").exists()
        assert collections.get("c").picture("i1") == b"picture 1"


def test_thumbnails_are_made_once_and_go_with_their_picture(store: Path) -> None:
    made: list[bytes] = []

    def make(picture: bytes) -> bytes:
        made.append(picture)
        return b"small " + picture + b"\xff\xd9"

    with SQLiteCollections(store) as collections:
        collection = _create(collections)
        collection.add([_item(1), _item(2)])
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


def test_row_34_add_delete_and_search_at_once(store: Path) -> None:
    """Row 34: an id is never returned after its delete was acknowledged."""
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([_item(i) for i in range(40)])
        failures: list[BaseException] = []
        deleted: set[str] = set()
        done = threading.Event()

        def change(offset: int) -> None:
            for i in range(offset, 40, 2):
                made.delete(f"i{i}")
                deleted.add(f"i{i}")
                made.add([_item(100 + i)])

        def look() -> None:
            while not done.is_set():
                gone = set(deleted)
                found = {hit.item.id for hit in made.search(unit_rows(1)[0], 1000)}
                assert not found & gone

        def guarded(work: object, *args: object) -> None:
            try:
                work(*args)  # type: ignore[operator]
            except BaseException as error:
                failures.append(error)

        readers = [threading.Thread(target=guarded, args=(look,)) for _ in range(2)]
        writers = [threading.Thread(target=guarded, args=(change, offset)) for offset in range(2)]
        for thread in (*readers, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        for thread in readers:
            thread.join()
        assert not failures
        assert made.info().count == 40


def test_row_35_a_full_disk_refuses_the_write_keeps_searching_and_recovers(store: Path) -> None:
    """Row 35, by SQLite's own limit of pages."""
    with SQLiteCollections(store) as collections:
        made = _create(collections)
        made.add([_item(1)])
        connection = collections._database._connection
        connection.pragma("max_page_count", connection.pragma("page_count") + 1)
        with pytest.raises(StorageError, match="nothing of it kept"):
            made.add([_item(i, metadata={"long": "x" * 8000}) for i in range(2, 60)])
        assert [hit.item.id for hit in made.search(unit_rows(1, 1)[0], 10)] == ["i1"]
        connection.pragma("max_page_count", 1 << 20)
        made.add([_item(2)])
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
            made.add([_item(1)])
            vfs.failures = failures
            with pytest.raises(StorageError, match=said):
                made.add([_item(i) for i in range(2, 60)])
            vfs.failures = 0
            shutil.copytree(store, store.parent / "killed")
            assert made.info().count == 1
        with SQLiteCollections(store.parent / "killed") as collections:
            there = [item.id for item in collections.get("c").page(100)]
        assert there == ["i1"] or said == "the next start shows"
    finally:
        vfs.unregister()
