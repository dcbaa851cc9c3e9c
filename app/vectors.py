"""Embeddings in and out of a collection as files: Parquet, and the folders of clip-retrieval and autofaiss.

Read are a Parquet file (or a folder of them) with a column `embedding`, as `semblance dump` and autofaiss write it; a
folder with `img_emb/`, `text_emb/` (.npy) and `metadata/` (.parquet), as clip-retrieval's; a folder of .npy files; and
the parts that `semblance index --to` leaves.
Nothing is embedded again, so they must be the collection's own model's.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from app.calls import AnswerError, call, collection_url, content_of, packed, send_all, send_sound
from app.ingest import Report, item_id, items_of
from app.inputs import vector_of, written
from models.errors import ConflictError, DataError, StorageError
from models.files import sync
from models.readers import pyarrow_for

OWN = b"semblance"  # what the schema of a dump or a part says of it
_NAMES = ("id", "key", "image_path", "path", "url")  # columns that may name a row, the best first
_ROWS = 256  # of a table that are read at once
_NOT_METADATA = {"id", "kind", "caption", "metadata", "embedding", "image", "text"}


@dataclass
class Row:
    """One embedding and what is known of it. image: the bytes of its picture, if they are at hand."""

    id: str
    kind: str
    embedding: NDArray[np.float32]
    caption: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    image: bytes | None = None


class _Stored(NamedTuple):
    """A row as it is in its file, not yet looked at, so that a bad one ends nothing. where: the file and the row, from
    1 on. name: of the item, if nothing else names it. about: its row of a table, or what kept that from being read.
    embedding and kind: where that does not hold them."""

    where: str
    name: str
    about: dict[str, Any] | Exception | None = None
    embedding: NDArray[np.floating] | None = None
    kind: str | None = None


class _Item(NamedTuple):
    """A row on its way. body: its JSON."""

    where: str
    row: Row
    body: bytes


def holds_vectors(source: str | Path) -> bool:
    """Whether a source is of embeddings, not of pictures. Raises DataError for Parquet that cannot be read."""
    path = Path(source)
    if path.is_dir():
        arrays = any(any(path.glob(pattern)) for pattern in ("img_emb", "*.npy", "part-*.safetensors"))
        return arrays or any(map(_has_embedding, path.glob("*.parquet")))
    return path.suffix == ".npy" or (path.suffix == ".parquet" and _has_embedding(path))


def own_of(table: Path) -> dict[str, Any] | None:
    """What a Parquet file of ours says of itself, None for one of others. Raises DataError if it cannot be read."""
    own = (_schema(table).metadata or {}).get(OWN)
    return None if own is None else json.loads(own)


def belong_together(own: dict[str, Any] | None, vectors: Path) -> bool:
    """Whether a part's table, by what it says of itself, and its embeddings are of one process. One that was cut off
    from its command goes on writing, and may come between the files of what followed it."""
    with safe_open(vectors, "numpy") as file:
        return bool((file.metadata() or {}).get("made") == (own or {}).get("made"))


async def load_vectors(
    client: httpx.AsyncClient,
    collection: str,
    source: str | Path,
    *,
    model: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Put every embedding of a source into a collection, which is made if need be; ids that are there are passed over,
    and of several rows of one id the first counts.

    Rows that cannot be read, or that the server refuses, are in the report with their file and row (from 1 on), as are
    pictures without which a row was stored.

    Raises ConflictError for a dump of another model's, and if another's takes the collection's place, DataError for a
    file that cannot be read or is of another model's, AnswerError when the server refuses more than single rows.
    """
    made = await call(client, "PUT", collection_url(collection), json={} if model is None else {"model": model})
    _check_model(Path(source), made)
    known, report = {item["id"] async for item in items_of(client, collection)}, Report()
    items = _items(_rows(Path(source), made["dimensions"]), known, report, progress)

    async def send(batch: list[_Item]) -> None:
        # As they could not be told apart where another model's has as many dimensions.
        await _check_same(client, made, "no more was stored; load embeddings of that model")
        content = b'{"items":[' + b",".join(item.body for item in batch) + b"]}"
        headers = {"Content-Type": "application/json"}
        await call(client, "POST", f"{collection_url(collection)}/items", content=content, headers=headers)

    async def refused(item: _Item, error: AnswerError) -> None:
        why = error.of_item
        if item.row.image is not None:
            row = replace(item.row, image=None)
            if not await send_sound([_Item(item.where, row, _body(row))], send, refused):
                return
            report.added += 1
            why = f"stored without its picture: {why}"
        report.bad.append(f"{item.where}: {why}")

    async def store(batch: list[_Item]) -> None:
        stored = await send_sound(batch, send, refused)
        report.added += stored
        progress(len(batch))

    await send_all(packed(items, lambda item: len(item.body)), store)
    return report


