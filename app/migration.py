"""Collections from one store into another while the first is served, until both hold the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from app.collection import Collection, Item, NewItem, kept_picture
from app.collections import STAGED, Collections
from app.index import Vectors
from models.errors import ConflictError, InputError, NotFoundError, StorageError

_PAGE = 500  # items that are read at once, with their vectors
_BATCH = 64  # items that are written at once, with their pictures
_PASSES = 20


class Pass(NamedTuple):
    """What one comparison of two collections found. checksums: SHA-256 over all items of each, in the order of ids."""

    items: int
    copied: int
    deleted: int
    checksums: tuple[str, str]


@contextmanager
def reading(folder: Path, picture_root: Path | None) -> Iterator[Mapping[str, Collection]]:
    """The collections of a data folder by name, for reading alone, whoever serves it.

    Raises NotFoundError if it is no data folder, StorageError if it is damaged.
    """
    from app.database import Database
    from app.index import make_index
    from app.pictures import Pictures
    from app.sqlite_collection import SQLiteCollection
    from app.sqlite_collections import known

    if not (folder / "store.db").is_file():
        raise NotFoundError(f"{folder} is no data folder: it has no store.db")
    database, pictures = Database(folder / "store.db", may_be_new=False), Pictures(folder / "pictures", picture_root)
    try:
        with database.read() as connection:
            found = known(connection)
        # An index is never asked, and so need not be filled.
        yield {
            made.name: SQLiteCollection(database, pictures, made, make_index("flat", made.dimensions))
            for made in found
            if not made.name.startswith(STAGED)
        }
    finally:
        database.close()


def migrate(source: Collection, target: Collections, progress: Callable[[Pass], None]) -> Pass:
    """Make the collection of the same name in `target` hold what `source` does, and compare until nothing differs.

    A kind of index that the target has not becomes "auto". progress: called after each pass.
    Raises ConflictError if the target has it of another model, if it changes faster than it is copied, or if it goes
    meanwhile, and StorageError for a picture that is lost.
    """
    made = {"model": source.model, "fingerprint": source.fingerprint, "dimensions": source.dimensions}
    try:
        copy = target.create(source.name, index=source.kind, **made)  # type: ignore[arg-type]
    except (InputError, ConflictError):  # of its model, too, and then again
        copy = target.create(source.name, **made)  # type: ignore[arg-type]
    for _ in range(_PASSES):
        try:
            found = _compare(source, copy)
        except NotFoundError as error:
            raise ConflictError(
                f"collection {source.name!r} was deleted, or made again with another model, while it was copied: what "
                "is in the target is no copy of it; delete it there, and begin again"
            ) from error
        progress(found)
        if not found.copied and not found.deleted and found.checksums[0] == found.checksums[1]:
            return found
    raise ConflictError(
        f"collection {source.name!r} changes faster than it is copied: try at a quieter time, or stop the server"
    )


def _compare(source: Collection, copy: Collection) -> Pass:
    """One pass over both in the order of their ids: what differs is copied, what the source has not is deleted."""
    ours, theirs = _digested(source), _digested(copy)
    sums = hashlib.sha256(), hashlib.sha256()
    items = copied = deleted = 0
    waiting: list[tuple[Item, Vectors]] = []
    mine, other = next(ours, None), next(theirs, None)
    while mine is not None or other is not None:
        if other is not None and (mine is None or other[0].id < mine[0].id):
            copy.delete(other[0].id)
            deleted += 1
            other = next(theirs, None)
            continue
        assert mine is not None  # noqa: S101 - else the other was
        items += 1
        sums[0].update(mine[2])
        if other is not None and other[0].id == mine[0].id:
            sums[1].update(other[2])
            same = other[2] == mine[2]
            other = next(theirs, None)
        else:
            same = False
        if not same:
            waiting.append(mine[:2])
        if len(waiting) == _BATCH:
            copied += _write(source, copy, waiting)
            waiting = []
        mine = next(ours, None)
    copied += _write(source, copy, waiting)
    return Pass(items, copied, deleted, (sums[0].hexdigest(), sums[1].hexdigest()))


def _digested(collection: Collection) -> Iterator[tuple[Item, Vectors, bytes]]:
    """Every item by id, with its vector and a digest of all there is of it; a picture is in its name."""
    after = ""
    while items := collection.page_with_vectors(_PAGE, after):
        after = items[-1][0].id
        for item, vector in items:
            said = json.dumps([item.id, item.kind, item.caption, item.metadata, item.picture])
            yield item, vector, hashlib.sha256(said.encode() + vector.astype("<f4").tobytes()).digest()


def _write(source: Collection, copy: Collection, items: list[tuple[Item, Vectors]]) -> int:
    """Copy items with their pictures. -> how many; one that has changed meanwhile is for the next pass."""
    made = []
    for item, vector in items:
        picture: bytes | Path | None = item.place
        if item.picture is not None and picture is None:
            try:
                picture = kept_picture(source, item)
            except StorageError as error:
                raise StorageError(
                    f"item {item.id!r} of collection {source.name!r}: {error}; put it back from a backup, or delete "
                    "the item, and begin again: what was copied is kept"
                ) from error
            if picture is None:
                continue
        made.append(NewItem(item.kind, vector, item.id, item.caption, item.metadata, picture))
    copy.add(made)
    return len(items)
