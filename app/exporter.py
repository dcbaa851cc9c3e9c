"""Writes a model's towers for ONNX Runtime or OpenVINO, or the ranges that torch needs for int8, and compares what they
compute with torch in float32.

The towers take what the engine gives them: pictures as bytes, normalised inside, and token ids. Other runtimes than
torch need the extra `onnx` or `openvino`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from copy import deepcopy
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from app import int8
from app.backends import (
    FILES,
    Array,
    Encode,
    Tower,
    cut,
    exported_tower,
    has_native_bf16,
    in_bf16,
    missing,
    serves_here,
    timed,
    torch_tower,
    unit,
)
from app.exports import Exports, Parity
from app.images import Limits, decode
from app.locking import lock
from app.settings import Backend
from models.errors import DataError, InputError, StorageError
from models.readers import BadRows, file_bytes, read

Runtime = Literal["torch", "onnx", "openvino"]
Found = dict[Tower, dict[Backend, Parity]]
_TIE = 1e-6  # of two cosines
_PART = 32  # inputs a forward, when all of a calibration set is computed


class Calibration(NamedTuple):
    """What exports are compared on, and int8 is calibrated on. texts: any number, of pictures such as these."""

    source: str
    pictures: list[Image.Image]
    texts: list[str]


def read_calibration(source: str, count: int) -> Calibration:
    """The first `count` pictures of a source (as models.readers.read takes it), with what is said of them.

    Raises DataError if there are none, or if one cannot be read.
    """
    pictures: list[Image.Image] = []
    texts: list[str] = []
    for record in islice(read(source, BadRows(0)), count):
        try:
            pictures.append(decode(file_bytes(record.image), Limits()))  # type: ignore[arg-type]
        except (InputError, OSError) as error:
            raise DataError(f"{record.where}: {error}; take it out, or choose another source") from error
        texts += record.captions[:1]
    if len(pictures) < 2:
        raise DataError(f"{source} holds fewer than two pictures; give some such as the model will be asked about")
    return Calibration(source, pictures, texts)


def export_model(model: Any, exports: Exports, to: Runtime, calibration: Calibration, threads: int) -> Found:
    """Write both towers of a model that is on the CPU; compare a runtime's backends with torch, record it and give it.

    A text tower without texts to compare it on is left out, and so is, of torch, one without transformer blocks. A file
    of these weights that is there is kept. Raises CheckpointError if a library is missing.
    """
    exports.folder.mkdir(parents=True, exist_ok=True)
    counts = {"pictures": len(calibration.pictures), "texts": len(calibration.texts)}
    entries = {"model": exports.name, "calibration": {"source": calibration.source, **counts}}
    pictures: Array | None = None
    result: Found = {}
    for tower, batch in _inputs(model, calibration).items():
        files = _written(exports, model, tower, to, batch)
        reference = _rows(torch_tower("torch-fp32", model, tower, torch.device("cpu")), batch)
        found = result[tower] = {}
        for backend, encode in _backends(exports, model, tower, to, threads):
            rows = _rows(encode, batch)
            if pictures is None:  # pictures are searched by pictures, all but themselves
                shares = [_agreement(rows, gallery, reference, reference, others=True) for gallery in (reference, rows)]
            else:
                shares = [_agreement(rows, pictures, reference, pictures)]
            cosine = float((rows * reference).sum(1).min())
            found[backend] = Parity(min(shares), cosine, *timed(encode, batch))
        pictures = reference
        exports.add(entries, files, tower, found)
    return result


def _inputs(model: Any, calibration: Calibration) -> dict[Tower, Tensor]:
    inputs: dict[Tower, Tensor] = {"image": torch.stack([model.preprocess(each) for each in calibration.pictures])}
    if model.tokenizer is not None and calibration.texts:
        inputs["text"] = cut(model, model.tokenizer(calibration.texts))
    return inputs


def _backends(
    exports: Exports, model: Any, tower: Tower, to: Runtime, threads: int
) -> Iterator[tuple[Backend, Encode]]:
    """What is compared: torch as it may serve here, then the runtime's own."""
    cpu = torch.device("cpu")
    native = has_native_bf16(cpu)
    names: list[Backend] = ["torch-fp32", "torch-bf16", *(each for each in FILES if each.startswith(to))]
    for name in names:
        if name == "torch-fp32":
            yield name, torch_tower(name, model, tower, cpu)
        elif name == "torch-bf16" and native:
            yield name, torch_tower(name, in_bf16(deepcopy(model)), tower, cpu)
        elif name in FILES and serves_here(name, cpu) and (exports.folder / FILES[name].format(tower=tower)).is_file():
            yield name, exported_tower(name, exports.folder, model, tower, threads)


