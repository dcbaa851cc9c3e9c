"""What `semblance export` left of a model for other runtimes (app/exporter.py), and the choice among them and torch.

A model's exports lie in a folder named by its fingerprint, with a report of what each was found to do; its files are
used only as long as their hashes are the report's.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError

from app.backends import (
    FILES,
    Encode,
    Tower,
    default_tower,
    example,
    exported_tower,
    in_bf16,
    serves_here,
    timed,
    torch_tower,
)
from app.settings import Backend, Settings
from app.snapshots import file_hash
from models.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 1
LEAST_AGREEMENT = 0.99


class Parity(NamedTuple):
    """What a backend was found to do, beside torch in float32.

    agreement: share of the calibration set whose nearest is the same, searched among float32 rows and among its own,
    the lower of the two. cosine: the lowest of its rows with float32's. alone, of_eight: seconds of an input, by itself
    and in a batch of eight.
    """

    agreement: float
    cosine: float
    alone: float
    of_eight: float


class _Report(BaseModel):
    """What is read of a report; backends may be such as only a later version knows."""

    files: dict[str, str]
    towers: dict[str, dict[Any, Parity]]


class Exports:
    """A model's exports. name: the model's. folder: theirs. Nothing is read before it is asked for, and nothing has to
    be there."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    @property
    def report(self) -> dict[str, Any]:
        """What was found, without rows before the first export. Raises CheckpointError if it cannot be read."""
        file = self.folder / "report.json"
        try:
            content = json.loads(file.read_text()) if file.is_file() else {"format": FORMAT, "files": {}, "towers": {}}
        except (OSError, ValueError) as error:
            raise self._wrong(f"report.json cannot be read ({error})") from error
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise self._wrong(f"report.json is of format {content.get('format')!r}, not {FORMAT}")
        try:
            _Report.model_validate(content)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            place = ".".join(map(str, ("report", *wrong["loc"])))
            raise self._wrong(f"report.json is no report ({place}: {wrong['msg']})") from error
        return content

    def found(self, tower: Tower) -> dict[Backend, Parity]:
        """Every backend that was compared, with what it was found to do. Raises as `report` does."""
        return _Report.model_validate(self.report).towers.get(tower, {})

    def open(self, backend: Backend, model: Any, tower: Tower, threads: int) -> Encode:
        """A tower from its file. Raises CheckpointError if it is not there, or not what was written."""
        if backend not in self.found(tower):
            if not serves_here(backend, torch.device("cpu")):
                raise CheckpointError(
                    f"{backend} is of no use on this processor, so {self.folder} holds no {tower} tower of model "
                    f"{self.name!r} for it: choose another backend"
                )
            raise CheckpointError(
                f"{self.folder} holds no {tower} tower for {backend}: run `semblance export {self.name} --to "
                f"{backend.partition('-')[0]}` first"
            )
        file = Path(FILES[backend].format(tower=tower))
        for name in [file.name, file.with_suffix(".bin").name] if file.suffix == ".xml" else [file.name]:
            try:
                whole = self.holds(name)
            except OSError as error:
                raise self._wrong(f"{name} cannot be read ({error})") from error
            if not whole:
                raise self._wrong(f"{name} is not what was written")
        return exported_tower(backend, self.folder, model, tower, threads)

    def holds(self, name: str) -> bool:
        """Whether a file is there as it was written."""
        digest = self.report["files"].get(name)
        return digest is not None and (self.folder / name).is_file() and file_hash(self.folder / name) == digest

    def add(self, entries: Mapping[str, Any], files: Sequence[Path], tower: Tower, found: Mapping[Any, Parity]) -> None:
        """Record files that were written, and what was found of a tower, beside what was there before."""
        report: dict[str, Any] = {**self.report, **entries}
        report["files"] |= {file.name: file_hash(file) for file in files}
        rows = {backend: parity._asdict() for backend, parity in found.items()}
        report["towers"][tower] = report["towers"].get(tower, {}) | rows
        _write_json(self.folder / "report.json", report)

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {what}; delete the folder and run `semblance export {self.name}` again")


def exports_of(name: str, model: Any, settings: Settings) -> Exports:
    """Where a model's exports lie, by its fingerprint, so that other weights never find them."""
    return Exports(name, settings.store / "exports" / model.fingerprint)


