"""Durable collections of pictures and texts: SQLite is the truth, an index beside it answers searches."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

import apsw
import numpy as np

from app import snapshots
from app.collection import Collection, unused, vectors_of
from app.database import Database, rows
from app.index import check_kind, make_index
from app.locking import lock
from app.pictures import Pictures
from models.errors import ConflictError, InputError, NotFoundError

_SNAPSHOTS = "index"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Collections:
    """The collections of one data folder, which one process opens at a time.

    Raises StorageError if another process has it open (naming that process) or a file in it is damaged.
    """

    def __init__(self, folder: str | Path, note: str = "") -> None:
        """note: what the lock file tells others about this process, such as its address."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder, note)
        try:
            self._database = Database(self.folder / "store.db")
            self._pictures = Pictures(self.folder / "pictures")
            self._open: dict[str, Collection] = {}
            self._mutex = threading.Lock()
            self._load()
        except BaseException:
            self._lock.close()
            raise

    def names(self) -> list[str]:
        """Every collection's name, sorted."""
        with self._mutex:
            return sorted(self._open)

    def get(self, name: str) -> Collection:
        """A collection. Raises NotFoundError, naming what there is."""
        with self._mutex:
            if name not in self._open:
                known = ", ".join(sorted(self._open)[:20]) or "none yet"
                raise NotFoundError(f"no collection {name!r}; there are: {known}")
            return self._open[name]

    def create(self, name: str, *, model: str, fingerprint: str, dimensions: int, index: str = "auto") -> Collection:
        """Make a collection, or give the one there is if it was made the same way.

        Raises InputError for a bad name or index, ConflictError if it exists with another model.
        """
        if not NAME.fullmatch(name):
            raise InputError("a collection's name is 1 to 64 letters, digits, dots, dashes or underscores")
        check_kind(index)  # before anything is written

        def change(connection: apsw.Connection) -> tuple[int, str] | None:
            for theirs, print_ in rows(connection, "SELECT model, fingerprint FROM collections WHERE name = ?", name):
                if print_ != fingerprint:
                    raise ConflictError(
                        f"collection {name!r} holds vectors of model {theirs!r} ({print_}), not of {model!r} "
                        f"({fingerprint}): use another name, or delete it first"
                    )
                return None
            connection.execute(
                "INSERT INTO collections (name, model, fingerprint, dimensions, kind) VALUES (?, ?, ?, ?, ?)",
                (name, model, fingerprint, dimensions, index),
            )
            return connection.last_insert_rowid(), name

        def after(made_now: tuple[int, str] | None) -> None:
            if made_now is not None:
                key = made_now[0]
                made = make_index(index, dimensions, snapshot=self._snapshot(key))
                opened = Collection(self._database, self._pictures, key, name, model, fingerprint, dimensions, made)
                with self._mutex:
                    self._open[name] = opened

        self._database.write(change, after)
        return self.get(name)

    def delete(self, name: str) -> None:
        """Delete a collection and its items. Raises NotFoundError."""
        collection = self.get(name)
        key = collection.key

        def change(connection: apsw.Connection) -> list[str]:
            found = rows(connection, "SELECT DISTINCT picture FROM items WHERE collection = ? AND picture NOTNULL", key)
            pictures = [row[0] for row in found]
            connection.execute("DELETE FROM collections WHERE key = ?", (key,))
            if not connection.changes():
                raise NotFoundError(f"no collection {name!r}")
            return unused(connection, pictures)

        def after(unused: list[str]) -> None:
            with self._mutex:
                self._open.pop(name, None)
            self._pictures.remove(unused)

        self._database.write(change, after)
        collection.close()
        snapshots.remove(self._snapshot(key))

    def close(self) -> None:
        """Finish what was begun and let the folder go."""
        for collection in self._open.values():
            collection.close()
        self._database.close()
        self._lock.close()

    def __enter__(self) -> Collections:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> None:
        """Make every index of the stored vectors; drop pictures and snapshots that nothing has: what a crash left."""
        with self._database.read() as connection:
            known = "SELECT key, name, model, fingerprint, dimensions, kind FROM collections"
            for key, name, model, fingerprint, dimensions, kind in rows(connection, known):
                stored = rows(
                    connection, "SELECT row, vector FROM vectors JOIN items USING (row) WHERE collection = ?", key
                )
                ids = np.array([row for row, _ in stored], np.int64)
                vectors = vectors_of([blob for _, blob in stored], dimensions, self._database.file)
                index = make_index(kind, dimensions, ids, vectors, self._snapshot(key))
                self._open[name] = Collection(
                    self._database, self._pictures, key, name, model, fingerprint, dimensions, index
                )
            kept = rows(connection, "SELECT DISTINCT picture FROM items WHERE picture NOTNULL")
            self._pictures.keep_only({row[0] for row in kept})
        snapshots.keep_only([self._snapshot(each.key) for each in self._open.values()], self.folder / _SNAPSHOTS)

    def _snapshot(self, key: int) -> Path:
        return self.folder / _SNAPSHOTS / str(key)
