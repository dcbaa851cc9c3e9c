"""Embeddings in and out of collections: through the API, as Parquet, and from other programs' folders."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from starlette.testclient import TestClient
from support import problem, tiny_clip, unit_rows, wait_for

from app.__main__ import main
from app.calls import BATCH, BATCH_BYTES, IN_FLIGHT, AnswerError
from app.engine import Engine, ModelEngine
from app.ingest import Report
from app.pictures import file_of
from app.sqlite_collections import SQLiteCollections
from app.vectors import dump_vectors, load_vectors
from models.checkpoint import save_checkpoint
from models.errors import ConflictError

Encoded = Callable[..., bytes]
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, status: int = 0, data: str = "data", models: Path = checkpoints) -> str:
        place = ["--data", str(tmp_path / data), "--checkpoints", str(models), "--threads", "1"]
        assert main([*arguments, *place]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out + captured.err

    return call


def _base64(vector: Any) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def _listed(client: TestClient, name: str = "c") -> dict[str, Any]:
    items = client.get(f"/collections/{name}/items?embeddings=true").json()["items"]
    return {
        item["id"]: item | {"embedding": np.frombuffer(base64.b64decode(item["embedding"]), "<f4")} for item in items
    }


def test_items_may_bring_their_embeddings(client: TestClient, encoded: Encoded) -> None:
    client.put("/collections/c")
    rows = unit_rows(4, size=24)
    picture = base64.b64encode(encoded(5)).decode()
    items = [
        {"id": "numbers", "embedding": [float(value) for value in 3 * rows[0]], "caption": "far away"},
        {"id": "bytes", "image": picture, "embedding": _base64(rows[1])},
        {"id": "own", "image": picture},
        {"id": "text", "text": "two things", "embedding": _base64(rows[3])},
    ]
    assert client.post("/collections/c/items", json={"items": items}).json()["ids"] == [item["id"] for item in items]
    listed = _listed(client)
    own = client.post("/embed", json={"input": {"image": picture}}).json()["data"][0]["embedding"]
    for id, expected in (("numbers", rows[0]), ("bytes", rows[1]), ("own", own), ("text", rows[3])):
        assert np.allclose(listed[id]["embedding"], expected, atol=1e-6)
    assert [listed[item["id"]]["kind"] for item in items] == ["image", "image", "image", "text"]
    assert listed["numbers"]["url"] is None
    assert client.get(listed["bytes"]["url"]).content[:2] == b"\xff\xd8"
    problem(client.get("/collections/c/items/numbers/image"), 404)
    assert "embedding" not in client.get("/collections/c/items").json()["items"][0]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"embedding": "no base64!"}, "base64 of little-endian float32"),
        ({"embedding": _base64([1.0] * 23)}, "shape (23,), (24,) expected"),
        ({"embedding": [0.0] * 24}, "zero or not finite"),
        ({"embedding": _base64([np.nan] * 24)}, "zero or not finite"),
        ({"embedding": base64.b64encode(b"abc").decode()}, "base64 of little-endian float32"),
        ({"text": "a", "image": "b", "embedding": [1.0] * 24}, "it may have neither"),
        ({"caption": "nothing"}, 'has {"text": ...} or {"image": ...}'),
        ({"embedding": True}, ""),
    ],
)
def test_wrong_embeddings_are_refused_and_nothing_is_stored(client: TestClient, item: Any, says: str) -> None:
    client.put("/collections/c")
    items = [{"id": "good", "embedding": [1.0] + [0.0] * 23}, item]
    answer = client.post("/collections/c/items", json={"items": items})
    assert says in json.dumps(problem(answer, 422)).replace("\\", "")
    assert client.get("/collections/c").json()["count"] == 0


def test_an_error_of_the_model_names_the_item_that_it_is(client: TestClient, encoded: Encoded) -> None:
    client.put("/collections/c")
    good = {"embedding": [1.0] * 24}
    broken = {"image": base64.b64encode(encoded()[:100]).decode()}
    answer = client.post("/collections/c/items", json={"items": [good, good, broken]})
    assert problem(answer, 422)["input"] == 2


def test_items_are_listed_with_their_own_embeddings_while_they_are_replaced(client: TestClient) -> None:
    client.put("/collections/c")
    rows, ended = unit_rows(2, size=24), threading.Event()

    def put(turn: int) -> None:
        item = {"id": "i", "embedding": _base64(rows[turn % 2]), "metadata": {"row": turn % 2}}
        assert client.post("/collections/c/items", json={"items": [item]}).status_code == 200

    def replace() -> None:
        for turn in range(1, 1000):
            if ended.is_set():
                return
            put(turn)

    put(0)
    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(200):
            (item,) = _listed(client).values()
            assert np.allclose(item["embedding"], rows[item["metadata"]["row"]], atol=1e-6)
    finally:
        ended.set()
        writer.join()


def _photos(folder: Path, encoded: Encoded) -> Path:
    for index in range(5):
        folder.mkdir(exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(encoded(index))
        (folder / f"{index}.txt").write_text(f"picture {index}")
    return folder


def test_a_dump_is_all_there_is_of_a_collection(run: Run, encoded: Encoded, tmp_path: Path) -> None:
    run("index", str(_photos(tmp_path / "photos", encoded)), "--collection", "a")
    file = tmp_path / "a.parquet"
    assert "5 items" in run("dump", str(file), "--collection", "a", "--pictures")
    table = pyarrow.parquet.read_table(file)
    assert table.column_names == ["id", "kind", "caption", "metadata", "embedding", "image"]
    assert json.loads(table.schema.metadata[b"semblance"])["dimensions"] == 24
    assert "5 added, 0 there already" in run("index", str(file), "--collection", "a", data="other")
    assert "0 added, 5 there already" in run("index", str(file), "--collection", "a", data="other")
    with SQLiteCollections(tmp_path / "data") as one, SQLiteCollections(tmp_path / "other") as other:
        before, after = one.get("a"), other.get("a")
        items = before.page(10)
        assert [(i.id, i.kind, i.caption, i.metadata) for i in after.page(10)] == [
            (i.id, i.kind, i.caption, i.metadata) for i in items
        ]
        assert np.allclose(*(kept.vectors([item.id for item in items]) for kept in (before, after)), atol=1e-7)
        assert len(before.picture(items[0].id)) > 100
        assert after.picture(items[0].id)[:2] == b"\xff\xd8"
    run("dump", str(tmp_path / "small.parquet"), "--collection", "a")
    assert "image" not in pyarrow.parquet.read_schema(tmp_path / "small.parquet").names
    run("dump", str(tmp_path / "no" / "folder.parquet"), "--collection", "a", status=1)
    assert sorted(path.name for path in tmp_path.glob("*.parquet*")) == ["a.parquet", "small.parquet"]
    file_of(tmp_path / "data" / "pictures", items[0].picture or "").unlink()
    said = run("dump", str(tmp_path / "lacks.parquet"), "--collection", "a", "--pictures")
    assert said.count("not written: ") == 1
    assert f"not written: the picture of item {items[0].id!r}: the picture has been deleted" in said


def test_a_dump_waits_for_a_busy_server_and_leaves_no_picture_out(tmp_path: Path) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/image"):
            asked.append(request)
            if len(asked) == 1:
                return httpx.Response(429, headers={"Retry-After": "0"}, json={"detail": "later"})
            return httpx.Response(404 if "gone" in request.url.path else status, content=b"picture")
        if request.url.path.endswith("/items"):
            items = [
                {"id": id, "kind": "image", "caption": None, "metadata": {}, "embedding": _base64([1.0] * 24)}
                | {"url": f"/collections/c/items/{id}/image"}
                for id in ("a", "gone")
            ]
            return httpx.Response(200, json={"items": items, "next": None})
        own = {"name": "c", "model": "m", "fingerprint": "f", "dimensions": 24}
        return httpx.Response(200, json=own)

    async def dump() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as client:
            async for _ in dump_vectors(client, "c", tmp_path / "out.parquet", pictures=True):
                pass

    status = 200
    asyncio.run(dump())
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["image"] for row in rows] == [b"picture", None]
    status = 500
    with pytest.raises(AnswerError, match="500"):
        asyncio.run(dump())


def test_an_embedding_of_a_text_needs_the_text(run: Run, tmp_path: Path) -> None:
    rows = [
        {"id": f"i{number}", "kind": "text", "embedding": list(vector), "caption": caption}
        for number, (vector, caption) in enumerate(
            zip(unit_rows(2, size=24).tolist(), ("a red star", None), strict=True)
        )
    ]
    said = run("index", _table(tmp_path / "rows.parquet", rows))
    assert "1 added, 0 there already, 1 not read" in said
    assert "rows.parquet:2: it is of a text" in said


class _Other(ModelEngine):
    """Another model than `clip`, of as many dimensions."""

    def __init__(self) -> None:
        model = tiny_clip(seed=1)
        model.fingerprint = "of another model"
        super().__init__("other", model, device="cpu")


@pytest.mark.parametrize("before_page", [1, 2, 3, None])
def test_a_dump_that_another_model_comes_into_leaves_no_file(
    start: Callable[..., TestClient], engines: dict[str, Engine], tmp_path: Path, before_page: int | None
) -> None:
    client = start({**engines, "other": _Other()})
    client.put("/collections/c", json={"model": "clip"})
    items = [{"id": f"i{place}", "text": f"text {place}"} for place in range(12)]
    assert client.post("/collections/c/items", json={"items": items}).status_code == 200
    pages = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal pages
        url = request.url
        if url.path.endswith("/items"):
            pages += 1
            url = url.copy_set_param("limit", 5)
            if pages == before_page:
                client.post("/collections/c/reindex", json={"model": "other"})
                wait_for(lambda: client.get("/collections/c/reindex").json()["state"] == "done")
        found = client.request(request.method, str(url))
        return httpx.Response(found.status_code, content=found.content)

    async def dump() -> int:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as through:
            return [count async for count in dump_vectors(through, "c", tmp_path / "c.parquet")][-1]

    if before_page is None:
        assert asyncio.run(dump()) == 12
        assert pages == 3
        return
    with pytest.raises(ConflictError, match=r"is of 'other' \(of another model\) now, .* dump it again"):
        asyncio.run(dump())
    assert not list(tmp_path.glob("*c.parquet*"))


def test_embeddings_are_not_loaded_into_the_collection_of_a_model_that_came_meanwhile(
    start: Callable[..., TestClient], engines: dict[str, Engine], tmp_path: Path
) -> None:
    client = start({**engines, "other": _Other()})
    source = _table(
        tmp_path / "rows.parquet", [{"id": f"i{n}", "embedding": unit_rows(1, n, 24)[0].tolist()} for n in range(40)]
    )

    def answer(request: httpx.Request) -> httpx.Response:
        sent = {"Content-Type": "application/json"}
        found = client.request(request.method, request.url.raw_path.decode(), content=request.content, headers=sent)
        if request.method == "PUT":
            begun = client.post("/collections/c/reindex", json={"model": "other"})
            assert begun.status_code == 202, begun.text
            wait_for(lambda: client.get("/collections/c/reindex").json()["state"] == "done")
        return httpx.Response(found.status_code, content=found.content)

    with pytest.raises(ConflictError, match=r"is of 'other' \(of another model\) now, so no more was stored"):
        _load_through(answer, source)
    assert _listed(client) == {}


def test_two_dumps_to_one_file_at_once_are_both_whole(
    start: Callable[..., TestClient], engines: dict[str, Engine], tmp_path: Path
) -> None:
    client = start(engines)
    client.put("/collections/c")
    items = [{"id": f"i{place}", "text": f"text {place}"} for place in range(12)]
    assert client.post("/collections/c/items", json={"items": items}).status_code == 200
    both = asyncio.Barrier(2)

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/items"):
            await both.wait()  # until both have begun to write
        found = client.request(request.method, str(request.url))
        return httpx.Response(found.status_code, content=found.content)

    async def dump() -> int:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as through:
            return [count async for count in dump_vectors(through, "c", tmp_path / "c.parquet")][-1]

    async def twice() -> list[int]:
        return await asyncio.gather(dump(), dump())

    assert asyncio.run(twice()) == [12, 12]
    assert [file.name for file in tmp_path.glob("*c.parquet*")] == ["c.parquet"]
    assert pyarrow.parquet.read_metadata(tmp_path / "c.parquet").num_rows == 12


def test_a_dump_names_the_file_that_it_cannot_write(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "no folder" / "c.parquet"
    run(
        "index",
        _table(tmp_path / "rows.parquet", [{"embedding": unit_rows(1, size=24)[0].tolist()}]),
        "--collection",
        "c",
    )
    assert f"{out} cannot be written: No such file or directory" in run("dump", str(out), "--collection", "c", status=1)


def test_a_dump_of_another_model_is_refused_by_name(run: Run, encoded: Encoded, tmp_path: Path) -> None:
    run("index", str(_photos(tmp_path / "photos", encoded)))
    run("dump", str(tmp_path / "a.parquet"))
    save_checkpoint(tiny_clip(seed=1), tmp_path / "models" / "clip")
    said = run("index", str(tmp_path / "a.parquet"), status=1, data="other", models=tmp_path / "models")
    assert "embeddings of model 'clip'" in said
    assert "load that model" in said


def test_folders_of_clip_retrieval_and_autofaiss_are_read(run: Run, encoded: Encoded, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(encoded(1))
    rows = unit_rows(6, size=24)
    folder = tmp_path / "laion"
    for part in range(2):
        for name, kind in (("img_emb", rows), ("text_emb", -rows)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"{name}_{part}.npy", kind[3 * part : 3 * part + 3].astype(np.float16))
        (folder / "metadata").mkdir(exist_ok=True)
        paths = [str(photo) if part + row == 0 else f"/gone/{part}/{row}.jpg" for row in range(3)]
        table = {"image_path": paths, "caption": [f"text {part} {row}" for row in range(3)], "width": [640, 480, 320]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "metadata" / f"metadata_{part}.parquet")
    assert "12 added" in run("index", str(folder), "--collection", "laion")
    with SQLiteCollections(tmp_path / "data") as collections:
        collection = collections.get("laion")
        for row in range(6):
            (hit,) = collection.search(rows[row], 1, target="image")
            assert hit.score > 0.999
            assert hit.item.caption == f"text {row // 3} {row % 3}"
            assert hit.item.metadata["width"] == (640, 480, 320)[row % 3]
            assert (hit.item.picture is not None) == (row == 0)
            (text,) = collection.search(-rows[row], 1, target="text")
            assert text.item.caption == hit.item.caption

    (tmp_path / "faiss").mkdir()
    np.save(tmp_path / "faiss" / "0.npy", rows[:2])
    np.save(tmp_path / "faiss" / "1.npy", rows[2:])
    assert "6 added" in run("index", str(tmp_path / "faiss"), "--collection", "plain")
    named = pyarrow.table({"id": ["x", "y"], "embedding": rows[:2].tolist(), "lot": [1, 2]})
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(named, tmp_path / "tables" / "0.parquet")
    assert "2 added" in run("index", str(tmp_path / "tables"), "--collection", "named")
    with SQLiteCollections(tmp_path / "data") as collections:
        assert [item.id for item in collections.get("plain").page(10)][:2] == ["0:0", "0:1"]
        assert {item.id: item.metadata for item in collections.get("named").page(10)} == {
            "x": {"lot": 1},
            "y": {"lot": 2},
        }


def _table(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(exist_ok=True)
    names = {name: None for row in rows for name in row}
    columns = {name: [row.get(name) for row in rows] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return str(file)


def test_a_bad_row_is_named_and_the_others_are_taken_in(run: Run, encoded: Encoded, tmp_path: Path) -> None:
    good = {"embedding": [1.0] + [0.0] * 23, "metadata": None, "caption": "good", "exif": None, "ratio": 1.5}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"caption": "x" * 2001}, "the text has 2,001 characters"),
        ({"exif": "x" * 17_000}, "at most 16,384 bytes, as JSON, are kept of one item"),
        ({"embedding": [0.0] * 24}, "zero or not finite"),
        ({"embedding": [1e300] * 24}, "zero or not finite"),
        ({"embedding": [1.0, None] * 12}, "zero or not finite"),
        ({"embedding": None}, "it has no embedding"),
        ({"embedding": [1.0] * 23}, "shape (23,), (24,) expected"),
        ({"metadata": "{"}, "its `metadata` is no JSON object"),
        ({"metadata": "[1]"}, "its `metadata` is no JSON object"),
        ({"ratio": float("inf")}, "not JSON compliant"),
        ({"caption": "half \0 a pair"}, "must not hold NUL"),
    ]
    rows = [good | change for change, _ in wrong]
    rows = [{"id": f"i{place}", **row} for place, row in enumerate([good, *rows, *[good] * 30])]
    file = _table(tmp_path / "rows.parquet", rows)
    said = run("index", file)
    assert f"31 added, 0 there already, {len(wrong)} not read" in said
    lines = [line for line in said.splitlines() if line.startswith("not read: ")]
    reported = {int(line.removeprefix(f"not read: {file}:").partition(":")[0]): line for line in lines}
    assert sorted(reported) == list(range(2, 2 + len(wrong)))
    for place, (_, says) in enumerate(wrong, 2):
        assert says in reported[place]
        assert "input" not in reported[place]
        assert ": : " not in reported[place]
    assert f"0 added, 31 there already, {len(wrong)} not read" in run("index", file)
    run("index", file, "--max-bad", "3", status=1)


def test_of_several_rows_of_one_item_the_first_counts(run: Run, tmp_path: Path) -> None:
    names = ["a", "b", "a"] + [f"i{number}" for number in range(5 * BATCH)] + ["b"]
    rows = [
        {"id": name, "embedding": list(vector), "caption": f"row {place}"}
        for place, (name, vector) in enumerate(zip(names, unit_rows(len(names), size=24).tolist(), strict=True))
    ]
    file = _table(tmp_path / "rows.parquet", rows)
    said = run("index", file)
    assert f"{5 * BATCH + 2} added, 0 there already, 2 not read" in said
    assert f"not read: {file}:3: an earlier row has this item (a)" in said
    assert f"not read: {file}:{len(names)}: an earlier row has this item (b)" in said
    run("dump", str(tmp_path / "out.parquet"))
    captions = {row["id"]: row["caption"] for row in pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()}
    assert (captions["a"], captions["b"]) == ("row 0", "row 1")


def test_a_bad_row_of_an_array_is_named(run: Run, tmp_path: Path) -> None:
    rows = unit_rows(20, size=24)
    rows[3], rows[17] = 0, np.nan
    np.save(tmp_path / "a.npy", rows)
    said = run("index", str(tmp_path / "a.npy"))
    assert "18 added, 0 there already, 2 not read" in said
    assert f"not read: {tmp_path}/a.npy:4: " in said
    assert f"not read: {tmp_path}/a.npy:18: " in said


def test_missing_values_are_left_out_of_the_metadata(run: Run, tmp_path: Path) -> None:
    for name in ("img_emb", "metadata"):
        (tmp_path / "c" / name).mkdir(parents=True)
    np.save(tmp_path / "c" / "img_emb" / "img_emb_0.npy", unit_rows(3, size=24))
    nan = float("nan")
    columns = {"width": [640.0, nan, None], "caption": pyarrow.array([nan] * 3), "image_path": [nan] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "c" / "metadata" / "metadata_0.parquet")
    assert "3 added, 0 there already, 0 not read" in run("index", str(tmp_path / "c"))
    with SQLiteCollections(tmp_path / "data") as collections:
        items = collections.get("default").page(10)
    assert [(item.caption, item.metadata) for item in items] == [(None, {"width": 640.0}), (None, {}), (None, {})]


def test_a_picture_that_cannot_be_read_is_left_out(run: Run, encoded: Encoded, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded(1))
    (tmp_path / "damaged.jpg").write_bytes(encoded(2)[:100])
    (tmp_path / "text.jpg").write_text("no picture")
    names = ["good", "damaged", "gone", "text", "x" * 300, "good"]
    vectors = unit_rows(6, size=24).tolist()
    rows = [
        {"id": f"i{place}", "embedding": vector, "image_path": f"{tmp_path}/{name}.jpg"}
        for place, (name, vector) in enumerate(zip(names, vectors, strict=True))
    ]
    rows[5]["embedding"] = [0.0] * 24
    file = _table(tmp_path / "rows.parquet", rows)
    said = run("index", file)
    assert "5 added, 0 there already, 3 not read" in said
    assert f"not read: {file}:2: stored without its picture: " in said
    assert f"not read: {file}:4: stored without its picture: " in said
    assert f"not read: {file}:6: " in said
    with SQLiteCollections(tmp_path / "data") as collections:
        items = collections.get("default").page(10)
    assert [item.picture is not None for item in items] == [True, False, False, False, False]


def _load_through(answer: Callable[[httpx.Request], httpx.Response], source: str | Path) -> Report:
    async def load() -> Report:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as client:
            return await load_vectors(client, "c", source)

    return asyncio.run(load())


MADE = {"name": "c", "model": "m", "fingerprint": "f", "dimensions": 24}


def test_large_pictures_are_sent_in_several_requests(run: Run, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (730, 730, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png", compress_level=0)
    assert (tmp_path / "large.png").stat().st_size > 1_500_000
    rows = [
        {"id": f"i{place}", "embedding": vector, "image_path": str(tmp_path / "large.png")}
        for place, vector in enumerate(unit_rows(16, size=24).tolist())
    ]
    file = _table(tmp_path / "rows.parquet", rows)
    assert "16 added, 0 there already, 0 not read" in run("index", file)
    sizes = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            sizes.append((len(request.content), len(json.loads(request.content)["items"])))
        return httpx.Response(200, json=MADE | {"items": [], "next": None})

    assert _load_through(answer, file).added == 16
    assert [items for _, items in sizes] == [2] * 8
    assert max(size for size, _ in sizes) <= BATCH_BYTES


def test_a_server_that_refuses_all_ends_the_import(tmp_path: Path) -> None:
    posts = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            posts.append(request)
            return httpx.Response(403, json={"detail": "no key"})
        return httpx.Response(200, json=MADE | {"items": [], "next": None})

    np.save(tmp_path / "a.npy", unit_rows(20 * BATCH, size=24))
    with pytest.raises(AnswerError, match="no key"):
        _load_through(answer, tmp_path / "a.npy")
    assert 1 <= len(posts) <= IN_FLIGHT


def test_folders_with_files_that_are_no_embeddings_are_refused_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "0.npy", unit_rows(2, size=24))
    _table(tmp_path / "arrays" / "other.parquet", [{"caption": "a"}])
    said = run("index", str(tmp_path / "arrays"), status=1)
    assert "other.parquet has no column `embedding`" in said
    assert "move it out of the folder" in said
    vector = unit_rows(1, size=24)[0].tolist()
    _table(tmp_path / "tables" / "0.parquet", [{"embedding": vector}])
    _table(tmp_path / "tables" / "1.parquet", [{"vector": vector}])
    assert "1.parquet has no column `embedding`" in run("index", str(tmp_path / "tables"), status=1)
    (tmp_path / "tables" / "1.parquet").write_bytes(b"nothing")
    assert "1.parquet cannot be read as Parquet" in run("index", str(tmp_path / "tables"), status=1)
    for content in (b"nothing", b"", b"PAR1" * 10):
        (tmp_path / "no.parquet").write_bytes(content)
        assert "no.parquet cannot be read as Parquet" in run("index", str(tmp_path / "no.parquet"), status=1)
    assert "gone.parquet cannot be read as Parquet" in run("index", str(tmp_path / "gone.parquet"), status=1)
    for value in ([1.0] * 5, 1.0, "1.0"):
        file = _table(tmp_path / "short.parquet", [{"embedding": value}] * 3)
        assert "short.parquet holds" in run("index", file, status=1)


def test_files_that_hold_no_embeddings_are_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"nothing")
    np.save(tmp_path / "b.npy", np.array([object()]), allow_pickle=True)
    np.save(tmp_path / "cut.npy", unit_rows(2, size=24))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:200])
    np.savez(tmp_path / "several.npz", unit_rows(2, size=24))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "empty.npy").touch()
    for name in ("a", "b", "cut", "several", "empty"):
        said = run("index", str(tmp_path / f"{name}.npy"), status=1)
        assert f"{name}.npy is no .npy array of numbers" in said
        assert "numpy.save" in said
        assert "pickle" not in said
    assert "gone.npy cannot be read: No such file" in run("index", str(tmp_path / "gone.npy"), status=1)
    np.save(tmp_path / "c.npy", np.arange(3))
    assert "rows of floats are expected" in run("index", str(tmp_path / "c.npy"), status=1)
    np.save(tmp_path / "d.npy", unit_rows(2, size=5))
    assert "d.npy holds embeddings of 5 numbers, those of the collection have 24" in run(
        "index", str(tmp_path / "d.npy"), status=1
    )
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", unit_rows(2, size=24))
    for captions in (["one"], ["one", "two", "three"]):  # more of them would be given to the wrong pictures as well
        pyarrow.parquet.write_table(pyarrow.table({"caption": captions}), tmp_path / "metadata" / "metadata_0.parquet")
        told = f"metadata_0.parquet has {len(captions)} rows and img_emb_0.npy 2"
        assert told in run("index", str(tmp_path), status=1)
