"""A client for Python: embeddings, search, classification and drawing by a server, with and without asyncio.

    with Client("http://localhost:8000") as client:
        vectors = client.encode(images=Path("photos").glob("*.jpg"))
        hits = client.search("two dogs on a beach", k=5)

Only `index`, which reads what `semblance index` reads, loads more than httpx, numpy and Pillow.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
import threading
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import CancelledError
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict, TypeVar, Unpack

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from app.calls import CLOSED, PATIENCE, AnswerError, bearer, call, events, packed, send_all, send_sound

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
Picture = str | Path | bytes | Image.Image
"""A file's path, its bytes, an http(s) or data: URL, or a picture."""


@dataclass(frozen=True)
class Hit:
    """An item that was found. score: cosine. url: of its picture, on the server; None for a text."""

    id: str
    score: float
    kind: Literal["image", "text"]
    caption: str | None
    url: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Classified:
    """The best label of a picture, its probability, and those of the others, best first."""

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """A picture of a prompt. png: its file. score: cosine of picture and prompt, if it was ranked. step of steps: how
    far it is; the same for a whole one. index: which of the n it is, on its way in order of seeds, whole best first."""

    png: bytes
    seed: int
    score: float | None
    index: int
    step: int
    steps: int

    @property
    def whole(self) -> bool:
        """Whether it is done."""
        return self.step == self.steps

    def image(self) -> Image.Image:
        """Decoded."""
        return Image.open(io.BytesIO(self.png))


class Drawing(TypedDict, total=False):
    """What POST /generate takes beside the prompt. seed: of the first of n; one is drawn where there is none. image:
    to start from, with a mask or a share of it to change."""

    n: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    guidance_scale: float
    rerank: bool
    style: str
    model: str
    image: Picture
    mask: Picture
    change: float


