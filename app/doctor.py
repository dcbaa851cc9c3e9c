"""What a server would meet here: packages, devices, checkpoints, the data folder, the port; and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

import apsw

from app.settings import Settings
from models.errors import SemblanceError, StorageError

Verdict = Literal["ok", "note", "bad"]
_LOW_DISK = 1 << 30
_WRONG = "SELECT vector FROM vectors JOIN items USING (row) WHERE collection = ? AND length(vector) != ? LIMIT 1"
_OPTIONAL = {
    "faiss": "without it every search compares with every item: pip install 'semblance[cpu]' (or [gpu])",
    "onnxruntime": "pip install 'semblance[onnx]', and `semblance export`, embed several times as fast on a CPU",
    "pyarrow": "for Parquet (`semblance dump`, tables): pip install 'semblance[train]'",
    "umap": "for maps by UMAP: pip install 'semblance[analysis]'",
}


class Finding(NamedTuple):
    """verdict: note is what may be meant so; bad is what keeps a server from starting or keeping its promises."""

    verdict: Verdict
    subject: str
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Everything, one after another; nothing is changed and no model is computed."""
    yield from _environment(settings)
    yield from _checkpoints(settings)
    yield from _data_folder(settings)
    yield from _address(settings)


def _environment(settings: Settings) -> Iterator[Finding]:
    import torch

    from app.backends import choose_device

    yield Finding(
        "ok", "python", f"{sys.version.split()[0]}, torch {torch.__version__}, SQLite {apsw.sqlite_lib_version()}"
    )
    for name, way in _OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield Finding("note", name, f"is not installed; {way}")
    try:
        device = choose_device(settings.device)
    except SemblanceError as error:
        yield Finding("bad", "device", str(error))
    else:
        named = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        yield Finding("ok", "device", f"{device}{named}; {settings.thread_count} threads")


def _checkpoints(settings: Settings) -> Iterator[Finding]:
    from app.loading import find_models
    from models.checkpoint import load_model

    try:
        known = find_models(settings)
    except (SemblanceError, OSError) as error:
        yield Finding("bad", "checkpoints", str(error))
        return
    if not known:
        yield Finding(
            "bad", "checkpoints", f"no model in {settings.checkpoints}: train one, or give --checkpoints or --model"
        )
    for name, reference in known.items():
        try:
            model = load_model(reference)
        except (SemblanceError, OSError, ImportError) as error:
            yield Finding("bad", f"model {name}", str(error))
        else:
            yield Finding("ok", f"model {name}", f"{model.architecture}, fingerprint {model.fingerprint}")


def _data_folder(settings: Settings) -> Iterator[Finding]:
    from app.keys import Keyring

    store = settings.store
    where = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    if not where.is_dir():
        yield Finding("bad", "data folder", f"{where} is a file: give a folder for the collections by --data")
        return
    if not os.access(where, os.W_OK):
        yield Finding("bad", "data folder", f"{where} cannot be written by this user: give another one by --data")
        return
    free = shutil.disk_usage(where).free
    room = f"{free / 2**30:,.1f} GiB free"
    if free < _LOW_DISK:
        yield Finding("bad", "disk", f"{room} where {store} is: writes are refused when it is full; make room")
    else:
        yield Finding("ok", "disk", room)
    yield from _collections(settings)
    try:
        count = len(Keyring(store).names())
        yield Finding("ok", "keys", f"{count} in the data folder, {len(settings.api_keys)} in the settings")
    except StorageError as error:
        yield Finding("bad", "keys", str(error))


def _collections(settings: Settings) -> Iterator[Finding]:
    from app.collections import STAGED
    from app.database import check, looked_at, nothing, rows
    from app.index import check_kind
    from app.locking import check_writable, held, lock_note
    from app.sqlite_collection import vectors_of
    from app.sqlite_collections import known
    from app.stores import check_stores

    if settings.database is not None:
        yield from _database(settings, settings.database.get_secret_value())
        return
    store, file = settings.store, settings.store / "store.db"
    findings = []
    try:
        check_stores(settings)
        check_writable(store)
        if not (file.is_file() and file.stat().st_size):
            if any((store / "pictures").glob("*/*")):
                raise nothing(file)
            yield Finding("ok", "data folder", f"{store} is made at the first start")
            return
        with closing(looked_at(file)) as connection:
            check(connection, file)
            for made in known(connection):
                count = rows(connection, "SELECT COUNT(*) FROM items WHERE collection = ?", made.key)[0][0]
                check_kind(made.kind)
                wrong = rows(connection, _WRONG, made.key, 4 * made.dimensions)
                vectors_of([blob for (blob,) in wrong], made.dimensions, file)  # which says what is wrong
                if not made.name.startswith(STAGED):
                    findings.append(_collection(made.name, count, made.model, made.kind))
            lost = _lost_pictures(connection, store / "pictures")
    except (SemblanceError, apsw.Error) as error:
        yield Finding("bad", "data folder", str(error))
        return
    yield from lost
    if not held(store):
        yield from findings
    elif note := lock_note(store):
        yield Finding("ok", "data folder", f"{store} is whole, and served by {note}")
    else:
        yield Finding("bad", "data folder", f"{store} is in use by another process: stop it, or use another folder")


def _lost_pictures(connection: apsw.Connection, folder: Path) -> list[Finding]:
    """Pictures that items have and the folder has not, or not whole; what is served meanwhile may lose some rightly."""
    from app.database import pictures_of, rows, way_out
    from app.pictures import file_of, place_of

    lengths = dict(rows(connection, "SELECT picture, size FROM items WHERE picture NOTNULL"))
    lost = {}
    for name, row in pictures_of(connection).items():
        try:
            if place_of(name) is None and file_of(folder, name).stat().st_size != lengths.get(name):
                lost[name] = row
        except OSError:
            lost[name] = row
    if not lost or not (still := sorted(lost.items() & pictures_of(connection).items())):
        return []
    name = still[0][0]
    text = f"{len(still):,} are missing or cut off, first {file_of(folder, name)}: {way_out(connection, name)}"
    return [Finding("bad", "pictures", text)]


def _database(settings: Settings, url: str) -> Iterator[Finding]:
    from app.collections import STAGED
    from app.postgres import look

    try:
        known = look(url)
        if known is None:
            yield Finding("ok", "database", "its schema is made at the first start")
        for name, count, model, kind in known or []:
            if not name.startswith(STAGED):
                yield _collection(name, count, model, kind)
        if settings.milvus is not None:
            from app.milvus import collections_of

            yield Finding("ok", "milvus", f"it answers, and has {len(collections_of(settings.milvus, ''))} collections")
    except SemblanceError as error:
        yield Finding("bad", "database", str(error))


def _collection(name: str, count: int, model: str, kind: str) -> Finding:
    return Finding("ok", f"collection {name}", f"{count:,} items of model {model!r}, {kind}")


def _address(settings: Settings) -> Iterator[Finding]:
    from app.address import bound, url_of
    from app.keys import Keyring
    from app.locking import held, lock_note

    try:
        settings.check_exposure(keyed=Keyring(settings.store).required)
    except SemblanceError as error:
        yield Finding("bad", "address", str(error))
    url = url_of(settings.host, settings.port)
    found = Finding("ok", "address", f"{url.removeprefix('http://')} is free")
    try:
        with bound(settings.host, settings.port):
            pass
    except SemblanceError as error:
        if held(settings.store) and lock_note(settings.store) == url:
            found = Finding("ok", "address", f"{url} is where the data folder is served")
        else:
            found = Finding("bad", "address", str(error))
    yield found
