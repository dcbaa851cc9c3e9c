"""A run from its data sets to a checkpoint folder: what every method's `train` does around its own model."""

from __future__ import annotations

import logging
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from models.checkpoint import check_target, load_checkpoint, save_checkpoint
from models.errors import CheckpointError, DataError
from models.readers import BadRows
from training.data import Batches, Source
from training.distributed import rank, world_size
from training.export import SKELETON
from training.figures import evaluate_model
from training.method import Method
from training.options import EncoderOptions, RunOptions
from training.pictures import open_source
from training.progress import history
from training.provenance import provenance
from training.state import alone_in, has_state
from training.trainer import Evaluate, Trainer, choose_device

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


@dataclass
class RunData:
    """The opened data sets of a run. side: in pixels, at which pictures are held."""

    sources: list[Source]
    weights: list[float]
    side: int
    bad: BadRows

    @property
    def described(self) -> list[str]:
        """Each data set's name and size, for the model card."""
        return [f"{source.name}: {source.size() or 'unlimited'}" for source in self.sources]


def open_data(options: RunOptions, side: int, *, captioned: bool = True) -> RunData:
    """Open the data sets that the options name. Raises DataError with the way out."""
    bad = BadRows(options.max_bad)
    opened = [
        open_source(spec, side, bad, options.data_root, options.hold, captioned=captioned) for spec in options.data
    ]
    return RunData([source for source, _ in opened], [weight for _, weight in opened], side, bad)


def batch_options(options: RunOptions) -> dict[str, Any]:
    """What `training.data.Batches` needs to know of the options and of this process."""
    return {
        "batch_size": options.batch_size,
        "steps": options.trainer.steps * options.trainer.accumulate,
        "chunk": options.chunk,
        "seed": options.trainer.seed,
        "rank": rank(),
        "world_size": world_size(),
    }


def starting_model(options: RunOptions, kind: type[M]) -> M | None:
    """The model of `init`, ready to be trained on; None where the run starts from nothing.

    Raises CheckpointError for a checkpoint of another kind.
    """
    if options.init is None:
        return None
    model: Any = load_checkpoint(options.init)
    if isinstance(options, EncoderOptions) and options.matryoshka:
        model.config["truncatable"] = list(options.matryoshka)
    if isinstance(model, kind):
        return model.train()
    raise CheckpointError(
        f"{options.init} holds another kind of model ({type(model).__name__}); this method needs {kind.__name__}"
    )


def run_folder(options: RunOptions) -> Path:
    """Where a run keeps its logs and its state."""
    return Path(options.run_dir or f"runs/{Path(options.out).name}")


def run_training(
    name: str, options: RunOptions, method: Method, batches: Batches, data: RunData, evaluate: Evaluate | None
) -> Path:
    """Train to the end, or go on with a run that was interrupted; write what the method keeps, and its figures.

    evaluate: for the log, while training. -> the checkpoint folder. Raises what Trainer.fit raises.
    """
    run, out = run_folder(options), Path(options.out)
    model: Any = method.export()
    if isinstance(options, EncoderOptions) and (longer := [n for n in options.matryoshka if n > model.embed_dim]):
        raise ValueError(f"--matryoshka {longer[0]}: embeddings of this model have {model.embed_dim} numbers")
    check_target(out)  # now, and not when all is trained
    if run.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(
            f"--run-dir {run} lies in --out {out}, which a checkpoint replaces: give it another place"
        )
    with alone_in(run):
        return _trained(name, options, method, batches, data, evaluate)


def _trained(
    name: str, options: RunOptions, method: Method, batches: Batches, data: RunData, evaluate: Evaluate | None
) -> Path:
    model = method.export()
    run, out = run_folder(options), Path(options.out)
    # Now, for the code on the disk may be another when the run ends.
    record = provenance(name, options, data.described, getattr(model, "provenance", {}))
    if rank() == 0 and not has_state(run):  # what goes with a state stays with it, though this run be refused
        save_checkpoint(model, run / SKELETON, provenance=record)
    identity = _identity(options) | {"pictures": data.described, "vocabulary": _vocabulary(model)}
    trainer = Trainer(method, batches, options.trainer, run, evaluate=evaluate, extra=identity)
    trained = trainer.fit()
    if rank() != 0:
        return out
    record |= {"steps": trainer.step, "training_seconds": round(trainer.spent), "skipped_rows": len(data.bad.rows)}
    record["history"] = history(run)
    save_checkpoint(trained, out, provenance=record, dtype=torch.float16)
    if options.evaluate:
        record["metrics"] = _figures(out, options)
        save_checkpoint(trained, out, provenance=record, dtype=torch.float16)
    return out


def _figures(out: Path, options: RunOptions) -> dict[str, float]:
    """Of what was written, rounded to half precision, on all that it was trained on and that can judge it."""
    model = load_checkpoint(out).to(choose_device(options.trainer.device))
    metrics: dict[str, float] = {}
    for spec in options.data:
        try:
            metrics |= evaluate_model(model, [spec], options.data_root)
        except DataError as error:  # pictures without classes train an encoder and cannot judge it
            log.warning("left out of the figures: %s", error)
    return metrics


def _vocabulary(model: Any) -> int | None:
    """Tells the tokenizer of one run from that of another, whose tokens would be other texts to the same weights."""
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else zlib.crc32(tokenizer.to_json().encode())


def _identity(options: RunOptions) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that began."""
    free = {"trainer", "out", "run_dir", "data_root", "max_bad", "hold", "evaluate"}
    values = asdict(options)
    return {item.name: values[item.name] for item in fields(options) if item.name not in free}
