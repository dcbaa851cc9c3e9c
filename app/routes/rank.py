"""POST /rank: documents by their nearness to a query, in the rerankers' shape."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.inputs import EXAMPLE_IMAGE, Body, Input, Inputs, body_of, check_inputs, of_fields, request_body
from app.service import Served, json_response

router = APIRouter(tags=["search"])


class RankRequest(Body):
    """top_n: so many results, the best ones. return_documents: repeat the text of each result."""

    query: Input
    documents: Inputs
    model: str | None = None
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class Ranked(BaseModel):
    """index: place in `documents`. relevance_score: cosine."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RankResponse(BaseModel):
    """Best first; equal scores in the order they came."""

    model: str
    results: list[Ranked]


_EXAMPLE = {"query": {"image": EXAMPLE_IMAGE}, "documents": ["a blue star", "a red circle"]}
_BODY = request_body(RankRequest, _EXAMPLE, files=False)


@router.post("/rank", response_model=RankResponse, openapi_extra=_BODY)
@router.post("/v1/rerank", response_model=RankResponse, openapi_extra=_BODY)
async def rank(service: Served, body: Annotated[RankRequest, Depends(body_of(RankRequest))]) -> Response:
    """Documents (texts or pictures), nearest to the query first."""
    both = [body.query, *body.documents]
    query, documents = ("query", None), ("documents", len(body.documents))
    with of_fields(documents):
        check_inputs(body.documents, service.settings, "documents")
    with of_fields(query):
        check_inputs([body.query], service.settings)
    served = service.engine(body.model, text=any(each.text is not None for each in both))
    with of_fields(query, documents):
        vectors, _ = await service.embed(served, both)
    scores = vectors[1:] @ vectors[0]
    results = []
    for place in np.argsort(-scores, kind="stable")[: body.top_n]:
        result: dict[str, Any] = {"index": int(place), "relevance_score": float(scores[place])}
        text = body.documents[place].text
        if body.return_documents and text is not None:
            result["document"] = {"text": text}
        results.append(result)
    return json_response({"model": served.engine.name, "results": results})
