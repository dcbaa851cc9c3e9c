"""Durable collections of pictures and texts: what every store offers, and which one the settings ask for."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from app.collection import Collection, Item
from app.index import check_kind
from models.errors import ConflictError, InputError, NotFoundError

STAGED = "~"  # begins the name of a collection that is to take another's place; NAME allows it to nobody
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Collections(ABC):
    """The collections of one store. Thread-safe."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every collection's name, sorted."""

    def get(self, name: str) -> Collection:
        """A collection. Raises NotFoundError, naming what there is."""
        found = None if name.startswith(STAGED) else self._find(name)
        if found is None:
            raise NotFoundError(f"no collection {name!r}; there are: {', '.join(self.names()[:20]) or 'none yet'}")
        return found

    @abstractmethod
    def refresh(self) -> None:
        """Look again at what other processes may have made or deleted, where they can."""

    def create(self, name: str, *, model: str, fingerprint: str, dimensions: int, index: str = "auto") -> Collection:
        """Make a collection, or give the one there is if it was made the same way.

        Raises InputError for a bad name or index, ConflictError if it exists with another model or index.
        """
        if not NAME.fullmatch(name):
            raise InputError("a collection's name is 1 to 64 letters, digits, dots, dashes or underscores")
        self._check_index(index)  # before anything is written
        made = self._make(name, model, fingerprint, dimensions, index)
        if index not in ("auto", made.kind):
            raise ConflictError(f"collection {name!r} was made with index {made.kind!r}, which stays; leave it out")
        return made

    def stage(self, name: str, model: str, fingerprint: str, dimensions: int) -> Collection:
        """The collection that is to take another's place, empty or as far as it came; nobody sees it.

        Raises NotFoundError if there is no other.
        """
        kind = self.get(name).kind
        staged = self.staged(name)
        if staged is not None and staged.fingerprint != fingerprint:
            self._delete(staged)
        return self._make(STAGED + name, model, fingerprint, dimensions, kind)

    def staged(self, name: str) -> Collection | None:
        """What `stage` made and `switch` has not put in its place."""
        return self._find(STAGED + name)

    def unstage(self, name: str) -> None:
        """Delete what `stage` made, if anything."""
        if (staged := self.staged(name)) is not None:
            self._delete(staged)

    @abstractmethod
    def lacking(self, name: str, after: str, limit: int) -> list[Item]:
        """The first items, by their ids, that the staged collection has not, or not as they are."""

    @abstractmethod
    def switch(self, name: str) -> bool:
        """Let the staged collection take the place of the other, in one commit; what it alone has goes first.

        False if it lacks something; then nothing is changed.
        """

    @abstractmethod
    def coverage(self, name: str) -> tuple[int, int, float | None]:
        """Items of a collection, those its graph or codes cover, and when (POSIX time) these were last kept."""

    def delete(self, name: str) -> None:
        """Delete a collection and its items, and what is to take its place. Raises NotFoundError."""
        found = self.get(name)
        self.unstage(name)  # first, for nobody would find it after a kill in between, and its pictures would stay
        self._delete(found)
        self.unstage(name)  # what was begun meanwhile

    @abstractmethod
    def close(self) -> None:
        """Finish what was begun and let the store go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stage_of(self, name: str) -> Collection:
        if (staged := self.staged(name)) is None:
            raise NotFoundError(f"nothing is to take the place of collection {name!r}")
        return staged

    def _check_index(self, kind: str) -> None:
        """Raises InputError for a kind of index that this store has not."""
        check_kind(kind)

    @abstractmethod
    def _find(self, name: str) -> Collection | None:
        """The collection of this name, staged ones with theirs."""

    @abstractmethod
    def _make(self, name: str, model: str, fingerprint: str, dimensions: int, index: str) -> Collection:
        """As `create`; of a staged one too."""

    @abstractmethod
    def _delete(self, collection: Collection) -> None:
        """Raises NotFoundError if it is gone."""


def refused(name: str, theirs: str, their_print: str, model: str, fingerprint: str) -> ConflictError:
    """What says that a collection was made with another model."""
    return ConflictError(
        f"collection {name!r} holds vectors of model {theirs!r} ({their_print}), not of {model!r} ({fingerprint}): "
        "use another name, or delete it first"
    )
