"""The command line: filling collections, searching them, and the demo that a first start shows."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support import open_clip_folder, running

from app.__main__ import main
from app.sqlite_collections import SQLiteCollections
from training.scene_shard import write_shard

Encoded = Callable[..., bytes]
Run = Callable[..., str]


@pytest.fixture
def photos(tmp_path: Path, encoded: Encoded) -> Path:
    folder = tmp_path / "photos"
    for index in range(40):
        file = folder / ("cats" if index % 2 else "old dogs") / f"pic ture {index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(index))
    (folder / "cats" / "broken.jpg").write_bytes(encoded()[:200])
    (folder / "cats" / "page.png").write_bytes(b"<html>")
    (folder / "notes.txt").write_text("not a picture, and none by its name")
    return folder


@pytest.fixture
def run(tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, status: int = 0) -> str:
        place = ["--data", str(tmp_path / "data"), "--checkpoints", str(checkpoints), "--threads", "1"]
        assert main([*arguments, *place]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out + captured.err

    return call


def test_index_reports_resumes_and_updates(run: Run, photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    said = run("index", str(photos), "--collection", "pets")
    assert "40 added, 0 there already, 2 not read" in said
    assert f"not read: {photos}/cats/broken.jpg: the picture cannot be decoded" in said
    assert f"not read: {photos}/cats/page.png: not a picture that is read" in said
    assert "0 added, 40 there already, 2 not read" in run("index", str(photos), "--collection", "pets")
    changed = photos / "cats" / "pic ture 1.jpg"
    changed.write_bytes(encoded(99))
    os.utime(changed, (1, 1))
    (photos / "cats" / "new.jpg").write_bytes(encoded(100))
    assert "2 added, 39 there already" in run("index", str(photos), "--collection", "pets")
    with SQLiteCollections(tmp_path / "data") as collections:
        items = collections.get("pets").page(100)
        assert len(items) == 41
        one = next(item for item in items if item.metadata["path"] == "old dogs/pic ture 0.jpg")
        assert (one.caption, one.metadata["label"]) == ("old dogs", "old dogs")
    run("index", str(photos), "--collection", "pets", "--max-bad", "1", status=1)


def test_index_of_a_table_and_of_shards(run: Run, photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    table = photos / "captions.csv"
    table.write_text("path,caption\ncats/pic ture 1.jpg,a cat asleep\nmissing.jpg,nothing\n")
    said = run("index", str(table), "--collection", "table")
    assert "1 added, 0 there already, 1 not read" in said
    assert "No such file" in said
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, content in (("x.jpg", encoded(1)), ("x.json", b'{"caption": "from a shard", "year": 1999}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert "1 added" in run("index", str(tmp_path / "shard.tar"), "--collection", "shard")
    with SQLiteCollections(tmp_path / "data") as collections:
        (item,) = collections.get("shard").page(10)
        assert (item.caption, item.metadata["year"]) == ("from a shard", 1999)
    # Keys of several shards may be alike; each picture keeps its place.
    (tmp_path / "shards").mkdir()
    for name in ("0.tar", "1.tar"):
        (tmp_path / "shards" / name).write_bytes((tmp_path / "shard.tar").read_bytes())
    assert "2 added" in run("index", str(tmp_path / "shards"), "--collection", "shards")
    with SQLiteCollections(tmp_path / "data") as collections:
        assert [item.id for item in collections.get("shards").page(10)] == ["0.tar:x", "1.tar:x"]


def test_search_embed_and_models(run: Run, photos: Path) -> None:
    run("index", str(photos))
    hits = json.loads(run("search", str(photos / "cats" / "pic ture 3.jpg"), "--image", "--json", "-k", "2"))["hits"]
    assert hits[0]["metadata"]["path"] == "cats/pic ture 3.jpg"
    assert len(hits) == 2
    assert "cats" in run("search", "a cat", "-k", "40")
    rows = [json.loads(line) for line in run("embed", "a", "b", "--dimensions", "4").splitlines()]
    assert [(row["input"], len(row["embedding"])) for row in rows] == [("a", 4), ("b", 4)]
    assert json.loads(run("models", "--json"))["data"][0]["id"] == "clip"
    assert "r1 0.25" in run("models")


def test_an_open_clip_model_is_indexed_and_searched(run: Run, photos: Path, tmp_path: Path) -> None:
    model = ["--model", f"mine={open_clip_folder(tmp_path / 'mine')}"]
    assert "40 added" in run("index", str(photos), "--collection", "theirs", "--embedder", "mine", *model)
    query = [str(photos / "cats" / "pic ture 3.jpg"), "--image", "--json", "--collection", "theirs", *model]
    answer = json.loads(run("search", *query))
    assert (answer["model"], answer["hits"][0]["metadata"]["path"]) == ("mine", "cats/pic ture 3.jpg")
    assert len(json.loads(run("models", "--json", *model))["data"]) == 2
    assert "model 'mine', which is not loaded" in run("search", "a cat", "--collection", "theirs", status=1)


def test_errors_are_sentences(run: Run, tmp_path: Path) -> None:
    assert "no collection 'nope'" in run("search", "a", "--collection", "nope", status=1)
    assert "is no file" in run("index", str(tmp_path / "absent"), status=1)
    assert "no model that generates pictures is loaded" in run("generate", "a red star", status=1)
    assert "--insecure" in run("serve", "--host", "0.0.0.0", status=1)
    assert "setting port" in run("serve", "--port", "99999", status=1)
    assert "cannot be reached" in run("models", "--server", "http://127.0.0.1:9", status=1)


def test_help_explains_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["serve"], ["index"], ["search"], ["embed"], ["generate"], ["models"]):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        assert "usage: semblance" in capsys.readouterr().out


def test_a_demo_is_filled_once_and_commands_find_the_running_server(
    tmp_path: Path, checkpoints: Path, photos: Path, run: Run
) -> None:
    import shutil

    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, folder)
    write_shard(folder / "scenes.tar.gz", each=1, others=5, size=32)
    with running(folder, tmp_path / "data", "--demo") as server:
        hits = httpx.get(f"{server.url}/search", params={"q": "a red star", "k": 200}).json()["hits"]
        assert len(hits) == 105
        assert httpx.get(server.url + hits[0]["url"]).headers["content-type"] == "image/jpeg"
        # The folder is in use, so these go through the server that has it.
        assert "40 added" in run("index", str(photos), "--collection", "pets")
        assert httpx.get(f"{server.url}/collections/pets").json()["count"] == 40
        assert httpx.delete(f"{server.url}/collections/default/items/{hits[0]['id']}").status_code == 204
        server.kill()
    with running(folder, tmp_path / "data", "--demo") as server:
        assert httpx.get(f"{server.url}/collections/default").json()["count"] == 104
        assert httpx.get(f"{server.url}/collections/pets").json()["count"] == 40
