"""Embeddings in and out of a collection as files: Parquet, and the folders of clip-retrieval and autofaiss.

Read are a Parquet file (or a folder of them) with a column `embedding`, as `semblance dump` and autofaiss write it; a
folder with `img_emb/`, `text_emb/` (.npy) and `metadata/` (.parquet), as clip-retrieval's; a folder of .npy files; and
the parts that `semblance index --to` leaves.
Nothing is embedded again, so they must be the collection's own model's.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from app.calls import BATCH, call
from app.ingest import Report, item_id, items_of
from app.inputs import vector_of, written
from models.errors import ConflictError, DataError
from models.readers import pyarrow_for

OWN = b"semblance"  # what the schema of a dump or a part says of it
_NAMES = ("id", "key", "image_path", "path", "url")  # columns that may name a row, the best first
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


def holds_vectors(source: str | Path) -> bool:
    """Whether a source is of embeddings, not of pictures."""
    path = Path(source)
    if path.is_dir():
        arrays = any(any(path.glob(pattern)) for pattern in ("img_emb", "*.npy", "part-*.safetensors"))
        return arrays or any(map(_has_embedding, path.glob("*.parquet")))
    return path.suffix == ".npy" or (path.suffix == ".parquet" and _has_embedding(path))


def own_of(table: Path) -> dict[str, Any] | None:
    """What a Parquet file of ours says of itself, None for one of others."""
    own = (pyarrow_for(table).parquet.read_schema(table).metadata or {}).get(OWN)
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
    """Put every embedding of a source into a collection, which is made if need be; ids that are there are passed over.

    Raises ConflictError for a dump of another model's, DataError for a file that cannot be read, AnswerError.
    """
    made = await call(client, "PUT", f"/collections/{collection}", json={} if model is None else {"model": model})
    _check_model(Path(source), made)
    known, report = {item["id"] async for item in items_of(client, collection)}, Report()
    rows = _rows(Path(source))
    while part := list(islice(rows, BATCH)):
        fresh = [row for row in part if row.id not in known]
        report.present += len(part) - len(fresh)
        if fresh:
            body = {"items": [_body(row) for row in fresh]}
            await call(client, "POST", f"/collections/{collection}/items", json=body)
            report.added += len(fresh)
        progress(len(part))
    return report


async def dump_vectors(
    client: httpx.AsyncClient, collection: str, out: str | Path, *, pictures: bool = False
) -> AsyncIterator[int]:
    """Write a collection to a Parquet file, whole or not at all; yields how many items are in it, page by page.

    pictures: with a column `image` of JPEGs, so that the file is all there is of the items.
    """
    arrow = pyarrow_for(Path(out))
    info = await call(client, "GET", f"/collections/{collection}")
    kept = {name: info[name] for name in ("name", "model", "fingerprint", "dimensions")}
    columns = [("id", arrow.string()), ("kind", arrow.string()), ("caption", arrow.string())]
    columns += [("metadata", arrow.string()), ("embedding", arrow.list_(arrow.float32(), info["dimensions"]))]
    schema = arrow.schema(columns + [("image", arrow.binary())] * pictures, metadata={OWN: json.dumps(kept)})
    target, count = Path(out), 0
    unfinished = target.with_name(f".{target.name}.part")
    try:
        with arrow.parquet.ParquetWriter(unfinished, schema) as writer:
            page: list[dict[str, Any]] = []
            async for item in items_of(client, collection, embeddings=True):
                item["metadata"] = json.dumps(item["metadata"])
                item["embedding"] = vector_of(item["embedding"])
                if pictures:
                    item["image"] = await _picture(client, item["url"])
                page.append({name: item[name] for name in schema.names})
                if len(page) == 1000:
                    writer.write_table(arrow.Table.from_pylist(page, schema))
                    count += len(page)
                    page = []
                    yield count
            writer.write_table(arrow.Table.from_pylist(page, schema))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    yield count + len(page)


async def _picture(client: httpx.AsyncClient, url: str | None) -> bytes | None:
    if url is None:
        return None
    answer = await client.get(url)
    return answer.content if answer.is_success else None  # deleted since


def _body(row: Row) -> dict[str, Any]:
    body: dict[str, Any] = {"id": row.id, "metadata": row.metadata}
    body["embedding"] = written(row.embedding)
    if row.kind == "text":
        body["text"] = row.caption or row.id
    elif row.image is not None:
        body["image"] = base64.b64encode(row.image).decode()
    if row.caption and row.kind != "text":
        body["caption"] = row.caption
    return body


def _rows(source: Path) -> Iterator[Row]:
    if source.suffix == ".parquet":
        yield from _parquet_rows(source)
    elif source.suffix == ".npy":
        yield from _array_rows(source, "image", None)
    elif (source / "img_emb").is_dir():
        yield from _clip_retrieval_rows(source)
    else:
        for file in sorted(source.glob("*.parquet")) or sorted(source.glob("*.npy")):
            beside = file.with_suffix(".safetensors")
            yield from _part_rows(file, beside) if beside.is_file() else _rows(file)


def _clip_retrieval_rows(source: Path) -> Iterator[Row]:
    for folder, kind in (("img_emb", "image"), ("text_emb", "text")):
        for file in sorted((source / folder).glob("*.npy")):
            table = source / "metadata" / f"metadata_{file.stem.rpartition('_')[2]}.parquet"
            yield from _array_rows(file, kind, table if table.is_file() else None)


def _part_rows(table: Path, vectors: Path) -> Iterator[Row]:
    """Of a part that app/bulk.py made."""
    try:
        if not belong_together(own_of(table), vectors):
            raise DataError(f"{table} and {vectors.name} are of two processes; `semblance index --to` makes them anew")
        embeddings = load_file(vectors)["embedding"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{vectors} holds no embeddings ({error})") from error
    for content, vector in zip(_table_rows(table), embeddings, strict=True):
        yield _row(content, vector, content["kind"], content["id"])


def _array_rows(file: Path, kind: str, table: Path | None) -> Iterator[Row]:
    """A row a row of an array (N, D), with what the table says of it at the same place."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no .npy array of numbers ({error})") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{file} is of shape {array.shape} and type {array.dtype}; rows of floats are expected")
    if table is None:
        for place, vector in enumerate(array):
            yield Row(item_id(f"{file.stem}:{place}"), kind, vector.astype(np.float32))
        return
    described = _table_rows(table)
    for place, vector in enumerate(array):
        content = next(described, None)
        if content is None:
            raise DataError(f"{table} has fewer rows than {file.name}, which has {len(array)}")
        yield _row(content, vector.astype(np.float32), kind, f"{file.stem}:{place}")