async def dump_vectors(
    client: httpx.AsyncClient,
    collection: str,
    out: str | Path,
    *,
    pictures: bool = False,
    lost: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[int]:
    """Write a collection to a Parquet file, whole or not at all; yields how many items are in it, page by page.

    pictures: with a column `image` of JPEGs, so that the file is all there is of the items.
    lost: told of each item that is written without its picture, for the server has that no more, and why.
    Raises ConflictError if another model's takes the collection's place meanwhile, StorageError if the file cannot be
    written, AnswerError.
    """
    arrow = pyarrow_for(Path(out))
    info = await call(client, "GET", collection_url(collection))
    kept = {name: info[name] for name in ("name", "model", "fingerprint", "dimensions")}
    columns = [("id", arrow.string()), ("kind", arrow.string()), ("caption", arrow.string())]
    columns += [("metadata", arrow.string()), ("embedding", arrow.list_(arrow.float32(), info["dimensions"]))]
    schema = arrow.schema(columns + [("image", arrow.binary())] * pictures, metadata={OWN: json.dumps(kept)})
    target, count = Path(out), 0
    try:
        # In a folder of its own, so that of two that write one file at once neither writes into the other's.
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            unfinished = Path(folder) / "part"
            with arrow.parquet.ParquetWriter(unfinished, schema) as writer:
                page: list[dict[str, Any]] = []
                async for item in items_of(client, collection, embeddings=True):
                    item["metadata"] = json.dumps(item["metadata"])
                    item["embedding"] = vector_of(item["embedding"])
                    if pictures:
                        item["image"] = await _picture(client, collection, item, lost)
                    page.append({name: item[name] for name in schema.names})
                    if len(page) == 1000:
                        await _check_same(client, info, "nothing was written; dump it again")
                        writer.write_table(arrow.Table.from_pylist(page, schema))
                        count += len(page)
                        page = []
                        yield count
                await _check_same(client, info, "nothing was written; dump it again")
                writer.write_table(arrow.Table.from_pylist(page, schema))
            sync(unfinished)
            unfinished.replace(target)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error  # pyarrow's own words name the draft
        raise StorageError(f"{target} cannot be written: {why}") from error
    yield count + len(page)


async def _check_same(client: httpx.AsyncClient, before: dict[str, Any], so: str) -> None:
    """What was read or written since `before` is of one model only if the collection still is that model's. so: what
    becomes of it otherwise."""
    now = await call(client, "GET", collection_url(before["name"]))
    if now["fingerprint"] != before["fingerprint"]:
        raise ConflictError(
            f"collection {before['name']!r} was of model {before['model']!r} ({before['fingerprint']}) when this began "
            f"and is of {now['model']!r} ({now['fingerprint']}) now, so {so}"
        )


async def _picture(
    client: httpx.AsyncClient, collection: str, item: dict[str, Any], lost: Callable[[str], None]
) -> bytes | None:
    if item["url"] is None:
        return None
    try:
        return await content_of(client, "GET", item["url"])
    except AnswerError as error:
        if error.status != 404:
            raise
        there = await call(client, "GET", f"{collection_url(collection)}/items", params={"id": item["id"]})
        if there["items"]:  # else deleted since
            lost(f"the picture of item {item['id']!r}: {error}")
        return None


def _items(
    rows: Iterator[_Stored], known: set[str], report: Report, progress: Callable[[int], None]
) -> Iterator[_Item]:
    """The rows that are new and can be sent; the others are in the report."""
    seen: set[str] = set()
    for stored in rows:
        try:
            row = _row(stored)
            if row.id in seen:
                raise ValueError(f"an earlier row has this item ({row.id}), which is stored once")
            seen.add(row.id)
            if row.id not in known:
                yield _Item(stored.where, row, _body(row))
                continue
            report.present += 1
        except (ValueError, TypeError, OverflowError) as error:  # UnicodeError and ArrowInvalid are ValueErrors
            report.bad.append(f"{stored.where}: {error}")
        progress(1)


def _body(row: Row) -> bytes:
    """A row as an item's JSON. Raises ValueError for what JSON cannot hold."""
    body: dict[str, Any] = {"id": row.id, "metadata": row.metadata}
    body["embedding"] = written(row.embedding)
    if row.kind == "text":
        body["text"] = row.caption
    elif row.image is not None:
        body["image"] = base64.b64encode(row.image).decode()
    if row.caption and row.kind != "text":
        body["caption"] = row.caption
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def _rows(source: Path, dimensions: int) -> Iterator[_Stored]:
    if source.suffix == ".parquet":
        yield from _parquet_rows(source, dimensions)
    elif source.suffix == ".npy":
        yield from _array_rows(source, "image", None, dimensions)
    elif (source / "img_emb").is_dir():
        yield from _clip_retrieval_rows(source, dimensions)
    else:
        for file in sorted(source.glob("*.parquet")) or sorted(source.glob("*.npy")):
            beside = file.with_suffix(".safetensors")
            yield from _part_rows(file, beside) if beside.is_file() else _rows(file, dimensions)


def _clip_retrieval_rows(source: Path, dimensions: int) -> Iterator[_Stored]:
    for folder, kind in (("img_emb", "image"), ("text_emb", "text")):
        for file in sorted((source / folder).glob("*.npy")):
            table = source / "metadata" / f"metadata_{file.stem.rpartition('_')[2]}.parquet"
            yield from _array_rows(file, kind, table if table.is_file() else None, dimensions)


def _part_rows(table: Path, vectors: Path) -> Iterator[_Stored]:
    """Of a part that app/bulk.py made."""
    try:
        if not belong_together(own_of(table), vectors):
            raise DataError(f"{table} and {vectors.name} are of two processes; `semblance index --to` makes them anew")
        embeddings = load_file(vectors)["embedding"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{vectors} holds no embeddings ({error})") from error
    for place, (about, vector) in enumerate(zip(_table_rows(table), embeddings, strict=True)):
        yield _Stored(f"{table}:{place + 1}", f"{table.stem}:{place}", about, vector)


def _array_rows(file: Path, kind: str, table: Path | None, dimensions: int) -> Iterator[_Stored]:
    """A row a row of an array (N, D), with what the table says of it at the same place."""
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # whose text may advise to unpickle
        raise DataError(
            f"{file} is no .npy array of numbers: not of that format, cut off, or of Python objects; "
            "write it again with numpy.save, as one array (N, D) of floats"
        ) from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{file} is of shape {array.shape} and type {array.dtype}; rows of floats are expected")
    _check_dimensions(file, {array.shape[1]}, dimensions)
    if table is not None and (count := _row_count(table)) != len(array):
        raise DataError(
            f"{table} has {count} rows and {file.name} {len(array)}: which belong together cannot be told; both must "
            "be of one run of what wrote them"
        )
    described = repeat(None, len(array)) if table is None else _table_rows(table)
    for place, (vector, about) in enumerate(zip(array, described, strict=True)):
        yield _Stored(f"{file}:{place + 1}", f"{file.stem}:{place}", about, vector, kind)


def _parquet_rows(file: Path, dimensions: int) -> Iterator[_Stored]:
    if not _has_embedding(file):
        raise DataError(
            f"{file} has no column `embedding`; name its column of embeddings so, or move it out of the folder: "
            "the .npy files of a folder are read where no Parquet file is beside them"
        )
    rows = _table_rows(file)
    first = list(islice(rows, _ROWS))
    vectors = [about["embedding"] for about in first if isinstance(about, dict)]
    lengths = {len(vector) if isinstance(vector, list) else 0 for vector in vectors if vector is not None}
    _check_dimensions(file, lengths, dimensions)  # one of another length is a bad row, all of them are another model's
    for place, about in enumerate(chain(first, rows)):
        yield _Stored(f"{file}:{place + 1}", f"{file.stem}:{place}", about)


def _row(stored: _Stored) -> Row:
    """What is known of a row. Raises ValueError, TypeError or OverflowError, saying what is wrong with it."""
    if isinstance(stored.about, Exception):
        raise stored.about
    found = stored.about or {}
    # What is missing is left out; pandas has NaN for it.
    content = {key: value for key, value in found.items() if value is not None and value == value}
    vector = _vector(content.get("embedding") if stored.embedding is None else stored.embedding)
    kind = stored.kind or content.get("kind") or "image"
    name = next((str(content[column]) for column in _NAMES if content.get(column)), stored.name)
    if kind == "text" and found and "id" not in content:  # beside the picture of the same name
        name += ":text"
    metadata = _metadata(content.get("metadata"))
    for key, value in content.items():
        if key not in _NOT_METADATA and 0 < len(key) <= 64:
            metadata[key] = value if isinstance(value, (str, int, float, bool)) else str(value)
    caption = content.get("caption") or content.get("text")
    if kind == "text" and not caption:
        raise ValueError("it is of a text, and a text is stored with its words: a column `caption` or `text` has them")
    image = content["image"] if "image" in content else _file(content.get("image_path"))
    return Row(item_id(name), kind, vector, caption, metadata, image)


def _vector(value: Any) -> NDArray[np.float32]:
    if value is None:
        raise ValueError("it has no embedding")
    try:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused
            return np.asarray(value, np.float32)
    except (ValueError, TypeError):
        raise ValueError("its embedding is no list of numbers") from None


def _metadata(text: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(text)) if text else {}
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its `metadata` is no JSON object") from None


def _file(path: Any) -> bytes | None:
    """What is at a picture's path, None where that cannot be read."""
    try:
        return Path(path).read_bytes() if path and Path(path).is_file() else None
    except (OSError, ValueError, TypeError):
        return None


def _table_rows(file: Path) -> Iterator[dict[str, Any] | Exception]:
    """Each row, or the error of one whose values Python cannot hold."""
    arrow = pyarrow_for(file)
    try:
        for batch in arrow.parquet.ParquetFile(file).iter_batches(batch_size=_ROWS):
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError):
                rows = [_alone(batch.slice(place, 1)) for place in range(batch.num_rows)]
            yield from rows
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _alone(row: Any) -> dict[str, Any] | Exception:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return error


def _schema(file: Path) -> Any:
    arrow = pyarrow_for(file)
    try:
        return arrow.parquet.read_schema(file)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _row_count(file: Path) -> int:
    arrow = pyarrow_for(file)
    try:
        return int(arrow.parquet.read_metadata(file).num_rows)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} cannot be read as Parquet ({error}); write it again, or move it out of the folder")


def _has_embedding(file: Path) -> bool:
    return "embedding" in _schema(file).names


def _check_dimensions(file: Path, found: set[int], expected: int) -> None:
    if found and expected not in found:
        raise DataError(
            f"{file} holds embeddings of {min(found)} numbers, those of the collection have {expected}; "
            "load the model that they are of, and name it with --embedder"
        )


def _check_model(source: Path, collection: dict[str, Any]) -> None:
    """A dump says whose embeddings it holds."""
    if source.is_dir():
        source = next(source.glob("part-*.parquet"), source)
    if source.suffix != ".parquet":
        return
    said = own_of(source)
    if said is not None and said["fingerprint"] != collection["fingerprint"]:
        raise ConflictError(
            f"{source} holds embeddings of model {said['model']!r} ({said['fingerprint']}), the collection "
            f"{collection['name']!r} those of {collection['model']!r} ({collection['fingerprint']}); load that model"
        )
