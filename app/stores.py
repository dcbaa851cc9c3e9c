"""Which store the settings ask for: a data folder of this machine, or a PostgreSQL that several servers share."""

from __future__ import annotations

from app.collections import Collections
from app.settings import Settings
from models.errors import StorageError


def open_collections(settings: Settings, note: str = "") -> Collections:
    """The collections of `settings.database`, or of the folder `settings.store`. note: what the folder's lock tells
    other processes about this one, such as its address.

    Raises StorageError, naming the store and the way out, if it is damaged, held by another or cannot be reached.
    """
    if settings.database is not None:
        from app.postgres_collections import PostgresCollections

        return PostgresCollections(settings.database.get_secret_value(), settings.picture_root, settings.milvus)
    check_stores(settings)
    from app.sqlite_collections import SQLiteCollections

    return SQLiteCollections(settings.store, note, settings.picture_root)


def check_stores(settings: Settings) -> None:
    """Raises StorageError for a Milvus without the truth beside it."""
    if settings.milvus is not None and settings.database is None:
        raise StorageError("a Milvus is no store by itself: give its PostgreSQL as SEMBLANCE_DATABASE")
