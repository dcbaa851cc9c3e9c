"""A collection's way from one model to another while it serves: a second is filled beside it, then takes its place.

What was made of items that were deleted or replaced in the meantime is made again, until both hold the same; the
exchange is one commit. A run that was interrupted or failed leaves what it made, and the next one goes on from there;
items that cannot be embedded fail it when all others have been.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from app.collection import Collection, Item, NewItem, kept_picture
from app.engine import ServedEngine
from app.fairness import CALLER
from models.errors import (
    BusyError,
    ConflictError,
    DeadlineError,
    InputError,
    ModelError,
    SemblanceError,
    StorageError,
)

if TYPE_CHECKING:
    from app.service import Service

log = logging.getLogger(__name__)

T = TypeVar("T")
_Embed = Callable[[Sequence[Item], float], Awaitable[Any]]  # (B items, a deadline) -> (B, D)
_PART = 32  # items embedded at once
_PATIENCE = 600.0  # seconds that a part may wait for its embeddings
_BAD = 100  # items that cannot be embedded, until it is no use to look for more
_SHOWN = 10  # of them that the error names
_BRIEF, _CHASES = 1.0, 5  # after so many passes of fewer seconds each, writes wait for the next
_HELD = 5.0  # seconds that a write waits at most


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
        self._writable = asyncio.Event()
        self._writable.set()

    def start(self) -> None:
        """Begin; the progress tells the rest."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End it where it is, if it has not ended."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def writable(self) -> None:
        """Until the collection may be written to: what is written to again and again would never be the same in both,
        so near the end of a run writes have to wait a little."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_HELD):
                await self._writable.wait()

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
        finally:
            self._writable.set()

    async def _fill_and_switch(self) -> None:
        store, collections = self._whole, self._service.collections
        engine = self._served.engine
        staged: Collection = await store(
            partial(collections.stage, self._name, engine.name, engine.fingerprint, engine.embed_dim)
        )
        chases = 0
        while True:
            after, moved, began = "", False, time.monotonic()
            bad: dict[str, str] = {}
            while len(bad) < _BAD and (items := await store(collections.lacking, self._name, after, _PART)):
                if made := await self._made(items, bad):
                    await store(staged.add, made)
                after, moved = items[-1].id, moved or bool(made)
                self.progress.done = (await store(staged.info)).count
            if bad and (not moved or len(bad) >= _BAD):
                raise ConflictError(_unmade(bad))
            if not moved and await store(collections.switch, self._name):
                return
            chases = chases + 1 if time.monotonic() - began < _BRIEF else 0
            if chases % (2 * _CHASES) < _CHASES:  # others may write, too: servers of the same database
                self._writable.set()
            else:
                self._writable.clear()

    async def _whole(self, call: Callable[..., T], *args: Any) -> T:
        """A call of the store, to its end even if the run is stopped: what it made would outlive what was deleted."""
        made = asyncio.ensure_future(self._service.store(call, *args))
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            await asyncio.wait([made])
            made.exception()  # nobody else asks, which would be logged
            raise

    async def _made(self, items: Sequence[Item], bad: dict[str, str]) -> list[NewItem]:
        """The same items with the other model's vectors; without those that were deleted or replaced since, and those
        that cannot be embedded, which `bad` is told of."""
        old = await self._service.collection(self._name)
        pictures: dict[str, bytes] = {}
        for item in items:
            if item.picture is not None:
                try:
                    content = await self._service.store(kept_picture, old, item)
                except StorageError as error:
                    bad[item.id] = str(error)
                else:
                    pictures |= {} if content is None else {item.id: content}
            elif item.kind == "image":
                bad[item.id] = "it came with its embedding alone"

        async def of_pictures(shown: Sequence[Item], deadline: float) -> Any:
            openers = [self._service.opener(pictures[item.id], index) for index, item in enumerate(shown)]
            return await self._served.embed_images(openers, deadline)

        async def of_texts(written: Sequence[Item], deadline: float) -> Any:
            rows, _ = await self._served.embed_texts([item.caption or "" for item in written], deadline)
            return rows

        vectors = await self._vectors([item for item in items if item.id in pictures], of_pictures, bad)
        vectors |= await self._vectors([item for item in items if item.kind == "text"], of_texts, bad)
        kept = {item.id: item.place or pictures.get(item.id) for item in items}
        return [
            NewItem(item.kind, vectors[item.id], item.id, item.caption, item.metadata, kept[item.id])
            for item in items
            if item.id in vectors
        ]

    async def _vectors(self, items: Sequence[Item], embed: _Embed, bad: dict[str, str]) -> dict[str, Any]:
        """What `embed` makes of each item by its id; where it fails, of each alone."""
        try:
            rows = await self._patiently(partial(embed, items))
            return dict(zip([item.id for item in items], rows, strict=True))
        except (InputError, ModelError) as error:
            if len(items) == 1:
                bad[items[0].id] = str(error)
                return {}
        found: dict[str, Any] = {}
        for item in items:
            found |= await self._vectors([item], embed, bad)
        return found

    async def _patiently(self, embed: Callable[[float], Any]) -> Any:
        """What `embed` gives; a queue that is full is waited for."""
        while True:
            try:
                return await embed(self._service.deadline(_PATIENCE))
            except (BusyError, DeadlineError) as error:
                await asyncio.sleep(getattr(error, "retry_after", None) or 1)


def _unmade(bad: dict[str, str]) -> str:
    shown = "; ".join(f"{id!r}: {why}" for id, why in list(bad.items())[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return (
        f"items that cannot be embedded again: {shown}{more}. Put their pictures back, or delete or replace them, and "
        "begin again: what was made of the others is kept"
    )
