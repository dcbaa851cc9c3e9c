"""Near-duplicates of a collection: items nearer to each other than a threshold, directly or by way of others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from app.index import Ids, VectorIndex

_PART = 256  # items whose neighbours are looked for at once
_NEIGHBOURS = 16  # of each; larger groups are linked by way of their members


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

    for start in range(0, len(ids), _PART):
        go_on()
        known, vectors = index.vectors(ids[start : start + _PART])
        for each, hits in zip(known.tolist(), index.search(vectors, _NEIGHBOURS, allowed), strict=True):
            for hit in hits:
                if hit.id != each and hit.score >= threshold:
                    first, second = sorted((oldest(each), oldest(hit.id)))
                    head[second] = first
    groups: dict[int, list[int]] = {}
    for each in sorted(head):
        groups.setdefault(oldest(each), []).append(each)
    found = [_by_cosine(index, np.array(members, np.int64)) for members in groups.values()]
    return sorted((group for group in found if len(group) > 1), key=lambda group: (-len(group), group[0][0]))


def _by_cosine(index: VectorIndex, members: Ids) -> list[tuple[int, float]]:
    known, vectors = index.vectors(members)
    if not len(known):
        return []
    scores = vectors @ vectors[0]
    order = [0, *(1 + np.argsort(-scores[1:], kind="stable"))]
    return [(int(known[place]), float(scores[place])) for place in order]
