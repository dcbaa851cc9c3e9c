"""Spans of a real server, as a collector gets them, and what must not be in them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from support import running

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class _Collector(ThreadingHTTPServer):
    """Keeps the bodies that are sent to /v1/traces."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def spans(self) -> dict[str, Span]:
        found = {}
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {each.key: each.value.string_value for each in resource.resource.attributes}
                assert names["service.name"] == "semblance"
                found |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
        return found


class _Handler(BaseHTTPRequestHandler):
    server: _Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[_Collector]:
    with _Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_request_is_a_span_of_its_callers_trace_and_says_nothing_of_what_was_asked(
    checkpoints: Path, tmp_path: Path, collector: _Collector
) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    with running(checkpoints, tmp_path / "data", **{ENDPOINT: endpoint}) as server:
        with httpx.Client(base_url=server.url, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}) as client:
            assert client.put("/collections/default", json={}).status_code == 200
            assert client.get("/search", params={"q": "a confidential star"}).status_code == 200
            assert client.post("/zero-shot", json={"input": "x", "labels": []}).status_code == 422
            assert client.get("/collections/confidential").status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        log = server.log.read_text()
    spans = collector.spans()
    assert {"PUT /collections/{name}", "GET /search", "POST /zero-shot", "embed texts", "store"} <= spans.keys()
    assert "GET /readyz" not in spans  # a probe asks every few seconds
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    search = spans["GET /search"]
    assert (search.parent_span_id.hex(), search.kind) == (PARENT, Span.SPAN_KIND_SERVER)
    assert spans["embed texts"].parent_span_id == search.span_id
    attributes = {each.key: each.value for each in search.attributes}
    assert attributes["http.route"].string_value == "/search"
    assert attributes["http.response.status_code"].int_value == 200
    assert spans["POST /zero-shot"].status.code == Status.STATUS_CODE_UNSET  # the client's error and not the server's
    assert not any(b"confidential" in body for body in collector.bodies)
    assert TRACE in log


def test_what_sends_traces_is_missed_by_name(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    code = "import sys; sys.modules['opentelemetry.sdk'] = None; from app.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "--checkpoints", str(checkpoints), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'semblance[tracing]'" in done.stderr
    assert "Traceback" not in done.stderr
