"""The collections of a data folder: SQLite is the truth, an index beside it answers searches."""

from __future__ import annotations

import threading
from pathlib import Path

import apsw
import numpy as np

from app import snapshots
from app.collection import Collection, Item, Made, item_of
from app.collections import STAGED, Collections, refused
from app.database import Database, rows
from app.index import make_index
from app.locking import check_writable, lock
from app.pictures import Pictures
from app.sqlite_collection import SQLiteCollection, sweep, vectors_of
from models.errors import NotFoundError

_SNAPSHOTS = "index"
# Items of one collection that another has not, or has otherwise; and those that the other alone has.
_LACKING = """
    SELECT old.id, old.kind, old.caption, old.metadata, old.picture FROM items AS old WHERE old.collection = ?
    AND NOT EXISTS (
      SELECT 1 FROM items AS new WHERE new.collection = ? AND new.id = old.id AND new.kind = old.kind
      AND new.caption IS old.caption AND new.metadata = old.metadata AND new.picture IS old.picture)
"""
_SURPLUS = """
    SELECT new.id FROM items AS new WHERE new.collection = ?
    AND NOT EXISTS (SELECT 1 FROM items AS old WHERE old.collection = ? AND old.id = new.id)
"""


class SQLiteCollections(Collections):
    """Those of one data folder, which one process opens at a time.

    Raises StorageError if another process has it open (naming that process), or a file in it is damaged, missing or may
    not be written.
    """

    def __init__(self, folder: str | Path, note: str = "", picture_root: Path | None = None) -> None:
        """note: what the lock file tells others about this process, such as its address. picture_root: below which
        pictures are read that items refer to in place."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_writable(self.folder)
        self._lock = lock(self.folder, note)
        try:
            self._pictures = Pictures(self.folder / "pictures", picture_root)
            self._database = Database(self.folder / "store.db", may_be_new=self._pictures.empty)
            self._open: dict[str, Collection] = {}
            self._mutex = threading.Lock()
            self._load()
        except BaseException:
            self._lock.close()
            raise

    def names(self) -> list[str]:
        with self._mutex:
            return sorted(name for name in self._open if not name.startswith(STAGED))

    def refresh(self) -> None:
        """Nobody else makes or deletes any: this process holds the folder."""

    def _find(self, name: str) -> Collection | None:
        with self._mutex:
            return self._open.get(name)

    def lacking(self, name: str, after: str, limit: int) -> list[Item]:
        keys = self.get(name).key, self._stage_of(name).key
        with self._database.read() as connection:
            found = rows(connection, f"{_LACKING} AND old.id > ? ORDER BY old.id LIMIT ?", *keys, after, limit)
        return [item_of(row) for row in found]

    def switch(self, name: str) -> bool:
        old, new = self.get(name), self._stage_of(name)
        with self._database.read() as connection:
            surplus = rows(connection, _SURPLUS, new.key, old.key)
        for (id,) in surplus:
            new.delete(id)

        def change(connection: apsw.Connection) -> bool:
            if rows(connection, f"{_LACKING} LIMIT 1", old.key, new.key):
                return False
            if rows(connection, f"{_SURPLUS} LIMIT 1", new.key, old.key):
                return False
            connection.execute("DELETE FROM collections WHERE key = ?", (old.key,))
            connection.execute("UPDATE collections SET name = ? WHERE key = ?", (name, new.key))
            return True

        def after(switched: bool) -> None:
            if switched:
                with self._mutex:
                    del self._open[STAGED + name]
                    self._open[name], new.name = new, name

        if not self._database.write(change, after):
            return False
        old.close()
        snapshots.remove(self._snapshot(old.key))
        return True

    def _make(self, name: str, model: str, fingerprint: str, dimensions: int, index: str) -> Collection:
        def change(connection: apsw.Connection) -> Made | None:
            for theirs, print_ in rows(connection, "SELECT model, fingerprint FROM collections WHERE name = ?", name):
                if print_ != fingerprint:
                    raise refused(name, theirs, print_, model, fingerprint)
                return None
            connection.execute(
                "INSERT INTO collections (name, model, fingerprint, dimensions, kind) VALUES (?, ?, ?, ?, ?)",
                (name, model, fingerprint, dimensions, index),
            )
            return Made(connection.last_insert_rowid(), name, model, fingerprint, dimensions, index)

        opened: list[SQLiteCollection] = []

        def after(made: Made | None) -> None:
            if made is not None:
                empty = make_index(index, dimensions, snapshot=self._snapshot(made.key))
                opened.append(SQLiteCollection(self._database, self._pictures, made, empty))
                with self._mutex:
                    self._open[name] = opened[0]

        while True:
            if self._database.write(change, after) is not None:
                return opened[0]
            with self._mutex:
                if name in self._open:  # else it was deleted since
                    return self._open[name]

    def coverage(self, name: str) -> tuple[int, int, float | None]:
        collection = self.get(name)
        return *collection.coverage, snapshots.kept_at(self._snapshot(collection.key))

    def _delete(self, collection: Collection) -> None:
        name, key = collection.name, collection.key

        def change(connection: apsw.Connection) -> list[str]:
            found = rows(connection, "SELECT DISTINCT picture FROM items WHERE collection = ? AND picture NOTNULL", key)
            pictures = [row[0] for row in found]
            connection.execute("DELETE FROM collections WHERE key = ?", (key,))
            if not connection.changes():
                raise NotFoundError(f"no collection {name!r}")
            return pictures

        def after(pictures: list[str]) -> None:
            with self._mutex:
                self._open.pop(name, None)
            sweep(self._database, self._pictures, pictures)

        self._database.write(change, after, frees=True)
        collection.close()
        snapshots.remove(self._snapshot(key))

    def close(self) -> None:
        for collection in self._open.values():
            collection.close()
        self._database.close()
        self._lock.close()

    def _load(self) -> None:
        """Make every index of the stored vectors; drop pictures and snapshots that nothing has: what a crash left."""
        with self._database.read() as connection:
            for made in known(connection):
                stored = rows(
                    connection, "SELECT row, vector FROM vectors JOIN items USING (row) WHERE collection = ?", made.key
                )
                ids = np.array([row for row, _ in stored], np.int64)
                vectors = vectors_of([blob for _, blob in stored], made.dimensions, self._database.file)
                index = make_index(made.kind, made.dimensions, ids, vectors, self._snapshot(made.key))
                self._open[made.name] = SQLiteCollection(self._database, self._pictures, made, index)
            kept = rows(connection, "SELECT DISTINCT picture FROM items WHERE picture NOTNULL")
            self._pictures.keep_only({row[0] for row in kept})
        snapshots.keep_only([self._snapshot(each.key) for each in self._open.values()], self.folder / _SNAPSHOTS)

    def _snapshot(self, key: int) -> Path:
        return self.folder / _SNAPSHOTS / str(key)


def known(connection: apsw.Connection) -> list[Made]:
    """What a database says of its collections."""
    found = rows(connection, "SELECT key, name, model, fingerprint, dimensions, kind FROM collections")
    return [Made(*each) for each in found]
