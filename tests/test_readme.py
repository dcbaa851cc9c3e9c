"""What the READMEs tell to paste works as pasted, and their tables are complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import running

from app.settings import Settings

ROOT = Path(__file__).parents[1]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_every_curl_line_and_python_example_works_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shutil.which("curl"), "the README's commands need curl"
    lines = [line for block in _blocks("sh") for line in block.splitlines() if line.startswith("curl")]
    assert len(lines) >= 22
    for name in [name for name in os.environ if name.startswith("SEMBLANCE_")]:
        monkeypatch.delenv(name)
    with running(ROOT / "checkpoints" / "demo", tmp_path / "data", "--demo") as server:

        def here(text: str) -> str:
            return text.replace("localhost:8000", f"127.0.0.1:{server.port}")

        for line in lines:
            command = here(line).replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            if done.stdout:
                json.loads(done.stdout)
        assert (tmp_path / "photo.jpg").read_bytes()[:2] == (tmp_path / "thumbnail.jpg").read_bytes()[:2] == b"\xff\xd8"
        for number, code in enumerate(_blocks("python")):
            example = subprocess.run(
                [sys.executable, "-c", here(code)], cwd=tmp_path, capture_output=True, text=True, check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            assert example.returncode == 0, example.stderr
            assert example.stdout, number
        assert (tmp_path / "star.png").read_bytes().startswith(b"\x89PNG")


def test_the_settings_table_is_complete() -> None:
    table = (ROOT / "app" / "README.md").read_text()
    for name, field in Settings.model_fields.items():
        row = next((line for line in table.splitlines() if line.startswith(f"| `{name.upper()}` |")), None)
        assert row, f"app/README.md lacks {name.upper()}"
        assert f"| {_shown(field.default)} |" in row
        assert field.description
        assert field.description in row


def _shown(default: object) -> str:
    return "none" if default == () else f"{default:,}" if type(default) is int and default >= 10_000 else str(default)


CARDS = [f"checkpoints/demo/{name}" for name in ("clip", "byol", "moco", "simclr")]


@pytest.mark.parametrize("folder", ["", "app", "training", *CARDS])
def test_no_placeholder_waits_for_its_figure(folder: str) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / folder / "README.md").read_text(), flags=re.DOTALL)
    assert not re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b|\b(?:TODO|TBD|FIXME)\b", prose)


def test_the_licence_is_whole() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert len((ROOT / "LICENSE").read_text().splitlines()) > 190
