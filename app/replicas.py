"""Models in other processes: replicas, which Ray starts and finds, and what stands for them where requests come in.

A replica decodes, tokenises and batches by itself, so what travels is what the client sent, and the rows. All that it
is asked for changes nothing, so what was on its way to one that died is sent to another.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from app import logs, tracing
from app.backends import Array, Tower, single_threads
from app.batching import late
from app.engine import Description, LocalEngine, Opener, RemoteEngine, ServedEngine, TextRow
from app.fairness import CALLER
from app.generator import Drawing, LocalGenerator, RemoteGenerator, ServedGenerator
from app.loading import load_engine, load_generator, settle
from app.metrics import Metrics
from app.settings import Settings
from models.dalle import DALLETransformer
from models.errors import BusyError, ModelError, SemblanceError
from models.generation import Sampling
from models.retrieval import Scale

log = logging.getLogger("semblance")
T = TypeVar("T")

QUEUE_WAIT = "queue_wait_seconds"  # what an encoder tells Ray
_AGAIN = 4  # times that a call is sent again


class Call(NamedTuple):
    """What a replica is told beside its work. seconds: until the answer must be there. caller: whose turn it takes.
    fingerprint: of the model that the router takes it for."""

    seconds: float
    caller: str
    fingerprint: str


@dataclass
class Described:
    """A `Description` that travels."""

    name: str
    fingerprint: str
    embed_dim: int
    image_size: int
    takes_text: bool
    details: dict[str, Any]
    scale: Scale


class _Replica:
    """What replicas have in common. Errors of ours travel as answers: Ray would wrap what is raised."""

    def __init__(self, name: str, settings: Settings) -> None:
        logs.configure(settings.log)
        torch.set_num_threads(settings.thread_count)
        self._name, self._settings, self._metrics = name, settings, Metrics()
        self._worker = ThreadPoolExecutor(1, "model")  # one thread owns the device
        self._fingerprint = ""

    @contextmanager
    def _taking(self, call: Call) -> Iterator[float]:
        """The deadline of a call, in this loop's time. Raises ModelError where the router speaks of another model."""
        if call.fingerprint != self._fingerprint:
            raise ModelError(f"the hosts have different checkpoints of model {self._name!r}; give them the same")
        CALLER.set(call.caller)
        yield asyncio.get_running_loop().time() + call.seconds

    async def _answer(self, call: Call, work: Callable[[float], Awaitable[T]]) -> T | SemblanceError:
        try:
            with self._taking(call) as deadline:
                return await work(deadline)
        except SemblanceError as error:
            return error


