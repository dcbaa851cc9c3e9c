"""The collection that a first start shows: scenes that lie beside the demo checkpoints, with their captions."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

from app.collections import Collections
from app.engine import Engine, RemoteEngine
from app.ingest import ingest
from app.main import create_app
from app.settings import Settings

SHARD = "scenes.tar.gz"  # made by `semblance-train scenes`


async def fill_demo(
    settings: Settings, engines: Mapping[str, Engine | RemoteEngine], collections: Collections
) -> int | None:
    """Fill the default collection unless it exists already. -> how many pictures it got, None if it was left alone.

    A fill that was interrupted is finished by the next start; what the user did to the collection since stays.
    """
    shard = settings.checkpoints / SHARD
    unfinished = settings.store / "demo-unfinished"
    name = settings.default_collection
    if not shard.is_file() or (name in collections.names() and not unfinished.exists()):
        return None
    settings.store.mkdir(parents=True, exist_ok=True)  # which a store elsewhere does not make
    unfinished.touch()
    app = create_app(settings, engines, collections)
    headers = {"Authorization": f"Bearer {settings.plain_keys[0]}"} if settings.api_keys else {}
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            report = await ingest(client, name, str(shard))
    unfinished.unlink()
    return report.added
