"""Fills a collection from a folder, a caption table or a shard, through the API; resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.calls import PATIENCE, AnswerError, call, collection_url, packed, send_all, send_sound
from models.errors import DataError
from models.readers import BadRows, Record, file_bytes, read

_NO_UNICODE = "its name, caption or metadata is no Unicode (half a surrogate pair)"
_SAFE = re.compile(r"[^A-Za-z0-9._:@+-]+")


@dataclass
class Report:
    """What became of every picture: stored now, there before, or unreadable (with the reason)."""

    added: int = 0
    present: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass
class Picture:
    """A record on its way into a collection."""

    id: str
    where: str
    record: Record
    metadata: dict[str, Any]

    @property
    def caption(self) -> str:
        """What is stored of its texts; empty where there is none."""
        return str(self.record.captions[0]) if self.record.captions else ""

    def check(self) -> None:
        """Raises ValueError for what no request can say."""
        try:
            json.dumps([self.caption, self.metadata], ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise ValueError(_NO_UNICODE) from None
        except ValueError:
            raise ValueError("a number of its metadata is not finite (NaN or infinite)") from None

    def content(self) -> bytes:
        """Its file."""
        return file_bytes(self.record.image)  # type: ignore[arg-type]


# A picture with its bytes, or without where it is to stay in its place; a batch has one kind.
_Content = tuple[Picture, bytes | None]


async def ingest(
    client: httpx.AsyncClient,
    collection: str,
    source: str,
    *,
    model: str | None = None,
    in_place: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    patience: int = PATIENCE,
) -> Report:
    """Put every picture of `source` (as models.readers.read takes it) into a collection, which is made if need be.

    in_place: files stay where they are and the collection refers to them, if the server allows that.

    Pictures that are there with the same time of change and caption are passed over; of several records of one picture
    the first counts. progress: told how many were dealt with.
    patience: as of `call`.
    Raises AnswerError when the server refuses more than single pictures, DataError when there is nothing to read.
    """
    rows, report = BadRows(limit=None), Report()
    records = read(source, rows)  # raises before anything is made
    body, url = {} if model is None else {"model": model}, collection_url(collection)
    await call(client, "PUT", url, json=body, patience=patience)
    there = items_of(client, collection, patience=patience)
    known = {item["id"]: _version(item["metadata"], item["caption"]) async for item in there}
    contents = _contents(_pictures(records, source, rows), known, report, progress, in_place)

    async def send(batch: list[_Content]) -> None:
        await call(client, "POST", f"{url}/items", patience=patience, **_request(batch))

    async def refused(item: _Content, error: AnswerError) -> None:
        report.bad.append(f"{item[0].where}: {error.of_item}")

    async def store(batch: list[_Content]) -> None:
        stored = await send_sound(batch, send, refused)
        report.added += stored
        progress(len(batch))

    await send_all(packed(contents, lambda item: len(item[1] or b""), lambda item: item[1] is None), store)
    report.bad += rows.rows
    if not (report.added or report.present or report.bad):
        raise DataError(f"{source} holds nothing to store: no picture of a known kind, or no row")
    return report


def count(source: str) -> int | None:
    """How many pictures a folder, table or plain shard names; None for what is not here, and for a compressed shard,
    which would be unpacked twice. Raises DataError as `read` does."""
    path = Path(source)
    if not path.exists() or path.name.endswith("gz"):
        return None
    return sum(1 for _ in read(source, BadRows(limit=None)))


async def items_of(
    client: httpx.AsyncClient, collection: str, *, embeddings: bool = False, patience: int = PATIENCE
) -> AsyncIterator[dict[str, Any]]:
    """Every item of a collection, as the API shows it."""
    after: str | None = ""
    while after is not None:
        wanted = {"limit": 1000, "after": after, "embeddings": embeddings}
        page = await call(client, "GET", f"{collection_url(collection)}/items", params=wanted, patience=patience)
        for item in page["items"]:
            yield item
        after = page["next"]


def _pictures(records: Iterator[Record], source: str, rows: BadRows) -> Iterator[Picture]:
    for record in records:
        try:
            picture = picture_of(record, Path(source))
            picture.check()
        except ValueError as error:
            rows.add(record.where, str(error))
        else:
            yield picture


def _contents(
    pictures: Iterator[Picture],
    known: dict[str, int],
    report: Report,
    progress: Callable[[int], None],
    in_place: bool,
) -> Iterator[_Content]:
    """What is to be sent, with its bytes; what is there or cannot be read is in the report."""
    seen: set[str] = set()
    for picture in pictures:
        first = picture.id not in seen
        seen.add(picture.id)
        if first and known.get(picture.id) == _version(picture.metadata, picture.caption):
            report.present += 1
            progress(1)
            continue
        try:
            if not first:
                raise ValueError("an earlier row has this picture, which is stored once")
            content = None if in_place and isinstance(picture.record.image, Path) else picture.content()
        except (OSError, ValueError) as error:  # a ValueError for NUL in a path, too
            report.bad.append(f"{picture.where}: {getattr(error, 'strerror', None) or error}")
            progress(1)
        else:
            yield picture, content


def _version(metadata: dict[str, Any], caption: str | None) -> int:
    """What differs where a picture has changed since; a number, for there may be millions."""
    return hash((metadata.get("modified"), caption or ""))


def _request(batch: list[_Content]) -> dict[str, Any]:
    captions = [picture.caption for picture, _ in batch]
    if batch[0][1] is None:
        items = [
            {"id": picture.id, "path": str(Path(str(picture.record.image)).absolute()), "metadata": picture.metadata}
            | ({"caption": caption} if caption else {})
            for (picture, _), caption in zip(batch, captions, strict=True)
        ]
        return {"json": {"items": items}}
    form = {
        "id": [picture.id for picture, _ in batch],
        "caption": captions,
        "metadata": [json.dumps(picture.metadata) for picture, _ in batch],
    }
    return {"data": form, "files": [("file", (f"{index}", content)) for index, (_, content) in enumerate(batch)]}


def picture_of(record: Record, source: Path) -> Picture:
    """What a record is to a collection: its id, and what is known of it. Raises ValueError for a name of no Unicode."""
    metadata = {
        key: value
        for key, value in record.meta.items()
        if isinstance(value, (str, int, float, bool)) and key not in ("caption", "text", "key")
    }
    if record.label:
        metadata["label"] = record.label
    name = str(record.meta.get("key", record.where))
    if source.is_dir() and "key" in record.meta:  # shards may count their keys from the same number on
        name = f"{Path(record.where.removesuffix(f':{name}')).relative_to(source)}/{name}"
    if isinstance(record.image, Path):
        base = source if source.is_dir() else source.parent
        inside = record.image.is_relative_to(base)
        name = str(record.image.relative_to(base) if inside else record.image)
        metadata["path"] = name
        with suppress(OSError, ValueError):  # what is wrong with the path is told when the file is read
            metadata["modified"] = record.image.stat().st_mtime_ns
    return Picture(item_id(name, path=isinstance(record.image, Path)), record.where, record, metadata)


def item_id(name: str, *, path: bool = False) -> str:
    """An id that reads like the name; two names never share one. path: whether it is one, in which `:` parts nothing.
    Raises ValueError for a name that is no Unicode."""
    slug = _SAFE.sub("-", name.replace("/", ":")).lstrip("-._:@+")
    if slug == name.replace("/", ":") and len(slug) <= 128 and not (path and ":" in name):
        return slug
    try:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    except UnicodeEncodeError:
        raise ValueError(_NO_UNICODE) from None
    return f"{slug[:100] or 'picture'}-{digest[:12]}"
