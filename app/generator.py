"""Pictures of texts, many requests in one decode loop: each step draws one token of every picture under way.

A request joins at the next step and leaves when its picture is whole or its caller is gone, so nobody waits for a batch
to end, and nothing is drawn for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app import tracing
from app.batching import late, shutting_down, too_busy
from app.fairness import FairQueue, Flow, flow_of, has_room, work_until_done
from app.metrics import Metrics
from app.settings import Settings
from models.dalle import DALLETransformer
from models.errors import ModelError
from models.generation import Sampling, TokenReader, draw, filtered, guided_logits, points_of
from models.tokenizers import ImageTokenizer

log = logging.getLogger(__name__)

_MEMORY = 0.05  # share that the last step has in what is known of the pace
_KNOWN = 20  # steps until it is known, for the first ones are slow


@dataclass(eq=False)
class Drawing:
    """One picture on its way. ids: int64 (length,), the tokens so far; done: how many they are. known: those that are
    given, -1 where one is drawn; without it, all are drawn. style: one of the model's, or none. flow: whose it is."""

    prompt: str
    seed: int
    sampling: Sampling
    ids: Tensor
    known: Tensor | None = None
    style: str | None = None
    flow: Flow = field(default_factory=lambda: flow_of(1))
    done: int = 0
    cancelled: bool = False
    error: Exception | None = None
    points: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # of the next token: (1, K), or (2, K): also textless

    @property
    def lanes(self) -> int:
        """Rows of the cache that it takes: two where guidance compares with no text."""
        return 1 if self.sampling.guidance_scale == 1 else 2

    @property
    def left(self) -> int:
        """Tokens that are to be computed, in all its lanes."""
        return self.lanes * (len(self.ids) - self.done)

    @property
    def whole(self) -> bool:
        """Whether the last token was drawn."""
        return self.done == len(self.ids)


