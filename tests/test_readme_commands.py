"""Every command that a README shows exists, with its options; those in blocks are run: by test_readme.py,
test_app_readme.py and test_training_readme.py, which use `blocks`."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml

import app.__main__
import training.__main__

ROOT = Path(__file__).parents[1]
READMES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
READMES += [ROOT / name / "README.md" for name in ("app", "training", "models")]
PARSERS = {"semblance": app.__main__.build_parser, "semblance-train": training.__main__.build_parser}


def blocks(readme: Path) -> list[str]:
    """The commands in a README's sh blocks, without the remarks that stand beside them."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s{2,}\S.*$|\s+#.*$", "", line.strip()) if not line.startswith("curl") else line
            found += [command] if command else []
    return found


def _mentions(readme: Path) -> list[list[str]]:
    """Commands of ours, in blocks and within the text, as words."""
    text = readme.read_text()
    inline = re.findall(r"`([^`\n]*(?:\n[^`\n]*)?)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = [*blocks(readme), *(re.sub(r"\s+", " ", code) for code in inline)]
    found = []
    for command in commands:
        words = shlex.split(command, comments=True) if command.count("'") % 2 == 0 else command.split()
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if len(words) > 1 and words[0] in (*PARSERS, "make"):
            found.append(words)
    return found


def _sub(parser: argparse.ArgumentParser, word: str) -> argparse.ArgumentParser | None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: argparse.ArgumentParser | None = action.choices.get(word)
            return found
    return None


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_subcommands_options_and_targets_exist(readme: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for program, *words in _mentions(readme):
        words = ["simclr" if word == "NAME" else word for word in words]
        if program == "make":
            assert words[0] in targets, f"make {words[0]}"
            continue
        parser = PARSERS[program]()
        for word in words:
            if (below := _sub(parser, word)) is not None:
                parser = below
            elif word.startswith("--"):
                assert word.partition("=")[0] in parser._option_string_actions, f"{program} {' '.join(words)}: {word}"
        assert parser.prog != program or "--help" in words, f"{program} {words[0]}"


def test_docker_commands_name_what_the_compose_file_has() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    profiles = {profile for service in compose["services"].values() for profile in service.get("profiles", [])}
    commands = [command for readme in READMES for command in blocks(readme) if "docker compose" in command]
    assert commands
    for command in commands:
        before, _, after = command.partition("docker compose")
        for name in re.findall(r"([A-Z_]+)=", before):
            assert f"${{{name}" in (ROOT / "docker-compose.yml").read_text(), name
        words = shlex.split(after)
        if "--profile" in words:
            assert words.pop(words.index("--profile") + 1) in profiles
        names = [word for word in words if word in compose["services"]]
        assert "run" not in words or names


def test_extras_that_are_to_be_installed_exist() -> None:
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [name for readme in READMES for name in re.findall(r"semblance\[([a-z,]+)\]", readme.read_text())]
    assert named
    assert {extra for name in named for extra in name.split(",")} <= known.keys()
