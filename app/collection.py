"""One collection: items with their vectors, and the searches among them; whatever store has it."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from app import statistics
from app.duplicates import duplicate_groups
from app.filters import Condition
from app.index import Ids, SharedSearch, VectorIndex, Vectors
from app.pictures import place_of
from models.errors import InputError, NotFoundError, StorageError

Kind = Literal["image", "text"]
Target = Literal["image", "text", "any"]
_UNIT = 3e-7  # how far the length of a unit vector of floats may be from 1


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
class Among:
    """Which of a collection's items are looked at: of a kind, with metadata that passes all filters, of these ids."""

    target: Target = "any"
    filters: Sequence[Condition] = ()
    ids: Sequence[str] | None = None


ALL = Among()


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


class Made(NamedTuple):
    """What a store says of a collection: its key there, and what it was made with. kind: of index, as asked for."""

    key: int
    name: str
    model: str
    fingerprint: str
    dimensions: int
    kind: str


class StoredPictures(Protocol):
    """The pictures of a store, by the name that an item has them under."""

    def get(self, digest: str) -> bytes:
        """A picture's bytes. Raises NotFoundError."""
        ...

    def version(self, digest: str) -> str:
        """What changes when the picture does. Raises NotFoundError."""
        ...

    def thumbnail(self, digest: str, size: int, make: Callable[[bytes], bytes]) -> bytes:
        """What `make` gives for a picture, kept for sizes that are asked for often. Raises NotFoundError."""
        ...


