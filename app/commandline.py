"""What the commands of `semblance` share: how one is described, and the settings it takes as options."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from app.settings import Settings

SETTINGS = {
    "host": "address to listen on",
    "port": "port to listen on",
    "store": "folder of the collections",
    "checkpoints": "folder whose subfolders are the models to serve",
    "device": "auto, cpu, cuda, cuda:1, ...",
    "backend": "what computes embeddings: auto, torch-fp32, onnx-int8, ... (app/README.md)",
    "threads": "processor threads, 0 for every core",
}
MODEL = "one more model, such as vit=open_clip:ViT-B-32/laion2b_s34b_b79k; may be repeated"


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A subcommand that calls `run` with its options. -> its parser, for them."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=run)
    return parser


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options for settings, each with its default."""
    for name in names:
        default = Settings.model_fields[name].default
        option = "data" if name == "store" else name
        parser.add_argument(
            f"--{option}",
            dest=name,
            default=None,
            metavar=option.upper(),
            help=f"{SETTINGS[name]} (default: {default})",
        )


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings, from the environment and from what the command line says."""
    given = {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}
    if getattr(options, "model", None):
        given["models"] = tuple(options.model)
    for flag in ("demo", "insecure"):
        if getattr(options, flag, False):
            given[flag] = True
    return Settings(**given)


def run_to_end(work: Coroutine[Any, Any, int]) -> int:
    """asyncio.run, of which a first Ctrl-C ends the work in good order, and a second one the process at once, with 130.

    What it would interrupt is that order: threads would go on in an interpreter that is taken apart beneath them. All
    that was acknowledged is on the disk, as for any process that is killed.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):  # Ctrl-C is somebody else's, for asyncio too
        return asyncio.run(work)

    def at_once(*_: Any) -> None:
        os._exit(130)

    async def run() -> int:
        cancel: Any = signal.getsignal(signal.SIGINT)  # asyncio's, which is there by now

        def interrupted(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, at_once)
            cancel(number, frame)

        signal.signal(signal.SIGINT, interrupted)
        return await work

    try:
        return asyncio.run(run())
    finally:
        if signal.getsignal(signal.SIGINT) is not at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
