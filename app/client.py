"""The way to a server for the command line: one that runs, or the same application in this process."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from app.collections import Collections
from app.locking import lock_note
from app.settings import Settings
from models.errors import SemblanceError, StorageError

LOCAL = "http://127.0.0.1"


@asynccontextmanager
async def connect(settings: Settings, server: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `server`; without one, of the server that has the data folder open, else of an application in this
    process. All three speak the same API, so a command needs to know only that.

    Raises StorageError if the folder is held by a process that is no server.
    """
    headers = {}
    if key := os.environ.get("SEMBLANCE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif settings.api_keys:
        headers["Authorization"] = f"Bearer {settings.api_keys[0].get_secret_value()}"
    collections = None
    if server is None:
        try:
            collections = Collections(settings.store, picture_root=settings.picture_root)
        except StorageError:
            server = lock_note(settings.store)
            if not server.startswith("http"):
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


class AnswerError(SemblanceError):
    """The server refused; the text is its problem's detail. status and input are the problem's."""

    def __init__(self, message: str, status: int, input: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.input = input


async def events(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events that answer a POST. Raises AnswerError as `call` does, and for an error among them."""
    try:
        async with client.stream("POST", url, json=body) as answer:
            if not answer.is_success:
                await answer.aread()
                raise _refused(answer)
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    content: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if error := content.get("error"):
                        raise AnswerError(error["detail"], error["status"])
                    yield content
    except httpx.TransportError as error:
        raise _unreachable(client, error) from error


async def call(client: httpx.AsyncClient, method: str, url: str, *, patience: int = 60, **options: Any) -> Any:
    """One request and its JSON; waits and tries again while the server is busy, `patience` times at most.

    Raises AnswerError with what the server said, or that it could not be reached.
    """
    for attempt in range(patience + 1):
        try:
            answer = await client.request(method, url, **options)
        except httpx.TransportError as error:
            raise _unreachable(client, error) from error
        if answer.status_code not in (429, 503) or attempt == patience:
            break
        await asyncio.sleep(min(30.0, float(answer.headers.get("retry-after", 1))))
    if answer.is_success:
        return answer.json() if answer.content else None
    raise _refused(answer)


def _unreachable(client: httpx.AsyncClient, error: httpx.TransportError) -> AnswerError:
    return AnswerError(f"{client.base_url} cannot be reached: {error}", 0)


def _refused(answer: httpx.Response) -> AnswerError:
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    text = problem.get("detail") or f"the server answered {answer.status_code}"
    return AnswerError(text, answer.status_code, problem.get("input"))
