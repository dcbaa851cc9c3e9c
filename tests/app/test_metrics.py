"""GET /metrics, and what stands in the log."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from support import running, tiny_dalle

from app.keys import Keyring
from app.metrics import Metrics
from app.middleware import Envelope

Start = Callable[..., TestClient]
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figures(client: TestClient | httpx.Client) -> Figures:
    """Every sample by its name and labels."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def of(found: Figures, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_requests_by_route_and_status(client: TestClient) -> None:
    for k in range(3):
        assert client.get("/collections/nowhere").status_code == 404, k
    client.get("/models")
    client.get("/no/such/page")
    client.request("BREW", "/models")
    found = figures(client)
    count = "http_request_duration_seconds_count"
    assert of(found, count, method="GET", route="/collections/{name}", status="404") == 3
    assert of(found, count, method="GET", route="/models", status="200") == 1
    assert of(found, count, method="GET", route="none", status="404") == 1
    assert {dict(labels)["method"] for name, labels in found if name == count} == {"GET", "other"}
    assert of(found, "semblance_rejections_total", reason="notfound") == 3
    assert of(found, "http_requests_in_flight") == 1  # the one that asks
    assert of(found, "process_resident_memory_bytes") > 1e6


def test_batches_queues_and_caches(client: TestClient, encoded: Callable[..., bytes]) -> None:
    texts = [f"text {number}" for number in range(5)]
    picture = base64.b64encode(encoded()).decode()
    assert client.post("/embed", json={"input": texts}).status_code == 200
    assert client.post("/embed", json={"input": [*texts[:2], "new"]}).status_code == 200
    assert client.post("/embed", json={"input": [{"image": picture}]}).status_code == 200
    for _ in range(2):
        body = {"input": {"image": picture}, "labels": ["a", "b"], "templates": ["{}"]}
        assert client.post("/zero-shot", json=body).status_code == 200
    found = figures(client)
    assert of(found, "semblance_batch_size_sum", model="clip", kind="text") == 5 + 1 + 2
    assert of(found, "semblance_batch_size_sum", model="clip", kind="image") == 3
    assert of(found, "semblance_queue_wait_seconds_count", model="clip", kind="text") == 8
    batches = of(found, "semblance_batch_size_count", model="clip", kind="image")
    assert of(found, "semblance_inference_seconds_count", model="clip", kind="image") == batches
    assert of(found, "semblance_inference_seconds_sum", model="clip", kind="image") > 0
    assert of(found, "semblance_decode_seconds_count", model="clip") == 3
    cache = "semblance_cache_requests_total"
    assert of(found, cache, model="clip", cache="text", result="miss") == 8
    assert of(found, cache, model="clip", cache="text", result="hit") == 2
    assert of(found, cache, model="clip", cache="labels", result="miss") == 1
    assert of(found, cache, model="clip", cache="labels", result="hit") == 1
    assert of(found, "semblance_queue_depth", model="clip", kind="image") == 0
    assert of(found, "semblance_ready") == 1


def test_collections(client: TestClient) -> None:
    items = [{"id": f"i{number}", "text": f"text {number}"} for number in range(7)]
    assert client.put("/collections/mine", json={}).status_code in (200, 201)
    assert client.post("/collections/mine/items", json={"items": items}).status_code == 200
    found = figures(client)
    assert of(found, "semblance_collection_items", collection="mine") == 7
    assert of(found, "semblance_collection_indexed_items", collection="mine") <= 7
    client.delete("/collections/mine")
    assert not any(name == "semblance_collection_items" for name, _ in figures(client))


def test_the_age_of_an_index_is_that_of_its_snapshot(client: TestClient) -> None:
    assert client.put("/collections/mine", json={"index": "hnsw"}).status_code in (200, 201)
    collections = client.app.state.service.collections  # type: ignore[attr-defined]
    assert collections.coverage("mine")[2] is None
    place = collections._snapshot(collections.get("mine").key)
    place.parent.mkdir(exist_ok=True)
    place.with_suffix(".json").write_text("{}")
    assert 0 <= of(figures(client), "semblance_index_age_seconds", collection="mine") < 60


