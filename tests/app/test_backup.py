"""Backups: of a folder that is served and changed, whole or refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import backup
from app.__main__ import main
from app.backup import back_up, restore
from app.collection import NewItem
from app.keys import Keyring
from app.sqlite_collections import SQLiteCollections
from models.errors import ConflictError, NotFoundError, StorageError

Encoded = Callable[..., bytes]


def item(number: int, picture: bytes | Path | None = None) -> NewItem:
    vector = np.zeros(4, "f4")
    vector[number % 4] = 1
    kind = "text" if picture is None else "image"
    return NewItem(
        id=f"i{number}", kind=kind, caption=f"caption {number}", metadata={"n": number}, vector=vector, picture=picture
    )


def content(store: Path) -> dict[str, tuple[str | None, bytes | None]]:
    with SQLiteCollections(store) as collections:
        mine = collections.get("mine")
        found = {}
        for each in mine.sample(10_000)[0]:
            picture = mine.picture(each.id) if each.picture else None
            found[each.id] = (each.caption, picture)
        return found


@pytest.fixture
def filled(tmp_path: Path, encoded: Encoded) -> Path:
    """A data folder with texts, pictures and a key."""
    store = tmp_path / "data"
    with SQLiteCollections(store) as collections:
        mine = collections.create("mine", model="m", fingerprint="f", dimensions=4)
        mine.add([item(number, encoded(seed=number) if number % 2 else None) for number in range(10)])
    Keyring(store).create("site")
    return store


def test_there_and_back(filled: Path, tmp_path: Path) -> None:
    saved = back_up(filled, tmp_path / "b.tar")
    assert (saved.items, saved.pictures, saved.elsewhere) == (10, 5, 0)
    assert saved.bytes == (tmp_path / "b.tar").stat().st_size
    assert restore(tmp_path / "b.tar", tmp_path / "again") == saved
    assert content(tmp_path / "again") == content(filled)
    assert [key.name for key in Keyring(tmp_path / "again").names()] == ["site"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again", "b.tar", "data"]  # nothing is left about


def test_a_folder_whose_last_key_was_revoked_asks_for_one_still(filled: Path, tmp_path: Path) -> None:
    Keyring(filled).revoke("site")
    back_up(filled, tmp_path / "b.tar")
    restore(tmp_path / "b.tar", tmp_path / "again")
    assert Keyring(tmp_path / "again").required
    assert (tmp_path / "again" / "keys").stat().st_mode & 0o777 == 0o700
    shutil.rmtree(filled / "keys")
    back_up(filled, tmp_path / "c.tar")
    restore(tmp_path / "c.tar", tmp_path / "open")
    assert not Keyring(tmp_path / "open").required


def test_while_it_changes(filled: Path, tmp_path: Path, encoded: Encoded) -> None:
    """Each backup is one moment: of the pairs that a writer adds and deletes together, none is torn."""
    stop = threading.Event()
    with SQLiteCollections(filled) as collections:
        mine = collections.get("mine")

        def change() -> None:
            number = 100
            while not stop.is_set():
                mine.add([item(number, encoded(seed=number)), item(number + 1, encoded(seed=number + 1))])
                if number >= 110:
                    mine.delete(f"i{number - 10}")
                number += 2

        writer = threading.Thread(target=change)
        writer.start()
        try:
            saved = [back_up(filled, tmp_path / f"{place}.tar") for place in range(5)]
        finally:
            stop.set()
            writer.join()
    assert saved[-1].items > saved[0].items
    for place, each in enumerate(saved):
        restore(tmp_path / f"{place}.tar", tmp_path / str(place))
        found = content(tmp_path / str(place))
        assert len(found) == each.items
        for number in range(100, 10_000, 2):
            assert f"i{number}" not in found or f"i{number + 1}" in found  # added together


def test_a_picture_that_goes_in_between_is_looked_for_again(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, copies = backup._copy_database, []

    def copy_and_delete(source: Path, copy: Path) -> None:
        original(source, copy)
        copies.append(copy)
        if len(copies) < 3:
            with SQLiteCollections(filled) as collections:
                collections.get("mine").delete(f"i{2 * len(copies) - 1}")

    monkeypatch.setattr(backup, "_copy_database", copy_and_delete)
    saved = back_up(filled, tmp_path / "b.tar")
    assert (len(copies), saved.items, saved.pictures) == (2, 9, 4)  # i3 was in the file before it was deleted
    restore(tmp_path / "b.tar", tmp_path / "again")
    assert content(tmp_path / "again").keys() == {f"i{number}" for number in range(10)} - {"i1"}
    monkeypatch.setattr(backup, "_add_pictures", lambda *given: given[-1][:1])
    monkeypatch.setattr(backup, "_TRIES", 1)
    with pytest.raises(StorageError, match="quieter time"):
        back_up(filled, tmp_path / "c.tar")
    assert not (tmp_path / "c.tar").exists()


def test_a_damaged_backup_makes_no_folder(filled: Path, tmp_path: Path) -> None:
    back_up(filled, tmp_path / "b.tar")
    whole = (tmp_path / "b.tar").read_bytes()
    rng = np.random.default_rng(0)
    bad, target = tmp_path / "bad.tar", tmp_path / "again"
    refused = 0
    for place in [*rng.integers(0, len(whole), 150), 0, 600, len(whole) - 30_000]:
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            restore(bad, target)
        except StorageError:
            refused += 1
            assert not target.exists()
        else:  # padding, or the date of a member
            assert content(target) == content(filled)
            shutil.rmtree(target)
    assert refused > 100
    for length in (0, 100, len(whole) // 2, len(whole) - 20_000):
        bad.write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"bad\.tar"):
            restore(bad, target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b.tar", "bad.tar", "data"]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "pictures/../../evil", "keys/../evil.json", "index/1.faiss"])
def test_a_foreign_member_is_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        told = tarfile.TarInfo(name)
        told.size = 1
        tar.addfile(told, io.BytesIO(b"x"))
        link = tarfile.TarInfo("store.db")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(StorageError, match="is no backup"):
        restore(tmp_path / "evil.tar", tmp_path / "again")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["evil.tar"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        link = tarfile.TarInfo("store.db")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(StorageError):
        restore(tmp_path / "evil.tar", tmp_path / "again")


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (
            json.dumps({"format": 2, "files": {"store.db": hashlib.sha256(b"x").hexdigest()}}).encode(),
            "2, this version",
        ),
        (b"{", "manifest cannot be read"),
        (b"\xff", "manifest cannot be read"),
        (b"[]", "manifest cannot be read"),
        (b'{"format": 1, "files": []}', "manifest cannot be read"),
        (b'{"format": 1, "files": {"store.db": "0"}}', "store.db is not what was saved"),
    ],
)
def test_a_manifest_that_does_not_fit(tmp_path: Path, manifest: bytes, told: str) -> None:
    with tarfile.open(tmp_path / "new.tar", "w") as tar:
        for name, data in (("store.db", b"x"), ("manifest.json", manifest)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(StorageError, match=told):
        restore(tmp_path / "new.tar", tmp_path / "again")


def test_a_picture_that_rotted_on_the_disk_is_noticed(filled: Path, tmp_path: Path) -> None:
    file = next(each for each in sorted((filled / "pictures").rglob("*")) if each.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match=f"{file.name} is damaged"):
        back_up(filled, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_a_picture_that_is_lost_is_named_with_its_item(filled: Path, tmp_path: Path) -> None:
    """It is no item that was deleted meanwhile, for which one would wait in vain."""
    next(each for each in sorted((filled / "pictures").rglob("*")) if each.is_file()).unlink()
    with pytest.raises(StorageError, match=r"is missing: it is the picture of item 'i\d' of collection 'mine'; put"):
        back_up(filled, tmp_path / "b.tar")
    assert not [file for file in tmp_path.iterdir() if "b" in file.suffix or file.name.startswith(".backup")]


def test_two_that_write_one_file_at_once(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, beside = backup._add_pictures, list[backup.Saved]()

    def add_and_begin_another(*given: Any) -> list[str]:
        gone = original(*given)
        monkeypatch.setattr(backup, "_add_pictures", original)
        if not beside:
            beside.append(back_up(filled, tmp_path / "b.tar"))
        return gone

    monkeypatch.setattr(backup, "_add_pictures", add_and_begin_another)
    with pytest.raises(ConflictError, match="exists by now"):
        back_up(filled, tmp_path / "b.tar")
    assert restore(tmp_path / "b.tar", tmp_path / "again") == beside[0]


def test_an_empty_folder_is_filled_where_it_is(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a volume, which can be neither removed nor renamed to, and beside which nothing can be written."""
    back_up(filled, tmp_path / "b.tar")
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    was, make = volume.stat().st_ino, backup.tempfile.mkdtemp
    monkeypatch.setattr(
        backup.tempfile, "mkdtemp", lambda dir, **rest: make(dir=dir, **rest) if dir == volume else 1 / 0
    )
    (tmp_path / "half.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:9_000])
    with pytest.raises(StorageError):
        restore(tmp_path / "half.tar", volume)
    assert [file.name for file in volume.iterdir()] == ["lost+found"]
    restore(tmp_path / "b.tar", volume)
    assert volume.stat().st_ino == was
    assert content(volume) == content(filled)
    assert not [file for file in volume.iterdir() if "restoring" in file.name]


def test_nothing_is_written_over(filled: Path, tmp_path: Path) -> None:
    back_up(filled, tmp_path / "b.tar")
    with pytest.raises(ConflictError, match="never written over"):
        back_up(filled, tmp_path / "b.tar")
    with pytest.raises(ConflictError, match="not empty"):
        restore(tmp_path / "b.tar", filled)
    with pytest.raises(NotFoundError, match="no data folder"):
        back_up(tmp_path, tmp_path / "c.tar")
    (tmp_path / "empty").mkdir()
    assert restore(tmp_path / "b.tar", tmp_path / "empty").items == 10


def test_the_commands_beside_a_server(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SQLiteCollections(filled):  # what a server has open
        assert main(["backup", str(tmp_path / "b.tar"), "--data", str(filled)]) == 0
    assert "10 items, 5 pictures" in capsys.readouterr().out
    assert main(["restore", str(tmp_path / "b.tar"), "--data", str(tmp_path / "again")]) == 0
    assert content(tmp_path / "again") == content(filled)
    assert main(["restore", str(tmp_path / "b.tar"), "--data", str(filled)]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_an_end_by_sigterm_leaves_nothing_half_written(
    command: str, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler ends a job that takes too long; each left a folder of the size of the database."""
    back_up(filled, tmp_path / "b.tar")
    before = sorted(tmp_path.iterdir())

    def ended(_: Path) -> tuple[int, dict[str, int]]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    monkeypatch.setattr(backup, "_contents", ended)
    handler = signal.getsignal(signal.SIGTERM)
    given = {"backup": ("c.tar", filled), "restore": ("b.tar", tmp_path / "new")}[command]
    try:
        assert main([command, str(tmp_path / given[0]), "--data", str(given[1])]) == 130
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert sorted(tmp_path.iterdir()) == before
