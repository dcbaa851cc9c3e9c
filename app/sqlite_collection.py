"""A collection in SQLite, which is the truth, with an index in this process beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from app import statistics
from app.collection import Among, Collection, Item, Made, NewItem, item_of
from app.database import Database, rows
from app.index import Ids, VectorIndex, Vectors
from app.pictures import Pictures
from models.errors import NotFoundError, StorageError

_ITEM = "id, kind, caption, metadata, picture"
_AMONG = "id IN (SELECT value FROM json_each(?))"
_KINDS = "SELECT kind, COUNT(*) FROM items WHERE collection = ? GROUP BY kind"
_PICTURES = "SELECT COUNT(DISTINCT picture) FROM items WHERE collection = ?"
_METADATA = """
    SELECT key, type IN ('integer', 'real'), COUNT(*), COUNT(DISTINCT value), MIN(value), MAX(value)
    FROM items, json_each(items.metadata) WHERE collection = ? GROUP BY key, type
"""
_FREQUENT = """
    SELECT value, COUNT(*) AS times FROM items, json_each(items.metadata)
    WHERE collection = ? AND key = ? AND type = 'text' GROUP BY value ORDER BY times DESC, value LIMIT ?
"""


class SQLiteCollection(Collection):
    """Rows of one SQLite file. Their vectors are in an index of this process before a search can miss them."""

    def __init__(self, database: Database, pictures: Pictures, made: Made, index: VectorIndex) -> None:
        super().__init__(made, index, pictures)
        self._database, self._pictures = database, pictures

    def _put(self, ids: Sequence[str], items: Sequence[NewItem], vectors: Vectors) -> None:
        digests = [None if item.picture is None else self._pictures.put(item.picture) for item in items]

        def change(connection: apsw.Connection) -> tuple[list[int], list[int], list[str | None]]:
            self._check_there(connection)
            old = self._rows_of(connection, ids)
            for item, digest in zip(items, digests, strict=True):
                if digest is not None and item.picture is not None:
                    # A delete that came between may have removed the file; deletes and this run in one thread.
                    self._pictures.ensure(digest, item.picture)
            self._forget(connection, [row for row, _ in old])
            new = []
            for each, item, vector, digest in zip(ids, items, vectors, digests, strict=True):
                connection.execute(
                    f"INSERT INTO items (collection, {_ITEM}, size) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        self.key,
                        each,
                        item.kind,
                        item.caption,
                        json.dumps(dict(item.metadata)),
                        digest,
                        len(item.picture) if isinstance(item.picture, bytes) else 0,
                    ),
                )
                row = connection.last_insert_rowid()
                connection.execute("INSERT INTO vectors (row, vector) VALUES (?, ?)", (row, vector.tobytes()))
                new.append(row)
            # Before the commit: a search that finds a row the database does not show (yet, or any more) leaves it out,
            # so an item that is being replaced is found under its old row until the commit and its new one after it.
            self._index.add(np.array(new, np.int64), vectors)
            return [row for row, _ in old], new, [picture for _, picture in old]

        def after(changed: tuple[list[int], list[int], list[str | None]]) -> None:
            old, _, pictures = changed
            self._index.remove(np.array(old, np.int64))
            sweep(self._database, self._pictures, pictures)

        def undo(changed: tuple[list[int], list[int], list[str | None]]) -> None:
            self._index.remove(np.array(changed[1], np.int64))

        self._database.write(change, after, undo)

    def delete(self, id: str) -> None:
        def change(connection: apsw.Connection) -> tuple[list[int], list[str | None]]:
            old = self._rows_of(connection, [id])
            if not old:
                raise self._missing(id)
            self._forget(connection, [row for row, _ in old])
            return [row for row, _ in old], [picture for _, picture in old]

        def after(changed: tuple[list[int], list[str | None]]) -> None:
            self._index.remove(np.array(changed[0], np.int64))
            sweep(self._database, self._pictures, changed[1])

        self._database.write(change, after, frees=True)

    def sample(self, limit: int) -> tuple[list[Item], Vectors]:
        with self._database.read() as connection:
            known = rows(connection, "SELECT row FROM items WHERE collection = ? ORDER BY row", self.key)
            chosen = [row for (row,) in known[:: max(1, -(-len(known) // limit))]]
            found = rows(
                connection,
                f"SELECT vector, {_ITEM} FROM items JOIN vectors USING (row) WHERE row IN "
                "(SELECT value FROM json_each(?))",
                json.dumps(chosen),
            )
        vectors = vectors_of([vector for vector, *_ in found], self.dimensions, self._database.file)
        return [item_of(rest) for _, *rest in found], vectors

    def _page(self, limit: int, after: str, among: Among, *, vectors: bool) -> tuple[list[Item], Vectors]:
        where, values = self._where(among)
        what = f"vector, {_ITEM} FROM items JOIN vectors USING (row)" if vectors else f"NULL, {_ITEM} FROM items"
        with self._database.read() as connection:
            statement = f"SELECT {what} WHERE {where} AND id > ? ORDER BY id LIMIT ?"
            found = rows(connection, statement, *values, after, limit)
            if not found:  # which of one that went meanwhile is no end of its items
                self._check_there(connection)
        stored = [vector for vector, *_ in found] if vectors else []
        return [item_of(rest) for _, *rest in found], vectors_of(stored, self.dimensions, self._database.file)

    def _stored(self, ids: Sequence[str]) -> list[Vectors | None]:
        with self._database.read() as connection:
            found = dict(
                connection.execute(
                    f"SELECT id, vector FROM items JOIN vectors USING (row) WHERE collection = ? AND {_AMONG}",
                    (self.key, json.dumps(ids)),
                )
            )
        blobs = [found.get(id) for id in ids]
        return [None if blob is None else vectors_of([blob], self.dimensions, self._database.file)[0] for blob in blobs]

    def _items(self, keys: Sequence[int]) -> dict[int, Item]:
        with self._database.read() as connection:
            found = connection.execute(
                f"SELECT row, {_ITEM} FROM items WHERE row IN (SELECT value FROM json_each(?))",
                (json.dumps(list(keys)),),
            )
            return {row: item_of(rest) for row, *rest in found}

    def _allowed(self, among: Among) -> Ids | None:
        with self._database.read() as connection:
            others = "SELECT 1 FROM items WHERE collection = ? AND kind <> ? LIMIT 1"
            if among.target != "any" and not rows(connection, others, self.key, among.target):
                among = replace(among, target="any")
            if among.target == "any" and not among.filters and among.ids is None:
                return None
            where, values = self._where(among)
            allowed = rows(connection, f"SELECT row FROM items WHERE {where}", *values)
            return np.array([row[0] for row in allowed], np.int64)

    def _where(self, among: Among) -> tuple[str, list[Any]]:
        """A condition on rows of `items`, and its values."""
        conditions = ["collection = ?"]
        values: list[Any] = [self.key]
        if among.target != "any":
            conditions.append("kind = ?")
            values.append(among.target)
        if among.ids is not None:
            conditions.append(_AMONG)
            values.append(json.dumps(among.ids))
        for condition, asked in (each.sql() for each in among.filters):
            conditions.append(condition)
            values += asked
        return " AND ".join(conditions), values

    def _picture_bytes(self) -> int:
        of_each = "SELECT DISTINCT picture, size FROM items WHERE collection = ?"
        with self._database.read() as connection:
            return int(rows(connection, f"SELECT TOTAL(size) FROM ({of_each})", self.key)[0][0])

    def _counts(self) -> dict[str, Any]:
        with self._database.read() as connection:
            return statistics.counts(
                dict(rows(connection, _KINDS, self.key)),
                rows(connection, _PICTURES, self.key)[0][0],
                rows(connection, _METADATA, self.key),
                lambda key: rows(connection, _FREQUENT, self.key, key, statistics.VALUES),
            )

    def _check_there(self, connection: apsw.Connection) -> None:
        """Raises NotFoundError if it was deleted, or another took its place."""
        if not rows(connection, "SELECT 1 FROM collections WHERE key = ?", self.key):
            raise NotFoundError(f"collection {self.name!r} has been deleted")

    def _rows_of(self, connection: apsw.Connection, ids: Sequence[str]) -> list[tuple[int, str | None]]:
        return rows(
            connection,
            f"SELECT row, picture FROM items WHERE collection = ? AND {_AMONG}",
            self.key,
            json.dumps(list(ids)),
        )

    def _forget(self, connection: apsw.Connection, keys: Sequence[int]) -> None:
        connection.execute("DELETE FROM items WHERE row IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),))


def sweep(database: Database, stored: Pictures, names: Iterable[str | None]) -> None:
    """Delete those of the pictures that no item has any more. For after a commit, as a change of another that shared it
    may have added an item with one; what cannot be read now is swept up at the next start."""
    pictures = {name for name in names if name is not None}
    if not pictures:
        return
    among = "SELECT DISTINCT picture FROM items WHERE picture IN (SELECT value FROM json_each(?))"
    with suppress(StorageError), database.read() as connection:
        stored.remove(pictures - {name for (name,) in rows(connection, among, json.dumps(sorted(pictures)))})


def vectors_of(blobs: Sequence[bytes], dimensions: int, file: Path) -> Vectors:
    """Stored vectors as rows (N, D). Raises StorageError, naming the database's file, for one of another length."""
    if any(len(blob) != 4 * dimensions for blob in blobs):
        raise StorageError(f"{file} is damaged: a vector is not {dimensions} numbers long; restore it from a backup")
    return np.frombuffer(b"".join(blobs), "<f4").reshape(-1, dimensions).astype(np.float32)
