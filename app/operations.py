"""The operator's commands: keys, backup, restore, migrate-store, doctor, export. They need no server, and mind one."""

from __future__ import annotations

import argparse
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from app.commandline import MODEL, add_command, add_settings, settings_of
from models.errors import CheckpointError, ConflictError, NotFoundError


def operator_commands(commands: Any) -> None:
    """`semblance keys`, `backup`, `restore`, `migrate-store`, `doctor` and `export`."""
    _key_commands(commands)
    backup = add_command(commands, "backup", _back_up, "Write the data folder to one file, also while it is served")
    backup.add_argument("out", help="the file to write, such as photos.tar")
    restored = add_command(commands, "restore", _restore, "Make a data folder of a backup")
    restored.add_argument("backup", help="the file")
    for command in (backup, restored):
        add_settings(command, "store")
    migrated = add_command(
        commands, "migrate-store", _migrate, "Copy collections into another store, also while they are served"
    )
    migrated.add_argument("to", help="postgresql://... (the password in PGPASSWORD or ~/.pgpass) or a data folder")
    migrated.add_argument("--collection", action="append", help="which; may be repeated (default: all)")
    add_settings(migrated, "store")
    text = "Look at what a server would meet here, and say what to do; exits with 1 if something is bad"
    doctor = add_command(commands, "doctor", _examine, text)
    doctor.add_argument("--model", action="append", metavar="NAME=REFERENCE", help=MODEL)
    add_settings(doctor, "host", "port", "store", "checkpoints", "device", "threads")
    export = add_command(commands, "export", _export, "Make a model ready for another backend, compared with torch")
    export.add_argument("name", help="a model, as `semblance models` lists it")
    export.add_argument("--to", required=True, choices=("torch", "onnx", "openvino"), help="the runtime; torch: int8")
    export.add_argument(
        "--pictures", help="a folder, table or .tar(.gz) to compare and calibrate on (default: the demo's scenes)"
    )
    export.add_argument("--samples", type=_several, default=256, help="pictures of it that are taken (default: 256)")
    export.add_argument("--model", action="append", metavar="NAME=REFERENCE", help=MODEL)
    add_settings(export, "store", "checkpoints", "threads")


def _key_commands(commands: Any) -> None:
    """They need no server, and a running one sees what they did."""
    keys = commands.add_parser(
        "keys", help="Make, list and revoke API keys", description="Make, list and revoke API keys"
    )
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = add_command(actions, "create", _create, "Make a key and print it, the only time that it can be seen")
    create.add_argument("name", help="what to call it")
    create.add_argument(
        "--scope",
        choices=("read", "write", "admin"),
        default="read",
        help="read: look, search, embed, generate; write: change items too; admin: delete and reindex collections too "
        "(default: read)",
    )
    create.add_argument("--rate", type=int, help="requests a minute (default: any)")
    create.add_argument("--concurrency", type=int, help="requests at once (default: any)")
    listed = add_command(actions, "list", _list, "List the keys: names, scopes and limits")
    revoke = add_command(actions, "revoke", _revoke, "Forget a key; a running server refuses it from now on")
    revoke.add_argument("name", help="which")
    for command in (create, listed, revoke):
        add_settings(command, "store")


def _keyring(options: argparse.Namespace) -> Any:
    from app.keys import Keyring

    return Keyring(settings_of(options).store)


def _create(options: argparse.Namespace) -> int:
    limits = {"rate": options.rate, "concurrency": options.concurrency}
    print(_keyring(options).create(options.name, options.scope, **limits))  # noqa: T201
    return 0


def _list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "scope", "a minute", "at once", "created")
    for key in _keyring(options).names():
        table.add_row(key.name, key.scope, str(key.rate or "any"), str(key.concurrency or "any"), key.created)
    Console().print(table)
    return 0


def _revoke(options: argparse.Namespace) -> int:
    _keyring(options).revoke(options.name)
    print(f"{options.name}: revoked")  # noqa: T201
    return 0


