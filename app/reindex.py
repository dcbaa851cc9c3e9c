"""A collection's way from one model to another while it serves: a second is filled beside it, then takes its place.

What was made of items that were deleted or replaced in the meantime is made again, until both hold the same; the
exchange is one commit. A run that was interrupted leaves what it made, and the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from app.collection import Collection, Item, NewItem
from app.engine import ServedEngine
from app.fairness import CALLER
from models.errors import BusyError, ConflictError, DeadlineError, NotFoundError, SemblanceError, StorageError

if TYPE_CHECKING:
    from app.service import Service

log = logging.getLogger(__name__)

T = TypeVar("T")
_PART = 32  # items embedded at once
_PATIENCE = 600.0  # seconds that a part may wait for its embeddings


@dataclass
class Progress:
    """How far it is. done, total: items. error: what ended it."""

    model: str
    state: Literal["running", "done", "failed", "interrupted"]
    done: int
    total: int
    error: str | None = None


class Reindexing:
    """One run; `start` it inside the event loop."""

    def __init__(self, service: Service, name: str, served: ServedEngine, total: int) -> None:
        self._service, self._name, self._served = service, name, served
        self.progress = Progress(served.engine.name, "running", 0, total)

    def start(self) -> None:
        """Begin; the progress tells the rest."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End it where it is, if it has not ended."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        CALLER.set("reindexing")  # has its share of the batches, as any caller
        try:
            await self._fill_and_switch()
            self.progress.state = "done"
        except asyncio.CancelledError:
            self.progress.state = "interrupted"
            raise
        except SemblanceError as error:
            self.progress.state, self.progress.error = "failed", str(error)
        except Exception:
            log.exception("collection %r could not be made with another model", self._name)
            self.progress.state, self.progress.error = "failed", "it failed; the server's log has more"

    async def _fill_and_switch(self) -> None:
        store, collections = self._whole, self._service.collections
        engine = self._served.engine
        staged: Collection = await store(
            partial(collections.stage, self._name, engine.name, engine.fingerprint, engine.embed_dim)
        )
        while True:
            after, moved = "", False
            while items := await store(collections.lacking, self._name, after, _PART):
                await store(staged.add, await self._made(items))
                after, moved = items[-1].id, True
                self.progress.done = (await store(staged.info)).count
            if not moved and await store(collections.switch, self._name):
                return

    async def _whole(self, call: Callable[..., T], *args: Any) -> T:
        """A call of the store, to its end even if the run is stopped: what it made would outlive what was deleted."""
        made = asyncio.ensure_future(self._service.store(call, *args))
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            await asyncio.wait([made])
            raise

    async def _made(self, items: Sequence[Item]) -> list[NewItem]:
        """The same items with the other model's vectors; without those that were deleted or replaced since."""
        old = await self._service.collection(self._name)
        pictures: dict[str, bytes] = {}
        for item in items:
            if item.picture is not None:
                content = await self._service.store(_picture, old, item)
                if content is not None:
                    pictures[item.id] = content
            elif item.kind == "image":
                raise ConflictError(f"item {item.id!r} came with its embedding alone and cannot be embedded again")
        shown = [item for item in items if item.id in pictures]
        written = [item for item in items if item.kind == "text"]
        openers = [self._service.opener(pictures[item.id], index) for index, item in enumerate(shown)]
        texts = [item.caption or "" for item in written]
        of_pictures = await self._patiently(lambda deadline: self._served.embed_images(openers, deadline))
        of_texts, _ = await self._patiently(lambda deadline: self._served.embed_texts(texts, deadline))
        made = zip([*shown, *written], [*of_pictures, *of_texts], strict=True)
        vectors = {item.id: vector for item, vector in made}
        kept = {item.id: item.place or pictures.get(item.id) for item in items}
        return [
            NewItem(item.kind, vectors[item.id], item.id, item.caption, item.metadata, kept[item.id])
            for item in items
            if item.id in vectors
        ]

    async def _patiently(self, embed: Callable[[float], Any]) -> Any:
        """What `embed` gives; a queue that is full is waited for."""
        while True:
            try:
                return await embed(self._service.deadline(_PATIENCE))
            except (BusyError, DeadlineError) as error:
                await asyncio.sleep(getattr(error, "retry_after", None) or 1)


def _picture(collection: Collection, item: Item) -> bytes | None:
    """An item's picture; None if the item has been deleted or replaced since."""
    try:
        return collection.picture(item.id)
    except NotFoundError:
        with suppress(NotFoundError):
            if collection.get(item.id) == item:
                raise StorageError(
                    f"the picture of item {item.id!r} is not on the disk any more; put it back, or delete the item"
                ) from None
        return None
