"""Row 36: a process that writes is killed, or its disk loses power, and what was acknowledged is looked for.

`make torture` does 500 and 100 rounds, the suite 25 and 10. The disk is an ext4 image on a loop device; a power cut is
a copy of the image in the moment of the kill, so what had not reached the disk by then is not in it.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from databases import MilvusServer, PostgresServer
from support import unit_rows

from app.collections import Collections
from app.postgres_collections import PostgresCollections
from app.sqlite_collections import SQLiteCollections
from models.errors import SemblanceError, StorageError

KILLS = int(os.environ.get("KILL_ROUNDS", "25"))
CUTS = int(os.environ.get("POWER_ROUNDS", "10"))

# Writes five items, or deletes one of five, and says so once it was answered. Arguments: folder or database and Milvus,
# first step, and how SQLite is to sync.
_WRITER = """
import sys, numpy as np
from app.collection import NewItem
from app.postgres_collections import PostgresCollections
from app.sqlite_collections import SQLiteCollections
from models.errors import StorageError
if sys.argv[1].startswith("postgresql:"):
    database, *milvus = sys.argv[1].split()
    collections = PostgresCollections(database, None, *milvus)
else:
    collections = SQLiteCollections(sys.argv[1])
    collections._database._connection.pragma("synchronous", sys.argv[3])
made = collections.create("c", model="m", fingerprint="f", dimensions=8)
step = int(sys.argv[2])
while True:
    vectors = np.random.default_rng(step).standard_normal((5, 8)).astype("f4")
    items = [NewItem("image", v, f"{step}-{i}", picture=b"%d-%d" % (step, i)) for i, v in enumerate(vectors)]
    try:
        made.add(items)
        print("add", step, flush=True)
        if step % 3 == 0:
            made.delete(f"{step}-0")
            print("delete", step, flush=True)
    except StorageError:
        print("refuse", step, flush=True)
    step += 1
