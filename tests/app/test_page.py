"""What the server does for the page: its files, and what the rooms ask of it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from starlette.responses import FileResponse
from starlette.testclient import TestClient
from support import problem

from app.middleware import Presence
from app.plane import Unfolding, principal_plane


def fill(client: TestClient, **items: str) -> None:
    client.put("/collections/default").raise_for_status()
    body = {"items": [{"id": id, "text": text, "metadata": {"n": len(text)}} for id, text in items.items()]}
    client.post("/collections/default/items", json=body).raise_for_status()


def test_the_page_is_open_and_strict_where_a_key_is_needed(start: Callable[..., TestClient]) -> None:
    client = start(api_keys=("secret",))
    for path in ("/", "/static/main.js", "/static/style.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-cache"
        assert client.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    for path in ("/docs", "/docs/static/swagger-ui-bundle.js", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert "https://" not in client.get("/docs").text
    assert client.get("/models").status_code == 401
    problem(client.get("/static/../main.py"), 401, "API key")
    problem(client.get("/static/nothing.js"), 404, "Not Found")
    problem(client.post("/static/main.js"), 405, "Not Allowed")


def test_one_that_sends_a_file_waits_for_the_disconnect_without_spinning(tmp_path: Path) -> None:
    """Starlette's FileResponse asks for messages until one is a disconnect; more than one body would never end."""
    file = tmp_path / "file.txt"
    file.write_text("words")
    asked = 0

    async def application(scope, receive, send):
        async def counted():
            nonlocal asked
            asked += 1
            assert asked < 5
            return await receive()

        await FileResponse(file)(scope, counted, send)

    async def run() -> list[str]:
        sent: list[str] = []
        done = asyncio.Event()

        async def receive():
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message["type"])

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}
        async with asyncio.timeout(10):
            await Presence(application)(scope, receive, send)
        return sent

    assert asyncio.run(run())[0] == "http.response.start"


def test_an_item_is_a_part_of_a_query(client: TestClient) -> None:
    fill(client, a="a red circle", b="a blue square", c="green")
    (hit, *_) = client.post("/search", json={"query": {"item": "b"}}).json()["hits"]
    assert (hit["id"], round(hit["score"], 5)) == ("b", 1.0)
    mixed = [{"item": "a", "weight": 0.5}, {"text": "a blue square"}, {"item": "c", "weight": -0.25}]
    given = client.post("/search", json={"query": mixed}).json()["hits"]
    texts = [{"text": "a red circle", "weight": 0.5}, {"text": "a blue square"}, {"text": "green", "weight": -0.25}]
    assert [h["id"] for h in given] == [h["id"] for h in client.post("/search", json={"query": texts}).json()["hits"]]
    problem(client.post("/search", json={"query": {"item": "nobody"}}), 404, "no item 'nobody'")
    problem(client.post("/search", json={"query": {"item": "a", "text": "b"}}), 422, "a part of a query")
    long = {"query": [{"item": "a"}, {"text": "x" * 9000}]}
    assert problem(client.post("/search", json=long), 413, "input 1")["input"] == 1


def test_a_search_among_some_items(client: TestClient) -> None:
    fill(client, a="a red circle", b="a blue square", c="green", d="red")
    found = client.post("/search", json={"query": "red", "ids": ["b", "c", "nobody"]}).json()["hits"]
    assert sorted(hit["id"] for hit in found) == ["b", "c"]
    listed = client.get("/collections/default/items", params={"id": ["d", "a"]}).json()["items"]
    assert [item["id"] for item in listed] == ["a", "d"]
    problem(client.post("/search", json={"query": "red", "ids": []}), 422, "ids")


def test_zero_shot_tells_cosines(client: TestClient, encoded: Callable[..., bytes]) -> None:
    image = {"image": base64.b64encode(encoded()).decode()}
    (one,) = client.post("/zero-shot", json={"input": image, "labels": ["red", "blue"]}).json()["data"]
    vectors = client.post("/embed", json={"input": [image]}).json()["data"][0]["embedding"]
    prompts = [f"a photo of a {label}" for label in ("red", "blue")]
    assert one["cosine"] == one["scores"][0]["cosine"]
    assert all(-1 <= each["cosine"] <= 1 for each in one["scores"])
    templates = {"input": image, "labels": ["red", "blue"], "templates": ["a photo of a {}"]}
    (one,) = client.post("/zero-shot", json=templates).json()["data"]
    texts = [each["embedding"] for each in client.post("/embed", json={"input": prompts}).json()["data"]]
    expected = dict(zip(("red", "blue"), np.array(texts) @ np.array(vectors), strict=True))
    assert {each["label"]: each["cosine"] for each in one["scores"]} == pytest.approx(expected, abs=1e-4)


