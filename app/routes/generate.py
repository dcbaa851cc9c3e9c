"""POST /generate: pictures of a text, in the shape and with the events of OpenAI's images API."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Request
from PIL import Image
from pydantic import BaseModel, Field, model_validator
from starlette.responses import Response, StreamingResponse
from torch import Tensor

from app import images
from app.errors import problem
from app.generator import Drawing, ServedGenerator
from app.inputs import (
    EXAMPLE_IMAGE,
    Body,
    Picture,
    Text,
    body_of,
    check_text,
    image_bytes,
    image_limits,
    request_body,
)
from app.service import Served, Service, json_response
from app.settings import Settings
from models.dalle import DALLETransformer
from models.errors import InputError, SemblanceError
from models.generation import Sampling, kept_tokens, masked_tokens, to_picture

router = APIRouter(tags=["generation"])
MAX_SEED = 2**53 - 16  # what every JSON reader holds exactly, with room for the seeds that follow


class GenerateRequest(Body):
    """Picture i of n has the seed `seed` + i; the same seed and options give the same picture. temperature 0 takes the
    likeliest token, top_k 0 all of them. guidance_scale: 1 is the text's own distribution, more is nearer to the text.
    rerank: best first by the score of a model that embeds both, where one is loaded. A url is a data: URI.

    image: a picture to start from. mask: another of its size; where it is transparent the picture is drawn anew, the
    rest stays. change: share of what may be drawn anew that is, picked by the seed: all of it with a mask, half of the
    picture without. style: one that the model has, as GET /models lists them."""

    named_files = frozenset({"image", "mask"})

    prompt: Text
    image: Picture | None = None
    mask: Picture | None = None
    change: float | None = Field(None, gt=0, le=1)
    style: str | None = None
    model: str | None = None
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    temperature: float = Field(1.0, ge=0, le=10)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    guidance_scale: float = Field(2.0, ge=0, le=100)
    rerank: bool = True
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=16, description="with stream: pictures on the way, of each")
    size: str = Field("auto", description="auto, or the model's own, such as 64x64")
    user: str | None = Field(None, description="taken for OpenAI's clients, not used")

    @model_validator(mode="after")
    def _starts_from_a_picture(self) -> GenerateRequest:
        if self.image is None and (self.mask is not None or self.change is not None):
            raise ValueError("a mask and a change need an image to start from")
        return self


class EditRequest(GenerateRequest):
    """As /generate, with a picture to start from."""

    image: Picture


class VariationRequest(EditRequest):
    """The same, and a text is not needed."""

    prompt: Text = ""


class GeneratedImage(BaseModel):
    """A PNG. score: cosine of picture and prompt; null without a model that embeds both."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    score: float | None


class GenerateResponse(BaseModel):
    """Best first where they were ranked, else in the order of their seeds."""

    created: int
    model: str
    data: list[GeneratedImage]


@dataclass
class _Made:
    picture: Image.Image
    seed: int
    score: float | None


def _described(model: type[GenerateRequest], **example: Any) -> dict[str, Any]:
    """What the routes have in common for FastAPI: their answers, and the body with an example."""
    return {
        "response_model": GenerateResponse,
        "openapi_extra": request_body(model, {**example, "n": 2, "seed": 1}),
        "responses": {200: {"content": {"image/png": {}, "text/event-stream": {}}}},
    }


@router.post("/generate", **_described(GenerateRequest, prompt="a red star"))
@router.post("/v1/images/generations", **_described(GenerateRequest, prompt="a red star"))
async def generate(
    request: Request, service: Served, body: Annotated[GenerateRequest, Depends(body_of(GenerateRequest))]
) -> Response:
    """Draw pictures of a text. `Accept: image/png` gives the best one itself, `stream` events while they are drawn."""
    return await _answer(request, service, body, "image_generation")


@router.post("/v1/images/edits", **_described(EditRequest, prompt="a red star", image=EXAMPLE_IMAGE))
async def edit(
    request: Request, service: Served, body: Annotated[EditRequest, Depends(body_of(EditRequest))]
) -> Response:
    """Draw a part of a picture anew, after a text."""
    return await _answer(request, service, body, "image_edit")


