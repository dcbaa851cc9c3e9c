"""What tests make for themselves: a small model, a server process, a look at an error."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from app.collection import NewItem
from models.checkpoint import load_checkpoint
from models.clip import CLIPModel
from models.dalle import DALLETransformer
from models.preprocess import Preprocess
from models.tokenizers import TextTokenizer
from models.torchvision import load_torchvision
from training.state import find_state, load_tensors, tensors_in
from training.trainer import Trainer

CORPUS = ["a red star", "a blue circle", "a photo of a green square", "two hearts on a gray background"] * 4


def tiny_clip(seed: int = 0, size: int = 32, **options: object) -> CLIPModel:
    """A CLIP of random weights that embeds in a millisecond."""
    torch.manual_seed(seed)
    tokenizer = TextTokenizer.train(CORPUS, 300, context_length=32)
    model = CLIPModel(
        image={"name": "conv", "image_size": size, "channels": 16, "blocks": [1, 1], "depth": 1},
        text={"vocab_size": tokenizer.vocab_size, "context_length": 32, "width": 32, "depth": 1, "heads": 2},
        embed_dim=24,
        **options,  # type: ignore[arg-type]
    )
    model.preprocess = Preprocess(size=size)
    model.tokenizer = tokenizer
    return model.eval()


OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def open_clip_folder(place: Path, preprocess: dict[str, object] | None = None, seed: int = 0) -> Path:
    """A local OpenCLIP folder with random weights."""
    load_torchvision()
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.CLIP(**OPEN_CLIP)
    place.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        place / "open_clip_model.safetensors",
    )
    (place / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess or {}})
    )
    return place


def png_of(**chunks: bytes) -> bytes:
    """A PNG of these chunks and its end."""
    parts = {name.encode(): body for name, body in (*chunks.items(), ("IEND", b""))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts.items()
    )


def png_header(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that says it is so large, with few bytes behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(rows or bytes(min(2_000_000, height * (width + 1))))
    return png_of(IHDR=header, IDAT=body)


def problem(answer: Any, status: int, says: str = "") -> dict[str, Any]:
    """Checks that an answer is a problem of this status, and gives it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "request_id"} <= body.keys()
    assert body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    assert re.search(says, body["detail"]), body["detail"]
    assert "Traceback" not in answer.text
    assert "/tmp/" not in answer.text
    return body


@dataclass
class Server:
    """A server process and how to reach it."""

    process: subprocess.Popen[bytes]
    url: str
    port: int
    log: Path
    data: Path

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(checkpoints: Path, data: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """`semblance serve` on a free port, until it answers; killed at the end if it still lives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app", "serve", "--checkpoints", str(checkpoints), "--data", str(data)]
    command += ["--port", str(port), "--threads", "1", *arguments]
    with tempfile.NamedTemporaryFile() as log:  # not a pipe, which would be full some day and hold the server up
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
        server = Server(process, f"http://127.0.0.1:{port}", port, Path(log.name), data)
        try:
            for _ in range(1200):
                try:
                    if httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    assert process.poll() is None, server.log.read_text()
                time.sleep(0.05)
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def tiny_dalle(seed: int = 0, **options: Any) -> DALLETransformer:
    """A generator of random weights: 16 tokens of 16 codes, pictures of 16 x 16."""
    torch.manual_seed(seed)
    tokenizer = TextTokenizer.train(CORPUS, 300, 10)
    quantizer = {"name": "fsq", "levels": [4, 4]}
    model = DALLETransformer(
        image={"image_size": 16, "quantizer": quantizer, "channels": [8, 8], "blocks": [0, 1]},
        vocab_size=tokenizer.vocab_size, text_length=10, width=32, depth=2, heads=2,
        **options,
    )  # fmt: skip
    model.tokenizer = tokenizer
    for parameter in model.parameters():  # far from its calm beginning, so that texts and seeds show
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return model.eval()


def resumed(train: Callable[[Any], Path], options: Callable[[Path], Any], folder: Path) -> Any:
    """The model of a run that was interrupted and went on, which has the very weights of the one that was not.

    options: of a run, by its folder; the whole run is in `folder` / "a".
    """
    whole = load_checkpoint(train(options(folder / "a")))
    with interrupted_after(2):
        train(options(folder / "b"))
    torch.manual_seed(999)
    model = load_checkpoint(train(options(folder / "b")))
    weights = model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in whole.state_dict().items())
    return model


def saved_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest state, by their names."""
    state = find_state(run)
    assert state is not None
    into = {name: torch.empty(kept.size, dtype=kept.properties.dtype) for name, kept in tensors_in(state).items()}
    load_tensors(state, into)
    return into


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Training runs in here end as by Ctrl-C, after so many steps."""
    step = Trainer._step

    def watched(trainer: Trainer, batches: Any) -> Any:
        trainer._interrupted = trainer.step == steps - 1
        return step(trainer, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        with pytest.raises(KeyboardInterrupt):
            yield


def wait_for(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Until it does; an error when it takes longer, for a test that hangs says nothing."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it took longer than {seconds} s"
        time.sleep(0.01)


def unit_rows(count: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """Random directions, float32 (count, size)."""
    rows = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def new_item(i: int, **changes: object) -> NewItem:
    """An item whose id, vector, caption and metadata say its number; three pictures among all."""
    values = {"kind": "image", "vector": unit_rows(1, i)[0], "id": f"i{i}", "picture": b"picture %d" % (i % 3)}
    return NewItem(**(values | {"caption": f"c{i}", "metadata": {"i": i}} | changes))  # type: ignore[arg-type]


def in_python(encode: Callable[..., Tensor], note: Callable[..., object]) -> Callable[..., Tensor]:
    """A model's `encode` that notes what it is given; a record of it (app/recording.py) would not, so there is none."""

    def noted(*given: Any) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("its calls are noted")
        note(*given)
        return encode(*given)

    return noted
