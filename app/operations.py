"""The operator's commands: keys."""

from __future__ import annotations

import argparse
from typing import Any

from app.commandline import add_command, add_settings, settings_of


def key_commands(commands: Any) -> None:
    """`semblance keys create | list | revoke`: they work on the data folder, whether or not a server has it open."""
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