@router.post("/v1/images/variations", **_described(VariationRequest, image=EXAMPLE_IMAGE))
async def vary(
    request: Request, service: Served, body: Annotated[VariationRequest, Depends(body_of(VariationRequest))]
) -> Response:
    """Draw pictures that share half of a picture's tokens, or another share."""
    return await _answer(request, service, body, "image_edit")


async def _answer(request: Request, service: Service, body: GenerateRequest, kind: str) -> Response:
    """kind: the first part of the events' names."""
    check_text(body.prompt, service.settings)
    generator = service.generator(body.model)
    if body.size not in ("auto", own := f"{generator.size}x{generator.size}"):
        raise InputError(f"size {body.size[:20]!r}: model {generator.name!r} draws pictures of {own}")
    if body.style is not None and body.style not in generator.model.styles:
        known_styles = ", ".join(generator.model.styles) or "none"
        raise InputError(f"style {body.style[:64]!r}: model {generator.name!r} has {known_styles}")
    first = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
    seeds = [first + number for number in range(body.n)]
    deadline = service.deadline(service.settings.generate_deadline)
    known = await _kept(service, generator, body, seeds)
    steps = generator.draw(body.prompt, seeds, _sampling(body), deadline, known, body.style)
    drawings = await anext(steps)  # a full queue is refused here, before any answer has begun
    if body.stream:
        request_id = request.scope["state"]["request_id"]
        events = _events(service, generator, body, drawings, steps, deadline, kind, request_id)
        return StreamingResponse(events, media_type="text/event-stream")
    async with aclosing(steps):
        async for _ in steps:
            pass
    made = await _ranked(service, generator, body, drawings, deadline)
    accept = ",".join(request.headers.getlist("accept"))
    if _quality(accept, "image/png") > _quality(accept, "application/json"):
        best = made[0]
        headers = {"X-Seed": str(best.seed)}
        return Response(await service.decode(_png, best, body.prompt), media_type="image/png", headers=headers)
    data = [await _entry(service, each, body) for each in made]
    return json_response({"created": int(time.time()), "model": generator.name, "data": data})


def _quality(accept: str, media_type: str) -> float:
    """How much a client wants a media type, 0 to 1, by the closest range of its Accept (RFC 9110, 12.5.1)."""
    wanted = {}
    for entry in accept.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        with suppress(ValueError):  # as if it were not there
            wanted[name] = float(weight)
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next((wanted[each] for each in ranges if each in wanted), 0.0)


async def _kept(
    service: Service, generator: ServedGenerator, body: GenerateRequest, seeds: Sequence[int]
) -> list[Tensor] | None:
    """What stays of the picture that the request starts from, for each seed; None where there is no such picture."""
    if body.image is None:
        return None
    pixels, anew = await service.decode(_opened, service.settings, generator.model, body.image, body.mask)
    ids = await generator.tokens(pixels)
    return [kept_tokens(ids, seed, anew, body.change) for seed in seeds]


def _opened(
    settings: Settings, model: DALLETransformer, image: str | bytes, mask: str | bytes | None
) -> tuple[Tensor, Tensor | None]:
    """Decoded, in a worker thread: pixels of the model's size, and which tokens the mask lets be drawn anew."""
    limits = image_limits(settings)
    with _said_of("image"):
        picture = images.decode(image_bytes(image, settings), limits)
    if mask is None:
        return model.preprocess(picture), None
    with _said_of("mask"):
        cover = images.decode_mask(image_bytes(mask, settings), limits)
    if cover.size != picture.size:
        raise InputError(f"mask: it has {cover.size} pixels and the image {picture.size}; they must be the same")
    try:
        return model.preprocess(picture), masked_tokens(model, cover)
    except ValueError as error:
        raise InputError(f"mask: {error}") from error


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Errors of one of the request's pictures say which."""
    try:
        yield
    except SemblanceError as error:
        error.args = (f"{name}: {error}",)
        raise


