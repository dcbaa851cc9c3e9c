"""Collections and their items: made, filled, read and deleted. What is answered with 2xx is on the disk."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import BaseModel, Field, field_validator, model_validator
from starlette.responses import Response

from app import images
from app.batching import late
from app.collection import Among, Collection, Item, NewItem, SearchHit, Target
from app.conditions import condition_of
from app.engine import ServedEngine
from app.forms import Form
from app.index import Vectors
from app.inputs import (
    EXAMPLE_IMAGE,
    MAX_IDS,
    Body,
    Input,
    ItemId,
    Metadata,
    Name,
    StoredInput,
    Text,
    body_of,
    check_text,
    image_limits,
    known_query,
    request_body,
    written,
)
from app.keys import needs
from app.service import Served, decoded, describe_item, json_response
from models.errors import ConflictError, InputError, NotFoundError, TooLargeError

router = APIRouter(tags=["collections"], dependencies=[Depends(known_query)])
MAX_METADATA = 16_384  # bytes of an item's metadata as JSON


class CollectionRequest(Body):
    """model: whose vectors it will hold (default: the first that takes text). index: flat (exact), hnsw (a graph
    says where to look), ivfpq (short codes do), or auto, from the first to the last as it grows."""

    model: str | None = None
    index: str = "auto"


class CollectionResponse(BaseModel):
    """bytes: of its vectors and pictures. indexed: how many items a graph or codes cover; each of the others is looked
    at in every search, until they are covered too."""

    name: str
    model: str
    fingerprint: str
    dimensions: int
    count: int
    index: str
    indexed: int
    bytes: int


class CollectionList(BaseModel):
    """Every collection, by name."""

    collections: list[CollectionResponse]


class ItemBody(StoredInput):
    """A picture or a text to store. Without an id one is made; an id that exists is replaced. An `embedding` is stored
    as it is, so it must be the collection's own model's; the picture may then be missing."""

    id: ItemId | None = None
    caption: Text | None = None
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_text(self) -> ItemBody:
        if self.text is not None and self.caption not in (None, self.text):
            raise ValueError("a text is its own caption, and another would take its place: put it into metadata")
        return self

    @field_validator("metadata")
    @classmethod
    def _small(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(value)) > MAX_METADATA:
            raise ValueError(f"at most {MAX_METADATA:,} bytes, as JSON, are kept of one item")
        return value


class ItemsRequest(Body):
    """As a form: file, and in the files' order as many id, caption and metadata (JSON) fields, or none of them."""

    items: list[ItemBody] = Field(min_length=1)

    @classmethod
    def from_form(cls, form: Form) -> dict[str, Any]:
        """Files with the ids, captions and metadata at the same places."""
        items: list[dict[str, Any]] = [{"image": part} for _, part in form if isinstance(part, bytes)]
        fields: dict[str, list[str]] = {}
        for name, part in form:
            if isinstance(part, str):
                fields.setdefault(name, []).append(part)
        for name, values in fields.items():
            if name not in ("id", "caption", "metadata"):
                raise InputError(f"unknown field {name[:64]!r}; a form has file, id, caption and metadata")
            if len(values) != len(items):
                raise InputError(f"{len(values)} {name} fields for {len(items)} files: give one each, or none")
            for item, value in zip(items, values, strict=True):
                if value:
                    item[name] = _parsed(value) if name == "metadata" else value
        return {"items": items}


class ItemsResponse(BaseModel):
    """The ids, in the order the items came. They are durable."""

    ids: list[str]


class ItemResponse(BaseModel):
    """An item. url: of its picture, if it is kept here. embedding: base64 of little-endian float32, if asked for."""

    id: str
    kind: str
    caption: str | None
    url: str | None
    metadata: dict[str, Any]
    embedding: str | None = None


class NearItem(ItemResponse):
    """score: cosine to the first of its group."""

    score: float


class DuplicatesResponse(BaseModel):
    """groups: the largest first, in each the oldest item first and the others by their score. total: groups in all."""

    collection: str
    total: int
    groups: list[list[NearItem]]


class Frequent(BaseModel):
    """A value and how many items have it."""

    value: str
    items: int


class KeyStatistics(BaseModel):
    """min, max: of the numbers at a key. frequent: the texts that most items have."""

    key: str
    items: int
    values: int
    min: float | None
    max: float | None
    frequent: list[Frequent]


class StatisticsResponse(BaseModel):
    """kinds: items of each, and pictures kept. cosines: quantiles, of a sample of items, to others drawn at random and
    to the nearest other; none with fewer than two items."""

    collection: str
    kinds: dict[str, int]
    metadata: list[KeyStatistics]
    cosines: dict[str, dict[str, float]]


class ItemList(BaseModel):
    """next: what to give as `after` for the items that follow; null after the last."""

    items: list[ItemResponse]
    next: str | None


