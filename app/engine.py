"""The models on their device, behind a few verbs; and the front that lets many requests share them."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app import tracing
from app.backends import Array, Encode, Tower, choose_device, default_tower, example, lanes_of, towers_of, unit
from app.batching import Batcher, In, Lanes, Out, late
from app.fairness import flow_of
from app.metrics import Metrics
from app.settings import Backend, Settings
from models.errors import BusyError, DeadlineError, InputError, ModelError
from models.retrieval import Scale

# Gives an upright RGB picture whose shorter side is at least twice the argument, or all it has; or its pixels, uint8
# (3, H, W), on any device.
Opener = Callable[[int], Image.Image | Tensor]
_BATCH_TOKENS = 4096  # of one forward
_LABEL_SETS = 32  # remembered; one has a thousand rows at most


class Description(Protocol):
    """What there is to know of a model that embeds, wherever it runs."""

    name: str
    fingerprint: str
    embed_dim: int
    image_size: int
    takes_text: bool
    details: dict[str, Any]
    scale: Scale


class Engine(Description, Protocol):
    """A model on its device. Rows of embeddings are float32 and of unit length; calls block and are thread-safe.

    lanes: of the towers that compute several batches at once.
    """

    lanes: dict[Tower, Lanes]

    def prepare_image(self, image: Image.Image | Tensor) -> Tensor: ...
    def prepare_texts(self, texts: Sequence[str]) -> list[Tensor]: ...
    def encode_images(self, rows: Sequence[Tensor]) -> Array: ...
    def encode_texts(self, rows: Sequence[Tensor]) -> Array: ...
    def embed_images(self, images: Sequence[Image.Image]) -> Array: ...
    def embed_texts(self, texts: Sequence[str]) -> Array: ...


class ModelEngine:
    """An `Engine` over any model of `models`; a tower without lanes runs one forward at a time.

    towers: what computes each (app/exports.py), torch by default.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        device: str = "auto",
        batch_size: int = 32,
        towers: Mapping[Tower, tuple[Backend, Encode]] | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.name = name
        self.model = model.to(self.device).eval()
        self.fingerprint: str = model.fingerprint
        self.embed_dim: int = model.embed_dim
        self.image_size: int = model.preprocess.size
        self.takes_text: bool = model.tokenizer is not None
        self.details: dict[str, Any] = {"architecture": model.architecture, "provenance": model.provenance}
        self._towers = towers or {tower: default_tower(model, tower, self.device) for tower in towers_of(model)}
        self.scale = Scale.of(model)
        self.bytes = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
        self.details["backends"] = {tower: backend for tower, (backend, _) in self._towers.items()}
        self._batch_size = batch_size
        lanes = {tower: lanes_of(backend, self.device) for tower, (backend, _) in self._towers.items()}
        self.lanes = {tower: found for tower, found in lanes.items() if found}
        self._lock = threading.Lock()

    def prepare_image(self, image: Image.Image | Tensor) -> Tensor:
        """RGB picture or uint8 (3, H, W) -> uint8 (3, S, S), by the checkpoint's own preprocess."""
        return self.model.preprocess(image)

    def prepare_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """B strings -> B rows of token ids, int64 (L,) each, as long as the text is.

        Raises:
            InputError: the model encodes images only.
        """
        if not self.takes_text:
            raise InputError(f"model {self.name!r} encodes images only")
        tokens = self.model.tokenizer(list(texts))
        return [row[:length] for row, length in zip(tokens, self.model.text_lengths(tokens).tolist(), strict=True)]

    def encode_images(self, rows: Sequence[Tensor]) -> Array:
        """B of uint8 (3, S, S) -> (B, D). Raises BusyError when the device has no memory for them."""
        if len({row.device for row in rows}) > 1:  # some were decoded on the GPU
            rows = [row.to(self.device) for row in rows]
        return self._forward("image", torch.stack(list(rows)))

    def encode_texts(self, rows: Sequence[Tensor]) -> Array:
        """B rows of token ids of any lengths -> (B, D), like lengths together. Raises as encode_images does."""
        vectors = np.empty((len(rows), self.embed_dim), np.float32)
        for part in like_lengths([len(row) for row in rows]):
            batch = torch.nn.utils.rnn.pad_sequence([rows[place] for place in part], batch_first=True)
            vectors[part] = self._forward("text", batch)
        return vectors

    def embed_images(self, images: Sequence[Image.Image]) -> Array:
        """RGB pictures -> (B, D). Raises ModelError, naming the picture, if a row is not finite."""
        return self._in_batches(self.encode_images, [self.prepare_image(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> Array:
        """Strings -> (B, D). Raises as embed_images and prepare_texts do."""
        return self._in_batches(self.encode_texts, self.prepare_texts(texts) if texts else [])

    def warm_up(self) -> None:
        """Embed something with each tower: what a first forward costs once is paid before the first request.

        Batches are made as those of requests are: `torch-compiled` would compile again for what is no view, as it does
        for one row, for several and, of convolutions, for many.
        """
        for tower, (backend, _) in self._towers.items():
            for count in (1, 2, self._batch_size) if backend == "torch-compiled" else (1, 2):
                if tower == "image":
                    self.encode_images([example(self.model, tower)[0]] * count)
                else:
                    self.encode_texts((self.prepare_texts(["a photo of two things", "a"]) * count)[:count])

    def _in_batches(self, encode: Callable[[Sequence[Tensor]], Array], rows: list[Tensor]) -> Array:
        starts = range(0, len(rows), self._batch_size)
        parts = [encode(rows[start : start + self._batch_size]) for start in starts]
        vectors = np.concatenate(parts) if parts else np.zeros((0, self.embed_dim), np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise ModelError(f"model {self.name!r} gave no finite numbers for input {bad[0]}")
        return vectors

    def _forward(self, tower: Tower, batch: Tensor) -> Array:
        _, encode = self._towers[tower]
        try:
            with nullcontext() if tower in self.lanes else self._lock:
                rows = encode(batch)
        except torch.OutOfMemoryError as error:
            # The batcher halves on any exception, so only a single input that does not fit ends here.
            raise BusyError("the device has no memory left for this input; try again shortly") from error
        # bfloat16 alone is 0.3 % off unit length
        return unit(rows)


class TextRow(NamedTuple):
    """A text's embedding (D,), and how many tokens it has."""

    vector: Array
    tokens: int


class RemoteEngine(ABC):
    """A model that other processes embed with: given in the place of an Engine."""

    description: Description

    @abstractmethod
    def served(self, settings: Settings, metrics: Metrics) -> ServedEngine:
        """What requests talk to; inside the event loop that will use it."""


class ServedEngine(ABC):
    """What requests talk to: one model's embeddings, wherever they are made. Texts and label sets are remembered."""

    def __init__(self, engine: Description, settings: Settings, metrics: Metrics) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._cache: OrderedDict[str, asyncio.Future[TextRow]] = OrderedDict()
        self._slow: set[str] = set()  # texts that bulk work is having embedded, for which no short request waits
        self._cache_size = settings.text_cache
        self._label_sets: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], Array] = OrderedDict()

    @abstractmethod
    def depths(self) -> dict[Tower, int]:
        """Inputs of each kind that are admitted and not answered; from any thread."""

    @abstractmethod
    async def embed_images(self, openers: Sequence[Opener], deadline: float) -> Array:
        """B pictures -> (B, D), each on its way to the device as soon as it is decoded.

        Raises:
            BusyError: the queue is full. DeadlineError: `deadline` (the loop's time) passed. ModelError: not finite.
            InputError: whatever an opener raises.
        """

    @abstractmethod
    async def encode_texts(self, texts: Sequence[str], deadline: float) -> list[TextRow]:
        """B strings -> B rows, none of them remembered. Raises as embed_images does."""

    @abstractmethod
    async def close(self) -> None:
        """Take no more, and tell whoever still waits."""

    async def embed_texts(self, texts: Sequence[str], deadline: float) -> tuple[Array, int]:
        """B strings -> (B, D) and the number of tokens they have. Raises as embed_images does.

        A text that another request is having embedded is waited for, if that is not bulk work and this is short.
        """
        slow = frozenset() if flow_of(len(texts)).bulk else self._slow
        missing = {text: self._loop.create_future() for text in texts if text not in self._cache or text in slow}
        bulk = set(missing) if flow_of(len(missing)).bulk else set()
        self._slow = self._slow - missing.keys() | bulk
        self._metrics.cached(self.engine.name, "text", len(texts) - len(missing), len(missing))
        self._cache.update(missing)
        known = {text: self._cache[text] for text in texts}
        for text in known:
            self._cache.move_to_end(text)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        if missing:
            try:
                rows = await self.encode_texts(list(missing), deadline)
                for answer, row in zip(missing.values(), rows, strict=True):
                    answer.set_result(row)
            except BaseException:
                for text, answer in missing.items():
                    answer.cancel()
                    if self._cache.get(text) is answer:
                        del self._cache[text]
                raise
            finally:
                self._slow -= bulk
        if others := [answer for answer in known.values() if not answer.done()]:
            await asyncio.wait(others, timeout=max(0.0, deadline - self._loop.time()))
            if not all(answer.done() for answer in others):
                raise late()
        if any(answer.cancelled() for answer in known.values()):  # who had it embedded has failed or left
            return await self.embed_texts(texts, deadline)
        found = [known[text].result() for text in texts]
        return self._stack([row.vector for row in found]), sum(row.tokens for row in found)

    async def embed_labels(self, labels: Sequence[str], templates: Sequence[str], deadline: float) -> Array:
        """A unit row a label, the mean over the templates of its prompts: (C, D). Sets that are asked for again are
        remembered whole. Raises as embed_texts does."""
        key = (tuple(labels), tuple(templates))
        known = key in self._label_sets
        self._metrics.cached(self.engine.name, "labels", known, not known)
        if not known:
            prompts = [template.replace("{}", label) for label in labels for template in templates]
            texts, _ = await self.embed_texts(prompts, deadline)
            self._label_sets[key] = unit(texts.reshape(len(labels), len(templates), -1).mean(1))
        self._label_sets.move_to_end(key)
        found = self._label_sets[key]
        while len(self._label_sets) > _LABEL_SETS:
            self._label_sets.popitem(last=False)
        return found

    def _span(self, name: str, inputs: int) -> AbstractContextManager[Any]:
        return tracing.span(name, model=self.engine.name, inputs=inputs)

    def _stack(self, rows: Sequence[Array]) -> Array:
        return np.stack(rows) if rows else np.zeros((0, self.engine.embed_dim), np.float32)


class LocalEngine(ServedEngine):
    """An engine of this process: decodes in a thread pool, batches on the worker thread."""

    engine: Engine

    def __init__(
        self, engine: Engine, settings: Settings, pool: Executor, worker: Executor, metrics: Metrics | None = None
    ) -> None:
        """pool: decodes. worker: one thread, shared by every engine of a device that has no lanes."""
        super().__init__(engine, settings, metrics or Metrics())
        self._pool = pool
        self._images = self._batcher("image", self._image_rows, settings, worker)
        self._texts = self._batcher("text", self._text_rows, settings, worker)
        self._on_their_way: dict[bytes, asyncio.Future[Array]] = {}  # pictures that are being embedded, by their hash

    def depths(self) -> dict[Tower, int]:
        """As ServedEngine's, and so the others."""
        return {"image": self._images.depth, "text": self._texts.depth}

    def _batcher(
        self, kind: Tower, forward: Callable[[list[In]], list[Out | Exception]], settings: Settings, worker: Executor
    ) -> Batcher[In, Out]:
        return Batcher(
            forward,
            worker,
            max_batch=settings.batch_size,
            max_wait=settings.batch_wait_ms / 1000,
            queue_size=settings.queue_size,
            meter=self._metrics.batches(self.engine.name, kind),
            lanes=self.engine.lanes.get(kind),
        )

    async def embed_images(self, openers: Sequence[Opener], deadline: float) -> Array:
        with self._span("embed images", len(openers)), self._images.admit(len(openers), deadline) as places:

            async def embed(opener: Opener) -> Array:
                row, digest = await self._loop.run_in_executor(self._pool, self._prepare, opener)
                places.here()
                while (same := self._on_their_way.get(digest)) is not None:
                    await asyncio.wait([same])
                    # Else who had it embedded has left, or was late.
                    if not same.cancelled() and not isinstance(same.exception(), DeadlineError):
                        return same.result()
                answer = places.submit(row, here=True)
                if digest:
                    self._on_their_way[digest] = answer
                    answer.add_done_callback(lambda _: self._on_their_way.pop(digest))
                return await answer

            return self._stack(await _all_before(deadline, [embed(opener) for opener in openers]))

    async def encode_texts(self, texts: Sequence[str], deadline: float) -> list[TextRow]:
        with self._span("embed texts", len(texts)), self._texts.admit(len(texts), deadline) as places:
            return await _all_before(deadline, [places.submit(text) for text in texts])

    async def close(self) -> None:
        """Stop both batchers."""
        await self._images.close()
        await self._texts.close()

    def _prepare(self, opener: Opener) -> tuple[Tensor, bytes]:
        """A picture's row, and its hash, by which equal ones are embedded once; empty on a GPU, which must not wait."""
        began = time.perf_counter()
        row = self.engine.prepare_image(opener(self.engine.image_size))
        digest = sha256(row.contiguous().numpy().data).digest() if row.device.type == "cpu" else b""
        self._metrics.decode.labels(self.engine.name).observe(time.perf_counter() - began)
        return row, digest

    def _image_rows(self, pictures: list[Tensor]) -> list[Array | Exception]:
        return _finite(self.engine.encode_images(pictures))

    def _text_rows(self, texts: list[str]) -> list[TextRow | Exception]:
        """Tokenised here: to give each text to another thread for that took longer than the tokens."""
        tokens = self.engine.prepare_texts(texts)
        rows = _finite(self.engine.encode_texts(tokens))
        counts = [int(torch.count_nonzero(each)) for each in tokens]  # of what is no padding
        return [row if isinstance(row, Exception) else TextRow(row, n) for row, n in zip(rows, counts, strict=True)]


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Places of texts that are embedded together: none is padded to more than twice its length or 16 tokens, and no
    batch has more than so many tokens."""
    groups: dict[int, list[int]] = {}
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        groups.setdefault(max(4, (lengths[place] - 1).bit_length()), []).append(place)
    parts = []
    for bits, places in groups.items():
        size = max(1, _BATCH_TOKENS >> bits)
        parts += [places[start : start + size] for start in range(0, len(places), size)]
    return parts


def _finite(rows: Array) -> list[Array | Exception]:
    """(B, D) -> B rows, with an error in the place of each that is not all numbers."""
    return [
        row if np.isfinite(row).all() else ModelError("the model gave no finite numbers for this input") for row in rows
    ]


async def _all_before(deadline: float, work: Sequence[Awaitable[Out]]) -> list[Out]:
    """Every result, in order. The first failure cancels the rest, and so does the deadline (DeadlineError)."""
    waiting = [asyncio.ensure_future(each) for each in work]
    try:
        async with asyncio.timeout_at(deadline):
            return await asyncio.gather(*waiting)
    except TimeoutError:
        raise late() from None
    finally:
        for each in waiting:
            each.cancel()
