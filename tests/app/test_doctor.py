"""`semblance doctor`: what is well, what is not, and the way out."""

from __future__ import annotations

import os
import re
import shutil
import socket
from contextlib import closing
from pathlib import Path

import apsw
import numpy as np
import psycopg
import pytest
from databases import PostgresServer
from pydantic import SecretStr

from app.__main__ import main
from app.collection import NewItem
from app.doctor import Finding, examine
from app.keys import Keyring
from app.pictures import file_of
from app.postgres_collections import PostgresCollections
from app.settings import Settings
from app.sqlite_collections import SQLiteCollections
from models.errors import StorageError


def found(settings: Settings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(settings)}


@pytest.fixture
def settings(checkpoints: Path, tmp_path: Path) -> Settings:
    with SQLiteCollections(tmp_path / "data") as collections:
        collections.create("mine", model="m", fingerprint="f", dimensions=4)
    return Settings(checkpoints=checkpoints, store=tmp_path / "data", port=0, threads=1)


def test_all_is_well(settings: Settings) -> None:
    findings = found(settings)
    assert {finding.verdict for finding in findings.values()} <= {"ok", "note"}
    assert findings["collection mine"].text.startswith("0 items of model 'm'")
    assert "fingerprint" in findings["model clip"].text
    assert found(settings.model_copy(update={"store": settings.store / "new"}))["data folder"].verdict == "ok"
    assert not (settings.store / "new").exists()


def test_a_server_that_runs_is_let_be(settings: Settings) -> None:
    with SQLiteCollections(settings.store, note="http://127.0.0.1:8000"):
        assert found(settings)["data folder"].text.endswith("is whole, and served by http://127.0.0.1:8000")


