"""SQLite as the truth: one writer that commits in groups, many readers, errors of the disk as our own."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import apsw

from models.errors import StorageError

T = TypeVar("T")
FORMAT = 1
_RESERVE = 1 << 20  # bytes
GROUP = 64  # changes that share one commit, at most
_TRIES = 4  # one fsync may fail where the next does not

_SCHEMA = """
CREATE TABLE collections (
  key INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, model TEXT NOT NULL, fingerprint TEXT NOT NULL,
  dimensions INTEGER NOT NULL, kind TEXT NOT NULL) STRICT;
CREATE TABLE items (
  row INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collections(key) ON DELETE CASCADE,
  id TEXT NOT NULL, kind TEXT NOT NULL, caption TEXT, metadata TEXT NOT NULL, picture TEXT,
  size INTEGER NOT NULL,
  UNIQUE (collection, id)) STRICT;
CREATE INDEX items_by_picture ON items(picture) WHERE picture IS NOT NULL;
CREATE TABLE vectors (
  row INTEGER PRIMARY KEY REFERENCES items(row) ON DELETE CASCADE, vector BLOB NOT NULL) STRICT;
"""


class Database:
    """One SQLite file in WAL mode with synchronous=FULL: what `write` returned from is on the disk.

    Raises StorageError, naming the file and the way out, if it is damaged or of a newer format, or if it is missing or
    empty where it must not be.
    """

    def __init__(self, file: Path, *, may_be_new: bool = True) -> None:
        self.file = file
        self._may_be_new = may_be_new
        self._reserve = file.with_suffix(".reserve")
        self._readers: queue.LifoQueue[apsw.Connection] = queue.LifoQueue()
        self._opened: list[apsw.Connection] = []
        if not may_be_new and not (file.is_file() and file.stat().st_size):
            raise nothing(self.file)  # and no file is left behind
        try:
            self._open()
        except apsw.Error as error:
            space = "free some space"
            ways = {apsw.FullError: space, apsw.IOError: "check the disk" if self._has_room() else space}
            way = ways.get(type(error), "restore it from a backup, or use another folder")
            raise StorageError(f"{file} cannot be opened ({error}); {way}") from error
        self._take_reserve()
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._closing = False
        self._gate = threading.Lock()  # nothing comes behind the end of the queue, where it would wait for ever
        self._writer = threading.Thread(target=self._write_all, name="writer", daemon=True)
        self._writer.start()

    def write(
        self,
        change: Callable[[apsw.Connection], T],
        after: Callable[[T], None] | None = None,
        undo: Callable[[T], None] | None = None,
        *,
        frees: bool = False,
    ) -> T:
        """Run `change` in a transaction and return its result once it is durable; an error undoes it alone.

        Changes of several callers share a commit. after: runs between the commit and the return, in commit order.
        undo: runs if the commit failed, for what `change` did outside of the database. frees: a delete, for which some
        room is kept on a disk that is full.
        Raises whatever `change` raises, and StorageError when the disk refuses.
        """
        job: _Job[T] = _Job(change, after, undo, frees, Future())
        with self._gate:
            if self._closing:
                raise StorageError("the store is closed")
            self._jobs.put(job)
        return job.done.result()

    @contextmanager
    def read(self) -> Iterator[apsw.Connection]:
        """A connection that sees one consistent state of everything committed so far."""
        connection = None
        try:
            with suppress(queue.Empty):
                connection = self._readers.get_nowait()
            connection = connection or self._connect()
            with connection:
                yield connection
        except apsw.Error as error:  # also of one more connection, where the process has too many files open
            raise StorageError(f"{self.file.name} cannot be read: {error}") from error
        finally:
            if connection is not None:
                self._readers.put(connection)

    def close(self) -> None:
        """Finish what was begun and let go of the file."""
        with self._gate:
            if self._closing:
                return
            self._closing = True
            self._jobs.put(None)
        self._writer.join()
        for connection in self._opened:
            connection.close()

    def _open(self) -> None:
        try:
            self._connection = self._connect()
            self._prepare()
        except (apsw.FullError, apsw.IOError):  # what SQLite needs beside the file has no room
            if self._has_room() or not self._give_reserve():
                raise
            self._opened.pop().close()
            self._connection = self._connect()
            self._prepare()

    def _has_room(self) -> bool:
        return shutil.disk_usage(self.file.parent).free >= _RESERVE

    def _take_reserve(self) -> None:
        """Keep some room on the disk, if there is enough, for a full one could not even delete: a delete is written
        before anything is freed."""
        try:
            if not self._reserve.exists() and shutil.disk_usage(self.file.parent).free >= 4 * _RESERVE:
                self._reserve.write_bytes(bytes(_RESERVE))
        except OSError:
            self._give_reserve()

    def _give_reserve(self) -> bool:
        """Free that room. False if there is none."""
        with suppress(OSError):
            self._reserve.unlink()
            return True
        return False

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(str(self.file))
        self._opened.append(connection)
        connection.set_busy_timeout(10_000)
        for setting in ("page_size=16384", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.pragma(*setting.split("="))
        return connection

    def _prepare(self) -> None:
        if check(self._connection, self.file) == 0:
            if not self._may_be_new:
                raise nothing(self.file)
            with self._connection:
                self._connection.execute(_SCHEMA)
                self._connection.pragma("user_version", FORMAT)

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            last = False
            while len(jobs) < GROUP and not self._jobs.empty():
                following = self._jobs.get()
                if following is None:
                    last = True
                    break
                jobs.append(following)
            self._write_group(jobs)
            if last:
                return

    def _bury(self) -> bool:
        """Write over what a failed commit left in the log. Its frames may lie there whole, only not synced, and whoever
        opens the file after a kill would take them for a commit. False if the disk refuses that too."""
        for _ in range(_TRIES):
            with suppress(apsw.Error):
                self._connection.pragma("user_version", FORMAT)
                return True
        return False

    def _write_group(self, jobs: list[_Job[Any]]) -> None:
        results: list[tuple[_Job[Any], Any]] = []
        try:
            with self._connection:
                for job in jobs:
                    try:
                        with self._connection:  # a savepoint
                            results.append((job, job.change(self._connection)))
                    except apsw.Error:
                        raise
                    except Exception as error:
                        job.done.set_exception(error)
        except BaseException as raised:  # whatever it was, nothing was committed and nobody is left waiting
            cause = _first(raised)
            for job, result in results:
                if job.undo is not None:
                    job.undo(result)
            if isinstance(cause, apsw.FullError) and self._give_reserve():
                self._write_group([job for job in jobs if job.frees and not job.done.done()])
            failure = cause
            if isinstance(cause, (apsw.Error, OSError)):
                # On a full disk the frame that makes a commit was not written: it is the last.
                void = isinstance(cause, apsw.FullError) or self._bury()
                kept = "nothing of it kept" if void else "the next start shows whether it was kept"
                failure = StorageError(f"the write was refused and {kept}: {cause}")
            for job in jobs:
                if not job.done.done():
                    job.done.set_exception(failure)
            return
        for job, result in results:
            try:
                if job.after is not None:
                    job.after(result)
                job.done.set_result(result)
            except BaseException as error:
                job.done.set_exception(error)
        self._take_reserve()


def _first(error: BaseException) -> BaseException:
    """What went wrong at first: where SQLite has ended the transaction itself, to end it again is an error too."""
    while isinstance(error, apsw.Error) and isinstance(error.__context__, apsw.Error):
        error = error.__context__
    return error


def nothing(file: Path) -> StorageError:
    """What to say of a database that is missing or empty where it must not be."""
    return StorageError(
        f"{file} is missing or empty; restore it from a backup, or use another folder: pictures beside it would be "
        "deleted as nobody's"
    )


def looked_at(file: Path) -> apsw.Connection:
    """A connection that reads, also beside a server, and leaves the database and its log as they are.

    Where there is no log nobody writes, and SQLite, which is told so, makes none.
    """
    immutable = "" if file.with_name(f"{file.name}-wal").exists() else "&immutable=1"
    place = f"{file.absolute().as_uri()}?mode=ro{immutable}"
    return apsw.Connection(place, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)


def check(connection: apsw.Connection, file: Path, *, whole: bool = False) -> int:
    """The format of a database, 0 if it is new. whole: indexes are looked at beside their tables too, which is slow.

    Raises StorageError, naming `file` and the way out, if it is damaged or of a newer format.
    """
    try:
        version: int = connection.pragma("user_version")
        if version > FORMAT:
            raise StorageError(
                f"{file} is of format {version}, this version reads up to {FORMAT}: upgrade, or use another"
            )
        found = rows(connection, "PRAGMA integrity_check(1)" if whole else "PRAGMA quick_check(1)")[0][0]
    except (apsw.NotADBError, apsw.CorruptError) as error:
        found = str(error)
    if found != "ok":
        raise StorageError(
            f"{file} is damaged ({' '.join(found.split())}); restore it from a backup, or use another folder"
        )
    return version


def pictures_of(connection: apsw.Connection) -> dict[str, int]:
    """Every picture that items have, by name, with the first row that has it."""
    found = rows(connection, "SELECT picture, MIN(row) FROM items WHERE picture NOTNULL GROUP BY picture")
    return dict(found)


def way_out(connection: apsw.Connection, picture: str) -> str:
    """What to do about a picture that is lost, with the item that has it."""
    found = rows(
        connection,
        "SELECT items.id, name FROM items JOIN collections ON key = collection WHERE picture = ? ORDER BY row",
        picture,
    )
    others = f" (and of {len(found) - 1} more)" if len(found) > 1 else ""
    shown = f"item {found[0][0]!r} of collection {found[0][1]!r}{others}" if found else "an item that has gone since"
    return f"it is the picture of {shown}; put the file back from a backup, or delete the item and add it anew"


def rows(connection: apsw.Connection, statement: str, *values: Any) -> list[Any]:
    """Every row that a statement gives."""
    return connection.execute(statement, values).fetchall()


@dataclass
class _Job(Generic[T]):
    change: Callable[[apsw.Connection], T]
    after: Callable[[T], None] | None
    undo: Callable[[T], None] | None
    frees: bool
    done: Future[T]
