"""Pictures that a request names by URL: from the hosts that the operator allows, and never from a network within.

The address that was checked is the one connected to, for each connection and so for each redirect: no second look at a
name can lead elsewhere (DNS rebinding). No proxy of the environment is asked.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import urljoin, urlsplit
from weakref import WeakValueDictionary

import httpcore

from app.fairness import CALLER, CALLERS_PART
from models.errors import DeadlineError, ForbiddenError, InputError, SemblanceError, TooLargeError

_REDIRECTS = 3
_AT_ONCE = 16
_PORTS = {None, 80, 443}
_HEADERS = [(b"Accept", b"image/*"), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"semblance")]
_GLOBAL_V6 = ip_network("2000::/3")
# Within what `is_global` of some Python or other calls public: relays, translations, transition mechanisms, examples.
_SPECIAL = tuple(
    map(
        ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)


class Fetcher:
    """Reads pictures from URLs, so many at once. Made inside the event loop that will use it.

    hosts: `example.com`, `*.example.com` for what is below it, `*` for any. limit: bytes. seconds: for one, from when
    it has a place.
    """

    def __init__(self, hosts: Sequence[str], limit: int, seconds: float) -> None:
        self._hosts = [host.lower() for host in hosts]
        self._limit, self._seconds = limit, seconds
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # of callers that are waiting
        self._pool = httpcore.AsyncConnectionPool(network_backend=_Pinned(), max_connections=_AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """What is at an http(s) URL.

        Raises:
            ForbiddenError: its host is not allowed or leads to an address that is not public. InputError: it is no URL,
            or nothing is there. TooLargeError: over the limit. DeadlineError: not there in time.
        """
        try:
            share = self._shares.setdefault(CALLER.get(), asyncio.Semaphore(int(CALLERS_PART * _AT_ONCE)))
            async with share, self._places, asyncio.timeout(self._seconds):
                for _ in range(_REDIRECTS + 1):
                    self._check(url)
                    content, onward = await self._get(url)
                    if onward is None:
                        return content
                    url = urljoin(url, onward)
        except TimeoutError:
            raise DeadlineError(f"the picture's URL was not answered within {self._seconds:g} s") from None
        except SemblanceError:
            raise
        except Exception as error:  # whatever a foreign server does
            raise InputError(f"the picture's URL cannot be read ({type(error).__name__})") from error
        raise InputError(f"the picture's URL leads on more than {_REDIRECTS} times")

    async def close(self) -> None:
        """Let its connections go."""
        await self._pool.aclose()

    async def _get(self, url: str) -> tuple[bytes, str | None]:
        """The content, or where to look instead."""
        async with self._pool.stream("GET", url, headers=[(b"Host", _host(url)), *_HEADERS]) as response:
            if response.status in (301, 302, 303, 307, 308):
                onward = next((value for name, value in response.headers if name.lower() == b"location"), None)
                if onward is not None:
                    return b"", onward.decode("ascii")
            if response.status != 200:
                raise InputError(f"the picture's URL answers with status {response.status}")
            content = bytearray()
            async for part in response.aiter_stream():
                content += part
                if len(content) > self._limit:
                    raise TooLargeError(f"the picture at the URL has more than {self._limit:,} bytes")
        return bytes(content), None

    def _check(self, url: str) -> None:
        if not url.isascii() or not url.isprintable() or "\\" in url or " " in url:
            raise InputError("the picture's URL has characters that no URL has; percent-encode them")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise InputError("the picture's URL cannot be read as one") from None
        if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
            raise InputError("a picture's URL is http(s)://host/path, without a user")
        if port not in _PORTS:
            raise ForbiddenError("a picture's URL has port 80 or 443")
        if not any(_matches(host, allowed) for allowed in self._hosts):
            raise ForbiddenError(f"this server fetches nothing from {host[:80]!r}; see the setting `fetch_hosts`")


def _matches(host: str, allowed: str) -> bool:
    return allowed in ("*", host) or (allowed.startswith("*.") and host.endswith(allowed[1:]))


def _host(url: str) -> bytes:
    return urlsplit(url).netloc.encode("ascii")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of the Internet's own: of no network within, and of no way around that."""
    if isinstance(address, IPv6Address) and address not in _GLOBAL_V6:
        return False  # loopback, link-local, unique local, mapped and translated IPv4, multicast
    special = any(address in network for network in _SPECIAL if network.version == address.version)
    return address.is_global and not address.is_multicast and not special


class _Pinned(httpcore.AsyncNetworkBackend):
    """Looks a name up once, checks every address it has, and connects to one of those."""

    def __init__(self) -> None:
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise InputError("the host of the picture's URL is not known") from None
        addresses = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        if not addresses or not all(map(is_public, addresses)):
            raise ForbiddenError("the host of the picture's URL has an address that is not public")
        return await self._network.connect_tcp(str(addresses[0]), port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, path: str, *rest: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        raise ForbiddenError("a picture's URL leads to no socket")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