def _parquet_rows(file: Path) -> Iterator[Row]:
    for place, content in enumerate(_table_rows(file)):
        vector = np.asarray(content["embedding"], np.float32)
        yield _row(content, vector, content.get("kind") or "image", f"{file.stem}:{place}")


def _row(content: dict[str, Any], vector: NDArray[np.float32], kind: str, otherwise: str) -> Row:
    name = next((str(content[column]) for column in _NAMES if content.get(column)), otherwise)
    if kind == "text" and "id" not in content:  # beside the picture of the same name
        name += ":text"
    metadata = json.loads(content["metadata"]) if content.get("metadata") else {}
    for key, value in content.items():
        if key not in _NOT_METADATA and value is not None and 0 < len(key) <= 64:
            metadata[key] = value if isinstance(value, (str, int, float, bool)) else str(value)
    caption = content.get("caption") or content.get("text")
    image = content.get("image")
    if image is None and (path := content.get("image_path")) and Path(path).is_file():
        image = Path(path).read_bytes()
    return Row(item_id(name), kind, vector, caption, metadata, image)


def _table_rows(file: Path) -> Iterator[dict[str, Any]]:
    arrow = pyarrow_for(file)
    try:
        for batch in arrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet ({error})") from error


def _has_embedding(file: Path) -> bool:
    return "embedding" in pyarrow_for(file).parquet.read_schema(file).names


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
