"""Folders that earlier versions wrote: each format that there was is kept here as a backup, and read for ever.

A new format of the store (app/database.py) adds its own file beside these, made by the version that introduces it.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from app.backup import restore
from app.database import FORMAT
from app.keys import Keyring
from app.sqlite_collections import SQLiteCollections

FOLDER = Path(__file__).parent.parent / "formats"


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_a_folder_of_each_format(version: int, tmp_path: Path) -> None:
    archive = tmp_path / "store.tar"
    archive.write_bytes(lzma.decompress((FOLDER / f"store-{version}.tar.xz").read_bytes()))
    assert restore(archive, tmp_path / "data").items == 2
    with SQLiteCollections(tmp_path / "data") as collections:
        mine = collections.get("mine")
        assert (mine.model, mine.fingerprint, mine.dimensions) == ("m", "f", 4)
        items, vectors = mine.sample(10)
        assert {item.id: item.caption for item in items} == {"t": "a text", "p": "a picture"}
        metadata = next(item.metadata for item in items if item.id == "t")
        assert metadata == {"n": 1, "s": "x", "none": None, "yes": True, "f": 0.5}
        assert np.array_equal(vectors, np.eye(4, dtype="f4")[:2])
        assert mine.picture("p").startswith(b"\xff\xd8")
    (key,) = Keyring(tmp_path / "data").names()
    assert (key.name, key.scope, key.rate, key.concurrency) == ("site", "write", 60, 2)
