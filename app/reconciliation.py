"""The truth and an index beside it, made to agree again after a crash between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from app.index import Ids, Vectors
from models.errors import InputError

_PART = 4_096  # rows whose vectors are held at once


class PagedIndex(Protocol):
    """What reconcile needs of an index."""

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """As VectorIndex.add."""
        ...

    def remove(self, ids: Ids) -> None:
        """As VectorIndex.remove."""
        ...

    def pages(self, last: int | None = None) -> Iterator[Ids]:
        """Every id up to `last`, ascending, in arrays of some thousand; others may come and go meanwhile."""
        ...


def reconcile(
    index: PagedIndex,
    rows: Iterable[Ids],
    vectors_of: Callable[[Ids], tuple[Ids, Vectors]],
    last: int | None = None,
) -> tuple[int, int]:
    """Make the index hold what the truth does, as after a crash between the two. -> how many were added, and removed.

    rows: the truth's row numbers, ascending, in arrays of any length; neither they nor Milvus' keys are ever all in
    memory. vectors_of: as VectorIndex.vectors, of the truth. last: up to which row numbers this goes; others may add
    above it meanwhile, and delete anywhere. Row numbers are never used twice, so an equal key means an equal vector,
    and no vectors are compared. Raises InputError for rows that are not ascending.
    """
    added = removed = 0
    for truth, there in _side_by_side(rows, index.pages(last)):
        extra, missing = np.setdiff1d(there, truth), np.setdiff1d(truth, there)
        index.remove(extra)
        for start in range(0, len(missing), _PART):
            index.add(*vectors_of(missing[start : start + _PART]))
        added, removed = added + len(missing), removed + len(extra)
    return added, removed


def _side_by_side(left: Iterable[Ids], right: Iterable[Ids]) -> Iterator[tuple[Ids, Ids]]:
    """Two ascending runs of numbers, cut at the same places."""
    runs = [_ascending(left), _ascending(right)]
    heads: list[Ids | None] = [next(run, None) for run in runs]
    while there := [head for head in heads if head is not None]:
        bound = min(int(head[-1]) for head in there)
        cut: list[Ids] = []
        for side, head in enumerate(heads):
            if head is None:
                cut.append(np.empty(0, np.int64))
                continue
            place = int(np.searchsorted(head, bound, "right"))
            cut.append(head[:place])
            heads[side] = head[place:] if place < len(head) else next(runs[side], None)
        yield cut[0], cut[1]


def _ascending(run: Iterable[Ids]) -> Iterator[Ids]:
    """The arrays that have anything in them. Raises InputError where a number is not above the one before it."""
    last = None
    for part in run:
        if not len(part):
            continue
        if (np.diff(part) <= 0).any() or (last is not None and part[0] <= last):
            raise InputError(f"row numbers must ascend, and those from {part[0]} on do not")
        last = part[-1]
        yield part