class Collection(ABC):
    """One collection: items with unit vectors of one model. Thread-safe; what a call returned from is durable.

    A store says how it keeps items (`_put` and the like) and which index answers searches by their row numbers.
    """

    def __init__(self, made: Made, index: VectorIndex, pictures: StoredPictures) -> None:
        self.key, self.name, self.model, self.fingerprint, self.dimensions, self.kind = made
        self._index, self._searches = index, SharedSearch(index)
        self._stored_pictures = pictures

    def close(self) -> None:
        """Stop what its index does in the background."""
        self._index.close()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def coverage(self) -> tuple[int, int]:
        """Its items, and those that its graph or codes cover."""
        return len(self), self._index.indexed

    def info(self) -> CollectionInfo:
        """What it is and how much it holds."""
        count, indexed = self.coverage
        return CollectionInfo(
            name=self.name,
            model=self.model,
            fingerprint=self.fingerprint,
            dimensions=self.dimensions,
            count=count,
            index=self._index.kind,
            indexed=indexed,
            bytes=count * self.dimensions * 4 + self._picture_bytes(),
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
        if items:
            self._put(ids, items, vectors)
        return ids

    @abstractmethod
    def delete(self, id: str) -> None:
        """Delete an item; no later search returns it. Raises NotFoundError."""

    def get(self, id: str) -> Item:
        """An item. Raises NotFoundError."""
        found = self.page(1, among=Among(ids=[id]))
        if not found:
            raise self._missing(id)
        return found[0]

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """The stored vectors (N, D) of items. Raises NotFoundError for an id that is not there."""
        stored = []
        for id, vector in zip(ids, self._stored(ids), strict=True):
            if vector is None:
                raise self._missing(id)
            stored.append(vector)
        return np.stack(stored)

    def page(self, limit: int, after: str = "", among: Among = ALL) -> list[Item]:
        """The first `limit` items whose ids come after `after`, in the order of their ids."""
        return self._page(limit, after, among, vectors=False)[0]

    def page_with_vectors(self, limit: int, after: str = "", among: Among = ALL) -> list[tuple[Item, Vectors]]:
        """As `page`, each with its vector (D,): read at one moment, for an item may be replaced at any."""
        return list(zip(*self._page(limit, after, among, vectors=True), strict=True))

    def version(self, item: Item) -> str:
        """What changes when an item's picture does. Raises NotFoundError for an item without one."""
        return self._stored_pictures.version(self._named(item))

    def picture(self, id: str, size: int | None = None, make: Callable[[bytes], bytes] = bytes) -> bytes:
        """The file of an item's picture, or a thumbnail of this size as `make` makes it. A file that is kept is a JPEG,
        one in its place what it was. Raises NotFoundError for an unknown id, or an item without a picture."""
        name = self._named(self.get(id))
        return self._stored_pictures.get(name) if size is None else self._stored_pictures.thumbnail(name, size, make)

    @abstractmethod
    def sample(self, limit: int) -> tuple[list[Item], Vectors]:
        """At most so many of its items, spread evenly over the order in which they came, and their vectors (N, D)."""

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
        query, wanted, among = self._unit([vector]), k + offset, Among(target, filters, ids)
        asked = wanted
        while True:
            found, more = self._nearest(query, asked, among)
            if group_by is not None:
                found = _first_of_groups(found, group_by)
            if len(found) >= wanted or not more:
                return [hit for hit in found[offset:wanted] if hit.score >= min_score]
            asked *= 2

    def duplicates(
        self, threshold: float, limit: int, *, target: Target = "any", go_on: Callable[[], None] = lambda: None
    ) -> tuple[int, list[list[SearchHit]]]:
        """How many groups of near-duplicates there are, and the `limit` largest, as duplicate_groups gives them."""
        groups = duplicate_groups(self._index, threshold, self._allowed(Among(target)), go_on)
        items = self._items([row for group in groups[:limit] for row, _ in group])
        shown = [[SearchHit(items[row], score) for row, score in group if row in items] for group in groups[:limit]]
        return len(groups), [group for group in shown if len(group) > 1]

    def statistics(self) -> dict[str, Any]:
        """What it holds, in numbers: `kinds`, `metadata` and `cosines` of app/statistics.py."""
        return {**self._counts(), "cosines": statistics.cosines(self._index)}

    def _nearest(self, query: Vectors, k: int, among: Among) -> tuple[list[SearchHit], bool]:
        """At most k hits of a unit vector (1, D), best first, and whether there may be more."""
        gone, before = set[int](), set[int]()
        while True:
            hits = self._searches.search(query, k, self._allowed(among))[0]
            items = self._items([hit.id for hit in hits])
            unseen = {hit.id for hit in hits} - items.keys()
            if not unseen or (unseen <= gone and items.keys() == before):
                # Rows that are being replaced or deleted are not among the items; others shall have their places.
                return [SearchHit(items[hit.id], hit.score) for hit in hits if hit.id in items], len(hits) == k
            # Not committed yet, deleted, or replaced since the index was asked: another look finds the new one. What
            # was not committed at one look may be there and replaced at the next, but then other items are seen.
            gone |= unseen
            before = set(items)

    @abstractmethod
    def _put(self, ids: Sequence[str], items: Sequence[NewItem], vectors: Vectors) -> None:
        """Store items under these ids, all or none; unit vectors (N, D), N > 0."""

    @abstractmethod
    def _page(self, limit: int, after: str, among: Among, *, vectors: bool) -> tuple[list[Item], Vectors]:
        """What `page` gives, and its vectors (N, D), or none (0, D), in one statement."""

    @abstractmethod
    def _stored(self, ids: Sequence[str]) -> list[Vectors | None]:
        """The vector of each id, None where there is no such item."""

    @abstractmethod
    def _items(self, rows: Sequence[int]) -> dict[int, Item]:
        """Those of the rows that are there."""

    @abstractmethod
    def _allowed(self, among: Among) -> Ids | None:
        """The rows a search may return, None for all of them."""

    @abstractmethod
    def _picture_bytes(self) -> int:
        """Of the pictures that are kept."""

    @abstractmethod
    def _counts(self) -> dict[str, Any]:
        """`kinds` and `metadata` of the statistics."""

    def _unit(self, vectors: Sequence[NDArray[np.float32]]) -> Vectors:
        """Unit units (N, D). Raises InputError, naming the item, for a wrong length, a zero or a number not finite."""
        units = np.zeros((len(vectors), self.dimensions), np.float32)
        for position, vector in enumerate(vectors):
            if vector.shape != (self.dimensions,):
                raise InputError(f"the vector has shape {vector.shape}, ({self.dimensions},) expected", position)
            norm = float(np.linalg.norm(vector.astype(np.float64)))
            if not np.isfinite(norm) or norm == 0:
                raise InputError("the vector is zero or not finite", position)
            # A unit vector stays as it is, so that a copy of an item is the same to the bit.
            units[position] = vector if abs(norm - 1) < _UNIT else vector / norm
        return units

    def _named(self, item: Item) -> str:
        if item.picture is None:
            raise NotFoundError(f"item {item.id!r} has no picture: it is a text, or its picture is elsewhere")
        return item.picture

    def _missing(self, id: str) -> NotFoundError:
        return NotFoundError(f"no item {id!r} in collection {self.name!r}, which holds {len(self)}")


def _first_of_groups(hits: Sequence[SearchHit], key: str) -> list[SearchHit]:
    """Without those whose value at a key of the metadata was seen before; what has none is a group by itself."""
    first: dict[Any, SearchHit] = {}
    for hit in hits:
        value = hit.item.metadata.get(key)
        # True is no 1 here; 1 and 1.0 are one value.
        first.setdefault(("alone", hit.item.id) if value is None else (isinstance(value, bool), value), hit)
    return list(first.values())


def kept_picture(collection: Collection, item: Item) -> bytes | None:
    """An item's picture; None if the item has been deleted or replaced since. Raises StorageError if it was lost."""
    try:
        return collection.picture(item.id)
    except NotFoundError:
        with suppress(NotFoundError):
            if collection.get(item.id) == item:
                raise StorageError("its picture is not on the disk any more") from None
        return None


def item_of(values: Sequence[Any]) -> Item:
    """An item of a row's id, kind, caption, metadata and picture."""
    id, kind, caption, metadata, picture = values
    return Item(id, kind, caption, json.loads(metadata), picture)
