"""The only place that knows HTTP status codes: errors become `application/problem+json` (RFC 9457) here."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from models.errors import (
    BusyError,
    CheckpointError,
    ConflictError,
    DeadlineError,
    ForbiddenError,
    ImageError,
    InputError,
    MalformedError,
    MediaTypeError,
    ModelError,
    NotFoundError,
    RateLimitError,
    SemblanceError,
    StorageError,
    TooLargeError,
    UnauthorizedError,
)

log = logging.getLogger(__name__)

# The first class of an error's MRO that stands here decides; what is not here is a bug and answers 500.
STATUS: dict[type[SemblanceError], HTTPStatus] = {
    InputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    MalformedError: HTTPStatus.BAD_REQUEST,
    ImageError: HTTPStatus.UNPROCESSABLE_ENTITY,
    MediaTypeError: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    TooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    NotFoundError: HTTPStatus.NOT_FOUND,
    ConflictError: HTTPStatus.CONFLICT,
    UnauthorizedError: HTTPStatus.UNAUTHORIZED,
    ForbiddenError: HTTPStatus.FORBIDDEN,
    RateLimitError: HTTPStatus.TOO_MANY_REQUESTS,
    BusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    DeadlineError: HTTPStatus.GATEWAY_TIMEOUT,
    StorageError: HTTPStatus.INSUFFICIENT_STORAGE,
    ModelError: HTTPStatus.INTERNAL_SERVER_ERROR,
    CheckpointError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
# A client may send any number of wrong values under names of any length; the answer stays small.
MAX_REPORTED, MAX_NAME = 20, 64


class FieldError(BaseModel):
    """One wrong value: where it is and what is wrong with it."""

    loc: list[str | int]
    msg: str


class Problem(BaseModel):
    """RFC 9457 problem details. input: which of several inputs was wrong, where one was."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    input: int | None = None
    errors: list[FieldError] | None = None


def problem_responses() -> dict[int | str, dict[str, Any]]:
    """Every problem an endpoint may answer, for OpenAPI."""
    statuses = sorted(set(STATUS.values()))
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {int(status): {"description": status.phrase, "content": content} for status in statuses}


def reason(error: Exception) -> str:
    """What kind of problem an error is, in a word: the end of its `type`, and what it is counted under."""
    if isinstance(error, RequestValidationError):
        return "validation"
    if isinstance(error, HTTPException):
        return _slug(HTTPStatus(error.status_code))
    known = _known(error)
    return _slug(HTTPStatus.INTERNAL_SERVER_ERROR) if known is None else _word(known)


def _word(cls: type[SemblanceError]) -> str:
    return cls.__name__.removesuffix("Error").lower()


# Those of our own errors; those of the framework have its words for their status.
REASONS = tuple(_word(cls) for cls in STATUS)


def _known(error: Exception) -> type[SemblanceError] | None:
    return next((cls for cls in type(error).__mro__ if cls in STATUS), None)


def problem(error: Exception, request_id: str) -> Response:
    """The answer to an error; an unknown one is logged and answered without its text.

    error: anything a handler, the framework or a middleware raised -> a complete response.
    """
    kind = reason(error)
    if isinstance(error, RequestValidationError):
        return _validation(error.errors(), request_id)
    if isinstance(error, HTTPException):
        status = HTTPStatus(error.status_code)
        return _render(status, kind, str(error.detail), request_id, headers=dict(error.headers or {}))
    known = _known(error)
    if known is None:
        log.error("request %s failed", request_id, exc_info=error)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        return _render(status, kind, "This is a bug; the log has it under the request id.", request_id)
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooLargeError):
        headers["Connection"] = "close"  # the rest of the body may be still to come
    detail, more = str(error), {}
    if isinstance(error, SemblanceError) and error.index is not None:
        detail, more = f"input {error.index}: {detail}", {"input": error.index}
    return _render(STATUS[known], kind, detail, request_id, headers=headers, **more)


def install(app: FastAPI) -> None:
    """Answer everything raised below the middlewares with `problem`; they do so themselves for the rest."""

    async def handle(request: Request, error: Exception) -> Response:
        request.scope["state"]["reason"] = reason(error)
        return problem(error, request.scope["state"]["request_id"])

    for kind in (SemblanceError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handle)


def _validation(errors: Sequence[Any], request_id: str) -> Response:
    """A 422 that names places and reasons, and never repeats what was sent."""
    shown = [
        {
            "loc": [part[:MAX_NAME] if isinstance(part, str) else part for part in error["loc"]],
            "msg": str(error["msg"]).removeprefix("Value error, "),
        }
        for error in errors[:MAX_REPORTED]
    ]
    detail = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in shown[:3])
    if len(errors) > 3:
        detail += f"; and {len(errors) - 3} more"
    return _render(HTTPStatus.UNPROCESSABLE_ENTITY, "validation", detail, request_id, errors=shown)


def _slug(status: HTTPStatus) -> str:
    return status.phrase.lower().replace(" ", "-")


def _render(
    status: HTTPStatus, kind: str, detail: str, request_id: str, *, headers: dict[str, str] | None = None, **more: Any
) -> Response:
    content = {
        "type": f"urn:semblance:problem:{kind}",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "request_id": request_id,
        **more,
    }
    # Names from a path may hold half a surrogate pair, which is no UTF-8.
    content["detail"] = detail.encode("utf-8", "replace").decode()
    return Response(orjson.dumps(content), int(status), headers, "application/problem+json")