class Encoder(_Replica):
    """A replica of a model that embeds, with the queue and the batches of `semblance serve`."""

    def __init__(self, name: str, reference: str, settings: Settings) -> None:
        super().__init__(name, settings)
        engine = load_engine(name, reference, settings)
        self._fingerprint = engine.fingerprint
        decoders = single_threads(settings.thread_count, "decode")
        self._served = LocalEngine(engine, settings, decoders, self._worker, self._metrics)
        self._waited = (0.0, 0.0)  # seconds, and by how many inputs, as told last
        settle()

    async def describe(self) -> Described:
        """What the router shows of the model."""
        engine = self._served.engine
        names = ("name", "fingerprint", "embed_dim", "image_size", "takes_text", "details", "scale")
        return Described(**{name: getattr(engine, name) for name in names})

    async def embed_images(self, call: Call, openers: Sequence[Opener]) -> Array | SemblanceError:
        """As ServedEngine's; a Semblance error is the answer."""
        return await self._answer(call, lambda deadline: self._served.embed_images(openers, deadline))

    async def encode_texts(self, call: Call, texts: Sequence[str]) -> list[TextRow] | SemblanceError:
        """As ServedEngine's; a Semblance error is the answer."""
        return await self._answer(call, lambda deadline: self._served.encode_texts(texts, deadline))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For QueueWait: seconds that an input waited in the queue, the mean since this was asked before."""
        (seconds, inputs), before = (self._sample("sum"), self._sample("count")), self._waited
        self._waited = seconds, inputs
        return {QUEUE_WAIT: (seconds - before[0]) / max(1.0, inputs - before[1])}

    def _sample(self, part: str) -> float:
        name, read = f"semblance_queue_wait_seconds_{part}", self._metrics.registry.get_sample_value
        return sum(read(name, {"model": self._name, "kind": kind}) or 0.0 for kind in ("image", "text"))


class Generator(_Replica):
    """A replica of a model that makes pictures, with the decode loop of `semblance serve`."""

    def __init__(self, name: str, reference: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self._model = load_generator(reference, settings)
        self._fingerprint = self._model.fingerprint
        self._served = LocalGenerator(name, self._model, settings, self._worker, self._metrics)
        settle()

    async def describe(self) -> DALLETransformer:
        """The model without its numbers."""
        numbers = {id(each): torch.nn.Parameter(each.to("meta"), False) for each in self._model.parameters()}
        numbers |= {id(each): each.to("meta") for each in self._model.buffers()}  # type: ignore[misc]
        return copy.deepcopy(self._model, numbers)

    async def draw(
        self,
        call: Call,
        prompt: str,
        seeds: Sequence[int],
        sampling: Sampling,
        known: Sequence[Tensor | None] | None,
        style: str | None,
    ) -> AsyncIterator[list[tuple[int, Tensor]] | SemblanceError]:
        """As ServedGenerator's: of each picture the tokens that are new, after how many; a Semblance error ends it."""
        told = [0] * len(seeds)
        try:
            with self._taking(call) as deadline:
                async with aclosing(self._served.draw(prompt, seeds, sampling, deadline, known, style)) as steps:
                    async for drawings in steps:
                        done = [each.done for each in drawings]  # once: the worker's thread draws on meanwhile
                        yield [
                            (start, each.ids[start:end].clone())
                            for start, end, each in zip(told, done, drawings, strict=True)
                        ]
                        told = done
        except SemblanceError as error:
            yield error

    async def decoded(self, call: Call, ids: Tensor) -> Tensor | SemblanceError:
        """As ServedGenerator's; a Semblance error is the answer."""
        return await self._answer(call, lambda deadline: self._served.decoded(ids))

    async def tokens(self, call: Call, pixels: Tensor) -> Tensor | SemblanceError:
        """As ServedGenerator's; a Semblance error is the answer."""
        return await self._answer(call, lambda deadline: self._served.tokens(pixels))


class _Replicas:
    """One model's replicas, as the router asks them. what: is done to an input, for errors. A call to one that is lost
    is sent to another, `_AGAIN` times at most; it may have been done twice, which changes nothing."""

    def __init__(self, handle: Any, name: str, fingerprint: str, what: str, metrics: Metrics) -> None:
        from ray import exceptions  # type: ignore[import-not-found,unused-ignore]
        from ray.serve.exceptions import (  # type: ignore[import-not-found,unused-ignore]
            BackPressureError,
            RequestCancelledError,
        )

        self._handle, self._streaming = handle, handle.options(stream=True)
        self._name, self._fingerprint, self._what = name, fingerprint, what
        self._resent = metrics.resent.labels(name)
        self._full = BackPressureError
        self._lost = (
            exceptions.RayActorError,  # died, or not to be reached
            exceptions.ObjectLostError,  # its answer died with its host
            exceptions.NodeDiedError,
            exceptions.WorkerCrashedError,
            RequestCancelledError,  # by one that stopped: for what we cancel ourselves nobody waits
        )

    async def ask(self, method: str, deadline: float, *arguments: Any) -> Any:
        """What a replica's method gives. Raises BusyError, DeadlineError, and the error that it gave."""
        left = _AGAIN
        while True:
            response = self._sent(self._handle, method, deadline, arguments)
            with self._waiting_for(response, left):
                async with asyncio.timeout_at(deadline):
                    answer = await response
                return _good(answer)
            left = await self._paused(left)

    async def stream(self, method: str, deadline: float, *arguments: Any) -> AsyncGenerator[Any]:
        """What a replica's method yields; from the beginning again where one was lost. Raises as `ask` does."""
        left = _AGAIN
        while True:
            response = self._sent(self._streaming, method, deadline, arguments)
            with self._waiting_for(response, left):
                while True:
                    async with asyncio.timeout_at(deadline):
                        answer = await anext(response, None)
                    if answer is None:
                        return
                    yield _good(answer)
            left = await self._paused(left)

    def _sent(self, handle: Any, method: str, deadline: float, arguments: Sequence[Any]) -> Any:
        call = Call(deadline - asyncio.get_running_loop().time(), CALLER.get(), self._fingerprint)
        return getattr(handle, method).remote(call, *arguments)

    @contextmanager
    def _waiting_for(self, response: Any, left: int) -> Iterator[None]:
        """Ray's errors in our words. Comes to its end where a replica was lost and there is a try left."""
        try:
            yield
        except TimeoutError:
            response.cancel()
            raise late(self._what) from None
        except self._full:
            raise BusyError(f"model {self._name!r} has no room for more; try again later") from None
        except self._lost as error:
            if not left:
                raise BusyError(f"the replicas of model {self._name!r} were lost", retry_after=5) from error
            log.warning("a replica of model %r was lost; what it had is sent to another", self._name)
            self._resent.inc()
        except (asyncio.CancelledError, GeneratorExit):  # nobody waits for it any more
            response.cancel()
            raise

    async def _paused(self, left: int) -> int:
        await asyncio.sleep(0.05 * 2 ** (_AGAIN - left))
        return left - 1


