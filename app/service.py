"""What every route works with: the engines, the collections and the settings of one running server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote
from weakref import WeakKeyDictionary

import numpy as np
import orjson
from fastapi import Depends, Request
from PIL import Image
from starlette.responses import Response
from torch import Tensor

from app import images, tracing
from app.backends import Array, single_threads
from app.collection import Collection, Item
from app.collections import Collections
from app.engine import Description, Engine, LocalEngine, Opener, RemoteEngine, ServedEngine
from app.fetching import Fetcher
from app.generator import LocalGenerator, RemoteGenerator, ServedGenerator
from app.inputs import Input, at_index, image_bytes, image_limits
from app.keys import Keyring
from app.metrics import Metrics
from app.nvjpeg import decoder_of
from app.plane import Unfolding
from app.reindex import Progress, Reindexing
from app.settings import Settings
from models.dalle import DALLETransformer
from models.errors import ConflictError, InputError, NotFoundError, StorageError

_LAST_WORDS = 0.9  # of the seconds to drain in: then whoever still waits is told
T = TypeVar("T")


class Embedded(NamedTuple):
    """Rows of unit length (N, D), and how many tokens the texts among the inputs had."""

    vectors: Array
    tokens: int


class Service:
    """Owns the threads and the batchers between `start` and `close`; the collections belong to the caller."""

    def __init__(
        self,
        settings: Settings,
        engines: Mapping[str, Engine | RemoteEngine],
        collections: Collections,
        generators: Mapping[str, DALLETransformer | RemoteGenerator],
        keys: Keyring,
    ) -> None:
        self.settings = settings
        self.keys = keys
        self.fetcher: Fetcher | None = None
        self.metrics = Metrics()
        self.metrics.watch(self)
        self._given, self._given_generators = dict(engines), dict(generators)
        self.engines: dict[str, Description] = {
            name: each.description if isinstance(each, RemoteEngine) else each for name, each in engines.items()
        }
        self.generators = {
            name: each.model if isinstance(each, RemoteGenerator) else each for name, each in generators.items()
        }
        self.collections = collections
        self._harmless = settings.model_copy(
            update={"api_keys": (), "database": None}
        )  # what may go to other processes
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self._served: dict[str, ServedEngine] = {}
        self._generators: dict[str, ServedGenerator] = {}
        self._pools: list[ThreadPoolExecutor] = []
        self._reindexing: dict[str, Reindexing] = {}
        self._unfoldings: WeakKeyDictionary[Collection, Unfolding] = WeakKeyDictionary()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.state == "ready"

    def start(self) -> None:
        """Make the threads and the batchers; inside the event loop that will use them."""
        self._loop = asyncio.get_running_loop()
        self._decoders = single_threads(self.settings.thread_count, "decode")
        self._storers = ThreadPoolExecutor(4, "store")
        self._lookers = ThreadPoolExecutor(2, "look")
        worker = ThreadPoolExecutor(1, "model")  # one thread owns the device
        self._pools = [self._decoders, self._storers, self._lookers, worker]
        self._served = {
            name: each.served(self.settings, self.metrics)
            if isinstance(each, RemoteEngine)
            else LocalEngine(each, self.settings, self._decoders, worker, self.metrics)
            for name, each in self._given.items()
        }
        self._generators = {
            name: each.served(name, self.settings, self.metrics)
            if isinstance(each, RemoteGenerator)
            else LocalGenerator(name, each, self.settings, worker, self.metrics)
            for name, each in self._given_generators.items()
        }
        if self.settings.fetch_hosts:
            self.fetcher = Fetcher(self.settings.fetch_hosts, self.settings.max_body, self.settings.fetch_seconds)
        self.state = "ready"

    def drain(self) -> None:
        """Take no more requests, and answer those that still wait when `drain_seconds` are nearly over; from a signal's
        handler in the event loop's thread."""
        if self.state != "ready":
            return
        self.state = "draining"
        late = _LAST_WORDS * self.settings.drain_seconds
        self._loop.call_soon_threadsafe(self._loop.call_later, late, self._begin_stopping)

    def _begin_stopping(self) -> None:
        # Kept, for a task that nobody holds may be collected before it is done.
        self._stopping = self._loop.create_task(self._stop_models())

    async def _stop_models(self) -> None:
        for served in self._served.values():
            await served.close()
        for generator in self._generators.values():
            await generator.close()

    async def close(self) -> None:
        """Take no more requests and stop the threads, after what they have begun."""
        self.state = "draining"
        runs: list[Reindexing | Unfolding] = [*self._reindexing.values(), *self._unfoldings.values()]
        for run in runs:
            await run.stop()
        await self._stop_models()
        if self.fetcher is not None:
            await self.fetcher.close()
        for pool in self._pools:
            await asyncio.to_thread(pool.shutdown)

    def queue_depths(self) -> dict[tuple[str, str], int]:
        """What is admitted and not answered, by model and kind."""
        embedding = {(n, kind): count for n, each in self._served.items() for kind, count in each.depths().items()}
        return embedding | {(n, "drawing"): each.depth for n, each in self._generators.items()}

    def engine(self, name: str | None, *, text: bool = False) -> ServedEngine:
        """The named engine, or the first that can do the work.

        Raises:
            NotFoundError: no engine of that name. InputError: it is to take text and does not.
        """
        able = [key for key, engine in self.engines.items() if engine.takes_text or not text]
        if name is None:
            if not able:
                raise NotFoundError("no model that takes text is loaded" if text else "no model is loaded")
            return self._served[able[0]]
        if name in self._generators:
            raise InputError(f"model {name!r} draws pictures alone; models that embed: {', '.join(able) or 'none'}")
        if name not in self.engines:
            raise NotFoundError(f"no model {name!r}; loaded: {', '.join(self.engines) or 'none'}")
        if name not in able:
            raise InputError(f"model {name!r} encodes images only; models that take text: {', '.join(able) or 'none'}")
        return self._served[name]

    def generator(self, name: str | None) -> ServedGenerator:
        """The named generator, or the first. Raises NotFoundError, naming what there is."""
        if not self._generators:
            raise NotFoundError("no model that generates pictures is loaded")
        chosen = next(iter(self._generators)) if name is None else name
        if chosen not in self._generators:
            raise NotFoundError(f"no model {chosen!r} generates pictures; those that do: {', '.join(self._generators)}")
        return self._generators[chosen]

    async def collection(self, name: str | None) -> Collection:
        """The named or the default collection. Raises NotFoundError."""
        wanted = self.settings.default_collection if name is None else name
        try:
            return self.collections.get(wanted)
        except NotFoundError:
            await self.store(self.collections.refresh)  # another server may just have made it
            return self.collections.get(wanted)

    def engine_of(self, collection: Collection) -> ServedEngine:
        """The engine whose vectors a collection holds. Raises ConflictError if it is not loaded."""
        for served in self._served.values():
            if served.engine.fingerprint == collection.fingerprint:
                return served
        made = f"collection {collection.name!r} was built with"
        if collection.model in self.engines:
            raise ConflictError(
                f"{made} another version of model {collection.model!r} than is loaded; load that version, or build the "
                "collection again"
            )
        loaded = ", ".join(self.engines) or "none"
        raise ConflictError(f"{made} model {collection.model!r}, which is not loaded (loaded: {loaded})")

    async def reindex(self, name: str, model: str) -> Progress:
        """Begin to make a collection again with another model; one that is that model's is done. Raises NotFoundError,
        or ConflictError if it is being made with yet another."""
        collection, served = await self.collection(name), self.engine(model)
        count = (await self.store(collection.info)).count
        if collection.fingerprint == served.engine.fingerprint:
            return Progress(served.engine.name, "done", count, count)
        running = self._reindexing.get(name)
        if running is not None and running.progress.state == "running":
            if running.progress.model != served.engine.name:
                raise ConflictError(
                    f"collection {name!r} is being made again with model {running.progress.model!r}; DELETE stops that"
                )
            return running.progress
        begun = self._reindexing[name] = Reindexing(self, name, served, count)
        begun.start()
        return begun.progress

    async def reindexing(self, name: str) -> Progress | None:
        """How far that is, how it ended, or what an earlier process left; None if there is nothing of it."""
        collection = await self.collection(name)
        if name in self._reindexing:
            return self._reindexing[name].progress
        staged = self.collections.staged(name)
        if staged is None:
            return None
        made, whole = await asyncio.gather(self.store(staged.info), self.store(collection.info))
        return Progress(staged.model, "interrupted", made.count, whole.count)

    async def writable(self, name: str) -> None:
        """Until a collection may be written to, which has to wait where another model's is about to take its place."""
        if (run := self._reindexing.get(name)) is not None:
            await run.writable()

    async def stop_reindexing(self, name: str) -> None:
        """End it and forget what was made. Raises NotFoundError."""
        await self.collection(name)
        if (run := self._reindexing.pop(name, None)) is not None:
            await run.stop()
        await self.store(self.collections.unstage, name)

    async def unfolding(self, name: str) -> Unfolding | None:
        """The run of UMAP over a collection as it is now; one made again has none. Raises NotFoundError."""
        return self._unfoldings.get(await self.collection(name))

    async def unfold(self, name: str, limit: int) -> Unfolding:
        """Begin to lay out at most `limit` items of a collection by UMAP; a run that is under way goes on."""
        collection = await self.collection(name)
        running = self._unfoldings.get(collection)
        if running is not None and running.state == "running":
            return running
        run = Unfolding(*await self.store(collection.sample, limit))
        run.start()
        self._unfoldings[collection] = run
        return run

    async def forget_unfolding(self, name: str) -> None:
        """End it and forget what was found. Raises NotFoundError for an unknown collection."""
        if (run := self._unfoldings.pop(await self.collection(name), None)) is not None:
            await run.stop()

    async def embed(self, engine: ServedEngine, inputs: Sequence[Input], deadline: float | None = None) -> Embedded:
        """Texts and pictures, in the order they came; an input lets go of its picture as soon as that is decoded.
        deadline: the settings' from now on, if none is given. Raises what ServedEngine does; errors name the input."""
        texts = [index for index, each in enumerate(inputs) if each.text is not None]
        pictures = [index for index, each in enumerate(inputs) if each.text is None]
        openers = [partial(_taken, self._harmless, inputs[index], index) for index in pictures]
        deadline = self.deadline() if deadline is None else deadline
        vectors = np.empty((len(inputs), engine.engine.embed_dim), np.float32)
        tokens = 0
        if pictures:
            vectors[pictures] = await engine.embed_images(openers, deadline)
        if texts:
            vectors[texts], tokens = await engine.embed_texts([inputs[index].text or "" for index in texts], deadline)
        return Embedded(vectors, tokens)

    def opener(self, value: str | bytes | Path, index: int) -> Opener:
        """Decodes one `image` value for a model when called, in a worker thread or another process; its errors carry
        `index`."""
        return partial(_pixels_of, self._harmless, value, index)

    def deadline(self, seconds: float | None = None) -> float:
        """When work that starts now must be done, in the event loop's time; by the settings' deadline or another."""
        return asyncio.get_running_loop().time() + (self.settings.deadline if seconds is None else seconds)

    async def store(self, call: Callable[..., T], *args: Any) -> T:
        """A blocking call of the store, in one of its threads."""
        with tracing.span("store"):
            return await asyncio.get_running_loop().run_in_executor(self._storers, call, *args)

    async def look(self, call: Callable[..., T], *args: Any) -> T:
        """A call that looks at a whole collection, in threads of their own: searches and writes need not wait."""
        return await asyncio.get_running_loop().run_in_executor(self._lookers, call, *args)

    async def in_collection(
        self,
        name: str,
        call: Callable[[Collection], T],
        *,
        writes: bool = False,
        by: Callable[..., Awaitable[Any]] | None = None,
    ) -> T:
        """A blocking call of a collection; again, if another model's had taken its place when it was done: then it may
        have found less than there is, or, if it `writes`, nothing. by: what runs it (default: `store`).

        Raises NotFoundError, and what the call does.
        """
        if writes:
            await self.writable(name)
        while True:
            collection = await self.collection(name)
            try:
                found: T = await (by or self.store)(call, collection)
                if writes or await self.collection(name) is collection:
                    return found
            except (NotFoundError, StorageError):  # the latter from a Milvus beside it
                await self.store(self.collections.refresh)  # another server may just have put it in its place
                if await self.collection(name) is collection:
                    raise

    async def decode(self, call: Callable[..., T], *args: Any) -> T:
        """A blocking call about pixels, in one of the decoding threads."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, call, *args)


def decoded(settings: Settings, value: str | bytes | Path, index: int, target: int) -> Image.Image:
    """Decodes one `image` value, as images.decode does; its errors carry `index`."""
    with at_index(index):
        return images.decode(image_bytes(value, settings), image_limits(settings), target)


def _pixels_of(settings: Settings, value: str | bytes | Path, index: int, target: int) -> Image.Image | Tensor:
    with at_index(index):
        return images.pixels(image_bytes(value, settings), image_limits(settings), target, decoder_of(settings))


def _taken(settings: Settings, holder: Input, index: int, target: int) -> Image.Image | Tensor:
    # Or hundreds that wait for a forward would hold their files beside the pixels.
    value, holder.image = holder.image, None
    return _pixels_of(settings, value or b"", index, target)


async def get_service(request: Request) -> Service:  # of FastAPI, what is not async costs a thread
    """The running server's service, as a dependency."""
    return request.app.state.service


Served = Annotated[Service, Depends(get_service)]


def describe_item(collection: str, item: Item) -> dict[str, Any]:
    """An item as every answer shows it."""
    url = f"/collections/{collection}/items/{quote(item.id, safe='')}/image" if item.picture else None
    return {"id": item.id, "kind": item.kind, "caption": item.caption, "url": url, "metadata": item.metadata}


def json_response(content: Any) -> Response:
    """JSON by orjson, which writes numpy rows without making a Python float of each number."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json")
