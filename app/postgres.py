"""PostgreSQL as the truth: a pool of connections, transactions that are tried again, and a schema with its format."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from pgvector.psycopg import register_vector
from psycopg import Connection, errors
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout

from models.errors import BusyError, InputError, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
# How servers tell each other that the list of collections, or what is known of one, is another.
TELL, LISTEN = "NOTIFY semblance_changed", "LISTEN semblance_changed"
PATIENCE = 10.0  # seconds that a call waits for a database that is away: as long as its restart takes
_CONNECTIONS = 16
_TRY = 1.0  # seconds that one try to get a connection takes at most
_LOCK = 0x73656D62  # of the schema while it is made
# Two changes at once: one of them was undone, and done again it succeeds.
_COLLIDED = (
    errors.UniqueViolation,
    errors.ForeignKeyViolation,
    errors.DeadlockDetected,
    errors.SerializationFailure,
    errors.LockNotAvailable,
)
_FULL = (errors.DiskFull, errors.OutOfMemory, errors.IoError, errors.ReadOnlySqlTransaction)

# A partition a collection, named by its key. number: never given twice, so that what an index knows under it is always
# this vector. facets: the metadata as it is filtered; `metadata` is the text that was stored, which jsonb would change.
_SCHEMA = """
CREATE TABLE collections (
  key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text COLLATE "C" NOT NULL UNIQUE, model text NOT NULL,
  fingerprint text NOT NULL, dimensions integer NOT NULL, kind text NOT NULL);
CREATE TABLE pictures (name text COLLATE "C" PRIMARY KEY, content bytea);
ALTER TABLE pictures ALTER content SET STORAGE EXTERNAL;
CREATE TABLE thumbnails (
  picture text COLLATE "C" NOT NULL REFERENCES pictures ON DELETE CASCADE, size integer NOT NULL, version text NOT NULL,
  content bytea NOT NULL, PRIMARY KEY (picture, size));
CREATE SEQUENCE numbers;
CREATE TABLE items (
  collection bigint NOT NULL REFERENCES collections, number bigint NOT NULL DEFAULT nextval('numbers'),
  id text COLLATE "C" NOT NULL, kind text NOT NULL, caption text, metadata text NOT NULL,
  facets jsonb NOT NULL GENERATED ALWAYS AS (metadata::jsonb) STORED,
  picture text COLLATE "C" REFERENCES pictures, size integer NOT NULL, vector vector NOT NULL,
  PRIMARY KEY (collection, number), UNIQUE (collection, id)) PARTITION BY LIST (collection);
