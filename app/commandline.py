"""What the commands of `semblance` share: how one is described, and the settings it takes as options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
