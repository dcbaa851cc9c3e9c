"""The models that the settings name: found, loaded, and held within a budget of memory."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from app import int8
from app.backends import FILES, Array, choose_device, has_native_bf16, in_bf16, in_passing, towers_of
from app.engine import Description, Engine, ModelEngine
from app.exports import choose
from app.nvjpeg import decoder_of
from app.settings import Settings
from models.dalle import DALLETransformer
from models.errors import CheckpointError, ModelError

log = logging.getLogger(__name__)
Described = TypeVar("Described", bound=Description)


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


@in_passing
def load_engine(name: str, reference: str, settings: Settings) -> ModelEngine:
    """One model that embeds, on its device, warm. Raises CheckpointError if it cannot be loaded."""
    from models.checkpoint import load_model  # brings open_clip with it, which takes a second

    decoder_of(settings)  # raises where it cannot be, before anything waits for it
    model = load_model(reference)
    if not hasattr(model, "encode_image"):
        raise CheckpointError(f"model {name!r} ({model.architecture}) embeds neither pictures nor texts; leave it out")
    device, threads = choose_device(settings.device), settings.thread_count
    model.to(device)
    towers = {tower: choose(name, model, tower, settings, device, threads) for tower in towers_of(model)}
    if has_native_bf16(device) and all(backend != "torch-fp32" for backend, _ in towers.values()):
        in_bf16(model)
    engine = ModelEngine(name, model, device=settings.device, batch_size=settings.batch_size, towers=towers)
    engine.warm_up()
    backends = {backend for backend, _ in towers.values()}
    if backends <= FILES.keys():  # what nothing computes with leaves the memory
        for parameter in int8.block_parameters(model) if "torch-int8" in backends else model.parameters():
            parameter.data = parameter.data.new_empty(0)
    return engine


def load_engines(settings: Settings) -> dict[str, Engine]:
    """Every model that embeds, by name, those that take text before the rest: the first that can do the work is a
    request's default. Raises CheckpointError as find_models and load_engine do.

    With `model_memory` each is loaded once, to see what it is and whether it is whole, and stays as long as there is
    room.
    """
    torch.set_num_threads(settings.thread_count)
    engines: list[Engine] = []
    shelf = Shelf(settings.model_memory)
    for name, reference in find_models(settings).items():
        if generates(reference):
            continue
        load = partial(load_engine, name, reference, settings)
        engines.append(ShelvedEngine(name, load, shelf) if settings.model_memory else load())
    return in_order(engines)


def in_order(engines: Sequence[Described]) -> dict[str, Described]:
    """By name, those that take text before the rest."""
    return {engine.name: engine for engine in sorted(engines, key=lambda engine: not engine.takes_text)}


def load_generators(settings: Settings) -> dict[str, DALLETransformer]:
    """Every model that makes pictures, by name, on its device. Raises CheckpointError."""
    found = find_models(settings).items()
    return {name: load_generator(reference, settings) for name, reference in found if generates(reference)}


@in_passing
def load_generator(reference: str, settings: Settings) -> DALLETransformer:
    """A model that makes pictures, on its device. Raises CheckpointError."""
    from models.checkpoint import load_checkpoint

    device = choose_device(settings.device)
    # On a CPU a row's logits in bfloat16 depend on how many others there are, and a seed's picture would with them.
    native = device.type == "cuda" and has_native_bf16(device)
    bfloat16 = settings.generate_precision == "bf16" or (settings.generate_precision == "auto" and native)
    model: DALLETransformer = load_checkpoint(reference).to(device)
    return model.cast(torch.bfloat16) if bfloat16 else model


def settle(seconds: float = 10.0) -> None:
    """Ready a process to serve for long. Python's collector of cycles passes over all that a start has made: with torch
    these are 400,000 objects, and took it a quarter of a second every few seconds, while everyone waited. And every so
    many `seconds` the C library gives back what it holds and nobody uses: in ten minutes of batches of every size that
    had become 400 MB."""
    gc.collect()
    gc.freeze()
    threading.Thread(target=_give_back, args=(seconds,), name="memory", daemon=True).start()


def _give_back(seconds: float) -> None:
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # GNU's alone keeps so much
    while give_back is not None:
        time.sleep(seconds)
        give_back(0)


class Shelf:
    """Loaded models, of so many bytes together; who was used least recently leaves. One alone may be larger."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._engines: OrderedDict[str, ModelEngine] = OrderedDict()  # the last one was used last
        self._lock = threading.Lock()  # of the dictionary
        self._loading = threading.Lock()  # one at a time, and whoever is there already need not wait

    def get(self, name: str, load: Callable[[], ModelEngine]) -> ModelEngine:
        """The engine, loaded if it is not there. Raises whatever `load` does."""
        if (engine := self._known(name)) is not None:
            return engine
        with self._loading:
            if (engine := self._known(name)) is None:
                engine = load()
                self._put(name, engine)
        return engine

    def _known(self, name: str) -> ModelEngine | None:
        with self._lock:
            if name in self._engines:
                self._engines.move_to_end(name)
            return self._engines.get(name)

    def _put(self, name: str, engine: ModelEngine) -> None:
        with self._lock:
            self._engines[name] = engine
            while len(self._engines) > 1 and sum(each.bytes for each in self._engines.values()) > self.budget:
                gone, _ = self._engines.popitem(last=False)
                log.info("model %r leaves the memory for %r", gone, name)