def test_drawing(start: Start) -> None:
    client = start(generators={"dalle": tiny_dalle()})
    assert client.post("/generate", json={"prompt": "a red star", "rerank": False}).status_code == 200
    found = figures(client)
    assert of(found, "semblance_generation_step_seconds_count", model="dalle") >= 16
    assert of(found, "semblance_queue_depth", model="dalle", kind="drawing") == 0


def test_metrics_want_a_key_where_one_is_asked_for(start: Start) -> None:
    client = start(api_keys=("secret",))
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_client_that_leaves_is_counted_as_499(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Presence cancels its work, so nothing is answered."""

    async def left(scope: object, receive: object, send: object) -> None:
        return

    metrics = Metrics()
    caplog.set_level(logging.INFO, "semblance.requests")
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    asyncio.run(Envelope(left, metrics)(scope, None, None))  # type: ignore[arg-type]
    assert b'status="499"' in metrics.text()
    assert caplog.records[-1].status == 499  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
@pytest.mark.parametrize("path", ["/embed", "/collections/default/items"])
def test_a_client_that_leaves_while_it_sends_is_no_bug(
    client: TestClient, caplog: pytest.LogCaptureFixture, path: str, kind: str
) -> None:
    caplog.set_level(logging.INFO)
    client.put("/collections/default", json={})
    begun = b'{"input": "a' if "json" in kind else b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\na'
    messages = [{"type": "http.request", "body": begun, "more_body": True}, {"type": "http.disconnect"}]
    headers = [(b"host", b"localhost"), (b"content-type", kind.encode()), (b"content-length", b"5000")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send(message: object) -> None:
        raise AssertionError(message)

    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    line = caplog.records[-1]
    assert (line.status, line.route, hasattr(line, "reason")) == (499, path.replace("default", "{name}"), False)  # type: ignore[attr-defined]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    found = figures(client)
    assert of(found, "http_request_duration_seconds_count", method="POST", route=line.route, status="499") == 1  # type: ignore[attr-defined]
    assert not any(value for (name, _), value in found.items() if name == "semblance_rejections_total")


def test_the_log_tells_what_was_done_and_not_what_was_asked(
    checkpoints: Path, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    """Whatever a request carries is marked, and the mark is looked for; errors of every kind are among them."""
    mark, picture = "zebrafinch", base64.b64encode(encoded()).decode()
    token = Keyring(tmp_path / "data").create("site", "write")
    trace = "0af7651916cd43dd8448eb211c80319c"
    with (
        running(checkpoints, tmp_path / "data") as server,
        httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {token}"}) as client,
    ):
        named = {"X-Request-ID": "known-id", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        assert client.post("/embed", json={"input": mark}, headers=named).status_code == 200
        assert client.put("/collections/default", json={}).status_code in (200, 201)
        item = {"image": picture, "caption": mark, "metadata": {mark: mark}}
        assert client.post("/collections/default/items", json={"items": [item]}).status_code == 200
        assert client.get("/search", params={"q": mark}).status_code == 200
        assert client.get(f"/{mark}").status_code == 404
        assert client.get(f"/collections/{mark}").status_code == 404
        assert client.post("/embed", json={mark: mark}).status_code == 422
        assert client.post("/embed", content=f'{{"input": {mark}').status_code in (400, 422)
        broken = base64.b64encode(b"\x89PNG\r\n\x1a\n" + mark.encode() * 9).decode()
        assert client.post("/embed", json={"input": {"image": broken}}).status_code in (415, 422)
        assert client.get("/models", headers={"Authorization": f"Bearer {mark}"}).status_code == 401
        assert client.get("/readyz").status_code == 200
        server.process.send_signal(signal.SIGTERM)  # a line is written after its answer
        assert server.process.wait(20) == 0
        written = server.log.read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) == 10  # health is not among them
    assert requests[0] | {"ms": 0, "timestamp": ""} == {
        "event": "request",
        "level": "info",
        "logger": "semblance.requests",
        "timestamp": "",
        "request_id": "known-id",
        "trace_id": trace,
        "method": "POST",
        "route": "/embed",
        "status": 200,
        "ms": 0,
        "key": "site",
    }
    assert [line["reason"] for line in requests if line["status"] == 401] == ["unauthorized"]
    assert mark not in written
    assert token.removeprefix("sem_") not in written
    assert picture[40:80] not in written
