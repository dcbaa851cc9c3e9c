"""What a run goes on from: written by its processes together, each its share, and read by as many or by others.

Every saved state is a folder `state/<step>` of the run's folder: tensors as torch.distributed.checkpoint keeps them,
and `run.json`. It gets its name when all of it is on the disk, and what was before it goes then. Its index is a pickle,
so a run's folder is to be trusted as code is; checkpoint folders hold none.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from models.errors import CheckpointError
from models.files import sync
from training.distributed import rank, world_size

_FACTS = "run.json"


def save_state(run: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the state of a step; all processes call it. tensors: by their names, whole or this process's shards.

    Raises CheckpointError if it cannot be written; what was saved before is kept.
    """
    staged = run / "state" / "next"
    try:
        _write_state(staged, step, tensors, facts)
    except (CheckpointException, OSError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise CheckpointError(
            f"the state of step {step} cannot be written to {staged.parent}: {_reason(error)}. Free some space there "
            "and start again with the same options, to go on from the state that was saved before"
        ) from error


def _write_state(staged: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    states = staged.parent
    if rank() == 0:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    # What every process has whole is the first one's: it is the one whose batch statistics count.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with _unwarned():
        save(dict(tensors), storage_writer=FileSystemWriter(staged), planner=planner)
    if rank() == 0:
        with (staged / _FACTS).open("w") as file:
            json.dump({**facts, "step": step}, file)
            file.flush()
            os.fsync(file.fileno())
        before = _complete(states)
        staged.rename(states / f"{step:08d}")
        sync(states)
        for folder in before:
            shutil.rmtree(folder)


def _reason(error: BaseException) -> str:
    """Why it failed, in the words of the system where it said any: they lie below what torch makes of them."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__cause__ or below.__context__
    return str(below or error).partition("\n")[0]


@contextmanager
def _readable(state: Path) -> Iterator[None]:
    """What is read here may be damaged."""
    try:
        yield
    except (CheckpointException, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{state} cannot be read, or is of another model: {_reason(error) or type(error).__name__}. Bring it back "
            f"from a copy, or delete {state.parent} to begin anew"
        ) from error


def find_state(run: Path) -> Path | None:
    """The newest state that is whole, the same for every process; None for a run that has saved none.

    Raises CheckpointError if it is not on a disk that all processes see, or of an earlier version.
    """
    complete = _complete(run / "state")
    found = [str(complete[-1]) if complete else None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
        seen = torch.tensor(int(found[0] is None or (Path(found[0]) / _FACTS).is_file()))
        dist.all_reduce(seen, dist.ReduceOp.MIN)
        if not seen:
            raise CheckpointError(
                f"{found[0]} is not there on every host: give --run-dir a folder on a disk that all of them share"
            )
    if found[0] is None and (old := next(run.glob("state*.pt"), None)) is not None:
        raise CheckpointError(
            f"{old} is the state of a run of an earlier version: end it with that version, or give another --run-dir"
        )
    return None if found[0] is None else Path(found[0])


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Keep a run's folder from other trainings on this machine. Raises CheckpointError if one has it.

    A lone process asks; those of torchrun do not, for one that hangs may outlive the start of those after it. The lock
    is the process's and not the file's, so that a killed one's loader workers, which outlive it a while, have no part.
    """
    if world_size() > 1:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise CheckpointError(
                f"another process trains in {run}: wait for its end, or give this run another --run-dir (and --out)"
            ) from error
        except OSError:  # a disk without locks
            pass
        yield


def has_state(run: Path) -> bool:
    """Whether a run has a whole state to go on from, by what this process sees."""
    return bool(_complete(run / "state"))


def facts_of(state: Path) -> dict[str, Any]:
    """What `save_state` was told beside the tensors, and `step`."""
    with _readable(state):
        facts: dict[str, Any] = json.loads((state / _FACTS).read_text())
        return facts


def tensors_in(state: Path) -> dict[str, TensorStorageMetadata]:
    """The names of a state's tensors, and their shapes and types."""
    with _readable(state):
        kept = FileSystemReader(state).read_metadata().state_dict_metadata
    return {name: each for name, each in kept.items() if isinstance(each, TensorStorageMetadata)}


def load_tensors(state: Path, into: dict[str, Tensor]) -> None:
    """Read tensors, or this process's shards of them, in place; all processes call it."""
    with _unwarned(), _readable(state):
        load(into, storage_reader=FileSystemReader(state))


@contextmanager
def _unwarned() -> Iterator[None]:
    """That one process alone saves or loads is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _complete(states: Path) -> list[Path]:
    """Folders of whole states, the oldest first."""
    return sorted(folder for folder in states.glob("[0-9]*") if (folder / _FACTS).is_file())
