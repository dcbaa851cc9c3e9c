"""The collections of a PostgreSQL, which several servers share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from psycopg import Connection, errors, sql

from app.collection import Collection, Item, Made, item_of
from app.collections import STAGED, Collections, refused
from app.index import KINDS, VectorIndex
from app.milvus import STARTING, MilvusIndex, collections_of, drop
from app.postgres import LISTEN, TELL, Postgres
from app.postgres_collection import PostgresCollection, PostgresPictures, sweep, writes_of
from app.postgres_index import TABLE_KINDS, TableIndex
from models.errors import InputError, NotFoundError, SemblanceError

log = logging.getLogger(__name__)
T = TypeVar("T")

_INLINE = 1_500  # numbers of a vector that fit into a row; longer ones lie beside it, and each costs another read
_MILVUS_PATIENCE = 10.0  # seconds that a call waits for a Milvus that is away
_PAUSE = 1.0  # seconds between two looks for the end of the server, and for a database that is away
_KNOWN = """
    SELECT key, name, model, fingerprint, dimensions, kind, COALESCE(
      (SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('semblance.items_' || key || '_hnsw')), false),
      (SELECT reltuples FROM pg_class WHERE oid = to_regclass('semblance.items_' || key))
    FROM collections
"""
# Items of one collection that another has not, or has otherwise; and those that the other alone has.
_LACKING = """
    SELECT old.id, old.kind, old.caption, old.metadata, old.picture FROM {old} AS old WHERE NOT EXISTS (
      SELECT 1 FROM {new} AS new WHERE new.id = old.id AND new.kind = old.kind AND new.metadata = old.metadata
      AND new.caption IS NOT DISTINCT FROM old.caption AND new.picture IS NOT DISTINCT FROM old.picture)
"""
_SURPLUS = """
    SELECT new.id FROM {new} AS new WHERE NOT EXISTS (SELECT 1 FROM {old} AS old WHERE old.id = new.id)