class AsyncClient:
    """A server from asyncio. Waits and tries again where it is busy (Retry-After), `patience` times for each request.

    base_url: where it listens. api_key: default SEMBLANCE_API_KEY. timeout: seconds of one request; of a drawing, until
    its next state. Every method raises AnswerError with what the server said, or that it could not be reached; `input`
    is the input's place in the call.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: int = PATIENCE,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = bearer(api_key or os.environ.get("SEMBLANCE_API_KEY"))
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=timeout, transport=transport)
        self._patience = patience

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """What is loaded, as GET /models describes it."""
        found: list[dict[str, Any]] = (await self._call("GET", "/models"))["data"]
        return found

    async def encode(
        self,
        *,
        images: Iterable[Picture] = (),
        texts: Iterable[str] = (),
        model: str | None = None,
        dimensions: int | None = None,
        bad: dict[int, str] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> NDArray[np.float32]:
        """Unit vectors (N, D) of the images, then of the texts. Any number: files are read as they are sent, several
        batches at a time. dimensions: the first so many, of a model that can. bad: takes the places of inputs that
        cannot be read, and why; their rows are NaN. Without it the first one raises, OSError for a file that is not
        there, ValueError for what no request can say. progress: told how many more are done."""
        options = _given(model=model, dimensions=dimensions) | {"encoding_format": "base64"}

        async def embed(inputs: list[dict[str, str]]) -> list[NDArray[np.float32]]:
            answer = await self._call("POST", "/embed", json=options | {"input": inputs})
            return [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in answer["data"]]

        found, count = await _batched(_inputs(images, texts), embed, progress, bad)
        width = len(next(iter(found.values()))) if found else dimensions or 0
        rows = np.full((count, width), np.nan, np.float32)
        for place, row in found.items():
            rows[place] = row
        return rows

    async def zero_shot(
        self,
        images: Iterable[Picture],
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        multi_label: bool = False,
        top_k: int | None = None,
        model: str | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Classified]:
        """Which of the labels each image shows, as POST /zero-shot tells."""
        options = _given(templates=templates and list(templates), top_k=top_k, model=model)
        options |= {"labels": list(labels), "multi_label": multi_label}

        async def classify(inputs: list[dict[str, str]]) -> list[Classified]:
            answer = await self._call("POST", "/zero-shot", json=options | {"input": inputs})
            return [
                Classified(each["label"], each["score"], {one["label"]: one["score"] for one in each["scores"]})
                for each in answer["data"]
            ]

        found, count = await _batched(_inputs(images, ()), classify, progress)
        return [found[place] for place in range(count)]

    async def search(
        self,
        text: str | None = None,
        *,
        image: Picture | None = None,
        mixed: Iterable[tuple[str | Picture | dict[str, str], float]] = (),
        k: int = 10,
        collection: str | None = None,
        target: Literal["image", "text", "any"] = "any",
        filters: Sequence[str | Mapping[str, Any]] = (),
        ids: Iterable[str] | None = None,
        group_by: str | None = None,
        min_score: float = -1.0,
        offset: int = 0,
    ) -> list[Hit]:
        """What a collection holds nearest to a text, an image, or both and more mixed into one: in `mixed` a str is a
        text, {"item": id} what the collection holds and anything else a picture, each with its weight; a negative one
        leads away. filters, ids and group_by: as POST /search has them. Best first."""
        query: list[dict[str, Any]] = [] if text is None else [{"text": text}]
        query += [] if image is None else [{"image": _image(image)}]
        query += [_part(each) | {"weight": weight} for each, weight in mixed]
        if not query:
            raise ValueError("search needs a text, an image or a mixture")
        options = _given(collection=collection, group_by=group_by, ids=None if ids is None else list(map(str, ids)))
        options |= {"query": query, "k": int(k), "target": target, "offset": int(offset)}
        options |= {"filter": list(filters), "min_score": min_score}
        answer = await self._call("POST", "/search", json=options)
        return [Hit(**each) for each in answer["hits"]]

    async def index(
        self,
        source: str | Path,
        collection: str = "default",
        *,
        model: str | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Any:
        """Put every picture of a folder, a caption table or a shard into a collection, which is made if need be, as
        `semblance index` does; those that are there are passed over. -> an app.ingest.Report."""
        from app.ingest import ingest

        return await ingest(
            self._http, collection, str(source), model=model, progress=progress, patience=self._patience
        )

    async def generate(self, prompt: str, **options: Unpack[Drawing]) -> list[Drawn]:
        """Pictures of a prompt, best first."""
        return [each async for each in self.drawing(prompt, partial_images=0, **options) if each.whole]

    async def drawing(
        self, prompt: str, *, partial_images: int = 8, **options: Unpack[Drawing]
    ) -> AsyncGenerator[Drawn]:
        """The same on their way: so many states of each picture, then the whole ones. Stop iterating, and the server
        stops drawing. With no prompt but an image that one is varied."""
        body = {"stream": True, "partial_images": partial_images, **_given(**options)}
        body |= {name: _image(body[name]) for name in ("image", "mask") if name in body}
        url = "/v1/images/variations"
        if prompt or "image" not in body:
            url, body["prompt"] = "/generate", prompt
        async with aclosing(events(self._http, url, body, patience=self._patience)) as stream:
            async for event in stream:
                steps = event["steps"] if "steps" in event else event["usage"]["output_tokens"] // options.get("n", 1)
                png = base64.b64decode(event["b64_json"])
                yield Drawn(png, event["seed"], event["score"], event["index"], event.get("step", steps), steps)

    async def _call(self, method: str, url: str, **options: Any) -> Any:
        return await call(self._http, method, url, patience=self._patience, **options)


def _waited(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The method of an AsyncClient for a Client."""

    def wait(self: Client, *arguments: P.args, **options: P.kwargs) -> T:
        return self._wait(method(self._client, *arguments, **options))

    return update_wrapper(wait, method)  # type: ignore[return-value]  # typeshed has the wrapper's own type for it