CREATE INDEX ON items (picture) WHERE picture IS NOT NULL;
CREATE INDEX ON items USING gin (facets jsonb_path_ops);
CREATE TABLE format (version integer NOT NULL, store uuid NOT NULL DEFAULT gen_random_uuid());
"""
_LOOK = """
SELECT name, (SELECT count(*) FROM semblance.items WHERE collection = key), model, kind
FROM semblance.collections ORDER BY name
"""


class Postgres:
    """A database that several servers may share; everything is in its schema `semblance`. Thread-safe.

    store: what tells it from every other.

    Raises StorageError, naming the database without its password and the way out, if it cannot be reached, lacks
    pgvector or is of a newer format.
    """

    def __init__(self, url: str) -> None:
        self.name = _shown(url)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                self.store = _prepare(connection, self.name)
        except psycopg.Error as error:
            raise _closed(self.name, error) from error
        self._url = url
        # It has a line for each try to come back to a database that is away; what fails at last is raised.
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
        self._pool = ConnectionPool(
            url,
            min_size=1,
            max_size=_CONNECTIONS,
            kwargs={"autocommit": True},
            configure=_configure,
            # By itself it tries again after 1, 2, 4, 8 s. So it gives up at once, and whoever asks lets it try anew.
            reconnect_timeout=_TRY,
            open=True,
        )

    def run(self, work: Callable[[Connection[Any]], T], *, transaction: bool = False, patience: float = PATIENCE) -> T:
        """What `work` returns, with all it did durable; it runs again if the database was away or another was first.

        `work` may therefore have taken effect before: it must come to the same when it runs twice. transaction: of all
        its statements, else each is one. patience: seconds in which the database must be back.
        Raises what `work` raises, InputError for what it cannot hold, such as the character U+0000, BusyError if it
        stays away, and StorageError if it refuses.
        """
        ends = time.monotonic() + patience
        while True:
            try:
                with self._pool.connection(timeout=_TRY) as connection:
                    if not transaction:
                        return work(connection)
                    with connection.transaction():
                        return work(connection)
            except errors.UndefinedTable:
                raise
            except _FULL as error:
                raise StorageError(f"{self.name} refused it, and nothing of it is kept: {_said(error)}") from error
            except psycopg.DataError as error:
                raise InputError(f"PostgreSQL does not take it: {_said(error)}") from error
            except _COLLIDED as error:
                if time.monotonic() > ends:
                    raise BusyError(f"{self.name} is too busy with the same items: {_said(error)}") from error
                time.sleep(random.random() * 0.02)  # not in step with whoever was first
            except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as error:
                if time.monotonic() > ends:
                    raise BusyError(f"{self.name} is away: {_said(error)}") from error
                time.sleep(0.05)
            except psycopg.Error as error:
                raise StorageError(f"{self.name} refused it, and nothing of it is kept: {_said(error)}") from error

    def alone(self) -> Connection[Any]:
        """A connection for what takes long, for whoever asks to close. Raises psycopg.Error."""
        connection = psycopg.connect(self._url, autocommit=True)
        _configure(connection)
        return connection

    def close(self) -> None:
        """Let the connections go."""
        self._pool.close()


def _prepare(connection: Connection[Any], name: str) -> UUID:
    """Make the schema, once among all who come; gives what tells this database from every other. Raises StorageError
    for a newer format."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        connection.execute("CREATE SCHEMA IF NOT EXISTS semblance")
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector SCHEMA public")
        connection.execute("SET LOCAL search_path = semblance, public")
        if connection.execute("SELECT to_regclass('semblance.format')").fetchone() == (None,):
            connection.execute(_SCHEMA)
            connection.execute("INSERT INTO format (version) VALUES (%s)", (FORMAT,))
        rows = connection.execute("SELECT version, store FROM format ORDER BY version").fetchall()
    _check(name, rows[-1][0])
    if connection.execute("SHOW fsync").fetchone() == ("off",):
        log.warning("%s does not sync (fsync = off): what is acknowledged is lost when its machine fails", name)
    store: UUID = rows[0][1]
    return store


def look(url: str) -> list[tuple[str, int, str, str]] | None:
    """Of each collection its name, items, model and kind of index; None where no schema was made yet. Nothing is made.

    Raises StorageError as Postgres does.
    """
    name = _shown(url)
    try:
        with psycopg.connect(url) as connection:
            connection.read_only = True
            if connection.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'").fetchone() is None:
                raise StorageError(f"{name} cannot be opened (it has no pgvector); install it on that server")
            if connection.execute("SELECT to_regclass('semblance.format')").fetchone() == (None,):
                return None
            ((version,),) = connection.execute("SELECT max(version) FROM semblance.format").fetchall()
            _check(name, version)
            return connection.execute(_LOOK).fetchall()
    except psycopg.Error as error:
        raise _closed(name, error) from error


def _check(name: str, version: int) -> None:
    if version > FORMAT:
        raise StorageError(
            f"{name} is of format {version}, this version reads up to {FORMAT}: upgrade, or use another database"
        )


def _closed(name: str, error: Exception) -> StorageError:
    return StorageError(
        f"{name} cannot be opened ({_said(error)}); check the address, and that the server has pgvector"
    )


def _configure(connection: Connection[Any]) -> None:
    """What every connection is told. Plans are made for the values, since only with them a LIMIT and a filter say which
    way is short; a graph is followed on until the filter has let enough through."""
    connection.execute(
        "SET search_path = semblance, public; SET plan_cache_mode = force_custom_plan; SET synchronous_commit = on; "
        "SET jit = off; SET hnsw.ef_search = 100; SET hnsw.iterative_scan = strict_order"
    )
    register_vector(connection)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _shown(url: str) -> str:
    """A database's address without its password."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error as error:
        raise StorageError("the database is given as postgresql://USER:PASSWORD@HOST/NAME, and this is none") from error
    host = parts.get("host", "localhost")
    return f"postgresql://{host}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"