"""


class PostgresCollections(Collections):
    """Those of one database. What any server was answered for, every other one shows.

    The list of collections is kept in memory; a server that changes it tells the others, and one that finds a
    collection gone, or a name that it does not know, looks again. Raises StorageError as Postgres does.
    """

    def __init__(self, url: str, picture_root: Path | None = None, milvus: str | None = None) -> None:
        """picture_root: below which pictures are read that items refer to in place; the same for every server. milvus:
        the address of a Milvus that is searched in pgvector's place; it is made to agree with the tables first."""
        self._postgres = Postgres(url)
        self._pictures = PostgresPictures(self._postgres, picture_root)
        self._open: dict[str, PostgresCollection] = {}
        self._mutex, self._refreshing = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._patience = STARTING  # seconds that a call of Milvus may take: it may be starting too
        self._milvus, self._prefix = milvus, f"semblance_{self._postgres.store.hex}"
        # Those in Milvus before the tables, which are made first.
        there = set[str]() if milvus is None else collections_of(milvus, self._prefix)
        self.refresh()
        if milvus is not None:
            self._reconcile(milvus, there)
        self._patience = _MILVUS_PATIENCE
        self._listener = threading.Thread(target=self._listen, name="collections", daemon=True)
        self._listener.start()

    def names(self) -> list[str]:
        with self._mutex:
            return sorted(name for name in self._open if not name.startswith(STAGED))

    def refresh(self) -> None:
        with self._refreshing:  # whoever asks last has what was there last
            known = self._postgres.run(lambda connection: connection.execute(_KNOWN).fetchall())
            there, opened = {each.key: each for each in self._open.values()}, dict[str, PostgresCollection]()
            for *columns, built, about in known:
                made = Made(*columns)
                found = there.pop(made.key, None)
                if found is None:
                    index = self._index(made, built)
                    found = PostgresCollection(self._postgres, self._pictures, made, index, self.refresh)
                found.update(made.name, built, about)
                opened[made.name] = found
            with self._mutex:
                self._open = opened
        for each in there.values():  # deleted
            each.forget()

    def lacking(self, name: str, after: str, limit: int) -> list[Item]:
        statement = sql.SQL(_LACKING + "AND old.id > %s ORDER BY old.id LIMIT %s").format(**self._pair(name))
        found = self._run(lambda connection: connection.execute(statement, (after, limit)).fetchall())
        return [item_of(row) for row in found]

    def switch(self, name: str) -> bool:
        old, new = self.get(name), self._stage_of(name)
        pair = self._pair(name)
        surplus = self._run(lambda connection: connection.execute(sql.SQL(_SURPLUS).format(**pair)).fetchall())
        for (id,) in surplus:
            new.delete(id)

        def change(connection: Connection[Any]) -> bool:
            # Nobody adds to either or deletes from it until this has ended.
            locked = "SELECT key, name FROM collections WHERE key = ANY(%s) FOR UPDATE"
            if connection.execute(locked, ([old.key, new.key],)).fetchall() == [(new.key, name)]:
                return True  # by an earlier try, whose end was not heard of
            connection.execute(sql.SQL("LOCK TABLE {old}, {new} IN SHARE ROW EXCLUSIVE MODE").format(**pair))
            for differing in (_LACKING, _SURPLUS):
                if connection.execute(sql.SQL(f"{differing} LIMIT 1").format(**pair)).fetchone() is not None:
                    return False
            self._drop(connection, old.key)
            connection.execute("UPDATE collections SET name = %s WHERE key = %s", (name, new.key))
            return True

        return self._change(change)

    def coverage(self, name: str) -> tuple[int, int, float | None]:
        found = self._find(name)
        if found is None:
            raise NotFoundError(f"no collection {name!r}")
        # Whoever asks for figures wants the others too, so not for long. A graph is never older than its table.
        return *found.counted(patience=_PAUSE), None

    def close(self) -> None:
        self._closing.set()
        self._listener.join()
        for each in self._open.values():
            each.close()
        self._postgres.close()

    def _find(self, name: str) -> PostgresCollection | None:
        with self._mutex:
            return self._open.get(name)

    def _index(self, made: Made, built: bool) -> VectorIndex:
        if self._milvus is None:
            return TableIndex(self._postgres, made.key, made.dimensions, made.kind, built)
        name = f"{self._prefix}_{made.key}"
        return MilvusIndex(self._milvus, name, made.dimensions, made.kind, lambda: self._patience)

    def _reconcile(self, milvus: str, there: set[str]) -> None:
        """Make Milvus agree with the tables, and drop from it those that were there before these were read and have
        none any more."""
        for each in self._open.values():
            each.reconcile()
        for name in there - {f"{self._prefix}_{each.key}" for each in self._open.values()}:
            drop(milvus, name)

    def _check_index(self, kind: str) -> None:
        known = TABLE_KINDS if self._milvus is None else KINDS
        if kind not in known:
            raise InputError(f"index {kind!r} is unknown; choose one of {', '.join(known)}")

    def _make(self, name: str, model: str, fingerprint: str, dimensions: int, index: str) -> Collection:
        def change(connection: Connection[Any]) -> None:
            known = "SELECT model, fingerprint FROM collections WHERE name = %s"
            for theirs, print_ in connection.execute(known, (name,)).fetchall():
                if print_ != fingerprint:
                    raise refused(name, theirs, print_, model, fingerprint)
                return
            made = connection.execute(
                "INSERT INTO collections (name, model, fingerprint, dimensions, kind) VALUES (%s, %s, %s, %s, %s) "
                "RETURNING key",
                (name, model, fingerprint, dimensions, index),
            ).fetchone()
            assert made is not None  # noqa: S101 - it was inserted
            table, key = sql.Identifier(f"items_{made[0]}"), sql.Literal(made[0])
            connection.execute(sql.SQL("CREATE TABLE {} PARTITION OF items FOR VALUES IN ({})").format(table, key))
            connection.execute(writes_of(made[0]))
            if dimensions <= _INLINE:
                connection.execute(sql.SQL("ALTER TABLE {} ALTER vector SET STORAGE PLAIN").format(table))
                # Else what is short goes elsewhere, and each look at it is another read, for a row is above 2 kB.
                connection.execute(sql.SQL("ALTER TABLE {} SET (toast_tuple_target = 8160)").format(table))

        self._change(change)
        if (found := self._find(name)) is None:
            raise NotFoundError(f"collection {name!r} has been deleted")
        return found

    def _delete(self, collection: Collection) -> None:
        there = False

        def change(connection: Connection[Any]) -> None:
            nonlocal there
            locked = "SELECT 1 FROM collections WHERE key = %s FOR UPDATE"
            if connection.execute(locked, (collection.key,)).fetchone() is not None:
                there = True
                self._drop(connection, collection.key)

        self._change(change)
        if not there:
            raise NotFoundError(f"no collection {collection.name!r}")

    def _drop(self, connection: Connection[Any], key: int) -> None:
        table = sql.Identifier(f"items_{key}")
        found = connection.execute(
            sql.SQL("SELECT DISTINCT picture FROM {} WHERE picture IS NOT NULL").format(table)
        ).fetchall()
        connection.execute(sql.SQL("DROP TABLE {}").format(table))
        connection.execute("DELETE FROM collections WHERE key = %s", (key,))
        sweep(connection, [name for (name,) in found])

    def _change(self, change: Callable[[Connection[Any]], T]) -> T:
        """Change the list of collections here and, once it is durable, with every server."""

        def told(connection: Connection[Any]) -> T:
            connection.execute(TELL)
            return change(connection)

        changed = self._run(told, transaction=True)
        self.refresh()
        return changed

    def _run(self, work: Callable[[Connection[Any]], T], *, transaction: bool = False) -> T:
        try:
            return self._postgres.run(work, transaction=transaction)
        except errors.UndefinedTable as error:
            self.refresh()
            raise NotFoundError("the collection has been deleted") from error

    def _pair(self, name: str) -> dict[str, sql.Identifier]:
        keys = {"old": self.get(name).key, "new": self._stage_of(name).key}
        return {each: sql.Identifier(f"items_{key}") for each, key in keys.items()}

    def _listen(self) -> None:
        """Look again whenever a server says that the list is another, and when it may have said so unheard."""
        while not self._closing.is_set():
            try:
                with self._postgres.alone() as connection:
                    connection.execute(LISTEN)
                    self.refresh()
                    while not self._closing.is_set():
                        for _ in connection.notifies(timeout=_PAUSE, stop_after=1):
                            self.refresh()
            except (psycopg.Error, SemblanceError) as error:
                log.warning("%s: %s", self._postgres.name, error)
                self._closing.wait(_PAUSE)
