"""SQLiteCollections made again with another model while they serve."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support import problem, tiny_clip, unit_rows, wait_for

from app.__main__ import main
from app.engine import Engine, ModelEngine, ServedEngine
from app.inputs import Input
from app.service import Embedded, Service
from app.sqlite_collections import SQLiteCollections
from models.checkpoint import save_checkpoint

Encoded = Callable[..., bytes]
Start = Callable[..., TestClient]


class Slow(ModelEngine):
    """Another model than `clip`, that takes its time and counts pictures."""

    def __init__(self, seconds: float = 0.0) -> None:
        model = tiny_clip(seed=1, size=24)
        model.fingerprint = "of another model"
        super().__init__("other", model, device="cpu")
        self.seconds, self.pictures = seconds, 0

    def encode_images(self, rows: Any) -> Any:
        time.sleep(self.seconds)
        self.pictures += len(rows)
        return super().encode_images(rows)


def _item(number: int, encoded: Encoded) -> dict[str, Any]:
    if number % 4 == 3:
        return {"id": f"i{number}", "text": f"text {number}", "metadata": {"n": number}}
    picture = base64.b64encode(encoded(number)).decode()
    return {"id": f"i{number}", "image": picture, "caption": f"c{number}", "metadata": {"n": number / 2}}


def _fill(client: TestClient, name: str, encoded: Encoded, count: int = 80, model: str = "clip") -> None:
    assert client.put(f"/collections/{name}", json={"model": model}).status_code == 200
    for first in range(0, count, 40):
        items = [_item(number, encoded) for number in range(first, min(count, first + 40))]
        assert client.post(f"/collections/{name}/items", json={"items": items}).status_code == 200


def _wait(client: TestClient, name: str = "c") -> dict[str, Any]:
    address = f"/collections/{name}/reindex"
    wait_for(lambda: client.get(address).json()["state"] != "running")
    return client.get(address).json()


def _scores(client: TestClient, name: str) -> dict[str, float]:
    hits = client.get(f"/search?q=a+red+star&k=200&collection={name}").json()["hits"]
    return {hit["id"]: hit["score"] for hit in hits}


@pytest.mark.of_every_store
def test_it_is_as_if_it_had_been_made_with_the_other_model(
    start: Start, engines: dict[str, Engine], encoded: Encoded, tmp_path: Path
) -> None:
    client = start({**engines, "other": Slow()})
    _fill(client, "c", encoded)
    before = client.get("/collections/c").json()
    pictures = sorted((tmp_path / "data" / "pictures").glob("*/*"))
    answer = client.post("/collections/c/reindex", json={"model": "other"})
    assert answer.status_code == 202
    assert answer.json()["total"] == 80
    assert _wait(client) == {"model": "other", "state": "done", "done": 80, "total": 80, "error": None}
    after = client.get("/collections/c").json()
    assert after == before | {"model": "other", "fingerprint": "of another model"}
    assert [each["name"] for each in client.get("/collections").json()["collections"]] == ["c"]
    _fill(client, "fresh", encoded, model="other")
    # Not of the files that came but of the JPEGs that were kept of them, so nearly the same.
    assert _scores(client, "c") == pytest.approx(_scores(client, "fresh"), abs=0.02)
    items = client.get("/collections/c/items?limit=1000").json()["items"]
    assert [item["metadata"] for item in items if item["id"] == "i7"] == [{"n": 7}]
    assert sorted((tmp_path / "data" / "pictures").glob("*/*")) == pictures  # the same files, not encoded again
    assert client.post("/collections/c/reindex", json={"model": "other"}).json()["state"] == "done"


@pytest.mark.of_every_store
def test_searches_and_writes_go_on_and_nothing_of_them_is_lost(
    start: Start, engines: dict[str, Engine], encoded: Encoded
) -> None:
    client = start({**engines, "other": Slow(0.05)})
    _fill(client, "c", encoded)
    client.post("/collections/c/reindex", json={"model": "other"})
    counts, done = [], threading.Event()

    def search() -> None:
        while not done.is_set():
            answer = client.get("/search?q=a+red+star&k=500&collection=c")
            assert answer.status_code == 200, answer.text
            counts.append(len(answer.json()["hits"]))

    searching = threading.Thread(target=search)
    searching.start()
    expected = {f"i{number}": number for number in range(80)}
    for number in range(100, 140):  # some go, some come, some change, at any stage
        kept = client.post("/collections/c/items", json={"items": [_item(number, encoded)]})
        assert kept.status_code == 200, kept.text
        assert client.delete(f"/collections/c/items/i{number - 100}").status_code == 204
        changed = _item(number, encoded) | {"id": f"i{number - 50}"}
        assert client.post("/collections/c/items", json={"items": [changed]}).status_code == 200
        expected |= {f"i{number}": number, f"i{number - 50}": number}
        del expected[f"i{number - 100}"]
    assert _wait(client)["state"] == "done"
    done.set()
    searching.join()
    assert min(counts) >= 80
    assert client.get("/collections/c").json()["model"] == "other"
    found = {
        item["id"]: item["metadata"]["n"] for item in client.get("/collections/c/items?limit=1000").json()["items"]
    }
    assert found == {id: number if number % 4 == 3 else number / 2 for id, number in expected.items()}
    assert set(_scores(client, "c")) == set(expected)


@pytest.mark.of_every_store
def test_it_ends_though_items_are_replaced_all_the_time(
    start: Start, engines: dict[str, Engine], encoded: Encoded
) -> None:
    client = start({**engines, "other": Slow()})
    _fill(client, "c", encoded, 40)
    stored, failed, ended = dict[str, int](), list[str](), threading.Event()

    def write(writer: int) -> None:
        for turn in range(100_000):
            if ended.is_set():
                return
            id = f"w{writer}-{turn % 10}"
            item = {"id": id, "text": f"text {turn}", "metadata": {"turn": turn}}
            answer = client.post("/collections/c/items", json={"items": [item]})
            stored[id] = turn
            failed.extend([] if answer.status_code == 200 else [answer.text])
            if turn % 7 == 0:
                client.delete(f"/collections/c/items/{id}")
                del stored[id]

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for writer in writers:
        writer.start()
    try:
        wait_for(lambda: len(stored) > 40)
        client.post("/collections/c/reindex", json={"model": "other"})
        wait_for(lambda: client.get("/collections/c/reindex").json()["state"] == "done")
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    assert not failed
    assert client.get("/collections/c").json()["model"] == "other"
    listed = client.get("/collections/c/items?limit=1000").json()["items"]
    assert {item["id"]: item["metadata"]["turn"] for item in listed if item["id"].startswith("w")} == stored


@pytest.mark.of_every_store
def test_a_picture_is_looked_for_with_the_model_that_came_while_it_was_embedded(
    start: Start, engines: dict[str, Engine], encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start({**engines, "other": Slow()})
    _fill(client, "c", encoded, 12)
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    embed, with_models = Service.embed, []

    async def then_switch(self: Service, engine: ServedEngine, inputs: Sequence[Input]) -> Embedded:
        made = await embed(self, engine, inputs)
        with_models.append(engine.engine.name)
        if len(with_models) == 1:
            await service.reindex("c", "other")
            while (await service.reindexing("c")).state == "running":  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
        return made

    monkeypatch.setattr(Service, "embed", then_switch)
    query = {"image": base64.b64encode(encoded(2)).decode()}
    answer = client.post("/search", json={"collection": "c", "query": query, "k": 1})
    assert answer.status_code == 200, answer.text
    assert with_models == ["clip", "other"]
    (hit,) = answer.json()["hits"]
    assert hit["id"] == "i2"
    assert hit["score"] == pytest.approx(1, abs=0.02)


@pytest.mark.of_every_store
def test_a_given_embedding_is_not_stored_with_those_of_the_model_that_came_meanwhile(
    start: Start, engines: dict[str, Engine], encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start({**engines, "other": Slow()})
    _fill(client, "c", encoded, 4)
    embed, models = Service.embed, []

    async def then_switch(self: Service, engine: ServedEngine, inputs: Sequence[Input]) -> Embedded:
        models.append(engine.engine.name)
        await self.reindex("c", "other")
        while (await self.reindexing("c")).state == "running":  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        return await embed(self, engine, inputs)

    monkeypatch.setattr(Service, "embed", then_switch)
    given = base64.b64encode(unit_rows(1, size=24)[0].tobytes()).decode()
    items = [{"id": "new", "embedding": given}, _item(5, encoded)]
    answer = client.post("/collections/c/items", json={"items": items})
    said = problem(answer, 409)
    assert "made again with model 'other' meanwhile" in said["detail"]
    assert models == ["clip"]
    monkeypatch.undo()
    listed = client.get("/collections/c/items").json()["items"]
    assert [item["id"] for item in listed] == ["i0", "i1", "i2", "i3"]


@pytest.mark.of_every_store
@pytest.mark.parametrize("what", ["items?limit=1000&embeddings=true", "statistics", "duplicates?threshold=0.000001"])
def test_what_is_read_while_another_models_takes_its_place_is_all_there(
    start: Start, engines: dict[str, Engine], encoded: Encoded, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    client = start({**engines, "other": Slow()})
    _fill(client, "c", encoded, 12)
    collections = client.app.state.service.collections  # type: ignore[attr-defined]
    get, old = collections.get, collections.get("c")
    client.post("/collections/c/reindex", json={"model": "other"})
    assert _wait(client)["state"] == "done"
    expected = client.get(f"/collections/c/{what}").json()
    late = [old]
    monkeypatch.setattr(collections, "get", lambda name: late.pop() if late else get(name))
    assert client.get(f"/collections/c/{what}").json() == expected
    assert not late


@pytest.mark.of_every_store
def test_what_was_interrupted_goes_on_where_it_was(
    start: Start, engines: dict[str, Engine], encoded: Encoded, tmp_path: Path
) -> None:
    with SQLiteCollections(tmp_path / "data") as _:
        pass
    first, again = Slow(0.1), Slow()
    client = start({**engines, "other": first})
    _fill(client, "c", encoded)
    client.post("/collections/c/reindex", json={"model": "other"})
    wait_for(lambda: client.get("/collections/c/reindex").json()["done"] >= 32)
    service = client.app.state.service  # type: ignore[attr-defined]
    client.portal.call(service._reindexing["c"].stop)  # type: ignore[union-attr]
    assert client.get("/collections/c/reindex").json()["state"] == "interrupted"
    service._reindexing.clear()  # as another process finds it
    left = client.get("/collections/c/reindex").json()
    assert (left["state"], left["model"]) == ("interrupted", "other")
    assert 32 <= left["done"] < 80
    assert client.get("/collections/c").json()["model"] == "clip"
    service._served["other"].engine = again
    service._served["other"]._images._forward = lambda rows: list(again.encode_images(rows))
    client.post("/collections/c/reindex", json={"model": "other"})
    assert _wait(client)["state"] == "done"
    assert again.pictures <= 60 - 24  # of 60 pictures, those of the first 32 items are there

    problem(client.delete("/collections/nowhere/reindex"), 404, "nowhere")


@pytest.mark.of_every_store
def test_it_can_be_given_up_and_says_what_is_wrong(start: Start, engines: dict[str, Engine], encoded: Encoded) -> None:
    third = Slow()
    third.name, third.fingerprint = "third", "of a third"
    client = start({**engines, "other": Slow(0.3), "third": third})
    _fill(client, "c", encoded)
    problem(client.get("/collections/c/reindex"), 404, "POST begins")
    problem(client.post("/collections/c/reindex", json={"model": "nobody"}), 404, "no model 'nobody'")
    assert client.post("/collections/c/reindex", json={"model": "clip"}).json()["state"] == "done"
    problem(client.get("/collections/c/reindex"), 404, "POST begins")
    client.post("/collections/c/reindex", json={"model": "other"})
    problem(client.post("/collections/c/reindex", json={"model": "third"}), 409, "with model 'other'")
    problem(client.post("/search", json={"query": "a", "collection": "~c"}), 404, "there are: c")  # seen by nobody
    assert client.delete("/collections/c/reindex").status_code == 204
    problem(client.get("/collections/c/reindex"), 404)
    assert client.get("/collections/c").json()["model"] == "clip"
    client.post("/collections/c/items", json={"items": [{"id": "far", "embedding": [1.0] * 24}]})
    client.post("/collections/c/reindex", json={"model": "third"})
    found = _wait(client)
    assert found["state"] == "failed"
    assert "'far': it came with its embedding alone" in found["error"]
    client.delete("/collections/c/items/far")
    client.post("/collections/c/reindex", json={"model": "third"})
    assert _wait(client)["state"] == "done"


def test_nothing_is_left_of_one_that_is_given_up_while_it_begins(
    start: Start, engines: dict[str, Engine], encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start({**engines, "other": Slow()})
    _fill(client, "c", encoded, 12)
    collections = client.app.state.service.collections  # type: ignore[attr-defined]
    stage, begun, may_go = collections.stage, threading.Event(), threading.Event()

    def late(*given: Any) -> Any:
        begun.set()
        assert may_go.wait(10)
        return stage(*given)

    monkeypatch.setattr(collections, "stage", late)
    client.post("/collections/c/reindex", json={"model": "other"})
    assert begun.wait(10)
    threading.Timer(0.2, may_go.set).start()
    assert client.delete("/collections/c/reindex").status_code == 204
    assert may_go.is_set()
    problem(client.get("/collections/c/reindex"), 404)


def test_what_is_to_take_its_place_goes_with_a_collection(tmp_path: Path) -> None:
    with SQLiteCollections(tmp_path / "data") as collections:
        collections.create("c", model="m", fingerprint="f", dimensions=8)
        assert collections.stage("c", "n", "g", 4) is collections.staged("c")
        assert collections.names() == ["c"]
        collections.delete("c")
        assert collections.staged("c") is None
        collections.create("c", model="m", fingerprint="f", dimensions=8)
    with SQLiteCollections(tmp_path / "data") as collections:
        assert (collections.names(), collections.staged("c")) == (["c"], None)


def test_items_that_cannot_be_embedded_are_named_when_all_others_are_made(
    start: Start, engines: dict[str, Engine], encoded: Encoded, tmp_path: Path
) -> None:
    other = Slow()
    client = start({**engines, "other": other})
    _fill(client, "c", encoded)
    files = {file.read_bytes(): file for file in (tmp_path / "data" / "pictures").glob("*/*")}
    contents = [client.get(f"/collections/c/items/i{number}/image").content for number in (1, 40)]
    gone, wrong = (files[content] for content in contents)
    gone.unlink()
    wrong.write_bytes(b"no picture")
    client.post("/collections/c/reindex", json={"model": "other"})
    found = _wait(client)
    assert (found["state"], found["done"]) == ("failed", 78)
    assert "'i1': its picture is not on the disk any more; 'i40': " in found["error"]
    assert "input" not in found["error"]
    assert client.get("/collections/c").json()["model"] == "clip"
    gone.write_bytes(contents[0])
    wrong.write_bytes(contents[1])
    before = other.pictures
    client.post("/collections/c/reindex", json={"model": "other"})
    assert _wait(client)["state"] == "done"
    assert other.pictures == before + 2


def test_a_disk_of_pictures_that_is_gone_ends_it_early(
    start: Start, engines: dict[str, Engine], encoded: Encoded, tmp_path: Path
) -> None:
    client = start({**engines, "other": Slow()})
    _fill(client, "c", encoded, 200)
    (tmp_path / "data" / "pictures").rename(tmp_path / "elsewhere")
    client.post("/collections/c/reindex", json={"model": "other"})
    found = _wait(client)
    assert found["state"] == "failed"
    more = int(found["error"].partition("; and ")[2].split()[0])
    assert 90 <= more < 130


def test_the_command_waits_for_the_other_model(
    checkpoints: Path, encoded: Encoded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    for seed, name in enumerate(("clip", "new")):
        save_checkpoint(tiny_clip(seed), models / name)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(encoded(number))
    place = ["--data", str(tmp_path / "data"), "--checkpoints", str(models), "--threads", "1"]
    assert main(["index", str(tmp_path / "photos"), *place]) == 0
    assert main(["reindex", "new", *place]) == 0
    assert "3 items of model 'new'" in capsys.readouterr().out
    assert main(["reindex", "new", *place]) == 0
    assert "3 items of model 'new'" in capsys.readouterr().out
    with SQLiteCollections(tmp_path / "data") as collections:
        assert collections.get("default").model == "new"
        assert collections.get("default").info().count == 3
