"""GET /models: what is loaded and what it can do."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from app.service import Served, Service, json_response
from models.errors import NotFoundError

router = APIRouter(tags=["models"])


class Model(BaseModel):
    """takes: what it is given. makes: what it gives. dimensions: of its embeddings, null if it makes pictures.

    size: side of its pictures in pixels. styles: that /generate takes. backends: what computes each tower. metrics: the
    figures of its model card.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    architecture: str
    takes: list[Literal["image", "text"]]
    makes: list[Literal["embedding", "image"]]
    dimensions: int | None
    size: int
    styles: list[str]
    backends: dict[str, str]
    fingerprint: str
    metrics: dict[str, float]
    license: str | None


class ModelList(BaseModel):
    """The first that can do the work is used where a request names none."""

    object: Literal["list"]
    data: list[Model]


class History(BaseModel):
    """series: of each figure that was logged while a model was trained, [step, value] in order."""

    model: str
    series: dict[str, list[tuple[int, float]]]


@router.get("/models", response_model=ModelList)
@router.get("/v1/models", response_model=ModelList)
async def models(service: Served) -> Response:
    """Every loaded model, in the order of preference; those that make pictures come last."""
    return json_response({"object": "list", "data": list(_all(service).values())})


@router.get("/v1/models/{name}", response_model=Model)
async def model(service: Served, name: str) -> Response:
    """One loaded model."""
    known = _all(service)
    if name not in known:
        raise _unknown(name, known)
    return json_response(known[name])


@router.get("/models/{name}/history", response_model=History)
async def history(service: Served, name: str) -> Response:
    """How a model's training went, as far as its checkpoint tells; no series where it does not."""
    provenances = {key: engine.details.get("provenance") for key, engine in service.engines.items()}
    provenances |= {key: generator.provenance for key, generator in service.generators.items()}
    if name not in provenances:
        raise _unknown(name, provenances)
    return json_response({"model": name, "series": _series(str((provenances[name] or {}).get("history", "")))})


def _series(table: str) -> dict[str, list[tuple[int, float]]]:
    """The columns of a checkpoint's history; values that are no number (any more) are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(table.splitlines()):
        step = int(row.pop("step"))
        for name, value in row.items():
            if value and math.isfinite(float(value)):
                found.setdefault(name, []).append((step, float(value)))
    return found


def _unknown(name: str, known: Iterable[str]) -> NotFoundError:
    return NotFoundError(f"no model {name!r}; loaded: {', '.join(known) or 'none'}")


def _all(service: Service) -> dict[str, dict[str, Any]]:
    embedders = {
        name: _described(name, engine.fingerprint, engine.details)
        | {
            "takes": ["image", "text"] if engine.takes_text else ["image"],
            "makes": ["embedding"],
            "dimensions": engine.embed_dim,
            "size": engine.image_size,
            "styles": [],
        }
        for name, engine in service.engines.items()
    }
    generators = {
        name: _described(name, model.fingerprint, {"architecture": model.architecture, "provenance": model.provenance})
        | {
            "takes": ["text"],
            "makes": ["image"],
            "dimensions": None,
            "size": model.preprocess.size,
            "styles": list(model.styles),
        }
        for name, model in service.generators.items()
    }
    return embedders | generators


def _described(name: str, fingerprint: str, details: dict[str, Any]) -> dict[str, Any]:
    provenance = details.get("provenance") or {}
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "semblance",
        "architecture": details.get("architecture", ""),
        "backends": details.get("backends", {}),
        "fingerprint": fingerprint,
        "metrics": provenance.get("metrics", {}),
        "license": provenance.get("license"),
    }
