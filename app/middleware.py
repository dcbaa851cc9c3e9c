"""What stands between the socket and the routes, as plain ASGI: request ids, keys, body limits, vanished clients."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, format_trace_id
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app import page, tracing
from app.batching import shutting_down
from app.errors import problem, reason
from app.fairness import CALLER
from models.errors import BusyError, ForbiddenError, MalformedError, TooLargeError, UnauthorizedError

if TYPE_CHECKING:
    from app.keys import Key
    from app.metrics import Metrics
    from app.service import Service

log = logging.getLogger("semblance.requests")

_HEALTH = frozenset({"/healthz", "/readyz"})  # asked for by whatever address a probe has
OPEN_PATHS = page.OPEN_PATHS | _HEALTH
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_METHODS = _SAFE | {"POST", "PUT", "PATCH", "DELETE"}
_LEFT = 499  # nginx's status for a client that left before it was answered
# Of every answer: what it is, and that no other site may show it in a frame, load it or learn where it led from.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A client that is still sending sees a reset instead of the 413 if it is cut off at once.
_DRAIN_SECONDS, _DRAIN_BODIES = 3.0, 16


class Envelope:
    """Outermost: gives every answer an `X-Request-ID` and the headers below, every error that escapes an answer, and
    every request its place in the metrics and a line in the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics, ending: Callable[[], bool] = lambda: False) -> None:
        """ending: whether the server is, which cancels what it has no more time for."""
        self.app = app
        self.metrics = metrics
        self.ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        told = Headers(scope=scope)
        sent = told.get("x-request-id", "")
        request_id = sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers.update(_HEADERS)
            await send(message)

        async def answer(error: Exception) -> None:
            scope["state"]["reason"] = reason(error)
            await problem(error, request_id)(scope, receive, labelled)

        method = scope["method"] if scope["method"] in _METHODS else "other"
        with (
            self.metrics.in_flight.track_inprogress(),
            _span(scope["path"], method, told.get("traceparent", "")) as span,
            bound_contextvars(request_id=request_id, **_trace_id(span)),
        ):
            try:
                await self.app(scope, receive, labelled)
            except ClientDisconnect:  # while its body was read; nobody is left to answer
                pass
            except Exception as error:
                if status:  # too late for another answer; the server closes the connection
                    raise
                await answer(error)
            except asyncio.CancelledError:
                if not self.ending():
                    raise
                if not status:
                    await answer(shutting_down())
            finally:
                self._record(scope, method, status or _LEFT, time.perf_counter() - began, span)

    def _record(self, scope: Scope, method: str, status: int, seconds: float, span: Span) -> None:
        """No path and no query, for they are what was asked; a method of the client's own making is none either."""
        route = getattr(scope.get("route"), "path", "") or "none"
        self.metrics.requests.labels(method, route, str(status)).observe(seconds)
        span.update_name(f"{method} {route}")
        span.set_attributes(  # OpenTelemetry's semantic conventions for HTTP servers
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        state = scope["state"]
        if kind := state.get("reason"):
            self.metrics.rejections.labels(kind).inc()
        key = state.get("key")
        if scope["path"] in _HEALTH:  # a probe asks every few seconds
            return
        told = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 1)}
        log.info("request", extra=told | ({"reason": kind} if kind else {}) | ({"key": key.name} if key else {}))


