"""Embeddings in and out of collections: through the API, as Parquet, and from other programs' folders."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from starlette.testclient import TestClient
from support import problem, tiny_clip, unit_rows

from app.__main__ import main
from app.sqlite_collections import SQLiteCollections
from models.checkpoint import save_checkpoint

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
        assert np.allclose(before.embeddings(items), after.embeddings(after.page(10)), atol=1e-7)
        assert len(before.picture(items[0].id)) > 100
        assert after.picture(items[0].id)[:2] == b"\xff\xd8"
    run("dump", str(tmp_path / "small.parquet"), "--collection", "a")
    assert "image" not in pyarrow.parquet.read_schema(tmp_path / "small.parquet").names
    run("dump", str(tmp_path / "no" / "folder.parquet"), "--collection", "a", status=1)
    assert sorted(path.name for path in tmp_path.glob("*.parquet*")) == ["a.parquet", "small.parquet"]


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


def test_files_that_hold_no_embeddings_are_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"nothing")
    assert "a.npy is no .npy array" in run("index", str(tmp_path / "a.npy"), status=1)
    np.save(tmp_path / "b.npy", np.array([object()]), allow_pickle=True)
    assert "b.npy is no .npy array" in run("index", str(tmp_path / "b.npy"), status=1)
    np.save(tmp_path / "c.npy", np.arange(3))
    assert "rows of floats are expected" in run("index", str(tmp_path / "c.npy"), status=1)
    np.save(tmp_path / "d.npy", unit_rows(2, size=5))
    assert "shape (5,), (24,) expected" in run("index", str(tmp_path / "d.npy"), status=1)
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", unit_rows(2, size=24))
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["one"]}), tmp_path / "metadata" / "metadata_0.parquet")
    assert "has fewer rows than img_emb_0.npy" in run("index", str(tmp_path), status=1)
