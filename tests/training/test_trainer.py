"""The trainer: resume to the bit, accumulation, EMA, precision, NaN, Ctrl-C, logs."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import saved_tensors
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.errors import CheckpointError, DivergedError
from training.memory import memory_kept
from training.method import Batch, Losses, Method
from training.progress import history
from training.state import facts_of, find_state
from training.trainer import Trainer, TrainerConfig, choose_device, choose_precision

CONFIG = TrainerConfig(
    steps=12, lr=0.05, warmup=2, precision="fp32", ema_decay=0.9, log_every=1, save_every=0, device="cpu"
)


class Noisy(Method):
    """Draws from the global generator, has batch norm and a queue: everything that a resume must bring back."""

    queue: Tensor

    def __init__(self, fail_at: int | None = None, interrupt_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6))
        self.register_buffer("queue", torch.zeros(4, 6))
        self.calls, self.fail_at, self.interrupt_at = 0, fail_at, interrupt_at

    def forward(self, batch: Batch) -> Losses:
        self.calls += 1
        rows = self.model(batch["rows"])
        loss = (rows - batch["rows"]).square().mean() + 0.01 * (rows @ self.queue.T).square().mean()
        if self.calls == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)  # in the midst of a step
        if self.calls == self.fail_at:
            loss = loss * float("nan")
        return {"loss": loss, "embeddings": rows}

    def after_step(self, progress: float) -> None:
        self.queue.copy_(torch.randn(4, 6) * (1 - progress))

    def export(self) -> nn.Module:
        return self.model


class Rows(Dataset[Batch]):
    def __init__(self, steps: int = 12, size: int = 8) -> None:
        self.steps, self.size = steps, size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        return {"rows": torch.randn(self.size, 6, generator=generator)}


def _train(run: Path, config: TrainerConfig = CONFIG, method: Noisy | None = None, **options: Any) -> Trainer:
    trainer = Trainer(method or Noisy(), Rows(), config, run, **options)
    trainer.fit()
    return trainer


def _same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, two.state_dict()[name]) for name, a in one.state_dict().items())


@pytest.mark.parametrize("stop", [1, 5, 11])
@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd"])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(tmp_path: Path, stop: int, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole = _train(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", config, Noisy(interrupt_at=stop))
    torch.manual_seed(999)  # what happens between has no part in it
    resumed = _train(tmp_path / "parts", config)
    assert _same(whole.method, resumed.method)
    assert whole.ema is not None
    assert resumed.ema is not None
    assert _same(whole.ema, resumed.ema)
    assert resumed.step == 12


def test_workers_do_not_change_the_bits(tmp_path: Path) -> None:
    one, two = _train(tmp_path / "one"), _train(tmp_path / "two", replace(CONFIG, workers=2))
    assert _same(one.method, two.method)


def test_another_runs_state_is_refused_by_the_names_of_its_options(tmp_path: Path) -> None:
    _train(tmp_path)
    with pytest.raises(CheckpointError, match="other lr, queue_size"):
        _train(tmp_path, replace(CONFIG, lr=0.1), extra={"queue_size": 3})


class _Plain(Method):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(6, 6)

    def forward(self, batch: Batch) -> Losses:
        return {"loss": (self.model(batch["rows"]) - batch["rows"]).square().mean()}

    def export(self) -> nn.Module:
        return self.model


class _Halves(Rows):
    """Every two steps together are one step of Rows."""

    def __getitem__(self, step: int) -> Batch:
        return {"rows": super().__getitem__(step // 2)["rows"].chunk(2)[step % 2]}


def test_accumulated_batches_make_the_step_of_their_union(tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=0.0, optimizer="sgd")
    whole, parts = _Plain(), _Plain()
    Trainer(whole, Rows(), config, tmp_path / "a").fit()
    Trainer(parts, _Halves(24), replace(config, accumulate=2), tmp_path / "b").fit()
    assert torch.allclose(whole.model.weight, parts.model.weight, atol=1e-6)


def test_ema_is_the_running_mean_and_is_what_is_exported(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(_Plain):
        def after_step(self, progress: float) -> None:
            seen.append(self.model.weight.detach().clone())

    method = Watched()
    mean = method.model.weight.detach().clone()
    exported = Trainer(method, Rows(), replace(CONFIG, steps=6), tmp_path).fit()
    for step, weight in enumerate(seen):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
    assert torch.allclose(exported.weight, mean, atol=1e-6)
    assert not torch.equal(exported.weight, method.model.weight)


def test_nan_stops_with_the_way_out_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="Lower --lr"):
        _train(tmp_path, replace(CONFIG, save_every=2), Noisy(fail_at=6))
    state = find_state(tmp_path)
    assert state is not None
    assert facts_of(state)["step"] == 4
    assert all(torch.isfinite(tensor).all() for name, tensor in saved_tensors(tmp_path).items() if name[:3] != "rng")


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Where the host does not look at every step, it looks before it writes."""
    trainer = Trainer(Noisy(), Rows(), CONFIG, tmp_path)
    trainer.fit()
    saved = saved_tensors(tmp_path)
    trainer.step += 1
    trainer._outputs["loss"] = torch.tensor(float("nan"))
    with pytest.raises(DivergedError, match="last good state"):
        trainer.save()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in saved_tensors(tmp_path).items())
    assert [folder.name for folder in (tmp_path / "state").iterdir()] == ["00000012"]


