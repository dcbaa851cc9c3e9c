"""uvicorn as it is used here: how long a connection may keep a request waiting that it has begun to send, and what a
signal to end begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_PROGRESS = 16_384  # bytes of a body; who sends fewer in the time given is taken to have stalled


def punctual(head_seconds: float, body_seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which has no such limit, with one: a connection is closed whose request's head has not come
    `head_seconds` after it was opened (or after the request's first byte, on one that was used before), or whose body
    has not come on for `body_seconds`."""

    class Punctual(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _arrived = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect(head_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._arrived += len(data)
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect(head_seconds)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._expect(body_seconds)

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            if self._arrived >= _PROGRESS:
                self._expect(body_seconds)

        def on_message_complete(self) -> None:
            self._expect(None)
            super().on_message_complete()

        def _expect(self, seconds: float | None) -> None:
            """The next thing in so many seconds; None: nothing."""
            if self._timer is not None:
                self._timer.cancel()
            self._arrived = 0
            self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

        def _late(self) -> None:
            if self.flow.read_paused:  # it is the server that does not read on
                self._expect(body_seconds)
            elif not self.transport.is_closing():
                self.transport.close()

    return Punctual


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which tells the application at a signal, and not only when the last request is answered."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self._drain()
        super().handle_exit(sig, frame)
