"""Rows 11 to 13: pictures by URL, from the hosts that are allowed and never from a network within."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import httpcore
import pytest
from starlette.testclient import TestClient
from support import problem

from app import fetching
from app.fetching import Fetcher, is_public
from models.errors import ForbiddenError, InputError

Start = Callable[..., TestClient]
Encoded = Callable[..., bytes]
Origin = dict[str, Callable[[BaseHTTPRequestHandler], None]]
PUBLIC = "93.184.215.14"

WITHIN = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.0.0.8",
    "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::1", "3fff::1", "fc00::1", "fd12::1", "fe80::1",
    "fec0::1", "ff02::1",
]  # fmt: skip


@pytest.mark.parametrize("address", WITHIN)
def test_row_12_addresses_within(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"])
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names lead to; and, under the name with a +, how often each was looked up."""
    known: dict[str, list[str]] = {}

    async def getaddrinfo(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        known.setdefault(f"{host}+", []).append("")
        if host not in known:
            return await asyncio.to_thread(socket.getaddrinfo, host, port, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return known


@pytest.fixture
def origin(lookups: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    """A server on this machine that stands at the public address, by its paths."""
    answers: Origin = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers[self.path](self)

        def log_message(self, *given: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    connect = httpcore.AnyIOBackend.connect_tcp

    async def moved(self: Any, host: str, port: int, *rest: Any) -> Any:
        assert host == PUBLIC, host  # nothing is connected to that was not checked
        return await connect(self, "127.0.0.1", server.server_port, *rest)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", moved)
    lookups["pictures.example"] = [PUBLIC]
    yield answers
    server.shutdown()
    server.server_close()


def gives(content: bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


@pytest.fixture
def client(start: Start) -> TestClient:
    return start(fetch_hosts=("pictures.example", "*.cdn.example"), fetch_seconds=2)


def embed(client: TestClient, *urls: str) -> Any:
    return client.post("/embed", json={"input": [{"image": url} for url in urls]})


def test_a_url_gives_what_the_file_gives(client: TestClient, origin: Origin, encoded: Encoded) -> None:
    origin["/a.jpg"] = gives(encoded(seed=1))
    origin["/b"] = gives(b"", 302, Location="/a.jpg")
    sent = client.post("/embed", json={"input": {"image": base64.b64encode(encoded(seed=1)).decode()}}).json()
    found = embed(client, "http://pictures.example/a.jpg", "HTTP://PICTURES.EXAMPLE:80/b").json()
    assert found["data"][0]["embedding"] == pytest.approx(sent["data"][0]["embedding"], abs=1e-6)
    assert found["data"][1]["embedding"] == found["data"][0]["embedding"]


def test_every_endpoint_reads_them(client: TestClient, origin: Origin, encoded: Encoded) -> None:
    origin["/a"] = gives(encoded(seed=1))
    picture = {"image": "http://pictures.example/a"}
    assert client.post("/zero-shot", json={"input": picture, "labels": ["a", "b"]}).status_code == 200
    assert client.post("/similarity", json={"a": [picture], "b": ["x", picture]}).status_code == 200
    assert client.post("/rank", json={"query": "x", "documents": [picture]}).status_code == 200
    client.put("/collections/mine", json={})
    assert client.post("/collections/mine/items", json={"items": [{"id": "a", **picture}]}).status_code == 200
    hits = client.post("/search", json={"collection": "mine", "query": picture}).json()["hits"]
    assert hits[0]["score"] > 0.99


def test_row_13_over_the_limit(start: Start, origin: Origin, encoded: Encoded) -> None:
    client = start(fetch_hosts=("pictures.example",), max_body=20_000)
    origin["/one"] = gives(b"x" * 20_001)
    problem(embed(client, "http://pictures.example/one"), 413, "more than 20,000 bytes")
    origin["/part"] = gives(b"x" * 11_000)
    problem(embed(client, "http://pictures.example/part", "http://pictures.example/part"), 413, "together")

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 1000)
        except OSError:
            pass

    origin["/endless"] = endless
    problem(embed(client, "http://pictures.example/endless"), 413, "more than 20,000 bytes")


def test_the_time_of_each_counts_from_its_place_on(start: Start, origin: Origin, encoded: Encoded) -> None:
    client = start(fetch_hosts=("pictures.example",), fetch_seconds=1.5)
    picture = gives(encoded(seed=1))

    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.4)
        picture(handler)

    origin["/slow"] = slow
    assert embed(client, *["http://pictures.example/slow"] * 60).status_code == 200


def test_all_pictures_of_a_request_have_its_time_together(start: Start, origin: Origin, encoded: Encoded) -> None:
    client = start(fetch_hosts=("pictures.example",), fetch_seconds=5, deadline=0.3)
    origin["/slow"] = lambda handler: time.sleep(1)
    problem(embed(client, "http://pictures.example/slow"), 504, "read from its URLs")


def test_row_13_slow(client: TestClient, origin: Origin) -> None:
    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    origin["/slow"] = slow
    began = time.monotonic()
    problem(embed(client, "http://pictures.example/slow"), 504, "within 2 s")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("host", "addresses"),
    [("127.0.0.1", None), ("[::1]", None), ("2130706433", None), ("0x7f.1", None), ("0177.0.0.1", None),
     ("localhost", None), ("[::ffff:127.0.0.1]", None), ("169.254.169.254", None), ("inner.example", ["10.0.0.5"]),
     ("mixed.example", [PUBLIC, "127.0.0.1"]), ("nowhere.example", [])],
)  # fmt: skip
def test_row_12_addresses_within_are_not_connected_to(
    start: Start, origin: Origin, lookups: dict[str, list[str]], host: str, addresses: list[str] | None
) -> None:
    """Whatever is allowed: `origin` fails the test if anything but the public address is connected to."""
    client = start(fetch_hosts=("*",))
    if addresses is not None:
        lookups[host] = addresses
    problem(embed(client, f"http://{host}/a"), 403, "not public")


def test_row_12_a_redirect_within_is_refused(start: Start, origin: Origin) -> None:
    client = start(fetch_hosts=("*",))
    origin["/a"] = gives(b"", 301, Location="http://127.0.0.1/secret")
    problem(embed(client, "http://pictures.example/a"), 403, "not public")
    origin["/b"] = gives(b"", 301, Location="file:///etc/passwd")
    problem(embed(client, "http://pictures.example/b"), 422, "without a user")
    origin["/c"] = gives(b"", 301, Location="/c")
    problem(embed(client, "http://pictures.example/c"), 422, "more than 3 times")


def test_row_12_a_redirect_to_a_host_that_is_not_allowed(client: TestClient, origin: Origin) -> None:
    origin["/a"] = gives(b"", 307, Location="http://other.example/")
    problem(embed(client, "http://pictures.example/a"), 403, "other.example")


def test_row_12_a_name_is_looked_up_once_and_the_checked_address_connected_to(
    client: TestClient, origin: Origin, lookups: dict[str, list[str]], encoded: Encoded
) -> None:
    def rebound(handler: BaseHTTPRequestHandler) -> None:
        lookups["pictures.example"] = ["127.0.0.1"]
        gives(encoded())(handler)

    origin["/a"] = rebound
    assert embed(client, "http://pictures.example/a").status_code == 200
    assert len(lookups["pictures.example+"]) == 1


@pytest.mark.parametrize(
    ("url", "status"),
    [("http://pictures.example.evil.example/", 403), ("http://evil.example/pictures.example", 403),
     ("http://cdn.example/", 403), ("http://xcdn.example/", 403), ("http://user@pictures.example/", 422),
     ("http://pictures.example@evil.example/", 422), ("http://evil.example\\@pictures.example/", 422),
     ("http://pictures.example:22/", 403), ("http://pictures.example:99999/", 422), ("http:///a", 422),
     ("http://pictures.example/\u00e4", 422), ("http://pictures.example/\r\nX: y", 422), ("https://[::1/", 422)],
)  # fmt: skip
def test_row_12_hosts_that_only_look_allowed(client: TestClient, url: str, status: int) -> None:
    problem(embed(client, url), status)


def test_what_is_not_there(client: TestClient, origin: Origin, lookups: dict[str, list[str]]) -> None:
    origin["/gone"] = gives(b"no", 404)
    answer = problem(embed(client, "http://pictures.example/gone"), 422, "status 404")
    assert answer["input"] == 0
    origin["/text"] = gives(b"<html>")
    problem(embed(client, "http://pictures.example/text"), 415, "input 0")

    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")

    origin["/cut"] = cut
    problem(embed(client, "http://pictures.example/cut"), 422, "cannot be read")
    problem(embed(client, *["http://pictures.example/gone"] * 65), 413, "64 of one call")


def test_without_the_setting_nothing_is_made(start: Start) -> None:
    assert start().app.state.service.fetcher is None  # type: ignore[attr-defined]


def test_alone() -> None:
    async def ask(url: str) -> bytes:
        fetcher = Fetcher(["*"], 1000, 1)
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.close()

    with pytest.raises(ForbiddenError):
        asyncio.run(ask("http://127.0.0.1/"))
    with pytest.raises(InputError):
        asyncio.run(ask("gopher://x"))
    with pytest.raises(ForbiddenError):
        asyncio.run(fetching._Pinned().connect_unix_socket("/run/docker.sock"))
