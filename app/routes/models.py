"""GET /models: what is loaded and what it can do."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from app.engine import Engine
from app.service import Served, json_response

router = APIRouter(tags=["models"])


class Model(BaseModel):
    """takes: what it embeds. size: side of its pictures in pixels. metrics: the figures of its model card."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    architecture: str
    takes: list[Literal["image", "text"]]
    dimensions: int
    size: int
    fingerprint: str
    metrics: dict[str, float]
    license: str | None


class ModelList(BaseModel):
    """The first that can do the work is used where a request names none."""

    object: Literal["list"]
    data: list[Model]


@router.get("/models", response_model=ModelList)
@router.get("/v1/models", response_model=ModelList)
async def models(service: Served) -> Response:
    """Every loaded model, in the order of preference."""
    return json_response({"object": "list", "data": [_described(engine) for engine in service.engines.values()]})


@router.get("/v1/models/{name}", response_model=Model)
async def model(service: Served, name: str) -> Response:
    """One loaded model."""
    return json_response(_described(service.engine(name).engine))


def _described(engine: Engine) -> dict[str, Any]:
    provenance = engine.details.get("provenance") or {}
    return {
        "id": engine.name,
        "object": "model",
        "created": 0,
        "owned_by": "semblance",
        "architecture": engine.details.get("architecture", ""),
        "takes": ["image", "text"] if engine.takes_text else ["image"],
        "dimensions": engine.embed_dim,
        "size": engine.image_size,
        "fingerprint": engine.fingerprint,
        "metrics": provenance.get("metrics", {}),
        "license": provenance.get("license"),
    }