@router.get("/collections", response_model=CollectionList)
async def list_collections(service: Served) -> Response:
    """Every collection with its model, size and index."""

    def infos() -> list[dict[str, Any]]:
        found = []
        for name in service.collections.names():
            try:
                found.append(asdict(service.collections.get(name).info()))
            except NotFoundError:  # deleted since
                continue
        return found

    return json_response({"collections": await service.store(infos)})


@router.put(
    "/collections/{name}",
    dependencies=[needs("write")],
    response_model=CollectionResponse,
    openapi_extra=request_body(CollectionRequest, {}, files=False, required=False),
)
async def create_collection(
    service: Served, name: Name, body: Annotated[CollectionRequest, Depends(body_of(CollectionRequest, optional=True))]
) -> Response:
    """Make a collection, or give the one there is if its model is the same."""
    engine = service.engine(body.model).engine

    def create() -> dict[str, Any]:
        made = service.collections.create(
            name, model=engine.name, fingerprint=engine.fingerprint, dimensions=engine.embed_dim, index=body.index
        )
        return asdict(made.info())

    return json_response(await service.store(create))


@router.get("/collections/{name}", response_model=CollectionResponse)
async def get_collection(service: Served, name: Name) -> Response:
    """One collection."""
    return json_response(await service.in_collection(name, lambda collection: asdict(collection.info())))


@router.delete("/collections/{name}", status_code=204, dependencies=[needs("admin")])
async def delete_collection(service: Served, name: Name) -> Response:
    """Delete a collection with all its items."""
    await service.forget_unfolding(name)
    await service.store(service.collections.delete, name)
    return Response(status_code=204)


@router.post(
    "/collections/{name}/items",
    dependencies=[needs("write")],
    response_model=ItemsResponse,
    openapi_extra=request_body(
        ItemsRequest, {"items": [{"id": "disc", "image": EXAMPLE_IMAGE, "metadata": {"year": 2026}}]}
    ),
)
async def add_items(
    service: Served, name: Name, body: Annotated[ItemsRequest, Depends(body_of(ItemsRequest))]
) -> Response:
    """Store all of these items, or none. Their ids come back once they are on the disk."""
    if len(body.items) > service.settings.max_inputs:
        raise TooLargeError(f"{len(body.items)} items are more than the {service.settings.max_inputs} of one call")
    for index, item in enumerate(body.items):
        check_text(item.text, service.settings, index)
        check_text(item.caption, service.settings, index)
    settings = service.settings
    places = await service.store(lambda: [item.place(settings, index) for index, item in enumerate(body.items)])
    pictures: list[bytes | Path | None] = []
    first = collection = await service.collection(name)
    while True:
        if collection.fingerprint != first.fingerprint and any(item.embedding is not None for item in body.items):
            raise ConflictError(
                f"collection {name!r} was made again with model {collection.model!r} meanwhile, and embeddings were "
                f"given, which can be of model {first.model!r} alone: nothing was stored; send embeddings of the other"
            )
        served = service.engine_of(collection)
        if not served.engine.takes_text and any(_needs_text(item) for item in body.items):
            service.engine(served.engine.name, text=True)  # raises, naming the models that take text
        vectors = await _embedded(service, served, body.items, places)
        if not pictures:
            kept = await asyncio.gather(*(_kept(service, item, index) for index, item in enumerate(body.items)))
            pictures = [place or picture for place, picture in zip(places, kept, strict=True)]
        items = [
            NewItem(_kind(item), vector, item.id, item.caption or item.text, item.metadata, picture)
            for item, vector, picture in zip(body.items, vectors, pictures, strict=True)
        ]
        await service.writable(name)
        try:
            return json_response({"ids": await service.store(collection.add, items)})
        except NotFoundError:
            tried, collection = collection, await service.collection(name)
            if collection is tried:  # else another model's has taken its place
                raise


@router.get("/collections/{name}/items", response_model=ItemList)
async def list_items(
    service: Served,
    name: Name,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=128)] = "",
    embeddings: Annotated[bool, Query(description="with each item's embedding")] = False,
    id: Annotated[tuple[ItemId, ...], Query(max_length=MAX_IDS, description="only these")] = (),
    target: Annotated[Target, Query()] = "any",
    filter: Annotated[tuple[Text, ...], Query(description="as GET /search takes it")] = (),
) -> Response:
    """Items by id, a page at a time; with options only those that a search with them could return."""
    filters = [condition_of(entry) for entry in filter]

    def look(collection: Collection) -> list[tuple[Item, Any]]:
        among = Among(target, filters, id or None)
        if embeddings:
            return list(collection.page_with_vectors(limit, after, among))
        return [(item, None) for item in collection.page(limit, after, among)]

    items = await service.in_collection(name, look)
    following = items[-1][0].id if len(items) == limit else None
    shown = [
        describe_item(name, item) | ({} if vector is None else {"embedding": written(vector)}) for item, vector in items
    ]
    return json_response({"items": shown, "next": following})


