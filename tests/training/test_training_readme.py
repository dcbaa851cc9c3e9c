"""The commands of training/README.md, and those that train of README.md, in order, with what makes them short."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny_clip, tiny_dalle
from test_readme_commands import ROOT, blocks
from torch.distributed.run import get_args_parser

from models.checkpoint import save_checkpoint
from models.vision import EncoderModel
from training.__main__ import build_parser, main
from training.method import discover

SHORT = ["--steps", "2", "--batch-size", "8", "--no-evaluate", "--threads", "1"]
SMALL = ["--encoder-options", '{"channels": 8, "blocks": [1], "depth": 0}']
# A command of the README -> what is run in its place, if that is anything else; `None`: as it stands.
STANDS_FOR: dict[str, list[str] | None] = {
    "semblance-train clip --help": None,
    "semblance-train clip --preset tiny-cpu --data scenes": [*SHORT, *SMALL],
    "SEMBLANCE_DATA=... semblance-train clip --preset demo": ["--data", "scenes", "--out", "demo", *SHORT, *SMALL],
    "semblance-train simclr --data ./photos --encoder resnet18 --image-size 64 --out checkpoints/simclr": SHORT,
    "semblance-train evaluate FOLDER --data scenes emoji grocery": ["--data", "photos", "--json"],
    "semblance-train evaluate FOLDER --data caltech101 --fine-tune 0.01 0.1": ["--data", "photos", "--fine-tune", "1"],
    "semblance-train evaluate FOLDER --data scenes --judge checkpoints/demo/clip": ["--data", "photos"],
    "semblance-train samples checkpoints/dalle --data emoji --judge checkpoints/demo/clip": [
        "--data", "photos", "--count", "2", "--columns", "1",
    ],
    "semblance-train analyze FOLDER --data caltech101 --maps pca tsne umap": ["--data", "photos"],
    "semblance-train views simclr --data ./photos --out views.png": ["--count", "2"],
    "semblance-train export runs/NAME --out FOLDER": [],
    "semblance-train scenes --out scenes.tar.gz": ["--each", "1", "--others", "2"],
    "torchrun --nproc-per-node 4 -m training clip ...": [],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, encoded: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos in two classes, and the checkpoints that the README names, by names of its own."""
    for number in range(60):
        file = tmp_path / "photos" / ("cats", "dogs")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number))
    save_checkpoint(tiny_clip(), tmp_path / "checkpoints" / "demo" / "clip")
    encoder = EncoderModel(image={"name": "conv", "image_size": 32, "channels": 8, "blocks": [1], "depth": 0})
    save_checkpoint(encoder, tmp_path / "checkpoints" / "encoder")
    save_checkpoint(tiny_dalle(), tmp_path / "checkpoints" / "dalle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
def test_every_command_of_trainings_readme_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = blocks(ROOT / "training" / "README.md")
    assert commands == list(STANDS_FOR)
    for command, more in STANDS_FOR.items():
        words = [word for word in shlex.split(command) if not word.startswith("SEMBLANCE_DATA=")]
        drawing = "--judge" in words
        words = [
            {"FOLDER": "checkpoints/dalle" if drawing else "checkpoints/encoder"}.get(word, word) for word in words
        ]
        if words[0] == "torchrun":
            _distributed(folder)
            continue
        if "export" in words:
            words = ["semblance-train", "export", "runs/simclr", "--out", "exported"]
        if more is None:
            with pytest.raises(SystemExit, match="0"):
                main(words[1:])
        else:
            assert main([*words[1:], *more]) == 0, (command, capsys.readouterr().err)
    for made in ("checkpoints/tiny-cpu", "demo", "checkpoints/simclr", "exported"):
        assert (folder / made / "model.safetensors").is_file(), made
    for made in ("samples.png", "views.png", "scenes.tar.gz", "analysis"):
        assert (folder / made).exists(), made


def test_every_command_for_many_gpus_is_one_that_torchrun_and_the_methods_take() -> None:
    commands = blocks(ROOT / "training" / "SCALING.md")
    assert len(commands) == 5
    for command in commands:
        launch, _, training = command.replace("semblance-train", "-m training").partition("-m training ")
        options = build_parser().parse_args(shlex.split(training))
        gpus = 1
        if launch:
            launched, left = get_args_parser().parse_known_args([*shlex.split(launch)[1:], "script"])
            gpus = int(launched.nnodes.partition(":")[0]) * int(launched.nproc_per_node)
            assert left == []
        assert options.batch_size % (discover()[options.method].Options().chunk * gpus) == 0, command


def test_every_training_of_the_first_readme_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [command for command in blocks(ROOT / "README.md") if command.startswith("semblance-train")]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        more = {"evaluate": [], "clip": [*SHORT, *SMALL], "simclr": SHORT}[words[1]]
        assert main([*words[1:], *more]) == 0, (command, capsys.readouterr().err)
    assert (folder / "checkpoints" / "mine" / "model.safetensors").is_file()


def _distributed(folder: Path) -> None:
    """Two processes in place of four."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "training", "clip", "--data", "photos", "--out", "both", *SHORT, *SMALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "both" / "model.safetensors").is_file()
