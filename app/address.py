"""Where a server listens: its sockets, and how others call it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from models.errors import SemblanceError

_BACKLOG = 2048  # connections that wait to be accepted, as uvicorn has it


def url_of(host: str, port: int) -> str:
    """An address as a client asks for it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def bound(host: str, port: int) -> Iterator[tuple[str, list[socket.socket]]]:
    """-> the URL, and a socket for each address of `host`, all with the same port: a free one, where it is 0. They are
    had and do not listen yet.

    Raises SemblanceError, naming the address and the way out.
    """
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        with _told(url_of(host, port)):
            away: OSError | None = None
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, place in dict.fromkeys(found):
                try:
                    each = opened.enter_context(socket.socket(family, kind, protocol))
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:  # or it would take IPv4's connections too
                        each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    each.bind((place[0], port, *place[2:]))
                except OSError as error:
                    if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                        raise
                    away = error  # such as localhost's ::1 where there is no IPv6
                else:
                    sockets.append(each)
                    port = each.getsockname()[1]
            if away is not None and not sockets:
                raise away
        yield url_of(host, port), sockets


def listen(url: str, sockets: Sequence[socket.socket]) -> None:
    """Have connections wait for who accepts them. Raises SemblanceError if another process was first."""
    with _told(url):
        for each in sockets:
            each.listen(_BACKLOG)


@contextmanager
def _told(url: str) -> Iterator[None]:
    named = url.removeprefix("http://")
    try:
        yield
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise SemblanceError(f"{named} is taken: stop what listens there, or give another --port") from error
        said = getattr(error, "strerror", None) or error
        raise SemblanceError(f"{named} cannot be had ({said}): give another --host or --port") from error
