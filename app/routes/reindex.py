"""A collection made again with another model, while the old one serves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.responses import Response

from app.inputs import Body, Name, body_of, request_body
from app.keys import needs
from app.service import Served, json_response
from models.errors import NotFoundError

router = APIRouter(tags=["collections"])


class ReindexRequest(Body):
    """model: whose vectors the collection shall hold."""

    model: str


class ReindexResponse(BaseModel):
    """done, total: items. interrupted: what was made is kept, and the next run with this model goes on from there."""

    model: str
    state: Literal["running", "done", "failed", "interrupted"]
    done: int
    total: int
    error: str | None


@router.post(
    "/collections/{name}/reindex",
    dependencies=[needs("admin")],
    status_code=202,
    response_model=ReindexResponse,
    openapi_extra=request_body(ReindexRequest, {"model": "clip"}, files=False),
)
async def start(
    service: Served, name: Name, body: Annotated[ReindexRequest, Depends(body_of(ReindexRequest))]
) -> Response:
    """Begin, or go on, in the background. Searches and writes go on too, and all at once the other model answers."""
    answer = json_response(asdict(await service.reindex(name, body.model)))
    answer.status_code = 202
    return answer


@router.get("/collections/{name}/reindex", response_model=ReindexResponse)
async def progress(service: Served, name: Name) -> Response:
    """How far it is, or how it ended."""
    found = await service.reindexing(name)
    if found is None:
        raise NotFoundError(f"collection {name!r} is not being made again; POST begins that")
    return json_response(asdict(found))


@router.delete("/collections/{name}/reindex", status_code=204, dependencies=[needs("admin")])
async def give_up(service: Served, name: Name) -> Response:
    """Stop, and forget what was made."""
    await service.stop_reindexing(name)
    return Response(status_code=204)
