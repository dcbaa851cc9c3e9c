"""GET and POST /collections/{name}/map: where a collection's items lie in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel
from starlette.responses import Response

from app.collection import Item
from app.inputs import Name, known_query, written
from app.keys import needs
from app.plane import Points, principal_plane
from app.service import Served, json_response

router = APIRouter(tags=["collections"], dependencies=[Depends(known_query)])
MAX_POINTS = 100_000
MapMethod = Literal["pca", "umap"]


class MapResponse(BaseModel):
    """points: base64 of little-endian float32, x and y of each id in turn; null until there are any. state: none until
    POST has begun one. values: of the metadata at `color`, null where an item has none. total: items of the collection,
    of which more than 100,000 are shown by a sample."""

    collection: str
    method: MapMethod
    state: Literal["none", "running", "done", "failed"]
    share: float
    total: int
    ids: list[str]
    values: list[str | int | float | bool | None] | None
    points: str | None


@router.get("/collections/{name}/map", response_model=MapResponse)
async def get_map(
    service: Served,
    name: Name,
    method: MapMethod = "pca",
    color: Annotated[str | None, Query(min_length=1, max_length=64, description="a key of the metadata")] = None,
) -> Response:
    """Each item as a point, near to what is like it. pca is computed at once; umap is begun by POST."""
    collection = await service.collection(name)
    total = (await service.store(collection.info)).count
    if method == "umap":
        run = await service.unfolding(name)
        if run is None:
            return json_response(_map(name, method, "none", 0.0, total, [], None, None))
        return json_response(_map(name, method, run.state, run.share, total, run.items, run.points, color))

    def plane() -> tuple[list[Item], Points]:
        items, vectors = collection.sample(MAX_POINTS)
        return items, principal_plane(vectors)

    items, points = await service.store(plane)
    return json_response(_map(name, method, "done", 1.0, total, items, points, color))


@router.post("/collections/{name}/map", status_code=202, response_model=MapResponse, dependencies=[needs("write")])
async def make_map(service: Served, name: Name) -> Response:
    """Begin a map by UMAP in the background, in the place of one there is; GET tells how far it is."""
    run = await service.unfold(name, MAX_POINTS)
    answer = json_response(_map(name, "umap", run.state, run.share, len(run.items), [], None, None))
    answer.status_code = 202
    return answer


@router.delete("/collections/{name}/map", status_code=204, dependencies=[needs("write")])
async def forget_map(service: Served, name: Name) -> Response:
    """Stop a map by UMAP, or forget it."""
    await service.forget_unfolding(name)
    return Response(status_code=204)


def _map(
    name: str,
    method: MapMethod,
    state: str,
    share: float,
    total: int,
    items: Sequence[Item],
    points: Points | None,
    color: str | None,
) -> dict[str, Any]:
    return {
        "collection": name,
        "method": method,
        "state": state,
        "share": share,
        "total": total,
        "ids": [] if points is None else [item.id for item in items],
        "values": None if color is None or points is None else [item.metadata.get(color) for item in items],
        "points": None if points is None else written(np.ascontiguousarray(points)),
    }