def choose(
    name: str, model: Any, tower: Tower, settings: Settings, device: torch.device, threads: int
) -> tuple[Backend, Encode]:
    """The tower that the settings ask for; of "auto" the fastest on this machine of torch's and of the exports that
    agree with float32. Raises CheckpointError as Exports.open does, unless it is auto: then torch serves."""
    exports, backend = exports_of(name, model, settings), settings.backend
    if backend == "auto":
        return _fastest(model, tower, exports, device, threads)
    if backend in FILES:
        return backend, exports.open(backend, model, tower, threads)
    return backend, torch_tower(backend, model, tower, device)


def _fastest(model: Any, tower: Tower, exports: Exports, device: torch.device, threads: int) -> tuple[Backend, Encode]:
    name, own = exports.name, default_tower(model, tower, device)
    try:
        found = exports.found(tower) if device.type == "cpu" else {}
    except CheckpointError as error:
        log.warning("exports are passed over: %s", error)
        found = {}
    if own[0] in found and found[own[0]].agreement < LEAST_AGREEMENT:
        own = "torch-fp32", torch_tower("torch-fp32", model, tower, device)
    agreeing = [each for each, parity in found.items() if each in FILES and parity.agreement >= LEAST_AGREEMENT]
    if refused := [each for each, parity in found.items() if parity.agreement < LEAST_AGREEMENT]:
        shares = ", ".join(f"{each} {100 * found[each].agreement:.1f} %" for each in refused)
        log.info("%s, %s: same nearest as float32 for less than 99 %%, and passed over: %s", name, tower, shares)
    able = [each for each in agreeing if serves_here(each, device)]
    if not able:
        if found:
            log.info("%s, %s: %s, for no export can take its place", name, tower, own[0])
        return own
    seconds = _measured(exports, model, tower, own, able, threads)
    taken = ", ".join(f"{each} {1000 * seconds[each]:.2f}" for each in sorted(seconds, key=seconds.__getitem__))
    for backend in sorted(seconds, key=seconds.__getitem__):
        if backend == own[0]:
            break
        try:
            encode = exports.open(backend, model, tower, threads)
        except CheckpointError as error:
            log.warning("%s is passed over: %s", backend, error)
            continue
        agreement = 100 * found[backend].agreement
        log.info("%s, %s: %s, same nearest as float32 for %.1f %% (ms: %s)", name, tower, backend, agreement, taken)
        return backend, encode
    log.info("%s, %s: %s (ms: %s)", name, tower, own[0], taken)
    return own


def _measured(
    exports: Exports, model: Any, tower: Tower, own: tuple[Backend, Encode], able: Sequence[Backend], threads: int
) -> dict[Backend, float]:
    """Seconds alone and of eight, added, of each that can be opened; kept until machine, library or file changes."""
    file = exports.folder / f"measured-{tower}.json"
    machine = [platform.node(), torch.backends.cpu.get_cpu_capability(), threads]
    versions = [_version(package) for package in ("torch", "onnxruntime", "openvino")]
    key = json.dumps([*machine, *versions, own[0], sorted(able), exports.report["files"]])
    try:
        kept = json.loads(file.read_text())
        return {backend: float(seconds) for backend, seconds in kept[key].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not measured yet, or not by this version
    batch = example(model, tower)
    encode = own[1]
    if own[0] == "torch-bf16":  # as it would serve
        encode = torch_tower(own[0], in_bf16(deepcopy(model)), tower, torch.device("cpu"))
    seconds = {own[0]: sum(timed(encode, batch))}
    for backend in able:
        try:
            seconds[backend] = sum(timed(exports.open(backend, model, tower, threads), batch))
        except CheckpointError as error:  # damaged, or its runtime is not installed here
            log.warning("%s is passed over: %s", backend, error)
    try:
        _write_json(file, {key: seconds})
    except OSError as error:
        log.warning("what was measured is not kept, and is measured again at the next start: %s", error)
    return seconds


def _write_json(file: Path, content: Any) -> None:
    """Atomically: a reader sees the old file or the new one."""
    written = file.with_suffix(f".{os.getpid()}.tmp")
    written.write_text(json.dumps(content, indent=2) + "\n")
    written.replace(file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
