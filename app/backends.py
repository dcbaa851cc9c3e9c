"""What computes a model's towers: torch, ONNX Runtime or OpenVINO, behind one face.

A tower makes rows (B, D) of pictures, uint8 (B, 3, S, S), or of texts, token ids int64 (B, L). Those of FILES compute
what `semblance export` wrote (app/exports.py).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from app import int8
from app.batching import Lanes
from app.recording import Recorded
from models.errors import CheckpointError
from models.generation import captured

if TYPE_CHECKING:
    from app.settings import Backend

P = ParamSpec("P")
T = TypeVar("T")
Array = NDArray[np.float32]
Tower = Literal["image", "text"]
Encode = Callable[[Tensor], Array]

# What these read of an export; torch needs none for the others.
FILES: dict[Backend, str] = {
    "torch-int8": "{tower}-int8.safetensors",
    "onnx-fp32": "{tower}.onnx",
    "onnx-int8": "{tower}-int8.onnx",
    "openvino-fp32": "{tower}.onnx",
    "openvino-bf16": "{tower}.onnx",
    "openvino-int8": "{tower}-int8.xml",
}
_IN_LANES = ("torch-fp32", "torch-bf16", "torch-int8")
_TURNS = 5
_PART = 4  # inputs that are worth a lane


def example(model: Any, tower: Tower) -> Tensor:
    """One input of a tower, to warm up and to measure with."""
    if tower == "image":
        return torch.zeros(1, 3, model.preprocess.size, model.preprocess.size, dtype=torch.uint8)
    return cut(model, model.tokenizer(["a photo of two things on a table"]))


def cut(model: Any, tokens: Tensor) -> Tensor:
    """Texts (B, L) at the end of the longest, as they are served."""
    return tokens[:, : int(model.text_lengths(tokens).max())]


def towers_of(model: Any) -> tuple[Tower, ...]:
    """Which towers a model has."""
    return ("image",) if model.tokenizer is None else ("image", "text")


def default_tower(model: Any, tower: Tower, device: torch.device) -> tuple[Backend, Encode]:
    """A tower by torch: as CUDA graphs on a GPU, in bfloat16 where the device has it."""
    backend: Backend = "torch-bf16" if has_native_bf16(device) else "torch-fp32"
    backend = "torch-graphs" if device.type == "cuda" else backend
    return backend, torch_tower(backend, model, tower, device)


def torch_tower(backend: Backend, model: Any, tower: Tower, device: torch.device) -> Encode:
    """A tower by torch, on the device that the model is on."""
    where_native = ("torch-int8", "torch-compiled", "torch-graphs")  # what is not in int8 is as torch-bf16's
    bf16 = backend == "torch-bf16" or (backend in where_native and has_native_bf16(device))

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()

    if device.type == "cpu" and backend in _IN_LANES:
        recorded = Recorded(_Rows(model, tower), lambda: _shapes(model, tower), precision)
        return lambda batch: _by_parts(recorded.ready(), batch).numpy()
    encode = getattr(model, f"encode_{tower}")
    if backend == "torch-compiled":
        encode = torch.compile(encode, dynamic=True)

    def rows(batch: Tensor) -> Tensor:
        with torch.inference_mode(), precision():
            return encode(batch).float()

    if backend == "torch-graphs":
        if device.type != "cuda":
            raise CheckpointError("backend torch-graphs needs a CUDA device; choose another, or auto")
        return GraphedTower(rows, model, tower, device)
    return lambda batch: rows(batch.to(device, non_blocking=True)).cpu().numpy()


class _Rows(nn.Module):
    """A tower as a module: batch -> float32 (B, D)."""

    def __init__(self, model: Any, tower: Tower) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, batch: Tensor) -> Tensor:
        rows: Tensor = getattr(self.model, f"encode_{self.tower}")(batch)
        return rows.float()

    def __repr__(self) -> str:
        return f"the {self.tower} tower of {self.model.architecture}"


def _shapes(model: Any, tower: Tower) -> list[Tensor]:
    """Batches of a tower that differ in rows, and in length, and what pads them, where texts may."""
    if tower == "text":
        whole = model.tokenizer(["a photo of two things on a table", "a", "a photo"])
        shorter = cut(model, whole)
        return [whole[:2], shorter, shorter[:1]]
    batch = example(model, tower)
    pictures = torch.arange(3 * batch.numel()).to(torch.uint8).view(3, *batch.shape[1:])
    return [pictures[:2], pictures, pictures[:1]]


def lanes_of(backend: Backend, device: torch.device) -> Lanes | None:
    """What computes batches of a tower at once; None where one batch has the whole device.

    Cores that share every operation wait for each other at the end of each, and decoding and answers hold one up at
    some: where two were also a third busy with other work, two lanes took 0.7 to 0.8 of the time.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or backend not in _IN_LANES or threads == 1:
        return None
    return Lanes(_lane_threads(threads), threads, _PART)


