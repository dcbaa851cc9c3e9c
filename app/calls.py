"""Requests to a server: their JSON or their events, whether it is busy, and what it said where it refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from models.errors import InputError, SemblanceError

T = TypeVar("T")
BATCH, BATCH_BYTES = 16, 6_000_000  # inputs and bytes of one request, at most
PATIENCE = 60  # times that a busy server is asked again
CLOSED = "the client is closed"
IN_FLIGHT = 4  # requests at once: some decode while others are embedded
# Requests that change nothing, which therefore may be sent again.
_PURE = {"/embed", "/zero-shot", "/search", "/similarity", "/rank", "/generate"}
_PLACE = re.compile(r"^input \d+: |\bitems\.\d+\.")  # where the server says that it is in the request
_LOST = 3  # connections in a row that end without an answer, until there is no server


class AnswerError(SemblanceError):
    """The server refused; the text is its problem's detail. status and input are the problem's."""

    def __init__(self, message: str, status: int, input: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.input = input

    @property
    def of_item(self) -> str:
        """What it says of an item, without the item's place in the request."""
        return _PLACE.sub("", str(self))


def collection_url(name: str) -> str:
    """Where a collection of any name is, so that what is no name is refused as one."""
    return f"/collections/{quote(name, safe='')}"


def bearer(key: str | None) -> dict[str, str]:
    """The header that brings a key. Raises InputError for one that no header can hold."""
    if key and not (key.isascii() and key.isprintable()):
        raise InputError("the API key has a character that no key has: only printable ASCII can be sent")
    return {"Authorization": f"Bearer {key}"} if key else {}


async def events(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], *, patience: int = PATIENCE
) -> AsyncGenerator[dict[str, Any]]:
    """The server-sent events that answer a POST. Waits and raises as `call` does, and AnswerError for an error among
    them."""
    answer = await _answer(client, "POST", url, patience, stream=True, json=body)
    try:
        async with aclosing(answer):
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    content: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if error := content.get("error"):
                        raise AnswerError(error["detail"], error["status"])
                    yield content
    except httpx.TransportError as error:
        raise _unreachable(client, error) from error


async def call(client: httpx.AsyncClient, method: str, url: str, *, patience: int = PATIENCE, **options: Any) -> Any:
    """One request and its JSON. Waits and raises as `content_of` does."""
    content = await content_of(client, method, url, patience=patience, **options)
    return json.loads(content) if content else None


async def content_of(
    client: httpx.AsyncClient, method: str, url: str, *, patience: int = PATIENCE, **options: Any
) -> bytes:
    """One request and what answers it; waits and tries again while the server is busy, `patience` times at most, and
    where the connection ended without a whole answer to what may be asked twice: a server behind a proxy has gone,
    another is there.

    Raises AnswerError with what the server said, or that it could not be reached.
    """
    return (await _answer(client, method, url, patience, **options)).content


def packed(
    items: Iterable[T], size: Callable[[T], int], kind: Callable[[T], Any] = lambda item: None
) -> Iterator[list[T]]:
    """Items as requests hold them: so many and so many bytes at most, one at least, and all of one kind."""
    batch: list[T] = []
    held = 0
    for item in items:
        length = size(item)
        if batch and (len(batch) == BATCH or held + length > BATCH_BYTES or kind(item) != kind(batch[0])):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += length
    if batch:
        yield batch


async def send_sound(
    batch: list[T],
    send: Callable[[list[T]], Awaitable[None]],
    refused: Callable[[T, AnswerError], Awaitable[None]],
    singly: Collection[int] = (400, 413, 415, 422),
) -> int:
    """Send a batch without the items that the server refuses; `refused` is told of each, and why. -> how many were
    taken. singly: statuses that may be due to some items alone, also where the answer does not say to which. Raises
    AnswerError for what no single item is at fault for."""
    parts, taken = [list(batch)], 0
    while parts:
        if not (part := parts.pop()):
            continue
        try:
            await send(part)
            taken += len(part)
        except AnswerError as error:
            if error.input is None and error.status not in singly:
                raise
            if error.input is None and len(part) > 1:  # one by one, for the answer does not say which it was
                parts += [[item] for item in reversed(part)]
                continue
            await refused(part.pop(error.input or 0), error)
            parts.append(part)
    return taken


async def send_all(batches: Iterator[T], send: Callable[[T], Coroutine[Any, Any, None]]) -> None:
    """Send every batch, several at once; the next one is made in a thread meanwhile, for it reads files. The first
    error ends them all."""
    pending: set[asyncio.Task[None]] = set()
    done: set[asyncio.Task[None]] = set()
    try:
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            pending.add(asyncio.create_task(send(batch)))
            if len(pending) == IN_FLIGHT:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        await asyncio.gather(*pending)
    finally:
        for task in pending:
            task.cancel()
        # Where a server goes, all end with an error: one is raised, and asyncio prints what nobody has asked for.
        await asyncio.gather(*pending, *done, return_exceptions=True)


async def _answer(
    client: httpx.AsyncClient, method: str, url: str, patience: int, stream: bool = False, **options: Any
) -> httpx.Response:
    """A good answer, within the client's time for a read; the body of a stream is yet to be read."""
    if client.is_closed:
        raise AnswerError(CLOSED, 0)
    lost = 0
    for attempt in range(patience + 1):
        try:
            async with asyncio.timeout(client.timeout.read):  # httpx's own begins again at every byte
                answer = await client.send(client.build_request(method, url, **options), stream=stream)
                if answer.is_success:
                    return answer
                await answer.aread()
        except (httpx.TransportError, TimeoutError) as error:
            lost += 1
            ended = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
            if lost > min(_LOST, patience) or not ended or (method == "POST" and url not in _PURE):
                raise _unreachable(client, error) from error
            await asyncio.sleep(0.1 * lost)
            continue
        lost = 0
        if answer.status_code not in (429, 503) or attempt == patience:
            break
        await asyncio.sleep(_pause(answer))
    raise _refused(answer)


def _pause(answer: httpx.Response) -> float:
    """Seconds that a busy server asks to wait, a proxy perhaps with a date in their place."""
    try:
        return min(30.0, max(0.0, float(answer.headers.get("retry-after", 1))))
    except ValueError:
        return 1.0


def _unreachable(client: httpx.AsyncClient, error: httpx.TransportError | TimeoutError) -> AnswerError:
    return AnswerError(f"{client.base_url} cannot be reached: {str(error) or type(error).__name__}", 0)


def _refused(answer: httpx.Response) -> AnswerError:
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    text = problem.get("detail") or f"the server answered {answer.status_code}"
    return AnswerError(text, answer.status_code, problem.get("input"))