def _again(name: str, load: Callable[[], ModelEngine], fingerprint: str) -> ModelEngine:
    try:
        engine = load()
    except CheckpointError as error:
        log.exception("model %r cannot be loaded again", name)
        raise ModelError(f"model {name!r} cannot be loaded again; the server's log says why") from error
    if engine.fingerprint != fingerprint:  # its vectors would stand under the other's name
        raise ModelError(
            f"model {name!r} was {fingerprint} when the server started and is {engine.fingerprint} on the disk now; "
            "start the server again, or put the old one back"
        )
    return engine


class ShelvedEngine:
    """An `Engine` whose model may leave the memory; what uses it loads it again. Its description stays.

    Who has begun with a model keeps it until done, so for that long there may be one more than the budget allows.
    """

    def __init__(self, name: str, load: Callable[[], ModelEngine], shelf: Shelf) -> None:
        engine = shelf.get(name, load)
        self._get = partial(shelf.get, name, partial(_again, name, load, engine.fingerprint))
        self.name = name
        self.fingerprint, self.embed_dim, self.image_size = engine.fingerprint, engine.embed_dim, engine.image_size
        self.takes_text, self.details, self.scale = engine.takes_text, engine.details, engine.scale
        self.lanes = engine.lanes

    def prepare_image(self, image: Image.Image | Tensor) -> Tensor:
        """As ModelEngine's, and so the others."""
        return self._get().prepare_image(image)

    def prepare_texts(self, texts: Sequence[str]) -> list[Tensor]:
        return self._get().prepare_texts(texts)

    def encode_images(self, rows: Sequence[Tensor]) -> Array:
        return self._get().encode_images(rows)

    def encode_texts(self, rows: Sequence[Tensor]) -> Array:
        return self._get().encode_texts(rows)

    def embed_images(self, images: Sequence[Image.Image]) -> Array:
        return self._get().embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Array:
        return self._get().embed_texts(texts)


def generates(reference: str) -> bool:
    """Whether it is a model that makes pictures."""
    return describe_checkpoint(reference).get("architecture") == "dalle"


def describe_checkpoint(reference: str) -> dict[str, Any]:
    """What a checkpoint folder's config.json says, without loading its weights; empty for other references."""
    config = Path(reference) / "config.json"
    try:
        content = json.loads(config.read_text()) if config.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    return {key: content[key] for key in ("architecture", "provenance") if key in content}
