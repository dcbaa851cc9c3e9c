"""HTTP/1.1 over one kept connection, for benchmarks: httpx takes as long for a request as a fast server does, on cores
that both share, and so makes unlike servers look alike."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.I)
_PATIENCE = 120  # seconds for an answer


class Connection:
    """To one server at a time, opened when it is first needed and again after it was closed."""

    def __init__(self) -> None:
        self._server = ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def status(self, url: str, body: bytes = b"") -> int:
        """POST a JSON body, or GET where there is none, and read the answer to its end; 0 if the server hangs up or is
        silent."""
        where = urlsplit(url)
        target = f"{where.path}?{where.query}" if where.query else where.path
        head = f"{'POST' if body else 'GET'} {target} HTTP/1.1\r\nHost: {where.netloc}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            async with asyncio.timeout(_PATIENCE):
                if self._streams is None or self._streams[0].at_eof() or self._server != where.netloc:
                    self.close()
                    self._streams = await asyncio.open_connection(where.hostname, where.port)
                    self._server = where.netloc
                reader, writer = self._streams
                writer.write(head.encode() + b"\r\n" + body)
                return await self._answer(reader)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0

    async def _answer(self, reader: asyncio.StreamReader) -> int:
        head = await reader.readuntil(b"\r\n\r\n")
        if _CHUNKED.search(head):
            while size := int(await reader.readuntil(b"\r\n"), 16):
                await reader.readexactly(size + 2)
            await reader.readexactly(2)
        else:
            length = _LENGTH.search(head)
            assert length, head
            await reader.readexactly(int(length[1]))
        if b"\r\nconnection: close" in head.lower():
            self.close()
        return int(head[9:12])

    def close(self) -> None:
        """Hang up; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None