class Client:
    """AsyncClient without asyncio: the same methods, which wait. Threads may share one."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        """options: as AsyncClient takes them."""
        self._client = AsyncClient(base_url, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="semblance-client", daemon=True)
        self._thread.start()
        self._closed = False
        self._lock = threading.Lock()  # so that nothing begins on a loop that is about to stop

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections. Threads that wait for an answer get AnswerError, as later calls do."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            ended = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        try:
            ended.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    models = _waited(AsyncClient.models)
    encode = _waited(AsyncClient.encode)
    zero_shot = _waited(AsyncClient.zero_shot)
    search = _waited(AsyncClient.search)
    index = _waited(AsyncClient.index)
    generate = _waited(AsyncClient.generate)

    def drawing(self, prompt: str, *, partial_images: int = 8, **options: Unpack[Drawing]) -> Generator[Drawn]:
        """As AsyncClient.drawing."""
        stream = self._client.drawing(prompt, partial_images=partial_images, **options)
        try:
            while (each := self._wait(_following(stream))) is not None:
                yield each
        finally:
            with suppress(AnswerError):  # closed, and the stream with it
                self._wait(stream.aclose())

    async def _end(self) -> None:
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    def _wait(self, work: Coroutine[Any, Any, R]) -> R:
        with self._lock:
            if self._closed:
                work.close()
                raise AnswerError(CLOSED, 0)
            done = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return done.result()
        except CancelledError:  # by `close` in another thread
            raise AnswerError(CLOSED, 0) from None
        except BaseException:  # such as Ctrl-C, after which nothing may go on
            done.cancel()
            raise


_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")  # PIL's modes that a PNG holds
_CONVERTED = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}  # those that it does not but have alpha; of others RGB
_Input = tuple[int, dict[str, str]]  # its place in the call, and how a request has it


async def _batched(
    given: Iterable[tuple[str, Any]],
    work: Callable[[list[dict[str, str]]], Awaitable[list[R]]],
    progress: Callable[[int], None],
    bad: dict[int, str] | None = None,
) -> tuple[dict[int, R], int]:
    """What a server makes of each input by its place, and how many inputs there were. bad: as `encode` takes it."""
    found: dict[int, R] = {}

    async def send(batch: list[_Input]) -> None:
        results = await work([each for _, each in batch])
        found.update((place, result) for (place, _), result in zip(batch, results, strict=True))

    async def refused(item: _Input, error: AnswerError) -> None:
        place, _ = item
        if bad is None:
            raise AnswerError(f"input {place}: {error.of_item}", error.status, place) from error
        bad[place] = error.of_item

    async def one(batch: list[_Input]) -> None:
        await send_sound([each for each in batch if each[1]], send, refused, singly=(413,))
        progress(len(batch))

    places = itertools.count()
    await send_all(packed(_readable(given, places, bad), lambda each: sum(map(len, each[1].values()))), one)
    return found, next(places)


def _readable(given: Iterable[tuple[str, Any]], places: Iterator[int], bad: dict[int, str] | None) -> Iterator[_Input]:
    """Inputs with their places; what cannot be read is noted in `bad` and has nothing to send, or raises."""
    for kind, each in given:
        place, content = next(places), dict[str, str]()
        try:
            value = _image(each) if kind == "image" else each
            value.encode()
            content = {kind: value}
        except (OSError, ValueError) as error:  # a ValueError for NUL in a path, too
            if bad is None and isinstance(error, OSError):
                raise
            reason = "no Unicode (half a surrogate pair)" if isinstance(error, UnicodeEncodeError) else str(error)
            if bad is None:
                raise ValueError(f"input {place}: {reason}") from error
            bad[place] = reason
        yield place, content


def _inputs(images: Iterable[Picture], texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
    yield from (("image", each) for each in images)
    yield from (("text", each) for each in texts)


def _part(each: str | Picture | dict[str, str]) -> dict[str, Any]:
    """A part of a mixed query as the API takes it."""
    if isinstance(each, str):
        return {"text": each}
    return dict(each) if isinstance(each, dict) else {"image": _image(each)}


def _image(picture: Picture) -> str:
    """As the API takes it: base64, or the URL that it is. Raises OSError for a file that cannot be read."""
    if isinstance(picture, str):
        if picture.startswith(("http://", "https://", "data:")):
            return picture
        picture = Path(picture)
    if isinstance(picture, Path):
        picture = picture.read_bytes()
    if isinstance(picture, Image.Image):
        with suppress(Exception):  # a picture with a damaged EXIF block is still a picture
            picture = ImageOps.exif_transpose(picture)  # which a PNG does not say
        if picture.mode not in _OF_PNG:
            picture = picture.convert(_CONVERTED.get(picture.mode, "RGB"))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        picture = file.getvalue()
    return base64.b64encode(picture).decode()


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


async def _following(stream: AsyncGenerator[T]) -> T | None:
    return await anext(stream, None)
