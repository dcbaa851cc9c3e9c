"""The way to a server for the command line: one that runs, or the same application in this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from app.calls import bearer
from app.locking import held, lock_note
from app.settings import Settings
from app.stores import open_collections
from models.errors import StorageError

LOCAL = "http://127.0.0.1"


@asynccontextmanager
async def connect(settings: Settings, server: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `server`; without one, of the server that has the data folder open, else of an application in this
    process. All three speak the same API, so a command needs to know only that.

    Raises StorageError if the folder is held by a process that is no server, InputError for a key that cannot be sent.
    """
    key = os.environ.get("SEMBLANCE_API_KEY")
    headers = bearer(settings.plain_keys[0] if not key and settings.api_keys else key)
    collections = None
    if server is None:
        try:
            collections = open_collections(settings)
        except StorageError:
            server = lock_note(settings.store)
            if not (server.startswith("http") and held(settings.store)):  # else it says who had the folder last
                raise
    if collections is None:
        async with httpx.AsyncClient(base_url=str(server), headers=headers, timeout=120) as client:
            yield client
        return
    from app.loading import load_engines, load_generators
    from app.main import create_app

    with collections:
        engines = await asyncio.to_thread(load_engines, settings)
        generators = await asyncio.to_thread(load_generators, settings)
        app = create_app(settings, engines, collections, generators)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=LOCAL, headers=headers, timeout=None) as client:
                yield client
