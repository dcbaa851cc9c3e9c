"""What a server would meet here: packages, devices, checkpoints, the data folder, the port; and what to do about it."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Literal, NamedTuple

import apsw

from app.settings import Settings
from models.errors import SemblanceError, StorageError

Verdict = Literal["ok", "note", "bad"]
_LOW_DISK = 1 << 30
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
    except (SemblanceError, RuntimeError, ValueError) as error:
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
    from app.database import check
    from app.locking import lock_note
    from app.stores import open_collections

    store = settings.store
    if settings.database is None:
        if not (store / "store.db").exists():
            yield Finding("ok", "data folder", f"{store} is made at the first start")
            return
        try:
            with closing(apsw.Connection(str(store / "store.db"), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
                check(connection, store / "store.db")
        except (StorageError, apsw.Error) as error:
            yield Finding("bad", "data folder", str(error))
            return
    try:
        with open_collections(settings) as collections:
            for name in collections.names():
                info = collections.get(name).info()
                yield Finding("ok", f"collection {name}", f"{info.count:,} items of model {info.model!r}, {info.index}")
    except SemblanceError as error:
        if settings.database is not None:
            yield Finding("bad", "database", str(error))
        elif not (note := lock_note(store)):
            yield Finding("bad", "data folder", str(error))
        else:
            yield Finding("ok", "data folder", f"{store} is whole, and served by {note}")


def _address(settings: Settings) -> Iterator[Finding]:
    from app.keys import Keyring

    try:
        settings.check_exposure(keyed=Keyring(settings.store).required)
    except SemblanceError as error:
        yield Finding("bad", "address", str(error))
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = (
                "is taken: stop what listens there, or give another --port"
                if taken
                else f"cannot be had: {error.strerror}"
            )
            yield Finding("bad", "address", f"{settings.host}:{settings.port} {why}")
        else:
            yield Finding("ok", "address", f"{settings.host}:{settings.port} is free")