def _by_parts(rows: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The rows of a batch on the processor: each lane computes a part of a long one, if it is in none."""
    threads = torch.get_num_threads()
    if threads == 1 or len(batch) < _PART * threads:
        return rows(batch)
    return torch.cat(list(_lane_threads(threads).map(rows, batch.chunk(threads))))


@functools.cache
def _lane_threads(count: int) -> ThreadPoolExecutor:
    return single_threads(count, "lane")


def single_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch's operations use no others.

    OpenMP keeps helpers for each thread that ever shared an operation among the cores. Once all of them are more than
    the cores, helpers sleep at the end of every operation, and one short text takes twice as long. So in a server no
    thread has any but the one that computes what is alone.
    """

    def alone() -> None:
        torch.get_num_threads()  # takes the process's number, the first time in a thread, and would do so later
        torch.set_num_threads(1)

    number = torch.get_num_threads()
    pool, all_there = ThreadPoolExecutor(count, name, initializer=alone), threading.Barrier(count)
    list(pool.map(lambda _: all_there.wait(), range(count)))
    torch.set_num_threads(number)  # the process's number is whatever was set last, and later threads take it
    return pool


def in_passing(call: Callable[P, T]) -> Callable[P, T]:
    """Have it run in a thread that ends with it, and the helpers (`single_threads`) of its operations with that."""

    @functools.wraps(call)
    def run(*args: P.args, **named: P.kwargs) -> T:
        with ThreadPoolExecutor(1) as passing:
            return passing.submit(call, *args, **named).result()

    return run


def in_bf16(model: Any) -> Any:
    """Hold in bfloat16, in place, the weights that autocast would take there in each forward pass; -> the model.

    The rows stay what they are but for rounding, and a CPU computes them up to 20 times as fast: where a weight is only
    cast, torch multiplies open_clip's attention by a copy of it for every row of the batch.
    """
    cast, rest = set[nn.Parameter](), set[nn.Parameter]()
    for module in model.modules():
        kind = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention))
        (cast if kind else rest).update(module.parameters(recurse=False))
    for parameter in cast - rest:  # a shared one may be an embedding's too, which autocast leaves alone
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


