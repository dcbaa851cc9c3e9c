"""Near-duplicates of a collection: items nearer to each other than a threshold, directly or by way of others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from app.index import Ids, VectorIndex

_PART = 256  # items whose neighbours are looked for at once
_NEIGHBOURS = 16, 64  # of each; the second where all of the first are near, for another group may be behind them


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

    def full(looked: Ids, count: int, among: Ids | None) -> Ids:
        """Link items to `count` neighbours each; those whose neighbours all were near."""
        left: list[int] = []
        for start in range(0, len(looked), _PART):
            go_on()
            known, vectors = index.vectors(looked[start : start + _PART])
            for each, hits in zip(known.tolist(), index.search(vectors, count, among), strict=True):
                near = [hit.id for hit in hits if hit.score >= threshold]
                for other in near:
                    if other != each:
                        first, second = sorted((oldest(each), oldest(other)))
                        head[second] = first
                if len(near) == count:
                    left.append(each)
        return np.array(left, np.int64)

    def groups() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for each in sorted(head):
            found.setdefault(oldest(each), []).append(each)
        return found

    rest = ids
    for count in _NEIGHBOURS:
        rest = full(rest, count, allowed)
    while len(rest):  # each time at least two groups have become one
        looked, of_group = rest.tolist(), groups()
        left = [np.empty(0, np.int64)]
        for first in sorted({oldest(each) for each in looked}):
            go_on()
            members = np.array(of_group[first], np.int64)
            outside = ids[~np.isin(ids, members)]
            if len(outside):
                left.append(full(rest[np.isin(rest, members)], _NEIGHBOURS[0], outside))
        rest = np.concatenate(left)
    found = [_by_cosine(index, np.array(members, np.int64)) for members in groups().values()]
    return sorted((group for group in found if len(group) > 1), key=lambda group: (-len(group), group[0][0]))


def _by_cosine(index: VectorIndex, members: Ids) -> list[tuple[int, float]]:
    known, vectors = index.vectors(members)
    if not len(known):
        return []
    scores = vectors @ vectors[0]
    order = [0, *(1 + np.argsort(-scores[1:], kind="stable"))]
    return [(int(known[place]), float(scores[place])) for place in order]