class Gate:
    """Lets a request in if it is meant for this server, which is ready, and the key is right; notes who sent it.

    Health, the page's own files and the description of the API are open without a key.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        self._hosts = frozenset(name.lower() for name in service.settings.accepted_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _HEALTH:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        self._check_address(scope["method"], headers)
        if _is_open(scope["path"]):
            await self.app(scope, receive, send)
            return
        key = self._check_key(headers)
        CALLER.set(key.digest if key else (scope.get("client") or ("",))[0])
        if not self.service.ready:
            raise BusyError(f"the server is {self.service.state}; try again shortly", retry_after=5)
        scope["state"]["key"] = key
        with self.service.keys.use(key) if key else nullcontext():
            await self.app(scope, receive, send)

    def _check_address(self, method: str, headers: Headers) -> None:
        """Refuse what a page of another site has a browser send: by a name made to lead here (DNS rebinding), or by a
        form or script of its own, whose Origin says so."""
        host = headers.get("host", "")
        if self._hosts and _hostname(host) not in self._hosts:
            raise MalformedError("this server is not known by the name in the request's Host; see the setting `hosts`")
        origin = headers.get("origin")
        if origin is None or method in _SAFE:
            return
        named = origin.partition("://")[2].lower()
        if named != host.lower() and _hostname(named) not in self._hosts:
            raise ForbiddenError("a page of another site may not change anything here; see the setting `hosts`")

    def _check_key(self, headers: Headers) -> Key | None:
        """The request's key; None where none is needed."""
        keys = self.service.keys
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = keys.find(token.strip()) if scheme.lower() == "bearer" else None
        if key is None and keys.required:  # in this order a good key costs one look at the folder
            raise UnauthorizedError("send an API key of this server as `Authorization: Bearer <key>`")
        return key


class Head:
    """Answers HEAD as GET, of which the server sends no body: probes and caches ask so, and routes know GET alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}  # the server goes by its own
        try:
            await self.app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")  # for metrics and the log


class BodyLimit:
    """Refuses bodies over `limit` bytes, by what arrives and not only by what Content-Length says."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and len(announced) < 20 and int(announced) > self.limit:
            if headers.get("expect", "").lower() != "100-continue":  # else nothing is on its way yet
                await self._drain(receive)
            raise self._error()

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                if message.get("more_body"):
                    await self._drain(receive)
                raise self._error()
            return message

        await self.app(scope, counted, send)

    async def _drain(self, receive: Receive) -> None:
        """Read on for a little and forget it."""
        drained = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while drained < _DRAIN_BODIES * self.limit:
                    message = await receive()
                    drained += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    def _error(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than {self.limit:,} bytes; send fewer or smaller inputs")


class Presence:
    """Cancels the work of a client that has hung up, so that its inputs leave the queue."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body_read, gone = asyncio.Event(), asyncio.Event()
        bodiless = "content-length" not in headers and "transfer-encoding" not in headers
        if bodiless:  # the only event still to come is the disconnect
            body_read.set()
        answered = body_given = False

        async def watched_receive() -> Message:
            nonlocal body_given
            if body_given:  # what sends a file waits here for the disconnect, which the watch below receives
                await gone.wait()
                return {"type": "http.disconnect"}
            message: Message = (
                {"type": "http.request", "body": b"", "more_body": False} if bodiless else await receive()
            )
            if not message.get("more_body"):
                body_given = True
                body_read.set()
            return message

        async def watched_send(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered = True
            await send(message)

        work = asyncio.current_task()
        assert work is not None  # noqa: S101 - servers run applications in tasks

        async def hang_up() -> None:
            await body_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not answered:
                work.cancel()

        watch = asyncio.ensure_future(hang_up())
        try:
            await self.app(scope, watched_receive, watched_send)
        except asyncio.CancelledError:
            if not gone.is_set() or work.uncancel():  # somebody else wants it to end
                raise
        finally:
            watch.cancel()


def _span(path: str, method: str, traceparent: str) -> AbstractContextManager[Span]:
    if path in _HEALTH:
        return nullcontext(INVALID_SPAN)
    return tracing.span(method, tracing.sent_by(traceparent), SpanKind.SERVER)


def _trace_id(span: Span) -> dict[str, str]:
    context = span.get_span_context()
    return {"trace_id": format_trace_id(context.trace_id)} if context.is_valid else {}


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(page.OPEN_FOLDERS)


def _hostname(address: str) -> str:
    """`name`, `name:port`, `[v6]` or `[v6]:port` -> the name or address in lower case."""
    if address.startswith("["):
        return address[1:].partition("]")[0].lower()
    return address.partition(":")[0].lower()
