"""Row 31: clients that open a connection and send nothing, half a head, half a body, or drops of one; and heads that
are too large or that say what is not read."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from support import Server, running

# `make stalls` has the settings' own limits.
HEAD, BODY, EACH = (10.0, 30.0, 100) if "STALLS" in os.environ else (1.5, 3.0, 100)
START = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
ASK = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
CASES = {
    "nothing": (b"", HEAD),
    "head": (START[:40], HEAD),
    "body": (START + b'{"input": "', BODY),
    "drops": (START, BODY),
}


@pytest.fixture(scope="module")
def server(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"SEMBLANCE_HEAD_SECONDS": str(HEAD), "SEMBLANCE_BODY_SECONDS": str(BODY)}
    with running(checkpoints, tmp_path_factory.mktemp("stalls") / "data", **limits) as running_server:
        yield running_server


def test_row_31_stalled_connections_are_closed_and_hurt_nobody(server: Server) -> None:
    """A hundred of each kind at once, while a healthy client asks on and on."""
    with httpx.Client(base_url=server.url, timeout=10) as client:
        alone = [_asked(client, f"alone {number}") for number in range(100)]
    waiting = selectors.DefaultSelector()
    opened = time.monotonic()
    for kind, (sent, _) in CASES.items():
        for _ in range(EACH):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(sent)
            connection.setblocking(False)
            waiting.register(connection, selectors.EVENT_READ, kind)
    closed: dict[str, list[float]] = {kind: [] for kind in CASES}
    took: list[float] = []
    with httpx.Client(base_url=server.url, timeout=10) as client:
        _asked(client, "when all have been accepted")  # to stall is what is looked at, and not to come at once
        while waiting.get_map() and time.monotonic() - opened < BODY + 30:
            took.append(_asked(client, f"text {len(took)}"))
            for key, _ in waiting.select(0):
                with key.fileobj as connection, suppress(ConnectionResetError):  # type: ignore[union-attr]
                    waiting.unregister(connection)
                    assert connection.recv(100) == b""  # or a reset, where a drop came after the end
                closed[key.data].append(time.monotonic() - opened)
            for key in list(waiting.get_map().values()):
                if key.data == "drops":
                    with suppress(OSError):
                        key.fileobj.send(b" ")  # type: ignore[union-attr]
            time.sleep(0.02)
        for key in list(waiting.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    for kind, (_, limit) in CASES.items():
        assert len(closed[kind]) == EACH, (kind, len(closed[kind]))
        assert min(closed[kind]) > limit * 0.6
        assert max(closed[kind]) < limit + 4
    assert "Traceback" not in server.log.read_text()
    (p50, p99), (p50_alone, p99_alone) = (1e3 * np.percentile(each, [50, 99]) for each in (took, alone))
    print(
        f"{4 * EACH} stalled connections; {len(took)} requests beside them: p50 {p50:.0f} and p99 {p99:.0f} ms, "
        f"{p50_alone:.0f} and {p99_alone:.0f} alone; slowest {1e3 * max(took):.0f}"
    )


def _asked(client: httpx.Client, text: str) -> float:
    """Seconds until a good answer."""
    began = time.monotonic()
    assert client.post("/embed", json={"input": text}).status_code == 200
    return time.monotonic() - began


def test_a_connection_that_is_used_again_is_timed_again(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(ASK)
            answer = b""
            while not answer.endswith(b"}"):
                part = connection.recv(4096)
                assert part, answer
                answer += part
            assert b" 200 " in answer
            time.sleep(HEAD + 0.5)  # idle, which is no stall
        connection.sendall(ASK[:10])
        began = time.monotonic()
        assert connection.recv(100) == b""
        assert HEAD - 0.5 < time.monotonic() - began < HEAD + 3


def test_bytes_that_begin_no_request_do_not_keep_a_connection(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(ASK)
        while not connection.recv(4096).endswith(b"}"):
            pass
        began = time.monotonic()
        connection.sendall(b"\r\n")
        time.sleep(HEAD / 2)
        connection.sendall(b"\r\n")  # which does not make it longer
        assert connection.recv(100) == b""
        assert HEAD - 0.5 < time.monotonic() - began < HEAD + 0.7


HOST = b"GET /models HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (HOST + b"X-A: %s\r\n\r\n" % (b"a" * 70_000), b""),
        (b"GET /models?%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 70_000), b""),
        (HOST + b"X-A: ", b"a" * 10_000),
        (HOST, b"".join(b"X-%04d: v\r\n" % number for number in range(1000))),
    ],
)
def test_a_head_over_64_kib_is_refused_whether_or_not_it_ends(server: Server, head: bytes, more: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(ASK)
        while not connection.recv(4096).endswith(b"}"):
            pass
        answer = _sent(connection, head, more)
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b"application/problem+json" in answer
    assert b"larger than 64 KiB" in answer


def test_a_trailer_without_end_is_hung_up_on(server: Server) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        assert _sent(connection, CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-A: b\r\n" * 1000) == b""
    assert time.monotonic() - began < BODY - 0.5


def _sent(connection: socket.socket, head: bytes, more: bytes) -> bytes:
    """Everything that is answered to a head that goes on for up to 1 MB."""
    with suppress(OSError):
        connection.sendall(head)
        for _ in range(1_000_000 // len(more) if more else 0):
            connection.sendall(more)
            time.sleep(0.001)
    answer = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            answer += part
    return answer


def test_large_heads_and_bodies_below_the_limits_are_read_one_after_another(server: Server) -> None:
    """Each head is counted by itself, and no body is."""
    body = b'{"input": "a"%s}' % (b" " * 200_000)
    padding = b"".join(b"X-%04d: %s\r\n" % (number, b"a" * 1000) for number in range(60))
    embed = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    plain = embed + padding + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:150_000], body[150_000:]))
    chunked = embed + padding + b"Transfer-Encoding: Chunked\r\n\r\n" + chunks + b"0\r\nX-Last: 1\r\n\r\n"
    last = ASK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(plain + chunked + plain + last)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1 200 OK") == 4


def test_a_transfer_coding_that_is_not_read_is_refused(server: Server) -> None:
    head = CHUNKED.replace(b"chunked", b"gzip, chunked")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        assert b"HTTP/1.1 501 " in _sent(connection, head + b"2\r\n{}\r\n0\r\n\r\n", b"")


def test_a_slow_body_that_comes_on_is_read_to_its_end(server: Server) -> None:
    text = b'{"input": "%s"}' % (b"a" * 1500)
    body = text + b" " * (100_000 - len(text))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(START)
        for start in range(0, len(body), 20_000):
            connection.sendall(body[start : start + 20_000])
            time.sleep(BODY / 3)
        assert b" 200 " in connection.recv(4096).partition(b"\r\n")[0]
