"""POST /zero-shot: which of these labels a picture shows, without training on them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.inputs import EXAMPLE_IMAGE, Body, Inputs, Text, body_of, check_inputs, request_body
from app.service import Served, json_response
from models.errors import InputError, TooLargeError
from models.retrieval import TEMPLATES, label_probabilities

router = APIRouter(tags=["zero-shot"])


class ZeroShotRequest(Body):
    """multi_label: each label on its own, in place of one among them. top_k: so many scores, the best ones."""

    input: Inputs
    labels: list[Text] = Field(min_length=1)
    templates: list[Text] = Field(list(TEMPLATES), min_length=1)
    model: str | None = None
    multi_label: bool = False
    top_k: int | None = Field(None, ge=1)

    file_field = "input"
    list_fields = frozenset({"labels", "templates"})


class LabelScore(BaseModel):
    """score: probability. cosine: of picture and label, which tells whether any of them fits at all."""

    label: str
    score: float
    cosine: float


class Classified(BaseModel):
    """The best label of a picture, and the scores, best first."""

    index: int
    label: str
    score: float
    cosine: float
    scores: list[LabelScore]


class ZeroShotResponse(BaseModel):
    """One answer a picture, in the order they came."""

    model: str
    data: list[Classified]


_BODY = request_body(ZeroShotRequest, {"input": {"image": EXAMPLE_IMAGE}, "labels": ["red circle", "blue star"]})


@router.post("/zero-shot", response_model=ZeroShotResponse, openapi_extra=_BODY)
async def zero_shot(service: Served, body: Annotated[ZeroShotRequest, Depends(body_of(ZeroShotRequest))]) -> Response:
    """Probabilities that sum to 1 over the labels, unless `multi_label`. Templates are averaged."""
    _check(service, body)
    served = service.engine(body.model, text=True)
    deadline = service.deadline()
    images, _ = await service.embed(served, body.input, deadline)
    labels = await served.embed_labels(body.labels, body.templates, deadline)
    cosines = images @ labels.T
    probabilities = label_probabilities(
        served.engine.scale, torch.from_numpy(cosines), multi_label=body.multi_label
    ).numpy()
    data = []
    for index, row in enumerate(probabilities):
        best = np.argsort(-row, kind="stable")[: body.top_k]
        scores = [
            {"label": body.labels[place], "score": float(row[place]), "cosine": float(cosines[index, place])}
            for place in best
        ]
        data.append({"index": index, **scores[0], "scores": scores})
    return json_response({"model": served.engine.name, "data": data})


def _check(service: Served, body: ZeroShotRequest) -> None:
    settings = service.settings
    check_inputs(body.input, settings)
    for index, each in enumerate(body.input):
        if each.image is None:
            raise InputError("zero-shot classification takes pictures; for texts use /rank", index)
    if len(body.labels) > settings.max_labels:
        raise TooLargeError(f"{len(body.labels)} labels are more than the {settings.max_labels} of one call")
    if len(body.labels) * len(body.templates) > settings.max_prompts:
        raise TooLargeError(f"labels times templates are more than the {settings.max_prompts} prompts of one call")
    for index, label in enumerate(body.labels):
        if len(label) > settings.max_text:
            raise TooLargeError(f"label {index} has {len(label):,} characters, at most {settings.max_text:,} are read")
    longest = max(map(len, body.labels))
    for index, template in enumerate(body.templates):
        places = template.count("{}")
        if not places:
            raise InputError(f"template {index}, {template[:80]!r}, has no {{}} where the label belongs")
        if (length := len(template) + places * (longest - 2)) > settings.max_text:
            with_label = f"template {index} has {length:,} characters with the longest label"
            raise TooLargeError(f"{with_label}, at most {settings.max_text:,} are read")
