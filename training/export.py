"""A checkpoint folder from a run that is still going or was interrupted."""

from __future__ import annotations

from pathlib import Path

import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.errors import CheckpointError

SKELETON = "model"  # in the run's folder: the model as it began, which tells its architecture, preprocess and tokenizer


def export_run(run: str | Path, out: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the averaged weights (without EMA: the current ones) of a run's saved state as a checkpoint folder.

    Raises CheckpointError if the folder holds no run, or one that has saved nothing yet.
    """
    run = Path(run)
    state_file = next((file for file in (run / "state.pt", run / "state-0.pt") if file.is_file()), None)
    if state_file is None or not (run / SKELETON).is_dir():
        raise CheckpointError(
            f"{run} holds no saved run: give the folder that --run-dir named (default runs/<name of out>)"
        )
    model = load_checkpoint(run / SKELETON)
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    weights = state["ema"] if state["ema"] is not None else state["method"]
    prefix = f"{state['exported']}."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    record = {**model.provenance, "steps": state["step"], "training_seconds": round(state["spent"])}
    return save_checkpoint(model, out, provenance=record, dtype=dtype)
