"""pgvector as the index of a collection: the rows are what it knows, and a graph over them says where to look."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import psycopg
from pgvector import Vector
from psycopg import Connection, errors, sql

from app.index import Ids, Vectors
from app.postgres import TELL, Postgres
from models.errors import NotFoundError, SemblanceError
from models.retrieval import Hit

T = TypeVar("T")

log = logging.getLogger(__name__)

NOTHING = sql.SQL("")
TABLE_KINDS = ("auto", "flat", "hnsw")
_LEAST = {"auto": 10_000, "hnsw": 1_000}  # from how many items on there is a graph
_WIDEST = 4_000  # numbers of a vector that pgvector's graph takes in half precision
_LOOK = 1_000  # items that are added between two looks at whether a graph is due
# Seconds between two looks at how many are added meanwhile: a row costs ten times as much where there is a graph, which
# is built faster of all at once. So it waits for a pause, but not for ever.
_SETTLE, _LONGEST = 2.0, 600.0
_LOCK = 0x736D6278  # whoever builds holds it, with the collection's key
_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('semblance.items_' || %s || '_hnsw')"
_PATIENCE = 5.0  # seconds that a close waits for a build that it has cancelled


class TableIndex:
    """VectorIndex over the table of one collection. A graph is HNSW over half precision, kept by PostgreSQL itself;
    what it finds is ordered again by the exact cosines. All servers see the same."""

    def __init__(self, postgres: Postgres, key: int, dimensions: int, asked: str, built: bool) -> None:
        """asked: auto, flat or hnsw. built: whether the graph is there."""
        self.dimensions, self.built = dimensions, built
        self._postgres, self._key, self._asked = postgres, key, asked
        self._table, self._graph = sql.Identifier(f"items_{key}"), sql.Identifier(f"items_{key}_hnsw")
        self._half = sql.SQL("vector::halfvec({})").format(sql.Literal(dimensions))
        self._unseen = 0
        self._lock = threading.Lock()
        self._builder: threading.Thread | None = None
        self._building: Connection[Any] | None = None
        self._closing = threading.Event()

    @property
    def kind(self) -> str:
        return "hnsw" if self.built else "flat"

    @property
    def indexed(self) -> int:
        return len(self) if self.built else 0

    def __len__(self) -> int:
        return self._rows(sql.SQL("SELECT count(*) FROM {}").format(self._table))[0][0]

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """The rows are what it knows."""

    def remove(self, ids: Ids) -> None:
        """The rows are what it knows."""

    def look(self, added: int) -> None:
        """So many rows have been committed, or are there already; a graph is built when it is due."""
        if self.built or self._asked == "flat" or self.dimensions > _WIDEST:
            return
        with self._lock:
            self._unseen += added
            if self._unseen < _LOOK or self._builder is not None or self._closing.is_set():
                return
            self._unseen = 0
            self._builder = threading.Thread(target=self._build, name="index", daemon=True)
            self._builder.start()

    def search(self, queries: Vectors, k: int, allowed: Ids | None = None) -> list[list[Hit]]:
        where, values = NOTHING, list[Any]()
        if allowed is not None:
            where, values = sql.SQL("WHERE number = ANY(%s)"), [allowed.tolist()]

        def work(connection: Connection[Any]) -> list[list[Hit]]:
            found = [self.nearest(connection, query, k, where, values) for query in queries]
            return [[Hit(row[0], row[1]) for row in each] for each in found]

        return self._run(work)

    def nearest(
        self,
        connection: Connection[Any],
        query: Vectors,
        k: int,
        where: sql.Composable,
        values: Sequence[Any],
        columns: sql.Composable = NOTHING,
    ) -> list[tuple[Any, ...]]:
        """The k nearest rows of those that a condition lets through: number, cosine and these columns.

        query: a unit vector (D,). With a graph more are looked at than k, and ordered by the vectors themselves; if it
        gives fewer than k, every row is looked at, for a filter leaves parts of a graph that no path leads to.
        """
        parts = {"columns": columns, "table": self._table, "where": where, "half": self._half}
        if self.built:
            near = sql.SQL(
                "SELECT number, -distance{columns} FROM (SELECT *, vector <#> %s AS distance FROM {table} {where} "
                "ORDER BY {half} <#> %s::halfvec LIMIT %s) AS near ORDER BY distance, number LIMIT %s"
            ).format(**parts)
            found = connection.execute(near, (query, *values, query, max(2 * k, k + 20), k)).fetchall()
            if len(found) == k:
                return found
        exact = sql.SQL(
            "SELECT number, -(vector <#> %s) AS cosine{columns} FROM {table} {where} "
            "ORDER BY cosine DESC, number LIMIT %s"
        ).format(**parts)
        return connection.execute(exact, (query, *values, k)).fetchall()

    def ids(self) -> Ids:
        return np.array(self._rows(sql.SQL("SELECT number FROM {}").format(self._table)), np.int64).reshape(-1)

    def vectors(self, ids: Ids) -> tuple[Ids, Vectors]:
        wanted = sql.SQL("SELECT number, vector FROM {} WHERE number = ANY(%s)").format(self._table)
        found = dict(self._rows(wanted, ids.tolist()))
        known = [each for each in ids.tolist() if each in found]
        return np.array(known, np.int64), numbers_of([found[each] for each in known], self.dimensions)

    def close(self) -> None:
        """Stop building; what is not finished is begun again by the next server that adds something."""
        with self._lock:
            self._closing.set()
            builder, building = self._builder, self._building
        if building is not None:
            with suppress(psycopg.Error):
                building.cancel_safe(timeout=1)
        if builder is not None:
            builder.join(_PATIENCE)

    def wait(self) -> None:
        """Until there is nothing left to build here."""
        while (builder := self._builder) is not None:
            builder.join()

    def _rows(self, statement: sql.Composed, *values: Any) -> list[Any]:
        return self._run(lambda connection: connection.execute(statement, values).fetchall())

    def _run(self, work: Callable[[Connection[Any]], T]) -> T:
        try:
            return self._postgres.run(work)
        except errors.UndefinedTable as error:
            raise NotFoundError("the collection has been deleted") from error

    def _settle(self) -> None:
        """Wait until few are being added."""
        ends, last = time.monotonic() + _LONGEST, len(self)
        while not self._closing.wait(_SETTLE) and time.monotonic() < ends:
            if (count := len(self)) - last < _LOOK:
                return
            last = count

    def _build(self) -> None:
        """Build the graph if it is due and no other server does; searches and writes go on meanwhile."""
        try:
            if len(self) < _LEAST[self._asked]:
                return
            self._settle()
            with self._postgres.alone() as connection:
                with self._lock:
                    if self._closing.is_set():
                        return
                    self._building = connection
                if connection.execute("SELECT pg_try_advisory_lock(%s, %s)", (_LOCK, self._key)).fetchone() != (True,):
                    return  # another server builds it, and will say so
                if connection.execute(_VALID, (self._key,)).fetchone() == (True,):
                    self.built = True  # another has built it
                    return
                # One that a crash left half built is of no use, and is in the way.
                connection.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(self._graph))
                connection.execute(
                    sql.SQL(
                        "CREATE INDEX CONCURRENTLY {} ON {} USING hnsw (({}) halfvec_ip_ops) "
                        "WITH (m = 16, ef_construction = 100)"
                    ).format(self._graph, self._table, self._half)
                )
                self.built = True
                connection.execute(TELL)
        except (psycopg.Error, SemblanceError) as error:
            if not self._closing.is_set():
                log.warning("a graph was not built, searches stay exact until the next try: %s", error)
        finally:
            with self._lock:
                self._builder = self._building = None


def numbers_of(vectors: Sequence[Vector], dimensions: int) -> Vectors:
    """Vectors that were read from a table, as rows (N, D)."""
    return np.array([vector.to_numpy() for vector in vectors], np.float32).reshape(len(vectors), dimensions)