def test_a_state_is_the_last_one_that_was_written_whole(tmp_path: Path) -> None:
    """A kill may come at any moment of the writing: what has no name yet does not count, and goes with the next."""
    whole = _train(tmp_path / "whole")
    with pytest.raises(DivergedError):
        _train(tmp_path / "parts", replace(CONFIG, save_every=5), Noisy(fail_at=8))
    shutil.copytree(tmp_path / "parts" / "state" / "00000005", tmp_path / "parts" / "state" / "next")
    (tmp_path / "parts" / "state" / "00000007").mkdir()  # whoever made it, it has no run.json
    resumed = _train(tmp_path / "parts", replace(CONFIG, save_every=5))
    assert _same(resumed.method, whole.method)
    assert resumed.step == 12


def test_a_state_of_an_earlier_version_is_not_begun_over(tmp_path: Path) -> None:
    (tmp_path / "state.pt").touch()
    with pytest.raises(CheckpointError, match="earlier version"):
        _train(tmp_path)


def test_log_lines_carry_what_a_run_is_judged_by(tmp_path: Path) -> None:
    _train(tmp_path, evaluate=lambda model: {"figure": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert {"loss", "lr", "grad_norm", "feature_std", "rankme"} <= trained[0].keys()
    assert trained[-1]["images_per_second"] > 0
    assert [line["figure"] for line in lines if line["kind"] == "evaluation"] == [0.5]
    assert list((tmp_path / "tensorboard").iterdir())


def test_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    _train(tmp_path)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates[:2] == pytest.approx([0.025, 0.05])
    assert rates[-1] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 9 / 10)))


def test_a_time_limit_ends_the_run_with_its_schedule(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1_000_000, time_limit=1.0)
    trainer = Trainer(_Plain(), Rows(1_000_000), replace(config, ema_decay=0), tmp_path)
    trainer.fit()
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 0 < trainer.step < 1_000_000
    assert rates[-1] < 0.05 * max(rates)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="sgd", clip_norm=1e-3, ema_decay=0, steps=1, warmup=0, weight_decay=0.0)
    method = _Plain()
    before = method.model.weight.detach().clone()
    Trainer(method, Rows(), config, tmp_path).fit()
    assert 0 < float((method.model.weight - before).detach().norm()) <= 0.05 * 1e-3 * 1.001


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precisions_train(tmp_path: Path, precision: str) -> None:
    trainer = _train(tmp_path, replace(CONFIG, precision=precision))  # type: ignore[arg-type]
    assert all(tensor.dtype == torch.float32 for tensor in trainer.method.parameters())


def test_choices_of_device_and_precision() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert choose_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="fp32, bf16, fp16"):
        choose_precision("int8", torch.device("cpu"))


def test_compiled_methods_train_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend that traces and runs eagerly: the suite must not need a C++ compiler."""
    real, compiled = torch.compile, []

    def traced(module: nn.Module) -> Any:
        compiled.append(module)
        return real(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    one, two = _Plain(), _Plain()
    config = replace(CONFIG, ema_decay=0.0, steps=4)
    Trainer(one, Rows(), config, tmp_path / "one").fit()
    Trainer(two, Rows(), replace(config, compile=True), tmp_path / "two").fit()
    assert compiled == [two]
    assert torch.allclose(one.model.weight, two.model.weight, atol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_a_step_frees_is_taken_again_without_page_faults() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.ones(12_000_000)  # 48 MB, 11,719 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with memory_kept(torch.device("cpu")):
        faults()
        assert faults() < 2_000  # without it nearly 94,000


def test_the_history_that_a_checkpoint_keeps(tmp_path: Path) -> None:
    assert history(tmp_path) == ""
    lines = [{"kind": "train", "step": step, "time": 1.0, "loss": step / 7} for step in range(0, 1000, 3)]
    lines += [{"kind": "train", "step": 3, "time": 2.0, "loss": 9.0}]  # done again after a resume
    lines += [{"kind": "evaluation", "step": 999, "time": 3.0, "knn": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head, *rows = history(tmp_path).split("\n")
    assert head == "step,loss,knn"
    assert rows[-1] == "999,142.7,0.5"
    steps = [int(row.split(",")[0]) for row in rows]
    assert steps == sorted(set(steps))
    assert 80 < len(steps) <= 100
    assert {b - a for a, b in itertools.pairwise(steps)} == {12}


def test_a_log_line_that_broke_off_costs_that_line_alone(tmp_path: Path) -> None:
    _train(tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join(["", "3", *lines[:6], lines[6][:20]]))
    shutil.rmtree(tmp_path / "state")
    _train(tmp_path, replace(CONFIG, steps=8))
    assert [row.split(",")[0] for row in history(tmp_path).split("\n")] == ["step", *map(str, range(1, 9))]
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:3]) + "\n\0\0\0")
    assert len(history(tmp_path).split("\n")) == 4


def test_a_state_that_cannot_be_written_or_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, replace(CONFIG, save_every=4), Noisy(interrupt_at=5))
    before = sorted(place.name for place in (tmp_path / "state").iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limit[1]))  # as a full disk
    try:
        with pytest.raises(CheckpointError, match=r"step 8 cannot be written to .*: \[Errno 27\] File too large. Free"):
            _train(tmp_path, replace(CONFIG, save_every=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    state = find_state(tmp_path)
    assert state is not None
    assert sorted(place.name for place in (tmp_path / "state").iterdir()) == before == [state.name]
    for name in ("__0_0.distcp", ".metadata", "run.json"):
        content = (state / name).read_bytes()
        (state / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=r"cannot be read, or is of another model: .*delete .* to begin anew"):
            _train(tmp_path, replace(CONFIG, save_every=4))
        (state / name).write_bytes(content)
    _train(tmp_path, replace(CONFIG, save_every=4))
