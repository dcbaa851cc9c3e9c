"""Checkpoint folders from runs: of one that is still going or was interrupted, and the average of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.errors import CheckpointError
from training.progress import history
from training.provenance import command
from training.state import facts_of, find_state, load_tensors, tensors_in

SKELETON = "model"  # in the run's folder: the model as it began, which tells its architecture, preprocess and tokenizer


def export_run(run: str | Path, out: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the averaged weights (without EMA: the current ones) of a run's saved state as a checkpoint folder.

    Raises CheckpointError if the folder holds no run, or one that has saved nothing yet.
    """
    run = Path(run)
    state = find_state(run)
    if state is None or not (run / SKELETON).is_dir():
        raise CheckpointError(
            f"{run} holds no saved run: give the folder that --run-dir named (default runs/<name of out>)"
        )
    model = load_checkpoint(run / SKELETON)
    facts, kept = facts_of(state), tensors_in(state)
    part = "ema" if any(name.startswith("ema/") for name in kept) else "method"
    load_tensors(state, {f"{part}/{facts['exported']}.{name}": t for name, t in model.state_dict().items()})
    record = {**model.provenance, "steps": facts["step"], "training_seconds": round(facts["spent"])}
    record["history"] = history(run)
    return save_checkpoint(model, out, provenance=record, dtype=dtype)


def average_checkpoints(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write the mean of the weights of several checkpoints that were trained one from the other (arXiv:2109.01903).

    It often keeps what the later ones learned and loses less of what the earlier ones knew. Batch statistics are
    averaged too; counters are the last one's. Its figures are for `evaluate --write` to measure. Raises
    CheckpointError for checkpoints that differ in anything but their weights.
    """
    models = [load_checkpoint(folder) for folder in folders]
    last = models[-1]
    for folder, model in zip(folders, models, strict=True):
        texts = [each.tokenizer and each.tokenizer.to_json() for each in (model, last)]
        if (model.architecture, model.config, model.preprocess, texts[0]) != (
            last.architecture, last.config, last.preprocess, texts[1]
        ):  # fmt: skip
            raise CheckpointError(
                f"{folder} and {folders[-1]} are no two states of one model: they differ in their options"
            )
    weights = [model.state_dict() for model in models]
    last.load_state_dict(
        {
            name: torch.stack([each[name] for each in weights]).mean(0) if value.is_floating_point() else value
            for name, value in weights[-1].items()
        }
    )
    kept = {
        key: last.provenance[key] for key in ("data", "license", "commit", "seed", "hardware") if key in last.provenance
    }
    parts = ", ".join(str(model.provenance.get("command", "unknown")) for model in models)
    record = {**kept, "command": f"{command('average')}, of: {parts}"}
    return save_checkpoint(last, out, provenance=record, dtype=last.stored_dtype)