def test_a_server_that_runs_has_its_address(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        settings = settings.model_copy(update={"port": port})
        with SQLiteCollections(settings.store, note=f"http://127.0.0.1:{port}"):
            assert found(settings)["address"].verdict == "ok"
        assert found(settings)["address"].verdict == "bad"  # a note that was left, and somebody else's port


def test_nothing_is_changed(settings: Settings) -> None:
    """Not what a start would sweep up, nor what it would make."""
    with SQLiteCollections(settings.store) as collections:
        collections.get("mine").add([NewItem("text", np.ones(4, np.float32) / 2, "a")])
        shutil.copytree(settings.store, settings.store.with_name("killed"))  # with its log
    for store in (settings.store, settings.store.with_name("killed")):
        for name in ("pictures/ab/" + "ab" * 32, "index/99.json"):
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(b"x")
        for name in ("lock", "store.reserve", "store.db-shm"):  # the last is no data, and made anew
            (store / name).unlink(missing_ok=True)
        before = _files(store)
        assert found(settings.model_copy(update={"store": store}))["collection mine"].text.startswith("1 items")
        assert _files(store) == before


def _files(store: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in store.rglob("*") if file.is_file() and file.suffix != ".db-shm"]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_pictures_without_their_database_are_bad_as_for_a_server(settings: Settings) -> None:
    store = settings.store / "other"
    (store / "pictures/ab").mkdir(parents=True)
    settings = settings.model_copy(update={"store": store})
    assert found(settings)["data folder"].verdict == "ok"
    (store / "pictures/ab" / ("ab" * 32)).write_bytes(b"x")
    with pytest.raises(StorageError) as refused:
        SQLiteCollections(store)
    assert found(settings)["data folder"] == Finding("bad", "data folder", str(refused.value))


def test_a_damaged_checkpoint_is_named(settings: Settings, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(settings.checkpoints, copy)
    weights = next(copy.glob("clip/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    finding = found(settings.model_copy(update={"checkpoints": copy}))["model clip"]
    assert finding.verdict == "bad"
    assert "clip" in finding.text
    assert found(settings.model_copy(update={"checkpoints": tmp_path / "none"}))["checkpoints"].verdict == "bad"


def test_a_damaged_database_is_named(settings: Settings) -> None:
    file = settings.store / "store.db"
    file.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    finding = found(settings)["data folder"]
    assert finding.verdict == "bad"
    assert "restore it from a backup" in finding.text


def test_a_vector_of_another_length_is_named(settings: Settings) -> None:
    with SQLiteCollections(settings.store) as collections:
        collections.get("mine").add([NewItem("text", np.ones(4, np.float32) / 2, "a")])
    with closing(apsw.Connection(str(settings.store / "store.db"))) as connection:
        connection.execute("UPDATE vectors SET vector = x'00'")
    assert "a vector is not 4 numbers long" in found(settings)["data folder"].text


def test_pictures_that_are_lost_are_named_with_an_item(settings: Settings) -> None:
    vector = np.ones(4, np.float32)
    with SQLiteCollections(settings.store) as collections:
        for number in range(3):
            item = NewItem("image", vector, f"i{number}", picture=b"picture %d" % number)
            collections.get("mine").add([item])
        first, second, third = (collections.get("mine").get(f"i{number}").picture or "" for number in range(3))
    assert "pictures" not in found(settings)
    file_of(settings.store / "pictures", first).unlink()
    file_of(settings.store / "pictures", second).write_bytes(b"pict")
    finding = found(settings)["pictures"]
    assert finding.verdict == "bad"
    assert finding.text.startswith("2 are missing or cut off")
    assert re.search(r"the picture of item 'i[01]' of collection 'mine'", finding.text)
    assert third not in finding.text


@pytest.mark.parametrize("name", ["store.db", "lock", "pictures/ab"])
def test_what_another_user_owns_is_named_as_by_a_server(
    settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server started, said that it was ready, and told every write that the disk is full."""
    (settings.store / "pictures/ab").mkdir()
    # Root, whom a test may run as, may write everything.
    monkeypatch.setattr(os, "access", lambda place, mode: place != settings.store / name)
    with pytest.raises(StorageError, match=f"{name} cannot be read and written by this user") as refused:
        SQLiteCollections(settings.store)
    assert found(settings)["data folder"] == Finding("bad", "data folder", str(refused.value))


def test_a_file_in_the_place_of_the_folder_is_named(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "photos.tar"
    file.touch()
    finding = found(settings.model_copy(update={"store": file}))["data folder"]
    assert (finding.verdict, finding.text) == ("bad", f"{file} is a file: give a folder for the collections by --data")
    assert main(["keys", "create", "a", "--data", str(file)]) == 1
    assert capsys.readouterr().err == f"semblance: {file}/keys: Not a directory\n"


def test_a_damaged_key_is_named(settings: Settings) -> None:
    Keyring(settings.store).create("site")
    assert found(settings)["keys"].text == "1 in the data folder, 0 in the settings"
    (settings.store / "keys/site.json").write_text("{")
    assert found(settings)["keys"].verdict == "bad"


def test_an_address_that_is_taken_or_open(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = found(settings.model_copy(update={"port": taken.getsockname()[1]}))["address"]
    assert (finding.verdict, "is taken" in finding.text) == ("bad", True)
    findings = [each for each in examine(settings.model_copy(update={"host": "0.0.0.0"})) if each.subject == "address"]
    assert [each.verdict for each in findings] == ["bad", "ok"]
    assert "semblance keys create" in findings[0].text


def test_a_device_that_is_not_there(settings: Settings) -> None:
    for name in ("nonsense", "cuda:99"):
        assert found(settings.model_copy(update={"device": name}))["device"].verdict == "bad"


def test_the_command(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoints", str(settings.checkpoints), "--data", str(settings.store), "--port", "0"]
    assert main(["doctor", *options]) == 0
    assert "ok   collection mine: 0 items" in capsys.readouterr().out
    assert main(["doctor", *options, "--host", "0.0.0.0"]) == 1
    assert "bad  address" in capsys.readouterr().out


def test_a_database_is_looked_at_in_the_folder_s_place(settings: Settings, postgres: PostgresServer) -> None:
    url = postgres.database()
    empty = found(settings.model_copy(update={"database": SecretStr(url)}))["database"]
    assert (empty.verdict, empty.text) == ("ok", "its schema is made at the first start")
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT to_regnamespace('semblance')").fetchone() == (None,)
    with PostgresCollections(url) as collections:
        collections.create("photos", model="clip", fingerprint="f", dimensions=8)
    findings = found(settings.model_copy(update={"database": SecretStr(url)}))
    assert findings["collection photos"].text.startswith("0 items")
    assert "collection mine" not in findings
    away = SecretStr("postgresql://u:secret@127.0.0.1:1/db")
    finding = found(settings.model_copy(update={"database": away}))["database"]
    assert finding.verdict == "bad"
    assert "127.0.0.1:1/db cannot be opened" in finding.text
    assert "secret" not in finding.text