def _rows(encode: Encode, batch: Tensor) -> Array:
    """(B, D) of unit length."""
    return unit(np.concatenate([encode(part) for part in batch.split(_PART)]).astype(np.float32))


def _agreement(queries: Array, gallery: Array, reference: Array, truth: Array, *, others: bool = False) -> float:
    """Share of the queries (B, D) whose nearest in the gallery (N, D) is also, or as near as, the nearest by the
    reference's queries in the true gallery. others: query i is not to find row i."""
    scores, exact = queries @ gallery.T, reference @ truth.T
    if others:
        np.fill_diagonal(scores, -np.inf)
        np.fill_diagonal(exact, -np.inf)
    picked = exact[np.arange(len(exact)), scores.argmax(1)]
    return float((picked >= exact.max(1) - _TIE).mean())


def _written(exports: Exports, model: Any, tower: Tower, to: Runtime, batch: Tensor) -> list[Path]:
    """The files of a tower, written whole or not at all."""
    exact = exports.folder / f"{tower}.onnx"
    with _staging(exports.folder) as staging:
        files: list[Path] = []
        if to != "torch" and not exports.holds(exact.name):
            files.append(_write_onnx(model, tower, batch, staging / exact.name))
        source = files[0] if files else exact
        if to == "torch":
            files += _write_ranges(model, tower, batch, staging / f"{tower}-int8.safetensors")
        elif to == "onnx":
            files.append(_quantize_onnx(source, staging / f"{tower}-int8.onnx"))
        else:
            files += _quantize_openvino(source, staging / f"{tower}-int8.xml", batch)
        return [file.replace(exports.folder / file.name) for file in files]


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder in another, which is rid of those that killed exports have left: nobody holds their locks."""
    with (folder / "lock").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # or another export would take the new folder for one of them
        for left in folder.glob("tmp*"):
            with suppress(StorageError), closing(lock(left, "")):
                shutil.rmtree(left)
        staging = Path(mkdtemp(dir=folder))
        held = lock(staging, f"process {os.getpid()}")
    with held:
        try:
            yield staging
        finally:
            shutil.rmtree(staging)


def _write_ranges(model: nn.Module, tower: Tower, batch: Tensor, file: Path) -> list[Path]:
    """What int8 is to cover of each product of the transformer blocks, which may be none."""

    def run(observed: Any) -> None:
        with torch.inference_mode():
            for part in batch.split(_PART):
                getattr(observed, f"encode_{tower}")(part)

    ranges = int8.observe(model, run)
    save_file(ranges, file)
    return [file] if ranges else []


class _Tower(nn.Module):
    def __init__(self, model: nn.Module, tower: Tower) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, batch: Tensor) -> Tensor:
        return getattr(self.model, f"encode_{self.tower}")(batch)


def _write_onnx(model: nn.Module, tower: Tower, batch: Tensor, file: Path) -> Path:
    try:
        import onnxscript  # noqa: F401  # what torch.onnx writes with
    except ImportError as error:
        raise missing("onnxscript", "onnx") from error
    free = torch.export.Dim.AUTO
    sizes = {0: free} if tower == "image" else {0: free, 1: free}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about torch
        program = torch.onnx.export(
            _Tower(model, tower).eval(), (batch[:2],), dynamo=True, dynamic_shapes=(sizes,), verbose=False
        )
        program.save(str(file))  # type: ignore[union-attr]
    return file


def _quantize_onnx(source: Path, file: Path) -> Path:
    """Products of matrices in int8, by ranges that each batch has; convolutions stay, which that makes slower."""
    try:
        from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
    except ImportError as error:
        raise missing("onnxruntime", "onnx") from error
    # Without VNNI a processor adds pairs of products in 16 bits, which eight full bits would overflow.
    narrow = not torch.cpu._is_vnni_supported()
    prepared, kinds = file.with_suffix(".prepared"), ["MatMul", "Gemm"]
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, file, kinds, per_channel=True, reduce_range=narrow, weight_type=QuantType.QInt8)
    return file


def _quantize_openvino(source: Path, file: Path, batch: Tensor) -> list[Path]:
    """Everything in int8, by the ranges that the calibration set has."""
    os.environ["NNCF_CI"] = "1"  # it would tell its makers about us
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise missing("nncf", "openvino") from error
    nncf.set_log_level(logging.ERROR)
    rows = [part.numpy() for part in batch.split(1)]
    kind = nncf.ModelType.TRANSFORMER
    quantized = nncf.quantize(
        openvino.Core().read_model(source), nncf.Dataset(rows), subset_size=len(rows), model_type=kind
    )
    openvino.save_model(quantized, file, compress_to_fp16=False)
    return [file, file.with_suffix(".bin")]
