"""Near-duplicates of a collection: items nearer to each other than a threshold, directly or by way of others."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from app.index import Ids, VectorIndex
from models.retrieval import Hit

_PART = 256  # items whose neighbours are looked for at once
_NEIGHBOURS, _MOST = 16, 1024  # of each, at first and at last; larger groups are linked by way of their members


def duplicate_groups(
    index: VectorIndex, threshold: float, allowed: Ids | None, go_on: Callable[[], None]
) -> list[list[tuple[int, float]]]:
    """Groups of (id, cosine to the first), largest groups first; the first of a group is its oldest, the rest are by
    cosine. allowed: ids to look at, None for all. go_on: called now and then; what it raises ends the search."""
    ids = np.sort(index.ids() if allowed is None else allowed)
    head: dict[int, int] = {}  # of every id that has a near one: an older id of the same group, or itself

    def oldest(each: int) -> int:
        while (older := head.setdefault(each, each)) != each:
            head[each] = head[older]  # halves the way for whoever comes next
            each = older
        return each

    def link(first: int, second: int) -> None:
        first, second = sorted((oldest(first), oldest(second)))
        head[second] = first

    first_of: dict[bytes, int] = {}  # of equal vectors, which have the same neighbours, by their hash
    for start in range(0, len(ids), _PART):
        known, vectors = index.vectors(ids[start : start + _PART])
        hashes: list[bytes] = [blake2b(row, digest_size=16).digest() for row in vectors]
        firsts = [first_of.setdefault(hash_, each) for hash_, each in zip(hashes, known.tolist(), strict=True)]
        for each, first in zip(known.tolist(), firsts, strict=True):
            if first != each:
                link(first, each)
        new = np.flatnonzero(known == firsts)
        for each, hits in zip(known[new].tolist(), _near(index, vectors[new], threshold, allowed, go_on), strict=True):
            for hit in hits:
                if hit.id != each and hit.score >= threshold:
                    link(each, hit.id)
    groups: dict[int, list[int]] = {}
    for each in sorted(head):
        groups.setdefault(oldest(each), []).append(each)
    found = [_by_cosine(index, np.array(members, np.int64)) for members in groups.values()]
    return sorted((group for group in found if len(group) > 1), key=lambda group: (-len(group), group[0][0]))


def _near(
    index: VectorIndex, vectors: np.ndarray, threshold: float, allowed: Ids | None, go_on: Callable[[], None]
) -> list[list[Hit]]:
    """The neighbours of each vector, more where all are near so far: another group may be behind."""
    found: list[list[Hit]] = [[] for _ in vectors]
    asked, rest = _NEIGHBOURS, list(range(len(vectors)))
    while rest and asked <= _MOST:
        go_on()
        for place, hits in zip(rest, index.search(vectors[rest], asked, allowed), strict=True):
            found[place] = hits
        rest = [place for place in rest if len(found[place]) == asked and found[place][-1].score >= threshold]
        asked *= 4
    return found


def _by_cosine(index: VectorIndex, members: Ids) -> list[tuple[int, float]]:
    known, vectors = index.vectors(members)
    if not len(known):
        return []
    scores = vectors @ vectors[0]
    order = [0, *(1 + np.argsort(-scores[1:], kind="stable"))]
    return [(int(known[place]), float(scores[place])) for place in order]
