"""The models on their device, behind a few verbs; and the front that lets many requests share them."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from app.batching import Batcher, late
from app.settings import Settings
from models.dalle import DALLETransformer
from models.errors import BusyError, CheckpointError, InputError, ModelError
from models.retrieval import label_probabilities

Array = NDArray[np.float32]
# Gives an upright RGB picture whose shorter side is at least twice the argument, or all it has.
Opener = Callable[[int], Image.Image]


class Engine(Protocol):
    """A model on its device. Rows of embeddings are float32 and of unit length; calls block and are thread-safe."""

    name: str
    fingerprint: str
    embed_dim: int
    image_size: int
    takes_text: bool
    details: dict[str, Any]

    def prepare_image(self, image: Image.Image) -> Tensor: ...
    def prepare_texts(self, texts: Sequence[str]) -> list[Tensor]: ...
    def encode_images(self, rows: Sequence[Tensor]) -> Array: ...
    def encode_texts(self, rows: Sequence[Tensor]) -> Array: ...
    def embed_images(self, images: Sequence[Image.Image]) -> Array: ...
    def embed_texts(self, texts: Sequence[str]) -> Array: ...
    def label_probabilities(self, similarity: Array, *, multi_label: bool) -> Array: ...


class TorchEngine:
    """An `Engine` over any model of `models`; one forward runs at a time."""

    def __init__(self, name: str, model: Any, *, device: str = "auto", batch_size: int = 32) -> None:
        self.device = choose_device(device)
        self.name = name
        self.model = model.to(self.device).eval()
        self.fingerprint: str = model.fingerprint
        self.embed_dim: int = model.embed_dim
        self.image_size: int = model.preprocess.size
        self.takes_text: bool = model.tokenizer is not None
        self.details: dict[str, Any] = {"architecture": model.architecture, "provenance": model.provenance}
        self._batch_size = batch_size
        self._bf16 = _has_native_bf16(self.device)
        self._lock = threading.Lock()

    def prepare_image(self, image: Image.Image) -> Tensor:
        """RGB picture -> uint8 (3, S, S), by the checkpoint's own preprocess."""
        return self.model.preprocess(image)

    def prepare_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """B strings -> B rows of token ids, int64 (L,) each.

        Raises:
            InputError: the model encodes images only.
        """
        if not self.takes_text:
            raise InputError(f"model {self.name!r} encodes images only")
        return list(self.model.tokenizer(list(texts)))

    def encode_images(self, rows: Sequence[Tensor]) -> Array:
        """B of uint8 (3, S, S) -> (B, D). Raises BusyError when the device has no memory for them."""
        return self._forward(self.model.encode_image, torch.stack(list(rows)))

    def encode_texts(self, rows: Sequence[Tensor]) -> Array:
        """B rows of token ids of any lengths -> (B, D). Raises BusyError as encode_images does."""
        return self._forward(self.model.encode_text, torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True))

    def embed_images(self, images: Sequence[Image.Image]) -> Array:
        """RGB pictures -> (B, D). Raises ModelError, naming the picture, if a row is not finite."""
        return self._in_batches(self.encode_images, [self.prepare_image(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> Array:
        """Strings -> (B, D). Raises as embed_images and prepare_texts do."""
        return self._in_batches(self.encode_texts, self.prepare_texts(texts) if texts else [])

    def label_probabilities(self, similarity: Array, *, multi_label: bool) -> Array:
        """Cosines (B, C) -> probabilities (B, C) by the model's own scale."""
        return label_probabilities(self.model, torch.from_numpy(similarity), multi_label=multi_label).numpy()

    def _in_batches(self, encode: Callable[[Sequence[Tensor]], Array], rows: list[Tensor]) -> Array:
        starts = range(0, len(rows), self._batch_size)
        parts = [encode(rows[start : start + self._batch_size]) for start in starts]
        vectors = np.concatenate(parts) if parts else np.zeros((0, self.embed_dim), np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise ModelError(f"model {self.name!r} gave no finite numbers for input {bad[0]}")
        return vectors

    def _forward(self, encode: Callable[[Tensor], Tensor], batch: Tensor) -> Array:
        precision: AbstractContextManager[Any] = nullcontext()
        if self._bf16:
            precision = torch.autocast(self.device.type, torch.bfloat16)
        try:
            with self._lock, torch.inference_mode(), precision:
                rows = encode(batch.to(self.device, non_blocking=True)).float()
                rows = torch.nn.functional.normalize(rows, dim=-1).cpu()  # bfloat16 alone is 0.3 % off unit length
        except torch.OutOfMemoryError as error:
            # The batcher halves on any exception, so only a single input that does not fit ends here.
            raise BusyError("the device has no memory left for this input; try again shortly") from error
        return np.ascontiguousarray(rows.numpy())


class ServedEngine:
    """What requests talk to: decodes in a thread pool, batches on the worker thread, remembers texts."""

    def __init__(self, engine: Engine, settings: Settings, pool: Executor, worker: Executor) -> None:
        """pool: decodes and tokenises. worker: one thread, shared by every engine of a device."""
        self.engine = engine
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._images: Batcher[Tensor, Array] = self._batcher(engine.encode_images, settings, worker)
        self._texts: Batcher[Tensor, Array] = self._batcher(engine.encode_texts, settings, worker)
        self._cache: OrderedDict[str, asyncio.Future[tuple[Array, int]]] = OrderedDict()  # a text's row and tokens
        self._cache_size = settings.text_cache

    @staticmethod
    def _batcher(
        encode: Callable[[Sequence[Tensor]], Array], settings: Settings, worker: Executor
    ) -> Batcher[Tensor, Array]:
        return Batcher(
            lambda rows: _finite(encode(rows)),
            worker,
            max_batch=settings.batch_size,
            max_wait=settings.batch_wait_ms / 1000,
            queue_size=settings.queue_size,
        )

    async def embed_images(self, openers: Sequence[Opener], deadline: float) -> Array:
        """B pictures -> (B, D), each on its way to the device as soon as it is decoded.

        Raises:
            BusyError: the queue is full. DeadlineError: `deadline` (the loop's time) passed. ModelError: not finite.
            InputError: whatever an opener raises.
        """

        with self._images.admit(len(openers), deadline) as submit:

            async def embed(opener: Opener) -> Array:
                row = await self._loop.run_in_executor(self._pool, self._prepare, opener)
                return await submit(row)

            return self._stack(await _all_before(deadline, [embed(opener) for opener in openers]))

    async def embed_texts(self, texts: Sequence[str], deadline: float) -> tuple[Array, int]:
        """B strings -> (B, D) and the number of tokens they have. Raises as embed_images does.

        A text that another request is having embedded is waited for.
        """
        missing = {text: self._loop.create_future() for text in texts if text not in self._cache}
        self._cache.update(missing)
        known = {text: self._cache[text] for text in texts}
        for text in known:
            self._cache.move_to_end(text)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        if missing:
            try:
                await self._encode_texts(missing, deadline)
            except BaseException:
                for text, answer in missing.items():
                    answer.cancel()
                    if self._cache.get(text) is answer:
                        del self._cache[text]
                raise
        if others := [answer for answer in known.values() if not answer.done()]:
            await asyncio.wait(others, timeout=max(0.0, deadline - self._loop.time()))
            if not all(answer.done() for answer in others):
                raise late()
        if any(answer.cancelled() for answer in known.values()):  # who had it embedded has failed or left
            return await self.embed_texts(texts, deadline)
        found = [known[text].result() for text in texts]
        return self._stack([vector for vector, _ in found]), sum(tokens for _, tokens in found)

    async def _encode_texts(self, answers: Mapping[str, asyncio.Future[tuple[Array, int]]], deadline: float) -> None:
        with self._texts.admit(len(answers), deadline) as submit:
            rows = await self._loop.run_in_executor(self._pool, self.engine.prepare_texts, list(answers))
            vectors = await _all_before(deadline, [submit(row) for row in rows])
        for answer, row, vector in zip(answers.values(), rows, vectors, strict=True):
            answer.set_result((vector, int(torch.count_nonzero(row))))

    async def close(self) -> None:
        """Stop both batchers."""
        await self._images.close()
        await self._texts.close()

    def _prepare(self, opener: Opener) -> Tensor:
        return self.engine.prepare_image(opener(self.engine.image_size))

    def _stack(self, rows: Sequence[Array]) -> Array:
        return np.stack(rows) if rows else np.zeros((0, self.engine.embed_dim), np.float32)


def find_models(settings: Settings) -> dict[str, str]:
    """Name -> reference of every model the settings name: the list first, then the subfolders of `checkpoints`.

    Image tokenizers are passed over: they neither embed nor generate by themselves.

    Raises:
        CheckpointError: an entry of `models` is not `name=reference`.
    """
    found: dict[str, str] = {}
    for entry in settings.models:
        name, equals, reference = entry.partition("=")
        if not (name and equals and reference):
            raise CheckpointError(
                f"model {entry!r} must be name=reference, e.g. vit=open_clip:ViT-B-32/laion2b_s34b_b79k"
            )
        found[name] = reference
    for config in sorted(settings.checkpoints.glob("*/config.json")):
        if describe_checkpoint(str(config.parent)).get("architecture") != "dvae":
            found.setdefault(config.parent.name, str(config.parent))
    return found


def load_engine(name: str, reference: str, settings: Settings) -> TorchEngine:
    """One model that embeds, on its device. Raises CheckpointError if it cannot be loaded."""
    from models.checkpoint import load_model  # brings open_clip with it, which takes a second

    model = load_model(reference)
    if not hasattr(model, "encode_image"):
        raise CheckpointError(f"model {name!r} ({model.architecture}) embeds neither pictures nor texts; leave it out")
    return TorchEngine(name, model, device=settings.device, batch_size=settings.batch_size)


def load_engines(settings: Settings) -> Iterator[TorchEngine]:
    """Every model that embeds, one by one. Raises CheckpointError as find_models and load_engine do."""
    torch.set_num_threads(thread_count(settings))
    for name, reference in find_models(settings).items():
        if not _generates(reference):
            yield load_engine(name, reference, settings)


def load_generators(settings: Settings) -> dict[str, DALLETransformer]:
    """Every model that makes pictures, by name, on its device. Raises CheckpointError."""
    from models.checkpoint import load_checkpoint

    device = choose_device(settings.device)
    # On a CPU a row's logits in bfloat16 depend on how many others there are, and a seed's picture would with them.
    native = device.type == "cuda" and _has_native_bf16(device)
    bfloat16 = settings.generate_precision == "bf16" or (settings.generate_precision == "auto" and native)
    found = {}
    for name, reference in find_models(settings).items():
        if _generates(reference):
            model: DALLETransformer = load_checkpoint(reference).to(device)
            found[name] = model.cast(torch.bfloat16) if bfloat16 else model
    return found


def choose_device(name: str) -> torch.device:
    """ "auto": CUDA if there is any, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _generates(reference: str) -> bool:
    return describe_checkpoint(reference).get("architecture") == "dalle"


def in_order(engines: Sequence[Engine]) -> dict[str, Engine]:
    """By name, those that take text before the rest: the first that can do the work is a request's default."""
    return {engine.name: engine for engine in sorted(engines, key=lambda engine: not engine.takes_text)}


def describe_checkpoint(reference: str) -> dict[str, Any]:
    """What a checkpoint folder's config.json says, without loading its weights; empty for other references."""
    config = Path(reference) / "config.json"
    try:
        content = json.loads(config.read_text()) if config.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    return {key: content[key] for key in ("architecture", "provenance") if key in content}


def thread_count(settings: Settings) -> int:
    """The setting, or the cores this process may use."""
    if settings.threads:
        return settings.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32; a processor that only emulates it is a hundred times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(torch.cpu._is_avx512_bf16_supported())


def _finite(rows: Array) -> list[Array | Exception]:
    """(B, D) -> B rows, with an error in the place of each that is not all numbers."""
    return [
        row if np.isfinite(row).all() else ModelError("the model gave no finite numbers for this input") for row in rows
    ]


async def _all_before(deadline: float, work: Sequence[Any]) -> list[Array]:
    """Every result, in order. The first failure cancels the rest, and so does the deadline (DeadlineError)."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        async with asyncio.timeout_at(deadline):
            return await asyncio.gather(*tasks)
    except TimeoutError:
        raise late() from None
    finally:
        for task in tasks:
            task.cancel()
