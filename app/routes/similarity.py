"""POST /similarity: the cosine of every pair."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.responses import Response

from app.inputs import EXAMPLE_IMAGE, Body, Inputs, body_of, check_inputs, of_fields, request_body
from app.service import Served, json_response

router = APIRouter(tags=["embeddings"])


class SimilarityRequest(Body):
    """Two lists of inputs."""

    a: Inputs
    b: Inputs
    model: str | None = None


class SimilarityResponse(BaseModel):
    """scores[i][j]: cosine of a[i] and b[j]."""

    model: str
    scores: list[list[float]]


_EXAMPLE = {"a": ["a red circle", "a blue star"], "b": [{"image": EXAMPLE_IMAGE}]}
_BODY = request_body(SimilarityRequest, _EXAMPLE, files=False)


@router.post("/similarity", response_model=SimilarityResponse, openapi_extra=_BODY)
async def similarity(
    service: Served, body: Annotated[SimilarityRequest, Depends(body_of(SimilarityRequest))]
) -> Response:
    """The cosine of every input of `a` with every input of `b`."""
    both = [*body.a, *body.b]
    fields = ("a", len(body.a)), ("b", len(body.b))
    with of_fields(*fields):
        check_inputs(both, service.settings)
    served = service.engine(body.model, text=any(each.text is not None for each in both))
    with of_fields(*fields):
        vectors, _ = await service.embed(served, both)
    scores = vectors[: len(body.a)] @ vectors[len(body.a) :].T
    return json_response({"model": served.engine.name, "scores": list(scores)})
