"""Whose turn it is: callers get equal shares of the device, and short requests come before long ones."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from itertools import count
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

# Who sent the request that is being answered: its key or its address (app/middleware.py).
CALLER: ContextVar[str] = ContextVar("caller", default="")
_LONG = 8  # inputs of one request; longer ones are bulk work
CALLERS_PART = 0.75  # of all places, for one caller at most, so that another finds one
_SHORT_WEIGHT = 8.0  # turns that short requests get for one of bulk work


class Flow(NamedTuple):
    """What stands in line together: one caller's short requests, or one caller's bulk work."""

    caller: str
    bulk: bool

    @property
    def weight(self) -> float:
        """Turns it gets for one of bulk work."""
        return 1.0 if self.bulk else _SHORT_WEIGHT


def flow_of(inputs: int) -> Flow:
    """The flow of the request that is being answered, by its number of inputs."""
    return Flow(CALLER.get(), inputs > _LONG)


def has_room(held: Mapping[str, int], caller: str, places: int) -> bool:
    """Whether a caller gets more of so many places, by those that each has: its part is not used up, nor are all taken.
    What a call has past its caller's part is not taken from others."""
    part = CALLERS_PART * places
    return held.get(caller, 0) < part and sum(min(each, part) for each in held.values()) < places


def work_until_done(held: Mapping[Flow, int], flow: Flow, count: int) -> float:
    """How much of what is held is done until `count` more of a flow is, itself included, if all have their shares."""
    weights = sum(other.weight for other in held if other != flow) + flow.weight
    own = held.get(flow, 0) + count
    return min(sum(held.values()) + count, own * weights / flow.weight)


class FairQueue(Generic[T]):
    """Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): an item's turn comes 1 / weight after its flow's
    last, or now if the flow was idle. So a backlog waits behind its own, and nobody waits for all of it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._last: dict[Flow, float] = {}
        self._now = 0.0
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[T]:
        """What is waiting, in no order."""
        return (item for _, _, item in self._heap)

    @property
    def first(self) -> T:
        """What `pop` would give."""
        return self._heap[0][2]

    def push(self, flow: Flow, item: T) -> None:
        """Put an item at the end of its flow."""
        turn = max(self._now, self._last.get(flow, 0.0))
        self._last[flow] = turn + 1 / flow.weight
        heapq.heappush(self._heap, (turn, next(self._arrivals), item))

    def pop(self) -> T:
        """The item whose turn it is; of equal turns the one that came first."""
        self._now, _, item = heapq.heappop(self._heap)
        if not self._heap:  # every flow is idle
            self._last.clear()
            self._now = 0.0
        return item