class GraphedTower:
    """A tower as CUDA graphs: a batch is one launch in place of one for each of some hundred operations.

    A graph has its shapes for ever, so a batch is filled up to one of a few (`filled_shape`); each is captured when it
    is first asked for. rows: the tower on the device, of normalised pictures or of token ids.
    """

    def __init__(self, rows: Callable[[Tensor], Tensor], model: Any, tower: Tower, device: torch.device) -> None:
        self._rows, self._device = rows, device
        # Normalised before, for that takes constants to the device, which a capture does not allow.
        self._prepare = model.preprocess.normalize if tower == "image" else None
        self._longest = int(model.tokenizer.context_length) if tower == "text" else None
        self._graphs: dict[tuple[int, ...], tuple[Tensor, Callable[[], Tensor]]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()  # shared, for one graph runs at a time

    def __call__(self, batch: Tensor) -> Array:
        with torch.inference_mode():
            batch = batch.to(self._device, non_blocking=True)
            batch = batch if self._prepare is None else self._prepare(batch)
            shape = filled_shape(batch.shape, self._longest)
            if shape not in self._graphs:
                inputs = torch.zeros(shape, dtype=batch.dtype, device=self._device)
                self._graphs[shape] = inputs, captured(lambda: self._rows(inputs), self._device, self._pool)
            inputs, replay = self._graphs[shape]
            inputs.zero_()
            inputs[tuple(slice(0, side) for side in batch.shape)] = batch
            return replay()[: len(batch)].cpu().numpy()


def filled_shape(shape: Sequence[int], longest: int | None) -> tuple[int, ...]:
    """A batch's shape with its rows at the next power of two and, of texts (B, L), the length at the next multiple of
    sixteen, up to the `longest` that there is."""
    rows = 1 << (shape[0] - 1).bit_length()
    if longest is None:
        return rows, *shape[1:]
    return rows, max(shape[1], min(longest, -(-shape[1] // 16) * 16))


def onnx_tower(file: Path, threads: int) -> Encode:
    """A tower by ONNX Runtime on the processor. Raises CheckpointError if that is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores decode pictures meanwhile
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch.numpy()})[0]


def openvino_tower(file: Path, threads: int, precision: Literal["f32", "bf16"]) -> Encode:
    """A tower by OpenVINO on the processor. Raises CheckpointError if that is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino", "openvino") from error
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    request = _core(openvino).compile_model(file, "CPU", hints).create_infer_request()
    # A copy: what the request gives is overwritten by its next answer.
    return lambda batch: np.array(request.infer([batch.numpy()], share_inputs=True, share_outputs=True)[0])


@functools.cache
def _core(openvino: Any) -> Any:
    """The process's own. Each has a stack for signals, and where the first of two goes first, the thread is left with
    one that is no more: the next signal, such as that of Ctrl-C, ends the process by SIGSEGV."""
    return openvino.Core()


def int8_tower(file: Path, model: Any, tower: Tower) -> Encode:
    """A tower of a model with its blocks in int8, by the ranges in a file. Raises CheckpointError where that cannot be.

    The rest of it is the model's own, in whatever precision that is held.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or not int8.supported():
        raise CheckpointError("backend torch-int8 needs a processor with VNNI; choose another, or auto")
    return torch_tower("torch-int8", int8.quantized(model, load_file(file)), tower, device)


def exported_tower(backend: Backend, folder: Path, model: Any, tower: Tower, threads: int) -> Encode:
    """A tower by the runtime that a backend names, from a folder of a model's exports."""
    file = folder / FILES[backend].format(tower=tower)
    if backend == "torch-int8":
        return int8_tower(file, model, tower)
    if backend.startswith("onnx"):
        return onnx_tower(file, threads)
    return openvino_tower(file, threads, "bf16" if backend == "openvino-bf16" else "f32")


def unit(rows: Array) -> Array:
    """Rows (B, D) at length 1; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def timed(encode: Encode, batch: Tensor) -> tuple[float, float]:
    """Seconds of one input alone, and of one among eight: the least of some turns of each."""
    eight = batch.repeat(-(-8 // len(batch)), *[1] * (batch.dim() - 1))[:8]
    return _seconds(encode, batch[:1]), _seconds(encode, eight) / 8


def _seconds(encode: Encode, batch: Tensor) -> float:
    encode(batch)
    turns = []
    for _ in range(_TURNS):
        start = time.perf_counter()
        encode(batch)
        turns.append(time.perf_counter() - start)
    return min(turns)


def choose_device(name: str) -> torch.device:
    """ "auto": CUDA if there is any, else the CPU. Raises CheckpointError, saying what there is, for a device that
    nothing can be computed on."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers, and an index may be of no GPU
    except (RuntimeError, AssertionError, ImportError) as error:  # torch without CUDA asserts that it has it
        there = ("auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
        said = str(error).partition("\n")[0].partition(". ")[0]
        raise CheckpointError(f"DEVICE={name} cannot be used ({said}); here are: {', '.join(there)}") from error
    return device


def serves_here(backend: Backend, device: torch.device) -> bool:
    """Whether this machine computes an exported backend as fast as it can be."""
    if backend == "torch-int8":
        return int8.supported()
    return backend != "openvino-bf16" or has_native_bf16(device)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32; a processor that only emulates it is a hundred times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(torch.cpu._is_avx512_bf16_supported())


def missing(package: str, extra: str) -> CheckpointError:
    """What to say where a library is not installed."""
    return CheckpointError(f"{package} is not installed: pip install 'semblance[{extra}]', or choose another backend")