def _good(answer: Any) -> Any:
    if isinstance(answer, SemblanceError):
        raise answer
    return answer


class EngineOfReplicas(RemoteEngine):
    """A model that replicas embed with."""

    def __init__(self, handle: Any, description: Description) -> None:
        self._handle, self.description = handle, description

    def served(self, settings: Settings, metrics: Metrics) -> ServedEngine:
        """As RemoteEngine's."""
        return _ServedEngine(self._handle, self.description, settings, metrics)


class _ServedEngine(ServedEngine):
    def __init__(self, handle: Any, description: Description, settings: Settings, metrics: Metrics) -> None:
        super().__init__(description, settings, metrics)
        self._replicas = _Replicas(handle, description.name, description.fingerprint, "embedded", metrics)
        self._depths: dict[Tower, int] = {"image": 0, "text": 0}

    def depths(self) -> dict[Tower, int]:
        return dict(self._depths)

    async def embed_images(self, openers: Sequence[Opener], deadline: float) -> Array:
        return await self._ask("image", "embed_images", openers, deadline)

    async def encode_texts(self, texts: Sequence[str], deadline: float) -> list[TextRow]:
        return await self._ask("text", "encode_texts", texts, deadline)

    async def _ask(self, kind: Tower, method: str, inputs: Sequence[Any], deadline: float) -> Any:
        self._depths[kind] += len(inputs)
        try:
            with self._span(f"embed {kind}s", len(inputs)):
                return await self._replicas.ask(method, deadline, list(inputs))
        finally:
            self._depths[kind] -= len(inputs)

    async def close(self) -> None:
        """Nothing: replicas finish what they have."""


class GeneratorOfReplicas(RemoteGenerator):
    """A model that replicas draw with."""

    def __init__(self, handle: Any, model: DALLETransformer) -> None:
        self._handle, self.model = handle, model

    def served(self, name: str, settings: Settings, metrics: Metrics) -> ServedGenerator:
        """As RemoteGenerator's."""
        return _ServedGenerator(self._handle, name, self.model, settings, metrics)


class _ServedGenerator(ServedGenerator):
    def __init__(self, handle: Any, name: str, model: DALLETransformer, settings: Settings, metrics: Metrics) -> None:
        super().__init__(name, model)
        self._replicas = _Replicas(handle, name, model.fingerprint, "drawn", metrics)
        self._seconds = settings.generate_deadline
        self._depth = 0

    @property
    def depth(self) -> int:
        return self._depth

    async def draw(
        self,
        prompt: str,
        seeds: Sequence[int],
        sampling: Sampling,
        deadline: float,
        known: Sequence[Tensor | None] | None = None,
        style: str | None = None,
    ) -> AsyncGenerator[list[Drawing]]:
        drawings = self.begun(prompt, seeds, sampling, known, style)
        moves = self._replicas.stream("draw", deadline, prompt, list(seeds), sampling, known, style)
        self._depth += len(seeds)
        try:
            with tracing.span("draw", model=self.name, pictures=len(seeds)):
                async with aclosing(moves):
                    async for moved in moves:
                        for drawing, (start, ids) in zip(drawings, moved, strict=True):
                            drawing.ids[start : start + len(ids)] = ids
                            drawing.done = max(drawing.done, start + len(ids))
                        yield drawings
        finally:
            self._depth -= len(seeds)

    async def decoded(self, ids: Tensor) -> Tensor:
        return await self._replicas.ask("decoded", self._deadline(), ids)

    async def tokens(self, pixels: Tensor) -> Tensor:
        return await self._replicas.ask("tokens", self._deadline(), pixels)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._seconds

    async def close(self) -> None:
        """Nothing: replicas finish what they have."""
