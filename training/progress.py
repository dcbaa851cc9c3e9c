"""What a run tells while it trains: a progress line, a JSONL log, TensorBoard where installed, and health figures."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

_ROWS = 100  # of each kind that a checkpoint keeps of its run's log


def history(run: Path) -> str:
    """How a run went, as CSV for the checkpoint: a column `step`, and one of each figure that log.jsonl has, empty
    where it was not taken. At most 100 rows of training and 100 of evaluation, evenly spread; "" without a log."""
    file = run / "log.jsonl"
    kinds: dict[str, dict[int, dict[str, float]]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            record = dict(json.loads(line))
            step, kind, _ = record.pop("step"), record.pop("kind"), record.pop("time")
        except (ValueError, TypeError, KeyError):  # a line that a full disk, a kill or a power cut broke off
            continue
        kinds.setdefault(kind, {})[step] = record  # a step that was done again after a resume counts once
    rows: dict[int, dict[str, float]] = {}
    for taken in kinds.values():
        steps = sorted(taken)
        stride = -(-len(steps) // _ROWS)
        for step in steps[(len(steps) - 1) % stride :: stride]:  # the last one always
            rows.setdefault(step, {}).update(taken[step])
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [",".join(["step", *names])]
    for step, row in sorted(rows.items()):
        lines.append(",".join([str(step), *(f"{row[name]:.4g}" if name in row else "" for name in names)]))
    return "\n".join(lines) if rows else ""


class Journal:
    """Writes log.jsonl and tensorboard/ in the run folder and the progress line on stderr."""

    def __init__(self, run: Path, steps: int, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        self._file = (run / "log.jsonl").open("a", encoding="utf-8")
        if self._broken_off():
            self._file.write("\n")  # or the next line would be part of it
        self._board = _summary_writer(run / "tensorboard")
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=steps)
        self._progress.start()
        self._last: tuple[int, float] | None = None

    def _broken_off(self) -> bool:
        """Whether the log's last line has no end."""
        with Path(self._file.name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read() not in (b"", b"\n")

    def log(self, step: int, values: dict[str, float], rows: int, alert: str | None = None) -> None:
        """One line of figures; rows: pictures a step, for the rate."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self._last is not None and now > self._last[1]:
            values["images_per_second"] = (step - self._last[0]) * rows / (now - self._last[1])
        self._last = (step, now)
        self._write("train", step, values)
        line = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._progress.update(self._task, completed=step, description=line)
        if not self._console.is_terminal:
            self._console.print(f"step {step}  {line}", soft_wrap=True, highlight=False)
        if alert:
            self._console.print(f"step {step}: {alert}", style="yellow")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Figures of an evaluation during training."""
        if not self.enabled:
            return
        self._write("evaluation", step, values)
        line = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._console.print(f"step {step}  evaluation: {line}", soft_wrap=True, highlight=False)
        self._last = None  # the time it took is no training time

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close everything."""
        if self.enabled:
            self._progress.stop()
            self._file.close()
            if self._board is not None:
                self._board.close()


@torch.no_grad()
def health(embeddings: Tensor) -> dict[str, float]:
    """Signs of collapse in unit rows (B, D): the mean standard deviation of a coordinate times sqrt(D) (1 when spread
    evenly over the sphere, 0 when collapsed) and RankMe, the exponential of the entropy of the normalised singular
    values (eq. 1 of arXiv:2210.02885), between 1 and min(B, D)."""
    rows = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    spectrum = torch.linalg.svdvals(rows)
    shares = spectrum / spectrum.sum() + 1e-7
    entropy = -(shares * shares.log()).sum()
    return {"feature_std": float(rows.std(0).mean() * rows.shape[1] ** 0.5), "rankme": float(entropy.exp())}


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
