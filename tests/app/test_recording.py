"""A tower's record: what it gives, what it leaves out, and what is never recorded."""

import logging
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.backends import Array, Tower, has_native_bf16, torch_tower, towers_of
from app.int8 import observe, quantized, supported
from app.recording import Recorded
from app.settings import Backend
from models.checkpoint import load_checkpoint

CPU = torch.device("cpu")
DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


class _Tokens(nn.Module):
    """Sums of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.embedding(tokens).sum(1)
        return rows


class _Fixed(_Tokens):
    """Takes the number of its rows for a constant."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * float(len(tokens))


class _Raises(_Tokens):
    """Cannot be recorded: what it gives depends on what it computes."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.tensor([[each % 9 for each in row] for row in tokens.tolist()]))


def _recorded(module: nn.Module) -> Recorded:
    examples = [torch.arange(rows * length).view(rows, length) % 9 for rows, length in ((2, 5), (3, 4), (1, 4))]
    return Recorded(module.eval(), lambda: examples, nullcontext)


def test_a_record_gives_what_the_module_gives():
    rows = _recorded(module := _Tokens())
    assert rows.recorded
    tokens = torch.arange(21).view(7, 3) % 9
    assert torch.equal(rows(tokens), module(tokens))


@pytest.mark.parametrize("kind", [_Fixed, _Raises])
def test_what_cannot_be_recorded_runs_in_python(kind: type[nn.Module], caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        rows = _recorded(module := kind())
        assert not rows.recorded
    assert f"{kind.__name__}" in caplog.text
    assert "cannot be recorded" in caplog.text
    tokens = torch.arange(21).view(7, 3) % 9
    assert torch.equal(rows(tokens), module(tokens))


def test_weights_that_change_later_change_the_rows():
    """As load_engine does, which holds them in bfloat16 once every tower is there."""
    rows = _recorded(module := _Tokens())
    tokens = torch.arange(21).view(7, 3) % 9
    before = rows(tokens)
    module.embedding.weight.data = 2 * module.embedding.weight.data
    assert torch.equal(rows(tokens), 2 * before)


def _calls(work: partial[Any]) -> int:
    """How many functions Python calls in a piece of work, others' too."""
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def _batch(model: Any, tower: Tower) -> Tensor:
    if tower == "text":
        tokens: Tensor = model.tokenizer(["a red star", "two blue hearts above a circle", "a photo"])
        return tokens[:, : int(model.text_lengths(tokens).max())]
    size = model.preprocess.size
    return torch.randint(256, (3, 3, size, size), generator=torch.manual_seed(0)).to(torch.uint8)


def _in_python(model: Any, tower: Tower, batch: Tensor, bf16: bool) -> Array:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        rows: Tensor = getattr(model, f"encode_{tower}")(batch)
    return rows.float().numpy()


@pytest.mark.parametrize("name", ["clip", "simclr"])
@pytest.mark.parametrize("backend", ["torch-fp32", "torch-bf16", "torch-int8"])
def test_the_demos_towers_leave_python_out(name: str, backend: Backend):
    model: Any = load_checkpoint(DEMO / name)
    bf16 = backend == "torch-bf16" or (backend == "torch-int8" and has_native_bf16(CPU))
    for tower in towers_of(model):
        used, batch = model, _batch(model, tower)
        if backend == "torch-int8":
            with torch.inference_mode():
                ranges = observe(model, lambda copy, tower=tower, batch=batch: getattr(copy, f"encode_{tower}")(batch))
            if not (ranges and supported()):
                continue  # no blocks, or a processor without VNNI
            used = quantized(model, ranges)
        rows = torch_tower(backend, used, tower, CPU)
        in_python = partial(_in_python, used, tower, batch, bf16)
        assert np.array_equal(rows(batch), in_python())
        assert _calls(partial(rows, batch)) < 60 < 150 < _calls(in_python)
