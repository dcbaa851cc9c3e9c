"""POST /embed: embeddings of texts and pictures, in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.backends import Array, unit
from app.inputs import EXAMPLE_IMAGE, Body, Inputs, body_of, check_inputs, request_body, written
from app.service import Served, json_response
from models.errors import InputError

router = APIRouter(tags=["embeddings"])


class EmbedRequest(Body):
    """normalize: scale vectors that `dimensions` has cut back to unit length; uncut ones always have it."""

    input: Inputs
    model: str | None = None
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"
    normalize: bool = True
    user: str | None = Field(None, description="taken for OpenAI's clients, not used")

    file_field = "input"


class Embedding(BaseModel):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts; pictures have none."""

    prompt_tokens: int
    total_tokens: int


class EmbedResponse(BaseModel):
    """One embedding an input, in the order they came."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


_BODY = request_body(EmbedRequest, {"input": ["a red star", {"image": EXAMPLE_IMAGE}]})


@router.post("/embed", response_model=EmbedResponse, openapi_extra=_BODY)
@router.post("/v1/embeddings", response_model=EmbedResponse, openapi_extra=_BODY)
async def embed(service: Served, body: Annotated[EmbedRequest, Depends(body_of(EmbedRequest))]) -> Response:
    """Unit vectors whose dot product is the similarity of what they stand for."""
    check_inputs(body.input, service.settings)
    served = service.engine(body.model, text=any(each.text is not None for each in body.input))
    length = body.dimensions or served.engine.embed_dim
    full = served.engine.embed_dim
    if length > full:
        raise InputError(f"model {served.engine.name!r} has {full} dimensions, {length} were asked for")
    vectors, tokens = await service.embed(served, body.input)
    if length < full:
        vectors = _cut(vectors, length, body.normalize)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(row, body.encoding_format)}
        for index, row in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "model": served.engine.name, "data": data, "usage": usage})


def _cut(vectors: Array, length: int, normalize: bool) -> Array:
    """The first numbers of each row: what a Matryoshka model keeps the most in (arXiv:2205.13147)."""
    cut = np.ascontiguousarray(vectors[:, :length])
    return unit(cut) if normalize else cut


def _encoded(row: Array, encoding: str) -> Any:
    return written(row) if encoding == "base64" else row