def _back_up(options: argparse.Namespace) -> int:
    from app.backup import back_up

    settings = settings_of(options)
    if settings.database is not None:
        raise ConflictError(
            "the collections are in PostgreSQL (SEMBLANCE_DATABASE): back them up by pg_dump, or by its "
            "own archive of the log; the data folder has the keys alone"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half written goes, as after Ctrl-C
    print(f"{options.out}: {_told(back_up(settings.store, Path(options.out)))}")  # noqa: T201
    return 0


def _restore(options: argparse.Namespace) -> int:
    from app.backup import restore

    store = settings_of(options).store
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as above
    print(f"{store}: {_told(restore(Path(options.backup), store))}")  # noqa: T201
    return 0


def _migrate(options: argparse.Namespace) -> int:
    from app.migration import Pass, migrate, reading
    from app.stores import open_collections

    settings = settings_of(options)
    elsewhere = (
        {"database": SecretStr(options.to)} if "://" in options.to else {"store": Path(options.to), "database": None}
    )
    with ExitStack() as stack:
        if settings.database is None:
            known = stack.enter_context(reading(settings.store, settings.picture_root))
        else:
            collections = stack.enter_context(open_collections(settings))
            known = {name: collections.get(name) for name in collections.names()}
        wanted = options.collection or sorted(known)
        if unknown := [name for name in wanted if name not in known]:
            raise NotFoundError(f"no collection {unknown[0]!r}; there are: {', '.join(sorted(known)) or 'none'}")
        target = stack.enter_context(open_collections(settings.model_copy(update=elsewhere)))
        for name in wanted:

            def progress(found: Pass, name: str = name) -> None:
                print(f"{name}: {found.items:,} items, {found.copied:,} copied, {found.deleted:,} deleted")  # noqa: T201

            found = migrate(known[name], target, progress)
            print(f"{name}: the same in both, {found.items:,} items, SHA-256 {found.checksums[1]}")  # noqa: T201
        for name in sorted({*target.names()} - known.keys()):
            print(f"{name}: only where the others went, and left there; delete it if it was deleted here")  # noqa: T201
    return 0


def _told(saved: Any) -> str:
    elsewhere = f", {saved.elsewhere:,} pictures in their places, which are not in it" if saved.elsewhere else ""
    return f"{saved.items:,} items, {saved.pictures:,} pictures, {saved.bytes / 1e6:,.1f} MB{elsewhere}"


def _examine(options: argparse.Namespace) -> int:
    from rich.console import Console

    from app.doctor import examine

    console, bad = Console(), 0
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    for finding in examine(settings_of(options)):
        bad += finding.verdict == "bad"
        shown = f"[{colours[finding.verdict]}]{finding.verdict:4}[/] "
        console.print(shown, end="")
        console.print(f"{finding.subject}: {finding.text}", markup=False, highlight=False, soft_wrap=True)
    return 1 if bad else 0


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not 2 or more: pictures are compared with each other")
    return int(text)


def _export(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from app import int8
    from app.backends import FILES
    from app.demo import SHARD
    from app.exporter import export_model, read_calibration
    from app.exports import exports_of
    from app.loading import find_models
    from models.checkpoint import load_model

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half written goes, as after Ctrl-C
    settings = settings_of(options)
    known = find_models(settings)
    if options.name not in known:
        raise NotFoundError(f"no model {options.name!r}; there are: {', '.join(known) or 'none'}")
    torch.set_num_threads(settings.thread_count)
    model = load_model(known[options.name])
    if not hasattr(model, "encode_image"):
        what = f"model {options.name!r} ({model.architecture}) embeds neither pictures nor texts"
        raise CheckpointError(f"{what}, so there is nothing of it to export; choose another")
    calibration = read_calibration(options.pictures or str(settings.checkpoints / SHARD), options.samples)
    exports = exports_of(options.name, model, settings)
    found = export_model(model, exports, options.to, calibration, settings.thread_count)
    table = Table("tower", "backend", "same nearest", "lowest cosine", "ms alone", "ms of eight")
    for tower, rows in found.items():
        for backend, parity in rows.items():
            shown = (f"{parity.agreement:.1%}", f"{parity.cosine:.5f}", *(f"{1000 * s:.2f}" for s in parity[2:]))
            table.add_row(tower, backend, *shown)
    Console().print(table)
    if not any(backend in FILES for rows in found.values() for backend in rows):
        why = "it has no transformer blocks" if int8.supported() else "this processor has no VNNI"
        raise CheckpointError(
            f"nothing of model {options.name!r} can be in int8 by torch: {why}; try --to openvino or onnx"
        )
    print(f"{exports.folder}: `semblance serve` takes the fastest that finds the same nearest for 99 % or more")  # noqa: T201
    return 0