def test_principal_components_are_those_of_the_svd() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype("f4") * np.arange(1, 9, dtype="f4")
    points = principal_plane(vectors)
    centred = vectors - vectors.mean(0)
    _, values, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.linalg.norm(points, axis=0), values[:2], rtol=1e-4)
    assert abs(points[:, 0] @ points[:, 1]) < 1e-2 * values[0]
    assert np.array_equal(points, principal_plane(vectors))
    assert principal_plane(np.zeros((0, 8), "f4")).shape == (0, 2)
    assert np.isfinite(principal_plane(np.ones((1, 1), "f4"))).all()


@pytest.mark.of_every_store
def test_an_empty_collection_has_an_empty_map(start: Callable[..., TestClient]) -> None:
    client = start()
    client.put("/collections/e")
    assert client.get("/collections/e/map").status_code == 200
    assert client.post("/collections/e/map", json={"method": "pca"}).status_code < 500


def test_a_map_of_a_collection(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(client, **{f"i{number}": f"text {number}" * (number + 1) for number in range(9)})
    found = client.get("/collections/default/map", params={"color": "n"}).json()
    assert found["ids"] == [f"i{number}" for number in range(9)]
    assert found["values"] == [len(f"text {number}" * (number + 1)) for number in range(9)]
    assert np.frombuffer(base64.b64decode(found["points"]), "<f4").reshape(-1, 2).shape == (9, 2)
    assert (found["state"], found["total"]) == ("done", 9)
    monkeypatch.setattr("app.routes.map.MAX_POINTS", 4)
    part = client.get("/collections/default/map").json()
    assert part["ids"] == ["i0", "i3", "i6"]
    assert part["total"] == 9
    assert client.get("/collections/default/map", params={"method": "umap"}).json()["state"] == "none"
    problem(client.get("/collections/nowhere/map"), 404, "nowhere")
    problem(client.post("/collections/nowhere/map"), 404, "nowhere")


def test_umap_needs_items_and_its_package(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(client, a="one", b="two")
    problem(client.post("/collections/default/map"), 422, "at least 4 items")
    monkeypatch.setattr("app.plane.importlib.util.find_spec", lambda name: None)
    problem(client.post("/collections/default/map"), 422, "UMAP is not installed")
    assert client.delete("/collections/default/map").status_code == 204


def test_a_map_by_umap_ends_with_its_collection(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.plane._SCRIPT", "import time; time.sleep(60)")
    begun = []
    monkeypatch.setattr("app.service.Unfolding", lambda *given: begun.append(Unfolding(*given)) or begun[-1])
    texts = {f"i{number}": f"text {number}" for number in range(4)}
    fill(client, **texts)
    assert client.post("/collections/default/map").status_code == 202
    assert client.get("/collections/default/map", params={"method": "umap"}).json()["state"] == "running"
    assert client.delete("/collections/default").status_code == 204
    assert begun[0]._task.done()
    fill(client, **texts)
    assert client.get("/collections/default/map", params={"method": "umap"}).json()["state"] == "none"


def test_umap_that_fails_or_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(script: str, *, stop: bool) -> Unfolding:
        monkeypatch.setattr("app.plane._SCRIPT", script)
        made = Unfolding([None] * 5, np.zeros((5, 3), "f4"))
        made.start()
        if stop:
            async with asyncio.timeout(60):
                while not made.share:
                    await asyncio.sleep(0.01)
            await made.stop()
        else:
            await asyncio.wait([made._task])
        return made

    failed = asyncio.run(run("raise SystemExit(3)", stop=False))
    assert failed.state == "failed"
    assert failed.points is None
    slow = "import time; print('3/10 ', flush=True); time.sleep(60)"
    assert asyncio.run(run(slow, stop=True)).share == pytest.approx(0.3)


def test_the_history_of_a_training(client: TestClient, engines: dict[str, object]) -> None:
    assert client.get("/models/clip/history").json() == {"model": "clip", "series": {}}
    details = client.app.state.service.engines["clip"].details
    details["provenance"]["history"] = "step,loss,knn\n0,6.5,\n100,5.25,0.4\n200,nan,"
    try:
        series = client.get("/models/clip/history").json()["series"]
    finally:
        del details["provenance"]["history"]
    assert series == {"loss": [[0, 6.5], [100, 5.25]], "knn": [[100, 0.4]]}
    problem(client.get("/models/nobody/history"), 404, "no model 'nobody'")