class DecodeLoop:
    """The pictures under way and their keys and values, in one cache of `lanes` rows; not thread-safe.

    The rows in use are always the first ones: where a picture leaves, the last rows move into its place, so that every
    step is one forward over one block of memory.
    """

    def __init__(self, model: DALLETransformer, lanes: int = 16) -> None:
        if lanes < 2:
            raise ValueError(f"{lanes} lanes are too few: a guided picture takes two")
        self.model, self.lanes = model, lanes
        self._reader = TokenReader(model, lanes)
        if self._reader.fixed:  # what compiling takes is paid before the first request
            with torch.inference_mode():
                self._reader.ids(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        self._rows: list[tuple[Drawing, int]] = []  # who has each lane: a drawing and which of its rows this is

    @property
    def free(self) -> int:
        """Lanes that nobody has."""
        return self.lanes - len(self._rows)

    @property
    def drawings(self) -> list[Drawing]:
        """The pictures under way."""
        return [drawing for drawing, part in self._rows if part == 0]

    @torch.inference_mode()
    def join(self, drawing: Drawing) -> None:
        """Read a picture's text; its first token is drawn by the next step. There must be lanes free for it."""
        model, start = self.model, len(self._rows)
        drawing.points = points_of(drawing.seed, model.image_length)
        texts = model.tokens_of([drawing.prompt, ""][: drawing.lanes], [drawing.style])
        drawing.logits = self._reader.text(texts, start)
        self._rows += [(drawing, part) for part in range(drawing.lanes)]

    @torch.inference_mode()
    def step(self) -> list[Drawing]:
        """Draw a token of every picture. -> those that have left: whole, cancelled or failed."""
        gone = []
        for drawing in self.drawings:
            if not drawing.cancelled:
                self._draw(drawing)
            if drawing.whole or drawing.cancelled or drawing.error:
                gone.append(drawing)
        self._leave(gone)
        if self._rows:
            self._advance()
        return gone

    def _draw(self, drawing: Drawing) -> None:
        scores = guided_logits(drawing.logits, drawing.sampling)
        if not bool(torch.isfinite(scores).all()):
            drawing.error = ModelError("the model gave no finite numbers for this picture")
            return
        given = -1 if drawing.known is None else int(drawing.known[drawing.done])
        if given < 0:
            shares = filtered(scores, drawing.sampling)
            given = int(draw(shares, drawing.points[drawing.done, None].to(shares.device)))
        drawing.ids[drawing.done] = given
        drawing.done += 1

    def _advance(self) -> None:
        ids = torch.tensor([int(drawing.ids[drawing.done - 1]) for drawing, _ in self._rows])
        places = torch.tensor([drawing.done - 1 for drawing, _ in self._rows])
        logits = self._reader.ids(ids, places)
        rows = {(id(drawing), part): row for row, (drawing, part) in enumerate(self._rows)}
        for drawing in self.drawings:
            drawing.logits = logits[[rows[id(drawing), part] for part in range(drawing.lanes)]]

    def _leave(self, gone: Sequence[Drawing]) -> None:
        for drawing in gone:
            while (row := next((r for r, (other, _) in enumerate(self._rows) if other is drawing), None)) is not None:
                last = len(self._rows) - 1
                if row != last:
                    for part in (self._reader.cache.keys, self._reader.cache.values):
                        part[:, row] = part[:, last]
                    self._rows[row] = self._rows[last]
                self._rows.pop()


class RemoteGenerator(ABC):
    """A model that other processes draw with: given in the place of a DALLETransformer. model: the same without its
    numbers (on the device "meta"), for what there is to know of it and what reads texts and masks."""

    model: DALLETransformer

    @abstractmethod
    def served(self, name: str, settings: Settings, metrics: Metrics) -> ServedGenerator:
        """What requests talk to; inside the event loop that will use it."""


class ServedGenerator(ABC):
    """What requests talk to: one model's pictures, wherever they are drawn. size: pixels of their sides."""

    def __init__(self, name: str, model: DALLETransformer) -> None:
        self.name, self.model = name, model
        self.size = model.preprocess.size

    @property
    @abstractmethod
    def depth(self) -> int:
        """Pictures that are admitted and not drawn; from any thread."""

    @abstractmethod
    def draw(
        self,
        prompt: str,
        seeds: Sequence[int],
        sampling: Sampling,
        deadline: float,
        known: Sequence[Tensor | None] | None = None,
        style: str | None = None,
    ) -> AsyncGenerator[list[Drawing]]:
        """The pictures of a prompt, one a seed: yields them all whenever they have moved on, the last time whole.

        known: of each picture the tokens that are given, -1 where one is to be drawn. style: one of the model's.
        Stop iterating, or be cancelled, and nothing more is drawn. Raises BusyError, DeadlineError, ModelError.
        """

    @abstractmethod
    async def decoded(self, ids: Tensor) -> Tensor:
        """int64 (B, length) -> uint8 (B, 3, S, S)."""

    @abstractmethod
    async def tokens(self, pixels: Tensor) -> Tensor:
        """uint8 (3, S, S) -> its tokens, int64 (length,)."""

    @abstractmethod
    async def close(self) -> None:
        """Take no more, and tell whoever still waits."""

    def begun(
        self,
        prompt: str,
        seeds: Sequence[int],
        sampling: Sampling,
        known: Sequence[Tensor | None] | None,
        style: str | None,
    ) -> list[Drawing]:
        """A picture a seed, none of its tokens drawn."""
        length = self.model.image_length
        return [
            Drawing(prompt, seed, sampling, torch.zeros(length, dtype=torch.int64), given, style, flow_of(len(seeds)))
            for seed, given in zip(seeds, known or [None] * len(seeds), strict=True)
        ]

    async def pictures(self, drawings: Sequence[Drawing]) -> list[Tensor]:
        """uint8 (3, S, S) of each; what is not drawn yet looks like the last token that is."""
        rows = []
        for drawing in drawings:
            ids = drawing.ids.clone()
            ids[drawing.done :] = ids[max(0, drawing.done - 1)]
            rows.append(ids)
        return list(await self.decoded(torch.stack(rows)))


class LocalGenerator(ServedGenerator):
    """A generator of this process: a bounded queue before a decode loop, whose steps run on the worker's one thread.

    Who is in the queue, and who leaves it next, is a matter of fairness (app/fairness.py), not of arrival alone.
    """

    def __init__(
        self,
        name: str,
        model: DALLETransformer,
        settings: Settings,
        worker: Executor,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(name, model)
        self._step_seconds = (metrics or Metrics()).drawing.labels(name)
        self._tokenizer = ImageTokenizer(model.dvae)
        self._steps = DecodeLoop(model, settings.generate_lanes)
        self._queue_size = settings.generate_queue
        self._worker = worker
        self._admitted: list[Drawing] = []
        self._waiting: FairQueue[Drawing] = FairQueue()  # those of them that have no lane yet
        self._pace = 0.0  # seconds a step, of late; 0: not known yet
        self._early: list[float] = []
        self._moved = asyncio.Condition()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    @property
    def depth(self) -> int:
        """As ServedGenerator's, and so the others."""
        return sum(not drawing.whole for drawing in self._admitted)

    async def draw(
        self,
        prompt: str,
        seeds: Sequence[int],
        sampling: Sampling,
        deadline: float,
        known: Sequence[Tensor | None] | None = None,
        style: str | None = None,
    ) -> AsyncGenerator[list[Drawing]]:
        if self._task.done():
            raise shutting_down()
        drawings = self.begun(prompt, seeds, sampling, known, style)
        self._check_room(drawings, deadline)
        span = tracing.begin("draw", model=self.name, pictures=len(seeds))
        self._admitted += drawings
        for drawing in drawings:
            self._waiting.push(drawing.flow, drawing)
        self._wake.set()
        try:
            before = _progress(drawings)
            while not all(drawing.whole for drawing in drawings):
                try:
                    async with asyncio.timeout_at(deadline), self._moved:
                        await self._moved.wait_for(partial(_moved_on, drawings, before))
                except TimeoutError:
                    raise late("drawn") from None
                before = _progress(drawings)
                if error := next((drawing.error for drawing in drawings if drawing.error), None):
                    raise error
                yield drawings
        finally:
            span.end()
            for drawing in drawings:
                drawing.cancelled = not drawing.whole
                self._admitted.remove(drawing)

    def _check_room(self, drawings: Sequence[Drawing], deadline: float) -> None:
        """Raise BusyError where all places are taken, or the caller has most of them, or those before would take until
        after `deadline`. One call may overshoot the bound by its own size, which the request's n bounds in turn."""
        flow = drawings[0].flow
        callers: Counter[str] = Counter()
        left: Counter[Flow] = Counter()
        for other in self._admitted:
            if not other.whole:
                callers[other.flow.caller] += 1
                left[other.flow] += other.left
        work = work_until_done(left, flow, sum(drawing.left for drawing in drawings))
        # A picture's tokens come one after the other, however many lanes are free.
        seconds = self._pace * max(len(drawings[0].ids), work / self._steps.lanes)
        spare = deadline - self._loop.time() - seconds
        # Whoever is alone is let in, so that a slow start is forgotten.
        if not has_room(callers, flow.caller, self._queue_size) or (left and spare < 0):
            raise too_busy(f"{callers.total()} pictures", callers[flow.caller], seconds, spare)

    async def decoded(self, ids: Tensor) -> Tensor:
        there = ids.to(self.model.image_embedding.weight.device)
        return (await self._loop.run_in_executor(self._worker, self._tokenizer.decode, there)).cpu()

    async def tokens(self, pixels: Tensor) -> Tensor:
        batch = pixels[None].to(self.model.image_embedding.weight.device)
        return (await self._loop.run_in_executor(self._worker, self._tokenizer.encode, batch))[0].cpu()

    async def close(self) -> None:
        """Stop, and tell whoever still waits. Call after the last request was answered."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        for drawing in self._admitted:
            if not drawing.whole:
                drawing.error = shutting_down()
        async with self._moved:
            self._moved.notify_all()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            joining = self._next()
            try:
                self._note(await self._loop.run_in_executor(self._worker, self._work, joining))
            except Exception as error:
                log.exception("a step of the decode loop failed")
                failure = ModelError("the model failed while this picture was drawn")
                failure.__cause__ = error
                for drawing in (*joining, *self._steps.drawings):
                    drawing.error = failure
            async with self._moved:
                self._moved.notify_all()
            if not self._waiting and not self._steps.drawings:
                self._wake.clear()

    def _next(self) -> list[Drawing]:
        """Those whose turn it is, as far as there are lanes."""
        joining: list[Drawing] = []
        free = self._steps.free
        while self._waiting and (self._waiting.first.cancelled or self._waiting.first.lanes <= free):
            drawing = self._waiting.pop()
            if not drawing.cancelled:
                joining.append(drawing)
                free -= drawing.lanes
        return joining

    def _note(self, seconds: float) -> None:
        if not seconds:  # nothing was drawn
            return
        if len(self._early) < _KNOWN:
            self._early.append(seconds)
            if len(self._early) == _KNOWN:
                self._pace = sum(self._early) / _KNOWN
        else:
            self._pace += (seconds - self._pace) * _MEMORY

    def _work(self, joining: Sequence[Drawing]) -> float:
        """One step, in the worker thread, that others join. -> its seconds, 0 if there was nothing to draw."""
        for drawing in joining:
            try:
                self._steps.join(drawing)
            except Exception as error:
                log.exception("a prompt could not be read")
                drawing.error = ModelError("the model failed for this prompt")
                drawing.error.__cause__ = error
        drawn, began = bool(self._steps.drawings), time.perf_counter()
        with self._step_seconds.time():
            self._steps.step()
        return time.perf_counter() - began if drawn else 0.0


def _moved_on(drawings: Sequence[Drawing], before: Any) -> bool:
    return bool(_progress(drawings) != before)


def _progress(drawings: Sequence[Drawing]) -> Any:
    """Something that changes whenever one of the drawings moves on or fails."""
    return [(drawing.done, drawing.error is None) for drawing in drawings]
