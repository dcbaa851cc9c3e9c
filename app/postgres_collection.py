"""A collection in PostgreSQL, where its rows, its pictures and its graph are one truth for all servers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from psycopg import Connection, errors, sql

from app import statistics
from app.collection import Among, Collection, Item, Made, NewItem, SearchHit, item_of
from app.index import Ids, VectorIndex, Vectors
from app.milvus import MilvusIndex
from app.pictures import Places, kept_size, name_of, place_of
from app.postgres import PATIENCE, Postgres
from app.postgres_index import NOTHING, TableIndex, numbers_of
from app.reconciliation import reconcile
from models.errors import InputError, NotFoundError, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

_ITEM = sql.SQL("id, kind, caption, metadata, picture")
_PAGE = 10_000  # numbers of rows that are read at once
_NUL = re.compile(r"(?<!\\)(\\\\)*\\u0000")  # of JSON; after an odd backslash it is six characters of a text
_COPY = "COPY {} (collection, number, id, kind, caption, metadata, picture, size, vector) FROM STDIN (FORMAT BINARY)"
_TYPES = ["int8", "int8", "text", "text", "text", "text", "text", "int4", "vector"]
_METADATA = """
    SELECT key, jsonb_typeof(value) = 'number', count(*), count(DISTINCT text), min(amount)::text, max(amount)::text
    FROM {1}, jsonb_each(facets) AS each (key, value), LATERAL (SELECT value #>> '{{}}') AS written (text),
    LATERAL (SELECT CASE jsonb_typeof(value) WHEN 'number' THEN text::numeric END) AS counted (amount)
    GROUP BY key, jsonb_typeof(value)
"""
_FREQUENT = """
    SELECT text, count(*) AS times
    FROM {1}, LATERAL (SELECT (facets ->> %s) COLLATE "C" AS text, jsonb_typeof(facets -> %s) AS type) AS written
    WHERE type = 'string' GROUP BY text ORDER BY times DESC, text LIMIT %s
"""
# Only those of which no item is left; that nobody takes one up meanwhile is the foreign key's to say.
_UNUSED = "DELETE FROM pictures WHERE name = ANY(%s) AND NOT EXISTS (SELECT 1 FROM items WHERE picture = pictures.name)"


class PostgresPictures:
    """Pictures as rows, so that every server has them; those that stay in their places are read there."""

    def __init__(self, postgres: Postgres, root: Path | None) -> None:
        self._postgres, self._places = postgres, Places(root)

    def get(self, digest: str) -> bytes:
        if (place := place_of(digest)) is not None:
            return self._places.read(place)
        found = self._one("SELECT content FROM pictures WHERE name = %s", digest)
        if found is None:
            raise NotFoundError("the picture has been deleted")
        return found

    def version(self, digest: str) -> str:
        return digest if (place := place_of(digest)) is None else self._places.version(place)

    def thumbnail(self, digest: str, size: int, make: Callable[[bytes], bytes]) -> bytes:
        version = self.version(digest)
        known = "SELECT content FROM thumbnails WHERE picture = %s AND size = %s AND version = %s"
        if (kept := self._one(known, digest, size, version)) is not None:
            return kept
        made = make(self.get(digest))
        if kept_size(size):
            keep = (
                "INSERT INTO thumbnails VALUES (%s, %s, %s, %s) ON CONFLICT (picture, size) "
                "DO UPDATE SET version = excluded.version, content = excluded.content"
            )

            def work(connection: Connection[Any]) -> None:
                with suppress(errors.ForeignKeyViolation):  # deleted since
                    connection.execute(keep, (digest, size, version, made))

            self._postgres.run(work)
        return made

    def _one(self, statement: str, *values: Any) -> bytes | None:
        found = self._postgres.run(lambda connection: connection.execute(statement, values).fetchone())
        return None if found is None else found[0]


def writes_of(key: int) -> sql.Composed:
    """Makes the counter of a collection's writes, which goes with its table."""
    parts = {"table": sql.Identifier(f"items_{key}"), "writes": sql.Identifier(f"writes_{key}")}
    return sql.SQL("CREATE SEQUENCE IF NOT EXISTS {writes} OWNED BY {table}.number").format(**parts)


def sweep(connection: Connection[Any], pictures: Iterable[str | None]) -> None:
    """Delete those of the pictures that no item has any more, in the transaction that deleted some which had."""
    if names := sorted({name for name in pictures if name is not None}):
        # One after another, or two who each drop one of the last items with a picture would both leave it.
        connection.execute("SELECT 1 FROM pictures WHERE name = ANY(%s) ORDER BY name FOR NO KEY UPDATE", (names,))
        connection.execute(_UNUSED, (names,))


class PostgresCollection(Collection):
    """One partition of the table `items`. It may be deleted, or put in another's place, by any server at any time."""

    def __init__(
        self,
        postgres: Postgres,
        pictures: PostgresPictures,
        made: Made,
        index: VectorIndex,
        gone: Callable[[], None],
    ) -> None:
        """gone: called when it is found to have been deleted."""
        super().__init__(made, index, pictures)
        self._postgres, self._gone = postgres, gone
        self.table = sql.Identifier(f"items_{made.key}")
        if isinstance(index, MilvusIndex):
            index.written = self._written

    def forget(self) -> None:
        """Drop what an index of its own keeps of it, after it has been deleted."""
        try:
            if isinstance(self._index, MilvusIndex):
                self._index.drop()
        except StorageError as error:  # the next start of a server sees what is left
            log.warning("collection %s is deleted, but not in Milvus yet: %s", self.name, error)
        self.close()

    def reconcile(self) -> None:
        """Make an index of its own hold what the table does, as after a crash between the two."""
        if not isinstance(self._index, MilvusIndex):
            return

        def horizon(connection: Connection[Any]) -> int:
            # Who adds holds the collection from before its numbers are taken: none up to this one is still to come.
            connection.execute("SELECT 1 FROM collections WHERE key = %s FOR UPDATE", (self.key,))
            connection.execute(writes_of(self.key))  # it may have been made by a version without
            return connection.execute("SELECT last_value FROM numbers").fetchall()[0][0]

        def rows() -> Iterator[Ids]:
            last = 0
            while page := self._rows(f"SELECT number FROM {{1}} WHERE number > %s ORDER BY number LIMIT {_PAGE}", last):
                yield np.array(page, np.int64).reshape(-1)
                last = page[-1][0]

        table = TableIndex(self._postgres, self.key, self.dimensions, "flat", built=False)
        last = self._run(horizon, transaction=True)
        added, removed = reconcile(self._index, rows(), table.vectors, last)
        if added or removed:
            log.info("collection %s in Milvus: %d items were missing, %d were too many", self.name, added, removed)

    def update(self, name: str, built: bool, about: float) -> None:
        """Take over what another server may have changed: its name, whether there is a graph, and roughly how many
        items there are, for a graph that is due though nothing is added any more."""
        self.name = name
        if isinstance(self._index, TableIndex):
            self._index.built = built
            self._index.look(max(0, int(about)))  # -1: not known yet

    def __len__(self) -> int:
        return self.counted()[0]

    @property
    def coverage(self) -> tuple[int, int]:
        return self.counted()

    def counted(self, patience: float = PATIENCE) -> tuple[int, int]:
        """As `coverage`; patience: seconds in which the database must be there."""
        statement = sql.SQL("SELECT count(*) FROM {}").format(self.table)
        ((count,),) = self._run(lambda connection: connection.execute(statement).fetchall(), patience=patience)
        if isinstance(self._index, TableIndex):
            return count, count if self._index.built else 0
        return count, min(count, self._index.indexed)

    def _put(self, ids: Sequence[str], items: Sequence[NewItem], vectors: Vectors) -> None:
        for position, item in enumerate(items):
            if "\0" in f"{ids[position]}{item.caption}" or _NUL.search(json.dumps(dict(item.metadata))):
                raise InputError("PostgreSQL keeps no text with the character U+0000", position)
        names = [None if item.picture is None else name_of(item.picture) for item in items]
        pictures = {
            name: item.picture if isinstance(item.picture, bytes) else None
            for name, item in zip(names, items, strict=True)
            if name is not None
        }

        def change(connection: Connection[Any]) -> list[int]:
            # Whoever deletes the collection, or lets it take another's place, waits for this or is waited for.
            if (
                connection.execute("SELECT 1 FROM collections WHERE key = %s FOR KEY SHARE", (self.key,)).fetchone()
                is None
            ):
                raise self._deleted()
            old = self._forget(connection, ids)
            given = connection.execute("SELECT nextval('numbers') FROM generate_series(1, %s)", (len(ids),)).fetchall()
            numbers = np.array(given, np.int64).reshape(-1)
            with connection.cursor() as cursor:
                if pictures:
                    keep = "INSERT INTO pictures VALUES (%s, %s) ON CONFLICT DO NOTHING"
                    cursor.executemany(keep, sorted(pictures.items()))
                with cursor.copy(sql.SQL(_COPY).format(self.table)) as copy:
                    copy.set_types(_TYPES)
                    for number, id, item, name, vector in zip(given, ids, items, names, vectors, strict=True):
                        size = len(item.picture) if isinstance(item.picture, bytes) else 0
                        content = json.dumps(dict(item.metadata))
                        copy.write_row((self.key, *number, id, item.kind, item.caption, content, name, size, vector))
            sweep(connection, [picture for _, picture in old])
            # Before the commit, for a search leaves out what the table does not show yet. What is left there if this
            # fails is never shown either, and goes when an index of its own is next reconciled.
            self._index.add(numbers, vectors)
            if isinstance(self._index, MilvusIndex):
                self._tell(connection)
            return [number for number, _ in old]

        self._remove(self._run(change, transaction=True))
        if isinstance(self._index, TableIndex):
            self._index.look(len(ids))

    def delete(self, id: str) -> None:
        gone = set[int]()

        def change(connection: Connection[Any]) -> None:
            old = self._forget(connection, [id])
            gone.update(number for number, _ in old)  # a try whose end was not heard of may have deleted it
            sweep(connection, [picture for _, picture in old])

        self._run(change, transaction=True)
        if not gone:
            raise self._missing(id)
        self._remove(sorted(gone))

    def _page(self, limit: int, after: str, among: Among, *, vectors: bool) -> tuple[list[Item], Vectors]:
        conditions, values = self._conditions(among)
        where = " AND ".join([*conditions, "id > %s"])
        statement = f"SELECT {'vector' if vectors else 'NULL'}, {{}} FROM {{}} WHERE {where} ORDER BY id LIMIT %s"
        found = self._rows(statement, *values, after, limit)
        stored = [vector for vector, *_ in found] if vectors else []
        return [item_of(rest) for _, *rest in found], numbers_of(stored, self.dimensions)

    def sample(self, limit: int) -> tuple[list[Item], Vectors]:
        known = [number for (number,) in self._rows("SELECT number FROM {1} ORDER BY number")]
        chosen = known[:: max(1, -(-len(known) // limit))]
        found = self._rows("SELECT vector, {} FROM {} WHERE number = ANY(%s) ORDER BY number", chosen)
        return [item_of(rest) for _, *rest in found], numbers_of([vector for vector, *_ in found], self.dimensions)

    def _remove(self, numbers: Sequence[int]) -> None:
        """From the index, what the table does not have any more."""
        self._index.remove(np.array(numbers, np.int64))
        if numbers and isinstance(self._index, MilvusIndex):
            self._run(self._tell)

    def _tell(self, connection: Connection[Any]) -> None:
        """To searches of all servers: Milvus has been written to. A sequence, as it is no part of a transaction: it is
        there for others at once, and nobody waits for it."""
        connection.execute("SELECT nextval(%s)", (f"writes_{self.key}",))

    def _written(self) -> int:
        return int(self._run(lambda c: c.execute(f"SELECT last_value FROM writes_{self.key}").fetchall())[0][0])

    def _nearest(self, query: Vectors, k: int, among: Among) -> tuple[list[SearchHit], bool]:
        if not isinstance(self._index, TableIndex):
            return super()._nearest(query, k, among)
        index, (where, values) = self._index, self._where(among)
        columns = sql.SQL(", {}").format(_ITEM)
        found = self._run(lambda connection: index.nearest(connection, query[0], k, where, values, columns))
        return [SearchHit(item_of(rest), cosine) for _, cosine, *rest in found], len(found) == k

    def _stored(self, ids: Sequence[str]) -> list[Vectors | None]:
        found = dict(self._rows("SELECT id, vector FROM {1} WHERE id = ANY(%s)", list(ids)))
        return [None if (vector := found.get(id)) is None else numbers_of([vector], self.dimensions)[0] for id in ids]

    def _items(self, numbers: Sequence[int]) -> dict[int, Item]:
        found = self._rows("SELECT number, {} FROM {} WHERE number = ANY(%s)", list(numbers))
        return {number: item_of(rest) for number, *rest in found}

    def _allowed(self, among: Among) -> Ids | None:
        where, values = self._where(among)
        if where is NOTHING:
            return None
        statement = sql.SQL("SELECT number FROM {} {}").format(self.table, where)
        found = self._run(lambda connection: connection.execute(statement, values).fetchall())
        return np.array(found, np.int64).reshape(-1)

    def _picture_bytes(self) -> int:
        of_each = "SELECT DISTINCT picture, size FROM {1}"
        return int(self._rows(f"SELECT COALESCE(sum(size), 0) FROM ({of_each}) AS each")[0][0])

    def _counts(self) -> dict[str, Any]:
        found = self._rows(_METADATA)
        return statistics.counts(
            dict(self._rows("SELECT kind, count(*) FROM {1} GROUP BY kind")),
            self._rows("SELECT count(DISTINCT picture) FROM {1}")[0][0],
            [(*rest, low and json.loads(low), high and json.loads(high)) for *rest, low, high in found],
            lambda key: self._rows(_FREQUENT, key, key, statistics.VALUES),
        )

    def _where(self, among: Among) -> tuple[sql.Composable, list[Any]]:
        conditions, values = self._conditions(among)
        # The conditions are this program's own, whatever was asked is in the values.
        return sql.SQL(f"WHERE {' AND '.join(conditions)}") if conditions else NOTHING, values

    def _conditions(self, among: Among) -> tuple[list[str], list[Any]]:
        conditions, values = list[str](), list[Any]()
        if among.target != "any":
            conditions.append("kind = %s")
            values.append(among.target)
        if among.ids is not None:
            conditions.append("id = ANY(%s)")
            values.append(list(among.ids))
        for condition, asked in (each.postgres() for each in among.filters):
            conditions.append(condition)
            values += asked
        return conditions, values

    def _forget(self, connection: Connection[Any], ids: Sequence[str]) -> list[tuple[int, str | None]]:
        """Delete items, in one order for all, so that two who delete the same wait for one another and no more; gives
        each one's number and the name of its picture."""
        statement = sql.SQL(
            "DELETE FROM {0} WHERE id IN (SELECT id FROM {0} WHERE id = ANY(%s) ORDER BY id FOR UPDATE) "
            "RETURNING number, picture"
        ).format(self.table)
        return connection.execute(statement, (list(ids),)).fetchall()

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        composed = sql.SQL(statement).format(_ITEM, self.table)
        return self._run(lambda connection: connection.execute(composed, values).fetchall())

    def _run(self, work: Callable[[Connection[Any]], T], *, transaction: bool = False, patience: float = PATIENCE) -> T:
        try:
            return self._postgres.run(work, transaction=transaction, patience=patience)
        except errors.UndefinedTable as error:
            self._gone()
            raise self._deleted() from error
        except NotFoundError:
            self._gone()
            raise

    def _deleted(self) -> NotFoundError:
        return NotFoundError(f"collection {self.name!r} has been deleted")
