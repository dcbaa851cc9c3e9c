"""Pictures that stay where they are: read below the operator's folder alone, and never handed out as they came."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient
from support import problem

from app.__main__ import main
from app.settings import Settings
from app.sqlite_collections import SQLiteCollections

Encoded = Callable[..., bytes]
Start = Callable[..., TestClient]


@pytest.fixture
def photos(tmp_path: Path, encoded: Encoded) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for index in range(4):
        (folder / "sub" / f"{index}.png").write_bytes(encoded(index, "PNG", size=(120, 90)))
    (tmp_path / "secret.png").write_bytes(encoded(9, "PNG"))
    (folder / "way-out.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture
def client(tmp_path: Path, photos: Path, engines: dict[str, object]) -> TestClient:
    """Of a server that may read the photos where they are."""
    from app.main import create_app

    settings = Settings(store=tmp_path / "data", threads=1, picture_root=photos)
    with SQLiteCollections(settings.store, picture_root=photos) as collections:
        app = create_app(settings, engines, collections)  # type: ignore[arg-type]
        with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as running:
            running.put("/collections/c")
            yield running  # type: ignore[misc]


def test_they_are_found_and_shown_from_their_places(client: TestClient, photos: Path, tmp_path: Path) -> None:
    items = [{"id": f"i{i}", "path": f"sub/{i}.png", "caption": f"c{i}"} for i in range(3)]
    items.append({"id": "i3", "path": str(photos / "sub" / "3.png")})
    assert client.post("/collections/c/items", json={"items": items}).status_code == 200
    with (photos / "sub" / "2.png").open("rb") as file:
        hits = client.post("/search", files={"file": file}, data={"collection": "c", "k": "1"}).json()["hits"]
    assert [(hit["id"], hit["score"] > 0.9999) for hit in hits] == [("i2", True)]
    url = hits[0]["url"]
    whole, small = client.get(url), client.get(url + "?size=64")
    assert whole.headers["content-type"] == small.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(whole.content)).size == (120, 90)
    assert max(Image.open(io.BytesIO(small.content)).size) == 64
    assert whole.content[:2] == b"\xff\xd8"  # encoded anew, whatever the file is
    for answer in (whole, small, client.get("/collections/c/items/i2"), client.get("/collections/c/items")):
        assert str(photos) not in answer.text + str(answer.headers)
    assert client.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    kept = [file for file in (tmp_path / "data" / "pictures").rglob("*") if file.is_file()]
    assert [file.suffix for file in kept] == [".64"]  # a thumbnail, and no copy

    (photos / "sub" / "2.png").write_bytes((photos / "sub" / "1.png").read_bytes())
    os.utime(photos / "sub" / "2.png", (1, 1))
    changed = client.get(url + "?size=64")
    assert changed.headers["etag"] != small.headers["etag"]
    assert changed.content != small.content
    (photos / "sub" / "2.png").unlink()
    problem(client.get(url), 404, "deleted")
    problem(client.get(url + "?size=64"), 404, "deleted")
    assert client.delete("/collections/c/items/i1").status_code == 204
    assert (photos / "sub" / "1.png").is_file()


@pytest.mark.parametrize(
    ("item", "status", "says"),
    [
        ({"path": "../secret.png"}, 422, "outside of the folder"),
        ({"path": "sub/../../secret.png"}, 422, "outside of the folder"),
        ({"path": "way-out.png"}, 422, "outside of the folder"),
        ({"path": "/etc/passwd"}, 422, "outside of the folder"),
        ({"path": "nothing.png"}, 422, "no file is at this path"),
        ({"path": "sub"}, 422, "no file is at this path"),
        ({"path": "text.png"}, 415, "not a picture"),
        ({"path": "sub/0.png\0"}, 422, "NUL"),
        ({"path": "sub/0.png", "image": "aaaa"}, 422, "an item has"),
        ({"path": ""}, 422, ""),
    ],
)
def test_nothing_else_is_read(client: TestClient, item: dict[str, str], status: int, says: str) -> None:
    good = {"path": "sub/0.png"}
    answer = client.post("/collections/c/items", json={"items": [good, item]})
    assert problem(answer, status, says)
    assert "/etc" not in answer.text
    assert client.get("/collections/c").json()["count"] == 0


def test_a_link_that_leads_out_later_is_not_followed(client: TestClient, photos: Path, tmp_path: Path) -> None:
    client.post("/collections/c/items", json={"items": [{"id": "i", "path": "sub/0.png"}]})
    assert client.get("/collections/c/items/i/image").status_code == 200
    (photos / "sub" / "0.png").unlink()
    (photos / "sub" / "0.png").symlink_to(tmp_path / "secret.png")
    problem(client.get("/collections/c/items/i/image"), 404, "does not read")
    problem(client.get("/collections/c/items/i/image?size=64"), 404, "does not read")


def test_a_server_without_such_a_folder_refuses(start: Start, photos: Path) -> None:
    client = start()
    client.put("/collections/c")
    items = [{"path": str(photos / "sub" / "0.png")}]
    problem(client.post("/collections/c/items", json={"items": items}), 403, "PICTURE_ROOT")


def test_a_large_file_is_refused_by_its_size(client: TestClient, photos: Path) -> None:
    with (photos / "large.png").open("wb") as file:
        file.truncate(20_000_001)
    answer = client.post("/collections/c/items", json={"items": [{"path": "large.png"}]})
    problem(answer, 413, "20,000,001 bytes")


def test_the_command_leaves_files_where_they_are(
    photos: Path, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEMBLANCE_PICTURE_ROOT", str(photos))
    place = ["--data", str(tmp_path / "data"), "--checkpoints", str(checkpoints), "--threads", "1"]
    assert main(["index", str(photos / "sub"), "--in-place", *place]) == 0
    assert "4 added, 0 there already, 0 not read" in capsys.readouterr().out
    assert main(["index", str(photos / "sub"), "--in-place", *place]) == 0
    assert "0 added, 4 there already" in capsys.readouterr().out
    with SQLiteCollections(tmp_path / "data", picture_root=photos) as collections:
        (first, *_) = collections.get("default").page(10)
        assert first.place == photos / "sub" / "0.png"
        assert collections.get("default").info().bytes == 4 * 24 * 4
        assert collections.get("default").picture(first.id) == (photos / "sub" / "0.png").read_bytes()
    assert not [file for file in (tmp_path / "data" / "pictures").rglob("*") if file.is_file()]
    assert main(["index", str(photos), "--in-place", "--collection", "all", *place]) == 0
    said = capsys.readouterr()
    assert "4 added, 0 there already, 2 not read" in said.out
    assert "text.png: not a picture" in said.err
    assert "way-out.png: the path lies outside" in said.err
