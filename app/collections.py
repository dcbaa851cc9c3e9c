"""Durable collections of pictures and texts: SQLite is the truth, an index beside it answers searches."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

import apsw
import numpy as np

from app import snapshots
from app.collection import Collection, Item, item_of, unused, vectors_of
from app.database import Database, rows
from app.index import check_kind, make_index
from app.locking import lock
from app.pictures import Pictures
from models.errors import ConflictError, InputError, NotFoundError

_SNAPSHOTS = "index"
_STAGED = "~"  # begins the name of a collection that is to take another's place; NAME allows it to nobody
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
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Collections:
    """The collections of one data folder, which one process opens at a time.

    Raises StorageError if another process has it open (naming that process) or a file in it is damaged.
    """

    def __init__(self, folder: str | Path, note: str = "", picture_root: Path | None = None) -> None:
        """note: what the lock file tells others about this process, such as its address. picture_root: below which
        pictures are read that items refer to in place."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder, note)
        try:
            self._database = Database(self.folder / "store.db")
            self._pictures = Pictures(self.folder / "pictures", picture_root)
            self._open: dict[str, Collection] = {}
            self._mutex = threading.Lock()
            self._load()
        except BaseException:
            self._lock.close()
            raise

    def names(self) -> list[str]:
        """Every collection's name, sorted."""
        with self._mutex:
            return sorted(name for name in self._open if not name.startswith(_STAGED))

    def get(self, name: str) -> Collection:
        """A collection. Raises NotFoundError, naming what there is."""
        with self._mutex:
            found = None if name.startswith(_STAGED) else self._open.get(name)
        if found is None:
            raise NotFoundError(f"no collection {name!r}; there are: {', '.join(self.names()[:20]) or 'none yet'}")
        return found

    def create(self, name: str, *, model: str, fingerprint: str, dimensions: int, index: str = "auto") -> Collection:
        """Make a collection, or give the one there is if it was made the same way.

        Raises InputError for a bad name or index, ConflictError if it exists with another model.
        """
        if not NAME.fullmatch(name):
            raise InputError("a collection's name is 1 to 64 letters, digits, dots, dashes or underscores")
        check_kind(index)  # before anything is written
        return self._make(name, model, fingerprint, dimensions, index)

    def stage(self, name: str, model: str, fingerprint: str, dimensions: int) -> Collection:
        """The collection that is to take another's place, empty or as far as it came; nobody sees it.

        Raises NotFoundError if there is no other.
        """
        with self._database.read() as connection:
            ((index,),) = rows(connection, "SELECT kind FROM collections WHERE key = ?", self.get(name).key)
        staged = self.staged(name)
        if staged is not None and staged.fingerprint != fingerprint:
            self._delete(staged)
        return self._make(_STAGED + name, model, fingerprint, dimensions, index)

    def staged(self, name: str) -> Collection | None:
        """What `stage` made and `switch` has not put in its place."""
        with self._mutex:
            return self._open.get(_STAGED + name)

    def unstage(self, name: str) -> None:
        """Delete what `stage` made, if anything."""
        if (staged := self.staged(name)) is not None:
            self._delete(staged)

    def lacking(self, name: str, after: str, limit: int) -> list[Item]:
        """The first items, by their ids, that the staged collection has not, or not as they are."""
        keys = self.get(name).key, self._stage_of(name).key
        with self._database.read() as connection:
            found = rows(connection, f"{_LACKING} AND old.id > ? ORDER BY old.id LIMIT ?", *keys, after, limit)
        return [item_of(row) for row in found]

    def switch(self, name: str) -> bool:
        """Let the staged collection take the place of the other, in one commit; what it alone has goes first.

        False if it lacks something; then nothing is changed.
        """
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
                    del self._open[_STAGED + name]
                    self._open[name], new.name = new, name

        if not self._database.write(change, after):
            return False
        old.close()
        snapshots.remove(self._snapshot(old.key))
        return True

    def _stage_of(self, name: str) -> Collection:
        if (staged := self.staged(name)) is None:
            raise NotFoundError(f"nothing is to take the place of collection {name!r}")
        return staged

    def _make(self, name: str, model: str, fingerprint: str, dimensions: int, index: str) -> Collection:
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
        with self._mutex:
            return self._open[name]

    def coverage(self, name: str) -> tuple[int, int, float | None]:
        """Items of a collection, those its graph or codes cover, and when (POSIX time) these were last kept."""
        collection = self.get(name)
        return *collection.coverage, snapshots.kept_at(self._snapshot(collection.key))

    def delete(self, name: str) -> None:
        """Delete a collection and its items, and what is to take its place. Raises NotFoundError."""
        self._delete(self.get(name))
        self.unstage(name)

    def _delete(self, collection: Collection) -> None:
        name, key = collection.name, collection.key

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

        self._database.write(change, after, frees=True)
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
