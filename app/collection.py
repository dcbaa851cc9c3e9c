"""One collection: items with their vectors, and the searches among them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import apsw
import numpy as np
from numpy.typing import NDArray

from app import statistics
from app.database import Database, rows
from app.duplicates import duplicate_groups
from app.filters import Condition
from app.index import Ids, SharedSearch, VectorIndex, Vectors
from app.pictures import Pictures, place_of
from models.errors import InputError, NotFoundError, StorageError

Kind = Literal["image", "text"]
Target = Literal["image", "text", "any"]
_ITEM = "id, kind, caption, metadata, picture"
_AMONG = "id IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True)
class NewItem:
    """What is to be stored. vector: (D,), any norm but 0. picture: the bytes of a JPEG, or the place of a picture that
    stays there. No id: one is made."""

    kind: Kind
    vector: NDArray[np.float32]
    id: str | None = None
    caption: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    picture: bytes | Path | None = None


@dataclass(frozen=True)
class Item:
    """What is stored. picture: the SHA-256 of its file, or its place; None without one."""

    id: str
    kind: Kind
    caption: str | None
    metadata: dict[str, Any]
    picture: str | None

    @property
    def place(self) -> Path | None:
        """Where its picture is, if it is not kept in the store."""
        return place_of(self.picture)


@dataclass(frozen=True)
class SearchHit:
    """An item that was found, and its cosine."""

    item: Item
    score: float


@dataclass(frozen=True)
class CollectionInfo:
    """What a collection is. bytes: of its vectors and pictures. indexed: how many items its graph or codes cover."""

    name: str
    model: str
    fingerprint: str
    dimensions: int
    count: int
    index: str
    indexed: int
    bytes: int


class Collection:
    """One collection: items with unit vectors of one model. Thread-safe; what a call returned from is durable."""

    def __init__(
        self,
        database: Database,
        pictures: Pictures,
        key: int,
        name: str,
        model: str,
        fingerprint: str,
        dimensions: int,
        index: VectorIndex,
    ) -> None:
        self.key, self.name, self.model, self.fingerprint, self.dimensions = key, name, model, fingerprint, dimensions
        self._database, self._pictures, self._index = database, pictures, index
        self._searches = SharedSearch(index)

    def close(self) -> None:
        """Stop what its index does in the background."""
        self._index.close()

    @property
    def coverage(self) -> tuple[int, int]:
        """Its items, and those that its graph or codes cover."""
        return len(self._index), self._index.indexed

    def info(self) -> CollectionInfo:
        """What it is and how much it holds."""
        with self._database.read() as connection:
            pictures = rows(
                connection,
                "SELECT TOTAL(size) FROM (SELECT DISTINCT picture, size FROM items WHERE collection = ?)",
                self.key,
            )[0][0]
        count = len(self._index)
        size = count * self.dimensions * 4 + int(pictures)
        return CollectionInfo(
            name=self.name,
            model=self.model,
            fingerprint=self.fingerprint,
            dimensions=self.dimensions,
            count=count,
            index=self._index.kind,
            indexed=self._index.indexed,
            bytes=size,
        )

    def add(self, items: Sequence[NewItem]) -> list[str]:
        """Store all of them or none, each under its id; an id that exists is replaced. -> the ids, in order.

        Raises InputError for a wrong vector or an id given twice, StorageError when the disk refuses.
        """
        ids = [item.id or uuid.uuid4().hex for item in items]
        seen: set[str] = set()
        for position, each in enumerate(ids):
            if each in seen:
                raise InputError(f"id {each!r} is given twice in one call", position)
            seen.add(each)
        vectors = self._unit([item.vector for item in items])
        digests = [None if item.picture is None else self._pictures.put(item.picture) for item in items]

        def change(connection: apsw.Connection) -> tuple[list[int], list[int], list[str]]:
            if not rows(connection, "SELECT 1 FROM collections WHERE key = ?", self.key):
                raise NotFoundError(f"collection {self.name!r} has been deleted")
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
            return [row for row, _ in old], new, unused(connection, [p for _, p in old if p is not None])

        def after(changed: tuple[list[int], list[int], list[str]]) -> None:
            old, _, unused = changed
            self._index.remove(np.array(old, np.int64))
            self._pictures.remove(unused)

        def undo(changed: tuple[list[int], list[int], list[str]]) -> None:
            self._index.remove(np.array(changed[1], np.int64))

        if items:
            self._database.write(change, after, undo)
        return ids

    def delete(self, id: str) -> None:
        """Delete an item; no later search returns it. Raises NotFoundError."""

        def change(connection: apsw.Connection) -> tuple[list[int], list[str]]:
            old = self._rows_of(connection, [id])
            if not old:
                raise self._missing(id)
            self._forget(connection, [row for row, _ in old])
            return [row for row, _ in old], unused(connection, [p for _, p in old if p is not None])

        def after(changed: tuple[list[int], list[str]]) -> None:
            self._index.remove(np.array(changed[0], np.int64))
            self._pictures.remove(changed[1])

        self._database.write(change, after, frees=True)

    def get(self, id: str) -> Item:
        """An item. Raises NotFoundError."""
        with self._database.read() as connection:
            found = rows(connection, f"SELECT {_ITEM} FROM items WHERE collection = ? AND id = ?", self.key, id)
        if not found:
            raise self._missing(id)
        return item_of(found[0])

    def embeddings(self, items: Sequence[Item]) -> list[Vectors | None]:
        """The stored vector (D,) of each; None for an item that has been deleted or replaced since."""
        return self._stored([item.id for item in items])

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """The stored vectors (N, D) of items. Raises NotFoundError for an id that is not there."""
        stored = []
        for id, vector in zip(ids, self._stored(ids), strict=True):
            if vector is None:
                raise self._missing(id)
            stored.append(vector)
        return np.stack(stored)

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

    def page(self, limit: int, after: str = "", ids: Sequence[str] | None = None) -> list[Item]:
        """The first `limit` items whose ids come after `after`, in the order of their ids; only `ids`, if given."""
        among, given = ("", ()) if ids is None else (f" AND {_AMONG}", (json.dumps(ids),))
        with self._database.read() as connection:
            found = connection.execute(
                f"SELECT {_ITEM} FROM items WHERE collection = ? AND id > ?{among} ORDER BY id LIMIT ?",
                (self.key, after, *given, limit),
            )
            return [item_of(row) for row in found]

    def version(self, item: Item) -> str:
        """What changes when an item's picture does. Raises NotFoundError for an item without one."""
        return self._pictures.version(self._named(item))

    def picture(self, id: str, size: int | None = None, make: Callable[[bytes], bytes] = bytes) -> bytes:
        """The file of an item's picture, or a thumbnail of this size as `make` makes it. A file that is kept is a JPEG,
        one in its place what it was. Raises NotFoundError for an unknown id, or an item without a picture."""
        name = self._named(self.get(id))
        return self._pictures.get(name) if size is None else self._pictures.thumbnail(name, size, make)

    def _named(self, item: Item) -> str:
        if item.picture is None:
            raise NotFoundError(f"item {item.id!r} has no picture: it is a text, or its picture is elsewhere")
        return item.picture

    def sample(self, limit: int) -> tuple[list[Item], Vectors]:
        """At most so many of its items, spread evenly over the order in which they came, and their vectors (N, D)."""
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

    def search(
        self,
        vector: NDArray[np.float32],
        k: int,
        *,
        offset: int = 0,
        target: Target = "any",
        filters: Sequence[Condition] = (),
        ids: Sequence[str] | None = None,
        group_by: str | None = None,
        min_score: float = -1.0,
    ) -> list[SearchHit]:
        """The k nearest items after the first `offset`, best first. vector: (D,), any norm but 0.

        filters: all of which an item's metadata must pass. ids: among which it must be. group_by: a key of the
        metadata; of the items with the same value only the nearest is given. Raises InputError for a vector that is
        zero or not finite.
        """
        query, wanted = self._unit([vector]), k + offset
        asked, gone = wanted, set[int]()
        while True:
            hits = self._searches.search(query, asked, self._allowed(target, filters, ids))[0]
            items = self._items([hit.id for hit in hits])
            if not (unseen := {hit.id for hit in hits} - items.keys()) <= gone:
                # Not committed yet, deleted, or replaced since the index was asked: another look finds the new one.
                gone |= unseen
                continue
            found = [SearchHit(items[hit.id], hit.score) for hit in hits if hit.id in items]
            if group_by is not None:
                found = _first_of_groups(found, group_by)
            # Rows that are being replaced or deleted are not among the items; others shall have their places.
            if len(found) >= wanted or len(hits) < asked:
                return [hit for hit in found[offset:wanted] if hit.score >= min_score]
            asked *= 2

    def duplicates(
        self, threshold: float, limit: int, *, target: Target = "any", go_on: Callable[[], None] = lambda: None
    ) -> tuple[int, list[list[SearchHit]]]:
        """How many groups of near-duplicates there are, and the `limit` largest, as duplicate_groups gives them."""
        groups = duplicate_groups(self._index, threshold, self._allowed(target, ()), go_on)
        items = self._items([row for group in groups[:limit] for row, _ in group])
        shown = [[SearchHit(items[row], score) for row, score in group if row in items] for group in groups[:limit]]
        return len(groups), [group for group in shown if len(group) > 1]

    def statistics(self) -> dict[str, Any]:
        """What it holds, in numbers: `kinds`, `metadata` and `cosines` of app/statistics.py."""
        with self._database.read() as connection:
            counts: dict[str, Any] = {"kinds": statistics.kinds(connection, self.key)}
            counts["metadata"] = statistics.metadata(connection, self.key)
        return counts | {"cosines": statistics.cosines(self._index)}

    def _allowed(self, target: Target, filters: Iterable[Condition], ids: Sequence[str] | None = None) -> Ids | None:
        """The rows a search may return, None for all of them."""
        with self._database.read() as connection:
            conditions = ["collection = ?"]
            values: list[Any] = [self.key]
            if target != "any" and rows(
                connection, "SELECT 1 FROM items WHERE collection = ? AND kind <> ? LIMIT 1", self.key, target
            ):
                conditions.append("kind = ?")
                values.append(target)
            if ids is not None:
                conditions.append(_AMONG)
                values.append(json.dumps(ids))
            for condition, asked in (each.sql() for each in filters):
                conditions.append(condition)
                values += asked
            if len(conditions) == 1:
                return None
            allowed = rows(connection, f"SELECT row FROM items WHERE {' AND '.join(conditions)}", *values)
            return np.array([row[0] for row in allowed], np.int64)

    def _items(self, keys: Sequence[int]) -> dict[int, Item]:
        with self._database.read() as connection:
            found = connection.execute(
                f"SELECT row, {_ITEM} FROM items WHERE row IN (SELECT value FROM json_each(?))",
                (json.dumps(list(keys)),),
            )
            return {row: item_of(rest) for row, *rest in found}

    def _rows_of(self, connection: apsw.Connection, ids: Sequence[str]) -> list[tuple[int, str | None]]:
        return rows(
            connection,
            f"SELECT row, picture FROM items WHERE collection = ? AND {_AMONG}",
            self.key,
            json.dumps(list(ids)),
        )

    def _forget(self, connection: apsw.Connection, keys: Sequence[int]) -> None:
        connection.execute("DELETE FROM items WHERE row IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),))

    def _unit(self, vectors: Sequence[NDArray[np.float32]]) -> Vectors:
        """Unit units (N, D). Raises InputError, naming the item, for a wrong length, a zero or a number not finite."""
        units = np.zeros((len(vectors), self.dimensions), np.float32)
        for position, vector in enumerate(vectors):
            if vector.shape != (self.dimensions,):
                raise InputError(f"the vector has shape {vector.shape}, ({self.dimensions},) expected", position)
            norm = float(np.linalg.norm(vector.astype(np.float64)))
            if not np.isfinite(norm) or norm == 0:
                raise InputError("the vector is zero or not finite", position)
            units[position] = vector / norm
        return units

    def _missing(self, id: str) -> NotFoundError:
        return NotFoundError(f"no item {id!r} in collection {self.name!r}, which holds {len(self._index)}")


def _first_of_groups(hits: Sequence[SearchHit], key: str) -> list[SearchHit]:
    """Without those whose value at a key of the metadata was seen before; what has none is a group by itself."""
    first: dict[Any, SearchHit] = {}
    for hit in hits:
        value = hit.item.metadata.get(key)
        # True is no 1 here; 1 and 1.0 are one value.
        first.setdefault(("alone", hit.item.id) if value is None else (isinstance(value, bool), value), hit)
    return list(first.values())


def item_of(values: Sequence[Any]) -> Item:
    """An item of a row's id, kind, caption, metadata and picture."""
    id, kind, caption, metadata, picture = values
    return Item(id, kind, caption, json.loads(metadata), picture)


def unused(connection: apsw.Connection, pictures: Sequence[str]) -> list[str]:
    """Those that no item has any more."""
    used = connection.execute(
        "SELECT DISTINCT picture FROM items WHERE picture IN (SELECT value FROM json_each(?))",
        (json.dumps(list(pictures)),),
    )
    return sorted(set(pictures) - {row[0] for row in used})


def vectors_of(blobs: Sequence[bytes], dimensions: int, file: Path) -> Vectors:
    """Stored vectors as rows (N, D). Raises StorageError, naming the database's file, for one of another length."""
    if any(len(blob) != 4 * dimensions for blob in blobs):
        raise StorageError(f"{file} is damaged: a vector is not {dimensions} numbers long; restore it from a backup")
    return np.frombuffer(b"".join(blobs), "<f4").reshape(-1, dimensions).astype(np.float32)
