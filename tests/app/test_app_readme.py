"""The commands of app/README.md, those of README.md that are not in test_readme.py, and the Python of models/README.md,
against small models and pictures made here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from databases import PostgresServer
from PIL import Image
from support import Server, running, tiny_clip, tiny_dalle
from test_readme_commands import ROOT, blocks

from app import int8
from models.checkpoint import save_checkpoint

# What test_readme_commands.py looks at in another way: an engine for containers, or the network, is needed; and what
# test_ray_serve.py runs, where Ray is.
ELSEWHERE = ("docker ", "pip ", "SEMBLANCE_API_KEYS=", "SEMBLANCE_CHECKPOINTS=", "PICTURES=")
ELSEWHERE += ("ray ", "semblance ray-serve")


@pytest.fixture
def folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """What the README's commands are given: pictures, embeddings of others, a scene with a mask, models."""
    (tmp_path / "some-of-ours").mkdir()
    for number in range(12):
        (tmp_path / "some-of-ours" / f"{number}.jpg").write_bytes(encoded(number))
    for name, seed in (("clip", 0), ("clip2", 1)):
        save_checkpoint(tiny_clip(seed), tmp_path / "checkpoints" / name, provenance={"data": "none"})
    save_checkpoint(tiny_dalle(), tmp_path / "checkpoints" / "dalle", provenance={"data": "none"})
    rows = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    for place in ("laion-embeddings/img_emb/img_emb_0.npy", "embeddings/rows.npy"):
        (tmp_path / place).parent.mkdir(parents=True)
        np.save(tmp_path / place, rows)
    scene = Image.new("RGBA", (16, 16), "red")
    scene.save(tmp_path / "scene.png")
    scene.putalpha(Image.linear_gradient("L").resize((16, 16)).point(lambda value: 255 * (value > 128)))
    scene.save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with running(folder / "checkpoints", folder / "data") as server:
        yield server


def _run(command: str, folder: Path, **environment: str) -> str:
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    options = {"cwd": folder, "env": os.environ | own | environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", command], timeout=120, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-1000:])
    return str(done.stdout + done.stderr)


def test_every_command_of_the_servers_readme_runs(folder: Path, server: Server, postgres: PostgresServer) -> None:
    database = postgres.database()
    here = {
        "SEMBLANCE_PORT": str(server.port), "SEMBLANCE_CHECKPOINTS": "checkpoints", "SEMBLANCE_THREADS": "1",
        "SEMBLANCE_STORE": "data",
    }  # fmt: skip
    _run("semblance index some-of-ours --collection photos", folder, **here)
    commands = [command for command in blocks(ROOT / "app" / "README.md") if not command.startswith(ELSEWHERE)]
    assert {command.split()[1] for command in commands if command.startswith("semblance")} == {
        "keys", "backup", "restore", "migrate-store", "reindex", "dump", "index", "export", "serve",
    }  # fmt: skip
    # What gives a collection another model comes last here, for a dump is of the model that it has.
    for command in sorted(commands, key=lambda command: "reindex" in command):
        if command == "semblance serve":  # is what answers here
            continue
        if "--to torch" in command and not int8.supported():  # it says so
            continue
        # Once there are keys the server asks for one, so they are made for another folder.
        elsewhere = {"SEMBLANCE_STORE": "keyed"} if " keys " in command else {}
        done = command.replace("localhost:8000", f"127.0.0.1:{server.port}")
        done = done.replace("postgresql://semblance@db.example/semblance", database)
        done = done.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
        _run(done, folder, **here | elsewhere)
    assert (folder / "somewhere-new" / "store.db").is_file()
    assert (folder / "another-folder" / "store.db").is_file()
    assert (folder / "photos.parquet").is_file()
    assert (folder / "star.png").read_bytes().startswith(b"\x89PNG")
    found = _run(f"curl --silent 127.0.0.1:{server.port}/collections", folder)
    counts = dict(re.findall(r'"name":"(\w+)".*?"count":(\d+)', found))
    filled = {"photos": "12", "copy": "12", "laion": "5", "ours": "5", "millions": "12"}
    assert counts | {"default": ""} == filled | {"default": ""}


def test_collections_are_filled_and_searched_as_the_first_readme_says(folder: Path) -> None:
    (folder / "some-of-ours").rename(folder / "photos")
    commands = [command for command in blocks(ROOT / "README.md") if command.startswith("semblance ")]
    served = [command for command in commands if command.startswith("semblance serve")]  # each loads what a hub has
    assert len(served) == 4
    for command in [command for command in commands if command not in served]:
        _run(command, folder, SEMBLANCE_THREADS="1", SEMBLANCE_CHECKPOINTS="checkpoints")


def test_the_python_of_the_models_readme_runs(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(ROOT / "checkpoints" / "demo", tmp_path / "checkpoints" / "demo")
    (tmp_path / "photo.jpg").write_bytes(encoded())
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "models" / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for number, example in enumerate(examples):
        (tmp_path / f"{number}.py").write_text(example)
        _run(f"{sys.executable} {number}.py", tmp_path)
    assert (tmp_path / "star.png").is_file()