"""


@dataclass
class Acknowledged:
    """The steps that were answered, in all rounds. next: the first that was not begun."""

    added: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    next: int = 0


def _opened(store: Path | str) -> Collections:
    if isinstance(store, Path):
        return SQLiteCollections(store)
    database, *milvus = store.split()
    return PostgresCollections(database, None, *milvus)


def write_and_kill(
    store: Path | str,
    rng: random.Random,
    seen: Acknowledged,
    then: Callable[[], None] = lambda: None,
    sync: str = "FULL",
    under: Sequence[str] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Let a process write, kill -9 it at a random moment, and note what it was answered. then: at once after it. under:
    a command that runs it. meanwhile: what is done between, after which it writes on."""
    writer = [*under, sys.executable, "-c", _WRITER, str(store), str(seen.next), sync]
    process = subprocess.Popen(writer, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    time.sleep(rng.random() * 0.15)
    meanwhile()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    then()
    lines += process.stdout.readlines()
    process.stdout.close()
    for line in lines:
        if line.endswith("\n"):
            word, step = line.split()
            {"add": seen.added, "delete": seen.deleted, "refuse": seen.refused}[word].add(int(step))


def check(store: Path | str, rng: random.Random, seen: Acknowledged) -> None:
    """Every acknowledged item is there, no deleted one, and of what was not acknowledged all of a batch or nothing."""
    with _opened(store) as collections:
        made = collections.get("c")
        there = {item.id: item for item in made.page(1_000_000)}
        for step in seen.added:
            # Of every third step the first item is deleted next; unless that was answered, it may be there or not.
            assert {f"{step}-{i}" for i in range(1 if step % 3 == 0 else 0, 5)} <= there.keys()
        assert not {f"{step}-0" for step in seen.deleted} & there.keys()
        steps = {int(each.split("-")[0]) for each in there}
        assert not steps & (seen.refused - seen.added)  # of an add that was refused nothing is kept
        for step in steps - seen.added:
            assert {f"{step}-{i}" for i in range(1, 5)} <= there.keys()
        assert made.info().count == len(there)
        for each in rng.sample(sorted(there), min(20, len(there))):
            assert made.picture(each).decode() == each
        hits = made.search(unit_rows(1)[0], 1_000_000)
        assert {hit.item.id for hit in hits} == there.keys()
    seen.next = max(steps | seen.added | seen.refused, default=seen.next) + 1


def test_row_36_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng, added, deleted = random.Random(0), 0, 0
    for start in range(0, KILLS, 50):  # a store each, for every round looks at all that there is
        seen = Acknowledged()
        for _ in range(start, min(start + 50, KILLS)):
            write_and_kill(tmp_path / f"data{start}", rng, seen)
            check(tmp_path / f"data{start}", rng, seen)
        added, deleted = added + len(seen.added), deleted + len(seen.deleted)
    print(f"{KILLS} kills: {added} writes and {deleted} deletes acknowledged, 0 lost, 0 undone")
    assert added > KILLS


def test_row_36_neither_the_writer_nor_its_postgresql_killed_loses_anything(postgres: PostgresServer) -> None:
    """Every third round kills every process of the database instead, while a writer writes; it waits and goes on."""
    rng, added, deleted, rounds = random.Random(0), 0, 0, KILLS // 3
    for start in range(0, rounds, 50):
        seen, database = Acknowledged(), postgres.database()

        def restart() -> None:
            postgres.kill()
            postgres.start()
            time.sleep(rng.random() * 0.3)

        for number in range(start, min(start + 50, rounds)):
            write_and_kill(database, rng, seen, meanwhile=restart if number % 3 == 2 else lambda: None)
            check(database, rng, seen)
        added, deleted = added + len(seen.added), deleted + len(seen.deleted)
    print(f"{rounds} kills: {added} writes and {deleted} deletes acknowledged by PostgreSQL, 0 lost, 0 undone")
    assert added > rounds


def test_row_36_neither_the_writer_nor_the_milvus_beside_its_postgresql_killed_loses_anything(
    postgres: PostgresServer, milvus: MilvusServer
) -> None:
    """Every third round kills the Milvus instead, while a writer writes; what is searched there is all that is true."""
    rng, added, deleted, rounds = random.Random(0), 0, 0, max(3, KILLS // 8)
    for start in range(0, rounds, 20):
        seen, store = Acknowledged(), f"{postgres.database()} {milvus.uri}"

        def restart() -> None:
            milvus.kill()
            milvus.start()
            time.sleep(1 + rng.random())

        for number in range(start, min(start + 20, rounds)):
            write_and_kill(store, rng, seen, meanwhile=restart if number % 3 == 2 else lambda: None)
            check(store, rng, seen)
        added, deleted = added + len(seen.added), deleted + len(seen.deleted)
    print(f"{rounds} kills: {added} writes and {deleted} deletes acknowledged with {milvus.what}, 0 lost, 0 undone")
    assert added >= rounds


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """An ext4 image as a folder."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., Path]:
    """Makes an image of so many megabytes."""
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4, to mount an image of a disk")

    def make(megabytes: int = 48) -> Path:
        image = tmp_path / "disk.img"
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        return image

    return make


def cut_power(image: Path, rng: random.Random, seen: Acknowledged, sync: str = "FULL") -> None:
    """One round: write, kill, copy the disk as it is, and go on with the copy. Raises if it has lost something."""
    left, place = image.with_suffix(".left"), image.parent / "mounted"
    with mounted(image, place):
        write_and_kill(place / "data", rng, seen, then=lambda: shutil.copyfile(image, left) and None, sync=sync)
    left.replace(image)
    with mounted(image, place):
        check(place / "data", rng, seen)


def test_row_36_a_power_cut_loses_nothing_that_was_acknowledged(disk: Callable[..., Path]) -> None:
    image, rng, seen = disk(), random.Random(0), Acknowledged()
    for _ in range(CUTS):
        cut_power(image, rng, seen)
    print(f"{CUTS} cuts: {len(seen.added)} writes and {len(seen.deleted)} deletes acknowledged, 0 lost, 0 undone")
    assert len(seen.added) > CUTS


def test_a_store_that_does_not_sync_is_found_out(disk: Callable[..., Path]) -> None:
    """The same rounds do lose something where SQLite is told not to sync: what they look for can be missed."""
    image = disk()
    lost = 0
    for seed in range(5):
        try:
            cut_power(image, random.Random(seed), Acknowledged(), sync="OFF")
        except (AssertionError, SemblanceError):
            lost += 1
            image = disk()
    assert lost


def test_row_35_a_start_and_a_delete_succeed_on_a_full_disk(disk: Callable[..., Path], tmp_path: Path) -> None:
    from app.database import Database
    from app.locking import lock

    with mounted(disk(16), tmp_path / "mounted") as place:
        database = Database(place / "store.db")
        rows = [(number,) for number in range(100)]
        database.write(lambda connection: connection.execute("CREATE TABLE numbers (number)") and None)
        database.write(lambda connection: connection.executemany("INSERT INTO numbers VALUES (?)", rows) and None)
        assert (place / "store.reserve").exists()
        database.close()
        with suppress(OSError), (place / "filled").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        lock(place, "who it is").close()
        with closing(Database(place / "store.db")) as database:  # SQLite wants room beside the file
            with database.read() as connection:
                assert len(list(connection.execute("SELECT * FROM numbers"))) == 100
            with pytest.raises(StorageError, match=r"nothing of it kept: .*full"):
                # So much that SQLite ends the transaction itself, before its end.
                database.write(lambda connection: connection.execute("INSERT INTO numbers VALUES (zeroblob(9000000))"))
            database.write(lambda connection: connection.execute("DELETE FROM numbers WHERE number < 9"), frees=True)


def test_row_35_a_disk_that_is_full_refuses_the_write_and_recovers(disk: Callable[..., Path], tmp_path: Path) -> None:
    """Row 35, by a disk that is: no write is half there, searches go on, and what is freed can be written."""
    import numpy as np

    from app.collection import NewItem

    with mounted(disk(8), tmp_path / "mounted") as place, SQLiteCollections(place / "data") as collections:
        made = collections.create("c", model="m", fingerprint="f", dimensions=8)
        stored: list[str] = []
        rng = np.random.default_rng(0)

        def items(step: int) -> list[NewItem]:
            vectors = rng.standard_normal((4, 8)).astype(np.float32)
            return [NewItem("image", v, f"{step}-{i}", picture=rng.bytes(20_000)) for i, v in enumerate(vectors)]

        def fill() -> None:
            for step in range(1000):
                stored.extend(made.add(items(step)))

        with pytest.raises(StorageError, match=r"(disk|write) .*refused|refused a picture"):
            fill()
        assert len(stored) >= 20
        assert {item.id for item in made.page(10_000)} == set(stored)
        assert len(made.search(unit_rows(1)[0], 10_000)) == len(stored)
        for each in stored[:12]:
            made.delete(each)
        assert made.add(items(5000)) == [f"5000-{i}" for i in range(4)]
        assert len(made.picture("5000-0")) == 20_000
    with (
        mounted(tmp_path / "disk.img", tmp_path / "mounted") as place,
        SQLiteCollections(place / "data") as collections,
    ):
        assert collections.get("c").info().count == len(stored) - 12 + 4


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_errors_of_the_disk_refuse_single_writes_and_lose_nothing(tmp_path: Path, error: int) -> None:
    """libfiu lets one in fifty calls that write or sync fail. An add that is refused is not there, one that is answered
    is, after the kill too."""
    if not shutil.which("fiu-run"):
        pytest.skip("needs fiu-run: apt-get install fiu-utils")
    calls = ("sync/fsync", "sync/fdatasync", "rw/pwrite")
    faults = [f"enable_random name=posix/io/{each},probability=0.02,failinfo={error}" for each in calls]
    fiu = ["fiu-run", "-x", *(word for fault in faults for word in ("-c", fault))]
    with SQLiteCollections(tmp_path / "data") as collections:
        collections.create("c", model="m", fingerprint="f", dimensions=8)
    rng, seen, rounds = random.Random(0), Acknowledged(), 0
    # More where the store could not be opened in any of them, which happens.
    while rounds < max(3, KILLS // 10) or (rounds < 30 and not (seen.added and seen.refused)):
        write_and_kill(tmp_path / "data", rng, seen, under=fiu)
        check(tmp_path / "data", rng, seen)
        rounds += 1
    print(f"{rounds} rounds, {len(seen.added)} writes acknowledged, {len(seen.refused)} refused, 0 lost")
    assert seen.added
    assert seen.refused
