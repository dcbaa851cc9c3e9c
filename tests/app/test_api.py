"""Every endpoint: what it answers, in batches, by file, and for the clients people have."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from support import problem, tiny_clip, tiny_dalle

from app.collection import Collection
from app.engine import Engine, ModelEngine
from app.routes.collections import list_duplicates
from app.service import Service
from models.checkpoint import save_checkpoint
from models.retrieval import embed_images, embed_texts
from models.vision import EncoderModel

Encoded = Callable[..., bytes]
Start = Callable[..., TestClient]


def _b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _vectors(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], np.float32)


def test_embeddings_are_the_models_own(client: TestClient, encoded: Encoded) -> None:
    png = encoded(1, "PNG")
    texts = ["a red star", "two hearts"]
    uri = f"data:image/png;base64,{_b64(png)}"
    inputs = ["a red star", {"image": _b64(png)}, {"text": "two hearts"}, {"image": uri}]
    answer = client.post("/embed", json={"input": inputs})
    vectors = _vectors(answer)
    model = tiny_clip()
    assert np.allclose(vectors[[0, 2]], embed_texts(model, texts).numpy(), atol=2e-2)
    assert np.allclose(vectors[[1, 3]], embed_images(model, [Image.open(io.BytesIO(png))]).numpy(), atol=2e-2)
    assert [entry["index"] for entry in answer.json()["data"]] == [0, 1, 2, 3]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(len(model.tokenizer.encode(t)) for t in texts)


def test_one_string_a_form_and_v1_give_the_same(client: TestClient, encoded: Encoded) -> None:
    jpeg = encoded(2)
    by_json = _vectors(client.post("/embed", json={"input": {"image": _b64(jpeg)}}))
    by_form = _vectors(client.post("/embed", files=[("file", ("a.jpg", jpeg)), ("file", ("b", jpeg))]))
    assert np.allclose(by_form, by_json, atol=1e-3)
    assert by_form.shape == (2, 24)
    assert np.allclose(
        _vectors(client.post("/v1/embeddings", json={"input": "a", "model": "clip"})),
        _vectors(client.post("/embed", json={"input": ["a"]})),
        atol=1e-3,
    )


def test_base64_and_dimensions(client: TestClient) -> None:
    full = _vectors(client.post("/embed", json={"input": "a"}))[0]
    packed = client.post("/embed", json={"input": "a", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), full)
    cut = _vectors(client.post("/embed", json={"input": "a", "dimensions": 8}))[0]
    raw = _vectors(client.post("/embed", json={"input": "a", "dimensions": 8, "normalize": False}))[0]
    assert np.allclose(raw, full[:8])
    assert np.allclose(cut, full[:8] / np.linalg.norm(full[:8]), atol=1e-6)
    problem(client.post("/embed", json={"input": "a", "dimensions": 25}), 422, "has 24 dimensions")


@pytest.mark.parametrize("encoding", [None, "float"])
def test_the_openai_client_works_unchanged(client: TestClient, encoding: str | None) -> None:
    import openai

    api = openai.OpenAI(api_key="unused", base_url="http://127.0.0.1/v1", http_client=client)  # type: ignore[arg-type]
    options: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
    answer = api.embeddings.create(model="clip", input=["a red star", "two hearts"], **options)
    expected = _vectors(client.post("/embed", json={"input": ["a red star", "two hearts"]}))
    assert np.allclose([entry.embedding for entry in answer.data], expected, atol=1e-6)
    assert [model.id for model in api.models.list()] == ["clip"]
    assert api.models.retrieve("clip").object == "model"
    with pytest.raises(openai.NotFoundError):
        api.embeddings.create(model="text-embedding-3", input="a")


def test_zero_shot_is_the_models_own(client: TestClient, encoded: Encoded) -> None:
    from models.retrieval import zero_shot_classification

    png = encoded(3, "PNG")
    labels, templates = ["red star", "blue circle", "green square"], ["a {}", "a photo of a {}"]
    body = {"input": [{"image": _b64(png)}] * 2, "labels": labels, "templates": templates}
    data = client.post("/zero-shot", json=body).json()["data"]
    expected = zero_shot_classification(tiny_clip(), [Image.open(io.BytesIO(png))], labels, templates)[0]
    for entry in data:
        scores = [score["score"] for score in entry["scores"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-3)
        assert {s["label"]: s["score"] for s in entry["scores"]} == pytest.approx(
            dict(zip(labels, expected.tolist(), strict=True)), abs=2e-2
        )
        assert (entry["label"], entry["score"]) == (entry["scores"][0]["label"], scores[0])
    assert len(client.post("/zero-shot", json=body | {"top_k": 1}).json()["data"][0]["scores"]) == 1
    form = {"labels": labels, "templates": templates, "multi_label": "true"}
    free = client.post("/zero-shot", files={"file": png}, data=form).json()["data"][0]["scores"]
    assert len(free) == 3
    assert all(0 < score["score"] < 1 for score in free)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": "a text"}, "input 0: zero-shot classification takes pictures"),
        ({"labels": []}, "labels"),
        ({"templates": ["no place"]}, "no {} where the label belongs"),
    ],
)
def test_zero_shot_refuses_in_words(client: TestClient, encoded: Encoded, change: dict[str, Any], says: str) -> None:
    body = {"input": {"image": _b64(encoded())}, "labels": ["a"]} | change
    problem(client.post("/zero-shot", json=body), 422, says)


def test_zero_shot_bounds_its_prompts_as_any_text(client: TestClient, encoded: Encoded) -> None:
    body = {"input": {"image": _b64(encoded())}, "labels": ["a", "b" * 101], "templates": ["{}", "{}" * 20]}
    problem(client.post("/zero-shot", json=body), 413, "template 1 has 2,020 characters with the longest label")
    problem(client.post("/zero-shot", json=body | {"labels": ["a", "b" * 2001]}), 413, "label 1 has 2,001 characters")
    assert client.post("/zero-shot", json=body | {"labels": ["a", "b" * 100]}).status_code == 200


def test_errors_of_several_fields_say_which_and_where(client: TestClient, encoded: Encoded) -> None:
    good, wrong, long = {"image": _b64(encoded())}, {"image": "AAAA"}, "x" * 2001
    for url, body, says, place in (
        ("/rank", {"query": "a", "documents": [wrong]}, "of `documents`", 0),
        ("/rank", {"query": "a", "documents": ["b", long]}, "of `documents`", 1),
        ("/rank", {"query": wrong, "documents": ["a"]}, "^of `query`", None),
        ("/rank", {"query": long, "documents": ["a"]}, "^of `query`", None),
        ("/similarity", {"a": [good, "a"], "b": [wrong]}, "of `b`", 0),
        ("/similarity", {"a": [good, wrong], "b": ["a"]}, "of `a`", 1),
        ("/embed", {"input": ["a", {"image": "http://example.com/a.jpg"}]}, "fetch_hosts", 1),
    ):
        answer = client.post(url, json=body)
        assert problem(answer, answer.status_code, says).get("input") == place, answer.text
        assert 400 <= answer.status_code < 500


def test_one_time_counts_for_all_that_a_request_asks(
    start: Start, engines: dict[str, Engine], encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(deadline=0.9)
    for tower in ("encode_images", "encode_texts"):
        whole = getattr(ModelEngine, tower)
        monkeypatch.setattr(ModelEngine, tower, lambda *given, whole=whole: time.sleep(0.6) or whole(*given))
    body = {"input": {"image": _b64(encoded())}, "labels": ["a"], "templates": ["{}"]}
    problem(client.post("/zero-shot", json=body), 504)


def test_queries_with_what_is_no_parameter_are_refused(client: TestClient) -> None:
    client.put("/collections/c")
    problem(client.get("/search?q=a&limit=3&collection=c"), 422, "no parameter 'limit' here; known: q, k,")
    problem(client.post("/search?k=3", json={"query": "a"}), 422, "no parameter 'k' here; known: none")
    problem(client.get("/collections/c/items?ids=a"), 422, "no parameter 'ids'")
    for wrong in ("%FF", "%ED%A0%80"):
        problem(client.get(f"/search?q={wrong}&collection=c"), 400, "not UTF-8")
    assert client.get("/search?q=%C3%A9&collection=c").status_code == 200


def test_similarity_and_rank_are_cosines(client: TestClient, encoded: Encoded) -> None:
    inputs: list[Any] = ["a red star", {"image": _b64(encoded(1))}, "two hearts"]
    vectors = _vectors(client.post("/embed", json={"input": inputs}))
    scores = client.post("/similarity", json={"a": inputs[:1], "b": inputs}).json()["scores"]
    assert np.allclose(scores, vectors[:1] @ vectors.T, atol=1e-3)
    for path in ("/rank", "/v1/rerank"):
        body = {"query": inputs[0], "documents": inputs, "return_documents": True}
        results = client.post(path, json=body).json()["results"]
        assert [r["index"] for r in results] == np.argsort(-(vectors @ vectors[0]), kind="stable").tolist()
        assert results[0]["relevance_score"] == pytest.approx(1, abs=1e-3)
        assert results[0]["document"] == {"text": "a red star"}
        assert len(client.post(path, json=body | {"top_n": 2}).json()["results"]) == 2


@pytest.fixture
def filled(client: TestClient, encoded: Encoded) -> TestClient:
    assert client.put("/collections/default", json={}).status_code == 200
    items: list[dict[str, Any]] = [
        {"id": f"p{i}", "image": _b64(encoded(i)), "caption": f"number {i}", "metadata": {"even": i % 2 == 0, "i": i}}
        for i in range(6)
    ]
    items += [{"id": "t", "text": "a red star", "metadata": {"even": True}}]
    answer = client.post("/collections/default/items", json={"items": items})
    assert answer.json() == {"ids": ["p0", "p1", "p2", "p3", "p4", "p5", "t"]}
    return client


def _ids(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["hits"]]


@pytest.mark.of_every_store
def test_search_by_text_picture_and_mixture(filled: TestClient, encoded: Encoded) -> None:
    answer = filled.get("/search", params={"q": "a red star"}).json()
    assert answer["hits"][0]["id"] == "t"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-2)
    assert (answer["collection"], answer["model"], answer["query"]) == ("default", "clip", "a red star")
    assert answer["took_ms"] > 0
    assert len(answer["hits"]) == 7
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    picture = {"image": _b64(encoded(4))}
    assert _ids(filled.post("/search", json={"query": picture, "k": 1})) == ["p4"]
    assert _ids(filled.post("/search", files={"file": encoded(2)}, data={"k": "1"})) == ["p2"]
    mixed = [{**picture, "weight": 1.0}, {"text": "a red star", "weight": -1.0}]
    assert _ids(filled.post("/search", json={"query": mixed}))[-1] == "t"
    cancelled = [{"text": "a"}, {"text": "a", "weight": -1.0}]
    problem(filled.post("/search", json={"query": cancelled}), 422, "cancel out")


@pytest.mark.of_every_store
def test_search_options(filled: TestClient) -> None:
    everything = _ids(filled.get("/search?q=a+red+star&k=100"))
    assert _ids(filled.get("/search?q=a+red+star&k=3&offset=2")) == everything[2:5]
    assert _ids(filled.get("/search?q=a+red+star&offset=100")) == []
    assert set(_ids(filled.get("/search?q=a+red+star&target=image"))) == {f"p{i}" for i in range(6)}
    assert _ids(filled.get("/search?q=a+red+star&target=text")) == ["t"]
    assert set(_ids(filled.get("/search?q=a&filter=even:true"))) == {"p0", "p2", "p4", "t"}
    assert _ids(filled.get("/search?q=a&filter=even:true&filter=i:2")) == ["p2"]
    assert _ids(filled.get("/search?q=a&filter=even:maybe")) == []
    assert _ids(filled.get("/search?q=a+red+star&min_score=0.99")) == ["t"]
    problem(filled.get("/search?q=a&filter=even"), 422, "key:value")


@pytest.mark.of_every_store
def test_hits_of_one_group_are_folded_and_others_take_their_places(filled: TestClient) -> None:
    everything = filled.get("/search?q=a+red+star&k=100").json()["hits"]
    first = {}
    for hit in everything:
        first.setdefault(hit["metadata"]["even"], hit["id"])
    assert _ids(filled.get("/search?q=a+red+star&group_by=even")) == list(first.values())
    assert _ids(filled.get("/search?q=a+red+star&group_by=even&k=1&offset=1")) == list(first.values())[1:]
    asked = {"query": {"text": "a red star"}, "group_by": "i", "k": 3}  # "t" has no i, so it is a group by itself
    assert _ids(filled.post("/search", json=asked)) == [hit["id"] for hit in everything[:3]]
    stored = [{"id": f"s{i}", "text": "a red star", "metadata": {"even": [True, 1, "true", 1.0][i]}} for i in range(4)]
    filled.post("/collections/default/items", json={"items": stored})
    found = _ids(filled.get("/search?q=a+red+star&group_by=even"))
    assert len([id for id in found if id in ("t", "s0", "s1", "s2", "s3")]) == 3  # true, 1 and "true" are three values
    problem(filled.get("/search?q=a&group_by="), 422, "group_by")


@pytest.mark.of_every_store
def test_statistics_say_what_a_collection_holds(filled: TestClient) -> None:
    stored = [{"id": f"n{i}", "text": f"text {i}", "metadata": {"tag": "ab"[i // 2], "i": 0.5}} for i in range(3)]
    filled.post("/collections/default/items", json={"items": stored})
    found = filled.get("/collections/default/statistics").json()
    assert found["kinds"] == {"image": 6, "text": 4, "pictures": 6}
    by_key = {entry.pop("key"): entry for entry in found["metadata"]}
    assert list(by_key) == ["i", "even", "tag"]
    assert by_key["i"] == {"items": 9, "values": 7, "min": 0, "max": 5, "frequent": []}
    assert by_key["even"] == {"items": 7, "values": 2, "min": None, "max": None, "frequent": []}
    assert by_key["tag"]["frequent"] == [{"value": "a", "items": 2}, {"value": "b", "items": 1}]
    rows = np.stack([_vectors(filled.post("/embed", json={"input": f"text {i}"}))[0] for i in range(3)])
    assert found["cosines"]["nearest"]["p99"] >= (rows @ rows.T)[np.triu_indices(3, 1)].max() - 1e-5
    assert -1 <= found["cosines"]["random"]["p5"] <= found["cosines"]["random"]["p95"] <= 1
    filled.put("/collections/empty")
    assert filled.get("/collections/empty/statistics").json()["cosines"] == {}
    problem(filled.get("/collections/nowhere/statistics"), 404, "nowhere")


@pytest.mark.of_every_store
def test_filters_by_value_by_bounds_and_by_one_of_several(filled: TestClient) -> None:
    """What p0 to p5 have: even true or false, i 0 to 5."""
    stored = [
        {"id": "a", "text": "a", "metadata": {"year": 1999, "day": "2026-01-31", "colour": "red", "x": None}},
        {"id": "b", "text": "b", "metadata": {"year": 2000.5, "day": "2026-02-01", "colour": "a:b", "x": 1}},
        {"id": "c", "text": "c", "metadata": {"year": "2001", "day": 20260201, "colour": "red<blue", "x": True}},
        {"id": "d", "text": "d", "metadata": {"x": "true"}},
        {"id": "e", "text": "e", "metadata": {"x": "null"}},
    ]
    assert filled.post("/collections/default/items", json={"items": stored}).status_code == 200

    def found(*entries: object) -> str:
        """By query where that can say it, and always by JSON."""
        asked = {"query": {"text": "a"}, "filter": list(entries), "k": 100}
        ids = set(_ids(filled.post("/search", json=asked)))
        written = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        assert set(_ids(filled.get("/search", params={"q": "a", "filter": written, "k": 100}))) == ids
        listed = filled.get("/collections/default/items", params={"filter": written}).json()["items"]
        assert [item["id"] for item in listed] == sorted(ids)
        return " ".join(sorted(ids))

    assert found("i>=2", "i<4") == "p2 p3"
    assert found("i>2.5") == "p3 p4 p5"
    assert found("i<=0") == "p0"
    assert found({"key": "i", "gte": 2, "lt": 4}) == "p2 p3"
    assert found({"key": "i", "gt": 3, "lte": 9}, "even:true") == "p4"
    assert found({"key": "i", "in": [1, 4.0, "5", 77]}) == "p1 p4"  # "5" is no 5
    assert found("year>=1999") == "a b"  # a text is within no numbers
    assert found({"key": "year", "gte": "2000"}) == "c"
    assert found("year:2001") == "c"
    assert found("year:2000.50") == "b"
    assert found("x:true") == "c d"
    assert found("day>=2026-02") == "b"
    assert found("day<2026-02", "year<2000") == "a"
    assert found("colour:a:b") == "b"
    assert found("colour:red<blue") == "c"
    assert found({"key": "colour", "in": ["red", "a:b"]}) == "a b"
    assert found({"key": "x", "in": [None, True]}) == "a c"
    assert found({"key": "x", "in": [1]}) == "b"  # true is no 1
    assert found({"key": "missing", "gte": 0}) == ""
    for wrong, says in [
        ("i", "key:value"),
        (":2", "key:value"),
        ("i>=", "key>=number"),
        ("i>=nan", "finite"),
        ("i<1e999", "finite"),
        ('{"key": "i"}', "needs one of"),
        ('{"key": "i", "near": 3}', "near: Extra inputs"),
        ('{"key": "i", "in": []}', "at least 1 item"),
        (f'{{"key": "i", "gte": {10**30}}}', "gte: a text that is not empty"),
        ('{"key": "i", "in": [[]]}', "in.0: a text"),
        ("{", "JSON"),
    ]:
        problem(filled.get("/search", params={"q": "a", "filter": wrong}), 422, says)
    problem(filled.post("/search", json={"query": {"text": "a"}, "filter": {"key": "i"}}), 422, "needs one of")


def test_what_is_wrong_with_a_filter_is_said_once(filled: TestClient) -> None:
    for wrong, where in [
        ({"key": "k", "inn": ["a"]}, "inn: Extra inputs are not permitted"),
        ({"in": ["a"]}, "key: Field required"),
        ({"key": "k", "in": []}, "in: List should have at least 1 item"),
        ({"key": "k", "in": [1, {"a": 1}]}, "in.1: a text without NUL, a finite number"),
        (
            {"key": "k", "gte": 2**63},
            "gte: a text that is not empty and has no NUL, or a finite number",
        ),
    ]:
        answer = filled.post("/search", json={"query": {"text": "a"}, "filter": [wrong]})
        problem(answer, 422, f"filter.0.{where}")
        assert len(answer.json()["errors"]) == 1
    for no_filter in (7, "", "a:\0", None, ["a:b"]):
        answer = filled.post("/search", json={"query": {"text": "a"}, "filter": [no_filter]})
        problem(answer, 422, "filter.0: key:value, key>=number, or an object with key and in")
        assert len(answer.json()["errors"]) == 1


def test_an_empty_text_is_a_value_to_look_for(filled: TestClient) -> None:
    stored = [{"id": "e", "text": "a", "metadata": {"k": ""}}, {"id": "f", "text": "b", "metadata": {"k": "b"}}]
    assert filled.post("/collections/default/items", json={"items": stored}).status_code == 200
    for entry in ("k:", {"key": "k", "in": [""]}):
        assert _ids(filled.post("/search", json={"query": {"text": "a"}, "filter": [entry]})) == ["e"]


@pytest.mark.of_every_store
def test_duplicates_are_found_in_groups(filled: TestClient, encoded: Encoded) -> None:
    copies = [{"id": f"copy{i}", "image": _b64(encoded(2)), "metadata": {"copy": i}} for i in range(2)]
    filled.post("/collections/default/items", json={"items": copies})
    path = "/collections/default/duplicates"
    answer = filled.get(path, params={"threshold": 0.999999}).json()
    (group,) = answer["groups"]
    assert (answer["collection"], answer["total"]) == ("default", 1)
    assert [item["id"] for item in group] == ["p2", "copy0", "copy1"]
    assert group[0]["score"] == pytest.approx(1)
    assert group[1]["url"] == "/collections/default/items/copy0/image"
    assert filled.get(path, params={"target": "text"}).json()["groups"] == []
    everything = filled.get(path, params={"threshold": 1e-9, "target": "image", "limit": 1}).json()
    assert (everything["total"], len(everything["groups"][0])) == (1, 8)
    problem(filled.get(path, params={"threshold": 2}), 422, "threshold")
    problem(filled.get(path, params={"limit": 0}), 422, "limit")
    problem(filled.get("/collections/nowhere/duplicates"), 404, "nowhere")


def test_duplicates_are_not_looked_for_any_more_when_their_caller_has_left(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put("/collections/c", json={})
    seen: list[str] = []

    def endless(*_: Any, go_on: Callable[[], None], **__: Any) -> Any:
        seen.append(threading.current_thread().name)
        while True:
            go_on()

    monkeypatch.setattr(Collection, "duplicates", endless)
    service: Service = client.app.state.service  # type: ignore[attr-defined]

    async def leave() -> None:
        task = asyncio.create_task(list_duplicates(service, "c", 0.9, "any", 1))
        while not seen:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await service.look(lambda: "free") == "free"

    client.portal.call(leave)  # type: ignore[union-attr]
    assert seen[0].startswith("look")  # and no search or write waits for such a thread
    client.portal.call(partial(asyncio.to_thread, service._lookers.shutdown))  # type: ignore[union-attr]


def test_what_a_collection_would_not_keep_is_refused(client: TestClient) -> None:
    assert client.put("/collections/c", json={"index": "hnsw"}).status_code == 200
    for same in ({}, {"index": "hnsw"}, {"index": "auto"}):
        assert client.put("/collections/c", json=same).status_code == 200
    problem(client.put("/collections/c", json={"index": "flat"}), 409, "made with index 'hnsw'")
    item = {"id": "a", "text": "a red star", "caption": "invoice number 7"}
    problem(client.post("/collections/c/items", json={"items": [item]}), 422, "a text is its own caption")
    item["caption"] = item["text"]
    assert client.post("/collections/c/items", json={"items": [item]}).status_code == 200
    assert client.get("/collections/c/items/a").json()["caption"] == "a red star"


@pytest.mark.of_every_store
def test_items_are_read_replaced_and_deleted(filled: TestClient, encoded: Encoded) -> None:
    item = filled.get("/collections/default/items/p3").json()
    assert item == {
        "id": "p3", "kind": "image", "caption": "number 3", "metadata": {"even": False, "i": 3},
        "url": "/collections/default/items/p3/image",
    }  # fmt: skip
    filled.post("/collections/default/items", json={"items": [{"id": "p3", "image": _b64(encoded(9))}]})
    assert filled.get("/collections/default/items/p3").json()["caption"] is None
    assert filled.get("/collections/default").json()["count"] == 7
    assert _ids(filled.post("/search", json={"query": {"image": _b64(encoded(9))}, "k": 1})) == ["p3"]
    assert filled.delete("/collections/default/items/p3").status_code == 204
    assert "p3" not in _ids(filled.get("/search?q=a&k=100"))
    problem(filled.delete("/collections/default/items/p3"), 404, "no item 'p3' in collection 'default', which holds 6")


@pytest.mark.of_every_store
def test_items_by_form_and_page(filled: TestClient, encoded: Encoded) -> None:
    filled.put("/collections/form", json={"index": "flat"})
    files = [("file", ("a.jpg", encoded(1))), ("file", ("b.jpg", encoded(2)))]
    form = {"id": ["one", "two"], "caption": ["first", ""], "metadata": ['{"a": 1}', "{}"]}
    assert filled.post("/collections/form/items", files=files, data=form).json() == {"ids": ["one", "two"]}
    made = filled.post("/collections/form/items", files=files).json()["ids"]
    assert len(set(made)) == 2
    assert filled.get("/collections/form/items/one").json()["metadata"] == {"a": 1}
    page = filled.get("/collections/default/items", params={"limit": 4}).json()
    rest = filled.get("/collections/default/items", params={"limit": 4, "after": page["next"]}).json()
    assert [item["id"] for item in page["items"] + rest["items"]] == ["p0", "p1", "p2", "p3", "p4", "p5", "t"]
    assert rest["next"] is None
    problem(filled.post("/collections/form/items", files=files, data={"id": ["one"]}), 422, "1 id fields for 2 files")


@pytest.mark.of_every_store
def test_pictures_come_back_clean_small_and_cached(filled: TestClient) -> None:
    answer = filled.get("/collections/default/items/p1/image")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert Image.open(io.BytesIO(answer.content)).size == (48, 40)
    small = filled.get("/collections/default/items/p1/image?size=24")
    assert max(Image.open(io.BytesIO(small.content)).size) == 24
    assert filled.get("/collections/default/items/p1/image?size=24").content == small.content
    for known in (answer.headers["etag"], f'"other", W/{answer.headers["etag"]}', "*"):
        again = filled.get("/collections/default/items/p1/image", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
    assert filled.get("/collections/default/items/p1/image", headers={"If-None-Match": '"other"'}).status_code == 200
    problem(filled.get("/collections/default/items/t/image", headers={"If-None-Match": "*"}), 404, "has no picture")
    assert small.headers["etag"] != answer.headers["etag"]
    problem(filled.get("/collections/default/items/t/image"), 404, "has no picture")


@pytest.mark.of_every_store
def test_collections_say_what_they_hold(filled: TestClient, engines: dict[str, Engine]) -> None:
    (info,) = filled.get("/collections").json()["collections"]
    assert info["fingerprint"] == engines["clip"].fingerprint
    assert (info["model"], info["dimensions"], info["count"], info["index"]) == ("clip", 24, 7, "flat")
    assert info["bytes"] > 7 * 24 * 4
    assert filled.put("/collections/default", json={}).status_code == 200  # again, and nothing is lost
    assert filled.get("/collections/default").json() == info
    problem(filled.put("/collections/other", json={"index": "annoy"}), 422, "auto, flat, hnsw")
    assert filled.delete("/collections/default").status_code == 204
    problem(filled.get("/collections/default"), 404, "none yet")


def test_models_show_their_card(client: TestClient) -> None:
    for path in ("/models", "/v1/models"):
        (model,) = client.get(path).json()["data"]
        assert model["takes"] == ["image", "text"]
        assert model["metrics"] == {"r1": 0.25}
        assert (model["dimensions"], model["size"]) == (24, 32)


def test_another_models_query_is_refused_by_name(start: Start, engines: dict[str, Engine]) -> None:
    from app.engine import ModelEngine

    other = tiny_clip(seed=1)
    other.fingerprint = "another"
    both = {**engines, "other": ModelEngine("other", other, device="cpu")}
    client = start(both)
    client.put("/collections/mine", json={"model": "other"})
    problem(client.put("/collections/mine", json={"model": "clip"}), 409, "holds vectors of model 'other'")
    assert client.post("/collections/mine/items", json={"items": [{"text": "a"}]}).status_code == 200
    assert client.get("/search?q=a&collection=mine").json()["model"] == "other"
    client.app.state.service.engines.pop("other")  # type: ignore[attr-defined]
    client.app.state.service._served.pop("other")  # type: ignore[attr-defined]
    problem(client.get("/search?q=a&collection=mine"), 409, "model 'other', which is not loaded")


def test_an_image_only_model_names_those_that_take_text(start: Start, engines: dict[str, Engine]) -> None:
    from app.engine import ModelEngine
    from app.loading import in_order

    blind = tiny_clip(seed=1)
    blind.tokenizer = None
    both = in_order([ModelEngine("simclr", blind, device="cpu"), *engines.values()])
    client = start(both)
    assert [model["id"] for model in client.get("/models").json()["data"]] == ["clip", "simclr"]
    problem(client.post("/embed", json={"input": "a", "model": "simclr"}), 422, "models that take text: clip")
    client.put("/collections/pictures", json={"model": "simclr"})
    problem(client.get("/search?q=a&collection=pictures"), 422, "models that take text: clip")


def test_a_checkpoint_of_an_encoder_is_searched_from_picture_to_picture(
    start: Start, tmp_path: Path, encoded: Encoded
) -> None:
    from app.loading import load_engines
    from app.settings import Settings

    torch.manual_seed(0)
    model = EncoderModel(image={"name": "conv", "image_size": 16, "channels": 16, "blocks": [1, 1], "depth": 0}).eval()
    save_checkpoint(model, tmp_path / "checkpoints" / "simclr", provenance={"metrics": {"knn": 0.5}})
    client = start(load_engines(Settings(checkpoints=tmp_path / "checkpoints", threads=1)))
    (entry,) = client.get("/models").json()["data"]
    assert (entry["id"], entry["takes"], entry["metrics"]) == ("simclr", ["image"], {"knn": 0.5})
    files = [("file", (f"{seed}.png", encoded(seed, "PNG"))) for seed in range(4)]
    vectors = _vectors(client.post("/embed", files=files))
    pictures = [Image.open(io.BytesIO(encoded(seed, "PNG"))) for seed in range(4)]
    assert np.allclose(vectors, embed_images(model, pictures).numpy(), atol=2e-2)  # bfloat16 where there is some
    client.put("/collections/pictures")
    client.post("/collections/pictures/items", files=files, data={"id": ["a", "b", "c", "d"]})
    found = client.post("/search", files={"file": encoded(2, "PNG")}, data={"collection": "pictures", "k": "2"}).json()
    assert found["hits"][0]["id"] == "c"
    problem(client.get("/search?q=a&collection=pictures"), 422, "models that take text: none")


def test_openapi_documents_every_path_with_an_example(start: Start) -> None:
    client = start(generators={"dalle": tiny_dalle()})
    document = client.get("/openapi.json").json()
    contract = {
        "/embed", "/v1/embeddings", "/zero-shot", "/search", "/similarity", "/rank", "/v1/rerank", "/models",
        "/v1/models", "/collections", "/collections/{name}", "/collections/{name}/items", "/healthz", "/readyz",
        "/collections/{name}/items/{id}", "/collections/{name}/items/{id}/image",
    }  # fmt: skip
    assert contract <= document["paths"].keys()
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.partition('"')[0] for reference in references} <= document["components"]["schemas"].keys()
    client.put("/collections/default", json={})
    tried = 0
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if body is not None:
            answer = client.post(path.replace("{name}", "default"), json=body["example"])
            assert answer.status_code in (200, 202), (path, answer.text)
            tried += 1
    assert tried >= 8
    assert client.get("/docs").status_code == 200


def test_request_ids_are_kept_if_sane(client: TestClient) -> None:
    assert client.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/healthz", headers={"X-Request-ID": "no good\x7f"}).headers["x-request-id"] != "no good\x7f"


def test_boots_without_models_and_says_so(start: Start, tmp_path: Path) -> None:
    client = start({})
    assert client.get("/models").json()["data"] == []
    problem(client.post("/embed", json={"input": "a"}), 404, "no model that takes text is loaded")