def _sampling(body: GenerateRequest) -> Sampling:
    return Sampling(body.temperature, body.top_k, body.top_p, body.guidance_scale)


async def _ranked(
    service: Service, generator: ServedGenerator, body: GenerateRequest, drawings: Sequence[Drawing], deadline: float
) -> list[_Made]:
    """The pictures, best first by the cosine of picture and prompt, as DALL-E chose among its samples with CLIP."""
    pictures = [to_picture(pixels) for pixels in await generator.pictures(drawings)]
    made = [_Made(picture, each.seed, None) for picture, each in zip(pictures, drawings, strict=True)]
    judge = next((engine for engine in service.engines.values() if engine.takes_text), None)
    if judge is None or not body.rerank or not body.prompt:
        return made
    served = service.engine(judge.name, text=True)
    shown = await served.embed_images([partial(_whole, each.picture) for each in made], deadline)
    (prompt,), _ = await served.embed_texts([body.prompt], deadline)
    for each, score in zip(made, (shown @ np.asarray(prompt)).tolist(), strict=True):
        each.score = score
    return sorted(made, key=lambda each: -(each.score or 0.0))


async def _events(
    service: Service,
    generator: ServedGenerator,
    body: GenerateRequest,
    drawings: Sequence[Drawing],
    steps: AsyncGenerator[Any],
    deadline: float,
    kind: str,
    request_id: str,
) -> AsyncIterator[bytes]:
    """OpenAI's events: partial pictures at even steps, then each whole one; an error ends them with its problem."""
    length = generator.model.image_length
    common = {
        "created_at": int(time.time()),
        "size": f"{generator.size}x{generator.size}",
        "quality": "auto",
        "background": "opaque",
        "output_format": "png",
    }
    try:
        # Even numbers of tokens, the whole picture left out: it has its own event.
        marks = [round(length * (part + 1) / (body.partial_images + 1)) for part in range(body.partial_images)]
        async with aclosing(steps):
            async for _ in steps:
                done = min(each.done for each in drawings)  # the slowest decides, so that an event shows all alike
                if not marks or done < marks[0]:
                    continue
                number = body.partial_images - len(marks)
                marks = [mark for mark in marks if mark > done]
                for index, (pixels, each) in enumerate(zip(await generator.pictures(drawings), drawings, strict=True)):
                    entry = await _entry(service, _Made(to_picture(pixels), each.seed, None), body, b64=True)
                    where = {"partial_image_index": number, "index": index, "step": done, "steps": length}
                    yield _event(f"{kind}.partial_image", common | where | entry)
        tokens = int((generator.model.tokens_of([body.prompt]) != 0).sum())
        usage = {"input_tokens": tokens, "output_tokens": body.n * length, "total_tokens": tokens + body.n * length}
        usage |= {"input_tokens_details": {"text_tokens": tokens, "image_tokens": 0}}
        for index, made in enumerate(await _ranked(service, generator, body, drawings, deadline)):
            entry = await _entry(service, made, body, b64=True)
            yield _event(f"{kind}.completed", common | {"index": index, "usage": usage} | entry)
    except Exception as error:
        content = orjson.loads(problem(error, request_id).body)
        yield b"event: error\ndata: " + orjson.dumps({"error": content | {"message": content["detail"]}}) + b"\n\n"


def _event(kind: str, content: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps({"type": kind, **content}) + b"\n\n"


async def _entry(service: Service, made: _Made, body: GenerateRequest, *, b64: bool = False) -> dict[str, Any]:
    encoded = base64.b64encode(await service.decode(_png, made, body.prompt)).decode()
    shown = {"b64_json": encoded} if b64 or body.response_format == "b64_json" else {"url": _uri(encoded)}
    return {**shown, "seed": made.seed, "score": made.score}


def _whole(picture: Image.Image, target: int) -> Image.Image:
    """A picture that is decoded already, for what wants to be told how large."""
    return picture


def _uri(encoded: str) -> str:
    return f"data:image/png;base64,{encoded}"


def _png(made: _Made, prompt: str) -> bytes:
    return images.png(made.picture, {"prompt": prompt, "seed": str(made.seed)})
