"""uvicorn as it is used here: how long a connection may keep a request waiting that it has begun to send, how large a
head may be, and what a signal to end begins."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Callable
from types import FrameType

import httptools
import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.errors import problem
from app.settings import Settings

_PROGRESS = 16_384  # bytes of a body; who sends fewer in the time given is taken to have stalled
_HEAD = 65_536  # bytes of a request's head, or of what is neither head nor body
_TOO_LARGE = 431, "the request's head is larger than 64 KiB; send fewer or shorter headers"
_LINGER = 0.5  # seconds in which a client that is still sending can read why it was refused


def punctual(head_seconds: float, body_seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which has no such limits, with some: a connection is closed whose request's head has not come
    `head_seconds` after it was opened (or after the next byte, on one that was used before), or whose body has not come
    on for `body_seconds`. A head of more than 64 KiB is answered 431."""
    return type("Punctual", (_Punctual,), {"head_seconds": head_seconds, "body_seconds": body_seconds})


class _Punctual(HttpToolsProtocol):
    head_seconds = body_seconds = 0.0
    _timer: asyncio.TimerHandle | None = None
    _arrived = 0
    _unread = 0  # bytes since the parser last came to an end: of a head, of a part of a body, of a request
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._arrived += len(data)
        self._unread += len(data)
        super().data_received(data)
        if self._unread > _HEAD:
            self._refuse(*_TOO_LARGE)
        elif self._timer is None and self.timeout_keep_alive_task is None and self._idle():
            self._expect(self.head_seconds)  # those bytes began no request, and they ended uvicorn's own timer

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect(self.head_seconds)

    def on_headers_complete(self) -> None:
        self._unread = 0
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _HEAD:
            self._refuse(*_TOO_LARGE)
        elif any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers):
            self._refuse(501, "of transfer codings only `chunked` is read; send the body without another one")
        if self._refused:
            raise httptools.HttpParserError("refused")  # or the rest of what came would be read
        super().on_headers_complete()
        self._expect(self.body_seconds)

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)
        if self._arrived >= _PROGRESS:
            self._expect(self.body_seconds)

    def on_message_complete(self) -> None:
        self._unread = 0
        self._expect(None)
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            super().send_400_response(msg)

    def _idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: int, says: str) -> None:
        """Answer for the application and hang up; without an answer where that would go into another one."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if not self._idle():
            self.transport.close()
            return
        request_id = uuid.uuid4().hex
        headers = {"Connection": "close", "X-Request-ID": request_id}
        answer = problem(HTTPException(status, says, headers), request_id)
        lines = [b"%s: %s\r\n" % header for header in answer.raw_headers]
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", bytes(answer.body)]))
        self._expect(_LINGER)

    def _expect(self, seconds: float | None) -> None:
        """The next thing in so many seconds; None: nothing."""
        if self._timer is not None:
            self._timer.cancel()
        self._arrived = 0
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self.flow.read_paused:  # it is the server that does not read on
            self._expect(self.body_seconds)
        elif not self.transport.is_closing():
            self.transport.close()


def config_of(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How a server with these settings runs an application."""
    return uvicorn.Config(
        app,
        http=punctual(settings.head_seconds, settings.body_seconds),
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        # Longer than clients and load balancers keep an idle connection (httpx 5 s, AWS 60): if both give up at the
        # same time, a request that is just on its way is hung up on.
        timeout_keep_alive=75,
        # Else the callers behind a proxy are one, and share what one may have.
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
    )


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which tells the application at a signal, and not only when the last request is answered."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self._drain()
        super().handle_exit(sig, frame)
