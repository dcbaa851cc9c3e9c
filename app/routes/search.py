"""GET and POST /search: what a collection holds that is nearest to a text, a picture, or a mixture of several."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, BeforeValidator, Field
from starlette.responses import Response

from app.backends import Array
from app.collection import Collection, Target
from app.conditions import Entry, condition_of
from app.engine import ServedEngine
from app.inputs import (
    MAX_IDS,
    Body,
    Input,
    ItemId,
    Text,
    WeightedInput,
    as_list,
    body_of,
    check_inputs,
    known_query,
    request_body,
)
from app.service import Served, Service, describe_item, json_response
from models.errors import InputError, NotFoundError

router = APIRouter(tags=["search"], dependencies=[Depends(known_query)])


class Options(Body):
    """target: kinds of items to return. filter: what their metadata must be, all of it: key:value, key>=number (also
    >, <=, <; a text that is no number bounds texts), or {"key": ..., "in": [...]} with gte, gt, lte and lt. ids: of the
    items to search among. group_by: a key of the metadata; of the items with the same value only the nearest comes."""

    k: int = Field(10, ge=1)
    collection: str | None = None
    target: Target = "any"
    filter: Annotated[list[Entry], BeforeValidator(as_list)] = Field(default_factory=list)
    ids: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_IDS)] | None = None
    group_by: Annotated[Text, Field(max_length=64)] | None = None
    min_score: float = Field(-1.0, ge=-1, le=1)
    offset: int = Field(0, ge=0)


class SearchRequest(Options):
    """query: an input, or several with weights that are mixed into one; a negative weight leads away."""

    query: Annotated[list[WeightedInput], Field(min_length=1), BeforeValidator(as_list)]

    file_field = "query"
    list_fields = frozenset({"filter"})


class Hit(BaseModel):
    """score: cosine. url: of the picture, for items that have one."""

    id: str
    score: float
    kind: Literal["image", "text"]
    caption: str | None
    url: str | None
    metadata: dict[str, Any]


class SearchResponse(BaseModel):
    """Best first. query: the text that was searched for; null where pictures took part."""

    collection: str
    model: str
    query: str | None
    hits: list[Hit]
    took_ms: float


_BODY = request_body(SearchRequest, {"query": [{"text": "a red star"}, {"text": "a blue background", "weight": -0.5}]})


@router.get("/search", response_model=SearchResponse)
async def search_by_text(
    service: Served,
    q: Annotated[Text, Query(examples=["a red star"])],
    k: Annotated[int, Query(ge=1)] = 10,
    collection: Annotated[str | None, Query()] = None,
    target: Annotated[Target, Query()] = "any",
    filter: Annotated[tuple[Text, ...], Query()] = (),
    group_by: Annotated[Text | None, Query(max_length=64)] = None,
    min_score: Annotated[float, Query(ge=-1, le=1, allow_inf_nan=False)] = -1.0,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """The items nearest to a text."""
    options = Options(
        k=k,
        collection=collection,
        target=target,
        filter=list(filter),
        group_by=group_by,
        min_score=min_score,
        offset=offset,
    )
    return await _search(service, [WeightedInput(text=q)], options)


@router.post("/search", response_model=SearchResponse, openapi_extra=_BODY)
async def search(service: Served, body: Annotated[SearchRequest, Depends(body_of(SearchRequest))]) -> Response:
    """The items nearest to a text, a picture, or a mixture."""
    return await _search(service, body.query, body)


async def _search(service: Served, query: list[WeightedInput], options: Options) -> Response:
    started = time.perf_counter()
    check_inputs(query, service.settings)
    for name, value, limit in (("k", options.k, service.settings.max_k), ("offset", options.offset, 100_000)):
        if value > limit:
            raise InputError(f"{name} is {value}, at most {limit} is served")
    filters = [condition_of(entry) for entry in options.filter]
    while True:
        collection = await service.collection(options.collection)
        served = service.engine_of(collection)
        if not served.engine.takes_text and any(each.text is not None for each in query):
            service.engine(served.engine.name, text=True)  # raises, naming the models that take text
        vectors = await _vectors(service, collection, served, query)
        search = partial(
            collection.search,
            _mixed(vectors, query),
            options.k,
            offset=options.offset,
            target=options.target,
            filters=filters,
            ids=options.ids,
            group_by=options.group_by,
            min_score=options.min_score,
        )
        hits = None
        with suppress(NotFoundError):
            hits = await service.store(search)
        # Else another model's has taken its place, or it is gone, which the next look says.
        if hits is not None and await service.collection(options.collection) is collection:
            break
    return json_response(
        {
            "collection": collection.name,
            "model": served.engine.name,
            "query": query[0].text if len(query) == 1 else None,
            "hits": [{"score": hit.score, **describe_item(collection.name, hit.item)} for hit in hits],
            "took_ms": round((time.perf_counter() - started) * 1000, 3),
        }
    )


async def _vectors(service: Service, collection: Collection, served: ServedEngine, query: list[WeightedInput]) -> Array:
    """Of each part (N, D): what the collection holds of an item, what the model makes of anything else. Raises
    NotFoundError for an item that is not there."""
    vectors = np.empty((len(query), served.engine.embed_dim), np.float32)
    given = [index for index, each in enumerate(query) if each.item is None]
    # Anew, for embedding takes the pictures, and the query is embedded again if another model's collection comes.
    inputs = [Input.model_construct(text=query[index].text, image=query[index].image) for index in given]
    try:
        vectors[given] = (await service.embed(served, inputs)).vectors
    except InputError as error:
        error.index = None if error.index is None else given[error.index]
        raise
    held = {index: each.item for index, each in enumerate(query) if each.item is not None}
    if held:
        vectors[list(held)] = await service.store(collection.vectors, list(held.values()))
    return vectors


def _mixed(vectors: Array, query: list[WeightedInput]) -> Array:
    """The weighted sum of unit vectors, as a unit vector; raises InputError if they cancel out."""
    vector = np.array([each.weight for each in query]) @ vectors
    norm = np.linalg.norm(vector)
    if norm < 1e-6:
        raise InputError("the weighted queries cancel out: give weights that leave a direction to search in")
    return (vector / norm).astype(np.float32)
