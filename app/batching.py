"""Dynamic micro-batches: many callers, one worker thread, a bounded number of inputs in flight."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from app.fairness import FairQueue, Flow, flow_of, has_room, work_until_done
from app.metrics import BatchMeter
from models.errors import BusyError, DeadlineError, ModelError, SemblanceError

log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")
_MEMORY = 0.2  # share that the last batch has in what is known of the pace


class Lanes(NamedTuple):
    """Threads that compute at once, each on one core.

    least: items that are worth a lane; fewer are computed sooner by all cores together, if those are free.
    """

    executor: Executor
    number: int
    least: int


@dataclass(slots=True)
class _Job(Generic[In, Out]):
    item: In
    result: asyncio.Future[Out]
    deadline: float
    arrived: float


@dataclass(slots=True)
class Places(Generic[In, Out]):
    """What `Batcher.admit` gives: places for items, of which `coming` are on their way."""

    batcher: Batcher[In, Out]
    deadline: float
    flow: Flow
    coming: int

    def here(self) -> None:
        """Say that an item has come that is submitted later, or never: no batch shall wait for it."""
        self.coming -= 1
        self.batcher.here(1)

    def submit(self, item: In, *, here: bool = False) -> asyncio.Future[Out]:
        """Have it embedded. here: that was said before."""
        if not here:
            self.here()
        return self.batcher.submit(item, self.deadline, self.flow)


class Batcher(Generic[In, Out]):
    """Groups single items into batches for `forward`, which runs in `executor`'s one thread, or in `lanes` where there
    are any: so many batches run at once, and each takes its share of what waits.

    A batch closes at `max_batch` items, or as soon as nothing that was admitted is still on its way (being decoded) and
    it is worth a lane if others have much to do, or `max_wait` seconds after its first item came; while a batch runs,
    the next one fills. Who is in it is a matter of fairness (app/fairness.py), not of arrival alone. `forward` gets
    1..max_batch items and returns one result or exception for each. If it raises, the batch is halved until the culprit
    is alone, so that nobody else fails with it; a ModelError is of all of them.
    """

    def __init__(
        self,
        forward: Callable[[list[In]], Sequence[Out | Exception]],
        executor: Executor,
        *,
        max_batch: int,
        max_wait: float,
        queue_size: int,
        meter: BatchMeter | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._forward = forward
        self._executor = executor
        self._lanes = lanes or Lanes(executor, 1, 0)
        self._running = 0  # batches
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._queue_size = queue_size
        self._meter = meter or BatchMeter()
        self._held: Counter[Flow] = Counter()  # places that each flow has
        self._coming = 0  # of them, those whose item was not submitted yet
        self._pace = 0.0  # seconds an item, of late
        self._jobs: FairQueue[_Job[In, Out]] = FairQueue()
        self._arrival = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks = [self._loop.create_task(self._run()) for _ in range(self._lanes.number)]

    @property
    def depth(self) -> int:
        """Inputs that are admitted and not answered; from any thread."""
        return sum(tuple(self._held.values()))

    @property
    def _stopped(self) -> bool:
        return any(task.done() for task in self._tasks)

    @contextmanager
    def admit(self, count: int, deadline: float) -> Iterator[Places[In, Out]]:
        """Hold places for `count` items, from before they are decoded until they are answered, until `deadline`.

        One call may overshoot the bound by its own size, which the request limits bound in turn; places past its part
        are not taken from others.

        Raises:
            BusyError: all places are taken, or the caller has most of them, or those before would take until after
                `deadline` at the pace of late, or the batcher is closed; at once, nothing waits.
        """
        if self._stopped:
            raise shutting_down()
        flow = flow_of(count)
        self._check_room(flow, count, deadline)
        self._held[flow] += count
        self._coming += count
        places = Places(self, deadline, flow, count)
        try:
            yield places
        finally:
            self._held[flow] -= count
            self._held += Counter()  # forgets who has none
            self.here(places.coming)

    def here(self, count: int) -> None:
        """So many of those that are admitted are not on their way any more: submitted, or given up."""
        self._coming -= count
        self._arrival.set()

    def _check_room(self, flow: Flow, count: int, deadline: float) -> None:
        held = self._held.total()
        seconds = self._pace * work_until_done(self._held, flow, count)
        spare = deadline - self._loop.time() - seconds
        callers: Counter[str] = Counter()
        for other, places in self._held.items():
            callers[other.caller] += places
        full = not has_room(callers, flow.caller, self._queue_size)
        # Whoever is alone is let in, so that a slow start is forgotten.
        if full or (held and spare < 0):
            raise too_busy(f"{held} inputs", callers[flow.caller], seconds, spare)

    def submit(self, item: In, deadline: float, flow: Flow | None = None) -> asyncio.Future[Out]:
        """What will be the result for one item, or the error that it alone has: ModelError where the model fails for
        it, DeadlineError where no batch took it before `deadline` (the event loop's time), BusyError at the end.

        Whoever cancels it takes the item out of the queue. Who waits keeps the time: nothing wakes them at `deadline`.

        Raises:
            BusyError: the batcher is closed.
        """
        if self._stopped:
            raise shutting_down()
        job: _Job[In, Out] = _Job(item, self._loop.create_future(), deadline, self._loop.time())
        self._jobs.push(flow or flow_of(1), job)
        self._arrival.set()
        return job.result

    async def close(self) -> None:
        """Stop, and tell whoever still waits. Call after the last request was answered."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        while self._jobs:
            _settle(self._jobs.pop(), shutting_down())

    async def _run(self) -> None:
        while True:
            jobs = await self._collect()
            if not jobs:
                continue
            started = self._loop.time()
            for job in jobs:
                self._meter.waited(started - job.arrived)
            few = not self._running and len(jobs) < self._lanes.least
            self._running += 1
            try:
                items = [job.item for job in jobs]
                executor = self._executor if few else self._lanes.executor
                results = await self._loop.run_in_executor(executor, self._timed, items)
            except BaseException as error:  # even a cancelled worker leaves nobody waiting
                for job in jobs:
                    _settle(job, shutting_down())
                if not isinstance(error, Exception):
                    raise
                log.exception("a batch could not be run")
                continue
            finally:
                self._running -= 1
            pace = (self._loop.time() - started) / len(jobs) / (self._running + 1)
            self._pace += (pace - self._pace) * (_MEMORY if self._pace else 1)
            for job, result in zip(jobs, results, strict=True):
                _settle(job, result)

    def _more_to_come(self) -> bool:
        """Whether a batch that is not full is to wait: for inputs that are being decoded, or, where other lanes are at
        work on many, for as many as are worth a lane."""
        waiting = len(self._jobs)
        return waiting < self._max_batch and (self._coming > 0 or waiting < self._lanes.least < self._held.total())

    async def _collect(self) -> list[_Job[In, Out]]:
        """The next batch, without the jobs that nobody waits for any more; may be empty."""
        while not self._jobs:
            self._arrival.clear()
            await self._arrival.wait()
        closes = min(job.arrived for job in self._jobs) + self._max_wait
        with suppress(TimeoutError):
            async with asyncio.timeout_at(closes):
                while self._more_to_come():
                    self._arrival.clear()
                    await self._arrival.wait()
        share = -(-len(self._jobs) // (self._lanes.number - self._running))
        size = min(self._max_batch, max(self._lanes.least, share))
        batch: list[_Job[In, Out]] = []
        while self._jobs and len(batch) < size:
            job = self._jobs.pop()
            if job.deadline <= self._loop.time():
                _settle(job, late())
            if not job.result.done():
                batch.append(job)
        return batch

    def _timed(self, items: list[In]) -> list[Out | Exception]:
        began = time.perf_counter()
        results = self._attempt(items)
        self._meter.ran(len(items), time.perf_counter() - began)
        return results

    def _attempt(self, items: list[In]) -> list[Out | Exception]:
        """One forward, in the worker thread; on an exception two halves, down to the item that causes it."""
        try:
            results = list(self._forward(items))
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} inputs gave {len(results)} results")
            return results
        except ModelError as error:
            return [error] * len(items)
        except Exception as error:
            if len(items) > 1:
                half = len(items) // 2
                return self._attempt(items[:half]) + self._attempt(items[half:])
            if isinstance(error, SemblanceError):
                return [error]
            log.exception("the model failed for one input")
            failure = ModelError("the model failed for this input")
            failure.__cause__ = error
            return [failure]


def late(what: str = "embedded") -> DeadlineError:
    """What a caller is told whose time ran out before all of it was `what`."""
    return DeadlineError(f"the time for this request ran out before all of it was {what}; ask for less, or later")


def too_busy(waiting: str, yours: int, seconds: float, spare: float) -> BusyError:
    """What a caller is told who gets no place. waiting: what has them, `yours` of it the caller's own. seconds: until
    this request were answered; spare: what would be left of its time then, below 0 where it would be late."""
    return BusyError(
        f"{waiting} are waiting already, {yours} of them yours, for about {seconds:.0f} s; try again later",
        retry_after=max(1, math.ceil(-spare if spare < 0 else seconds / 2)),
    )


def shutting_down() -> BusyError:
    """What a caller is told who still waits when the models stop."""
    return BusyError("the server is shutting down", retry_after=5)


def _settle(job: _Job[In, Out], result: Out | Exception) -> None:
    if job.result.done():
        return
    if isinstance(result, Exception):
        job.result.set_exception(result)
    else:
        job.result.set_result(result)