@router.get("/collections/{name}/duplicates", response_model=DuplicatesResponse)
async def list_duplicates(
    service: Served,
    name: Name,
    threshold: Annotated[float, Query(gt=0, le=1, description="cosine from which two items are near")] = 0.95,
    target: Target = "any",
    limit: Annotated[int, Query(ge=1, le=1000, description="groups to return")] = 100,
) -> Response:
    """Groups of items that are nearly the same, directly or by way of others."""
    ends = time.monotonic() + service.settings.deadline

    def go_on() -> None:
        if time.monotonic() > ends:
            raise late("compared")

    def look(collection: Collection) -> tuple[int, list[list[SearchHit]]]:
        return collection.duplicates(threshold, limit, target=target, go_on=go_on)

    try:
        total, groups = await service.in_collection(name, look, by=service.look)
    finally:
        ends = 0.0  # whoever asked may have left
    shown = [[{"score": hit.score, **describe_item(name, hit.item)} for hit in group] for group in groups]
    return json_response({"collection": name, "total": total, "groups": shown})


@router.get("/collections/{name}/statistics", response_model=StatisticsResponse)
async def get_statistics(service: Served, name: Name) -> Response:
    """What a collection holds, in numbers; what a score is worth in it shows beside its own cosines."""
    return json_response(
        {"collection": name, **await service.in_collection(name, Collection.statistics, by=service.look)}
    )


@router.get("/collections/{name}/items/{id}", response_model=ItemResponse)
async def get_item(service: Served, name: Name, id: ItemId) -> Response:
    """One item."""
    item = await service.in_collection(name, lambda collection: collection.get(id))
    return json_response(describe_item(name, item))


@router.delete("/collections/{name}/items/{id}", status_code=204, dependencies=[needs("write")])
async def delete_item(service: Served, name: Name, id: ItemId) -> Response:
    """Delete an item; no search that begins after the answer returns it."""
    await service.in_collection(name, lambda collection: collection.delete(id), writes=True)
    return Response(status_code=204)


@router.get(
    "/collections/{name}/items/{id}/image",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, 304: {"description": "not changed"}},
)
async def get_picture(
    request: Request,
    service: Served,
    name: Name,
    id: ItemId,
    size: Annotated[int | None, Query(ge=1, le=2048, description="longest side in pixels; smaller ones stay")] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """An item's picture, or a thumbnail of it, always as JPEG."""

    def look(collection: Collection) -> tuple[Item, str]:
        item = collection.get(id)
        return item, collection.version(item)

    def thumbnail(collection: Collection) -> bytes:
        return collection.picture(id, size, lambda file: images.thumbnail(file, size or 0, limits))

    item, version = await service.in_collection(name, look)
    limits = image_limits(service.settings)
    if size is None and item.place is not None:  # only pictures that were encoded anew are given
        size = service.settings.stored_side
    etag = f'"{version}-{size or "full"}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if if_none_match and (if_none_match.strip() == "*" or etag in if_none_match):  # RFC 9110: * is whatever there is
        return Response(status_code=304, headers=headers)
    if size is None:
        content = await service.in_collection(name, lambda collection: collection.picture(id))
    else:
        content = await service.in_collection(name, thumbnail, by=service.decode)
    return Response(content, media_type="image/jpeg", headers=headers)


async def _embedded(
    service: Served, served: ServedEngine, items: Sequence[ItemBody], places: Sequence[Path | None]
) -> list[Vectors]:
    """The vector of each item: what it brings, or what the model makes of it."""
    found = [item.vector(index) for index, item in enumerate(items)]
    rest = [index for index, vector in enumerate(found) if vector is None]
    try:
        inputs = [Input.model_construct(text=items[at].text, image=places[at] or items[at].image) for at in rest]
        made = await service.embed(served, inputs)
    except InputError as error:
        error.index = None if error.index is None else rest[error.index]
        raise
    for index, vector in zip(rest, made.vectors, strict=True):
        found[index] = vector
    return [vector for vector in found if vector is not None]


async def _kept(service: Served, item: ItemBody, index: int) -> bytes | None:
    """What is kept of a picture: its pixels in a new JPEG, and nothing else of the file that came."""
    if item.image is None:
        return None
    image, side = item.image, service.settings.stored_side
    return await service.decode(lambda: images.reencode(decoded(service.settings, image, index, side // 2), side))


def _needs_text(item: ItemBody) -> bool:
    return item.text is not None and item.embedding is None


def _kind(item: ItemBody) -> Literal["image", "text"]:
    return "image" if item.text is None else "text"


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError("metadata must be a JSON object") from error
