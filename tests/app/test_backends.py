"""What computes a model: each backend against torch, and the choice among them."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from support import CORPUS, in_python, open_clip_folder

from app import backends, int8
from app.__main__ import main
from app.backends import choose_device, exported_tower, filled_shape, in_bf16, openvino_tower, torch_tower
from app.engine import ModelEngine
from app.exporter import export_model, read_calibration
from app.exports import Exports, exports_of
from app.int8 import block_parameters
from app.loading import load_engine
from app.locking import lock
from app.settings import Settings
from models.checkpoint import load_model
from models.errors import CheckpointError, DataError

EXACT = ("onnx-fp32", "openvino-fp32")
NARROW = (*(["torch-int8"] if int8.supported() else []), "onnx-int8", "openvino-int8")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, each with a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CORPUS[number])
    return folder


@pytest.fixture(scope="module")
def exported(checkpoints: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the model `clip` exported for every runtime."""
    settings = Settings(store=tmp_path_factory.mktemp("store"))
    model = load_model(checkpoints / "clip")
    exports = exports_of("clip", model, settings)
    calibration = read_calibration(str(pictures), 12)
    for runtime in ("torch", "onnx", "openvino"):
        export_model(model, exports, runtime, calibration, 1)
    return settings.store


def _engine(checkpoints: Path, store: Path, backend: str) -> ModelEngine:
    return load_engine("clip", str(checkpoints / "clip"), Settings(store=store, backend=backend, threads=1))


@pytest.mark.parametrize("backend", ["torch-bf16", "torch-compiled", *EXACT, *NARROW])
def test_every_backend_gives_the_rows_of_torch(
    backend: str,
    checkpoints: Path,
    exported: Path,
    picture: Callable[..., Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What inductor makes of it is torch's business, and takes it a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    exact, other = (_engine(checkpoints, exported, each) for each in ("torch-fp32", backend))
    assert other.details["backends"] == {"image": backend, "text": backend}
    images = [picture(seed) for seed in range(5)]
    texts = ["a", "a red star", "two hearts on a gray background " * 3]
    least = {"torch-bf16": 0.999, "torch-compiled": 0.999} | dict.fromkeys(NARROW, 0.9)  # bfloat16, where there is any
    for count in (1, 3, 5):  # sizes that no file was made with
        for rows, expected in (
            (other.embed_images(images[:count]), exact.embed_images(images[:count])),
            (other.embed_texts(texts[:count]), exact.embed_texts(texts[:count])),
        ):
            assert rows.dtype == np.float32
            assert ((rows * expected).sum(1) >= least.get(backend, 0.99999)).all()
            if backend in EXACT:
                assert np.allclose(rows, expected, atol=2e-6)
    assert other.scale == exact.scale


def test_what_is_compiled_is_compiled_before_the_first_request(
    checkpoints: Path, tmp_path: Path, picture: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def counted(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    engine = _engine(checkpoints, tmp_path, "torch-compiled")
    assert compiled
    compiled.clear()
    for count in (1, 2, 5, 32):
        engine.embed_images([picture(seed) for seed in range(count)])
        engine.embed_texts([f"a {'red ' * (number % 4)}star" for number in range(count)])
        engine.embed_texts(["two hearts"] * count)
    assert not compiled


@pytest.mark.skipif(not int8.supported(), reason="this processor has no VNNI")
def test_weights_that_nothing_computes_with_leave_the_memory(checkpoints: Path, exported: Path) -> None:
    def held(engine: ModelEngine) -> int:
        return sum(parameter.numel() for parameter in engine.model.parameters())

    assert held(_engine(checkpoints, exported, "onnx-fp32")) == 0
    whole = held(_engine(checkpoints, exported, "torch-fp32"))
    narrow = _engine(checkpoints, exported, "torch-int8")
    blocks = sum(parameter.numel() for parameter in block_parameters(load_model(checkpoints / "clip")))
    assert blocks > 10_000
    assert held(narrow) == whole - blocks
    assert np.isfinite(narrow.embed_texts(["a"])).all()


def test_lanes_leave_every_other_thread_its_cores() -> None:
    """Whoever is alone is computed in a thread that may have begun after them."""
    before = torch.get_num_threads()
    backends._lane_threads.cache_clear()
    try:
        torch.set_num_threads(2)
        found = backends.lanes_of("torch-fp32", torch.device("cpu"))
        assert found is not None
        in_lanes = [found.executor.submit(torch.get_num_threads) for _ in range(4)]
        assert [each.result() for each in in_lanes] == [1] * 4
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_a_long_batch_is_computed_by_one_thread_a_part(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = load_model(checkpoints / "clip"), []
    noted = in_python(model.encode_text, lambda batch: seen.append((len(batch), torch.get_num_threads())))
    monkeypatch.setattr(model, "encode_text", noted)
    tower = torch_tower("torch-fp32", model, "text", torch.device("cpu"))
    batch = model.tokenizer(CORPUS[:9] * 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rows = tower(batch)
        assert sorted(seen) == [(9, 1), (9, 1)]
        seen.clear()
        assert np.allclose(tower(batch[:7]), rows[:7], atol=1e-5)  # too few to be worth it
        assert seen == [(7, 2)]
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert np.allclose(tower(batch), rows, atol=1e-5)
        assert seen[1:] == [(18, 1)]
    finally:
        torch.set_num_threads(before)


def test_an_export_says_what_it_was_found_to_do(exported: Path, checkpoints: Path) -> None:
    exports = exports_of("clip", load_model(checkpoints / "clip"), Settings(store=exported))
    for tower in ("image", "text"):
        found = exports.found(tower)
        assert {*EXACT, *NARROW, "torch-fp32"} <= set(found)
        for backend in EXACT:
            assert found[backend].agreement == 1
            assert found[backend].cosine > 0.99999
        assert all(0 < each.alone < 10 and 0 < each.of_eight < 10 for each in found.values())
        assert all(0.9 < found[backend].cosine <= 1.000001 for backend in NARROW)
    assert exports.report["calibration"]["pictures"] == exports.report["calibration"]["texts"] == 12


def _with_report(exported: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Exports:
    """A copy of the exports, with another report."""
    shutil.copytree(exported / "exports", place / "exports")
    (report,) = place.glob("exports/*/report.json")
    content = json.loads(report.read_text())
    change(content)
    report.write_text(json.dumps(content))
    return Exports("clip", report.parent)


def test_auto_takes_the_fastest_that_agrees_and_measures_once(
    exported: Path, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_onnx_agrees(content: dict[str, Any]) -> None:
        for tower in content["towers"].values():
            for backend, row in tower.items():
                row["agreement"] = 0.995 if backend == "onnx-fp32" else 0.98

    exports = _with_report(exported, tmp_path, only_onnx_agrees)
    seconds = {"onnx-fp32": 0.001, "torch-fp32": 0.002, "torch-bf16": 0.002}
    measured = []

    def timed(encode: Any, batch: Any) -> tuple[float, float]:
        measured.append(batch)
        return (seconds["torch-fp32" if "torch_tower" in encode.__qualname__ else "onnx-fp32"], 0.0)

    monkeypatch.setattr("app.exports.timed", timed)
    with caplog.at_level(logging.INFO):
        engine = _engine(checkpoints, tmp_path, "auto")
    assert engine.details["backends"] == {"image": "onnx-fp32", "text": "onnx-fp32"}
    assert "image: onnx-fp32, same nearest as float32 for 99.5 % (ms: onnx-fp32 1.00, torch-" in caplog.text
    assert re.search(
        r"image: same nearest as float32 for less than 99 %, and passed over: .*openvino-int8 98\.0 %", caplog.text
    )
    assert len(measured) == 4  # two towers by torch and by one other: what does not agree is not even opened
    _engine(checkpoints, tmp_path, "auto")
    assert len(measured) == 4

    seconds["torch-fp32"] = 0.0005
    for file in exports.folder.glob("measured-*.json"):
        file.unlink()
    backends = _engine(checkpoints, tmp_path, "auto").details["backends"]
    assert set(backends.values()) == {"torch-fp32"}  # bfloat16 was found not to agree


def test_auto_says_why_it_takes_no_export(
    exported: Path, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def none_agrees(content: dict[str, Any]) -> None:
        for tower in content["towers"].values():
            for row in tower.values():
                row["agreement"] = 0.97

    _with_report(exported, tmp_path, none_agrees)
    with caplog.at_level(logging.INFO):
        engine = _engine(checkpoints, tmp_path, "auto")
    assert set(engine.details["backends"].values()) == {"torch-fp32"}
    for tower in ("image", "text"):
        assert re.search(rf"{tower}: same nearest .* passed over: .*onnx-fp32 97\.0 %, onnx-int8 97\.0 %", caplog.text)
        assert f"clip, {tower}: torch-fp32, for no export can take its place" in caplog.text


def test_a_damaged_export_is_refused_by_name_and_passed_over_by_auto(
    exported: Path, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exports = _with_report(exported, tmp_path, lambda content: None)
    for file in exports.folder.glob("*.onnx"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    (exports.folder / "image-int8.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"image\.onnx is not what was written.*semblance export"):
        _engine(checkpoints, tmp_path, "onnx-fp32")
    with pytest.raises(CheckpointError, match=r"image-int8\.bin is not what was written.*delete the folder"):
        _engine(checkpoints, tmp_path, "openvino-int8")
    assert _engine(checkpoints, tmp_path, "auto").details["backends"]["image"].startswith("torch")
    assert "passed over" in caplog.text


ROW = {"agreement": 1.0, "cosine": 1.0, "alone": 0.001, "of_eight": 0.001}


@pytest.mark.parametrize(
    ("report", "says"),
    [
        ("{", "cannot be read"),
        ([], "no report"),
        ([1], "no report"),
        ({"format": 2}, "of format 2"),
        ({"format": 1, "files": {}}, "report.towers: Field required"),
        ({"format": 1, "files": [], "towers": {}}, "report.files"),
        ({"format": 1, "files": {}, "towers": {"image": {"onnx-fp32": ROW | {"more": 1}}}}, "onnx-fp32.more"),
        ({"format": 1, "files": {}, "towers": {"image": {"onnx-fp32": ROW | {"agreement": "all"}}}}, "agreement"),
    ],
)
def test_a_report_that_is_none_is_refused_by_name_and_passed_over_by_auto(
    report: Any, says: str, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exports = exports_of("clip", load_model(checkpoints / "clip"), Settings(store=tmp_path))
    exports.folder.mkdir(parents=True)
    (exports.folder / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    with pytest.raises(
        CheckpointError, match=rf"report\.json .*{says}.*delete the folder and run `semblance export clip`"
    ):
        _engine(checkpoints, tmp_path, "onnx-fp32")
    assert _engine(checkpoints, tmp_path, "auto").details["backends"]["image"].startswith("torch")
    assert f"exports are passed over: {exports.folder}: report.json" in caplog.text


def test_exports_that_can_be_neither_written_nor_read_do_not_keep_auto_from_serving(
    exported: Path,
    checkpoints: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    exports = _with_report(exported, tmp_path, lambda content: None)
    monkeypatch.setattr("app.exports.timed", lambda encode, batch: (0.001, 0.0))
    monkeypatch.setattr("app.exports._write_json", refused)
    assert _engine(checkpoints, tmp_path, "auto").details["backends"].keys() == {"image", "text"}
    assert "measured again at the next start: [Errno 13] Permission denied" in caplog.text
    assert not list(exports.folder.glob("measured-*"))
    monkeypatch.setattr("app.exports.file_hash", refused)
    with pytest.raises(CheckpointError, match=r"image\.onnx cannot be read \(.*Permission denied"):
        _engine(checkpoints, tmp_path, "onnx-fp32")
    assert _engine(checkpoints, tmp_path, "auto").details["backends"]["image"].startswith("torch")


def test_what_is_not_there_is_said_with_the_way_out(
    checkpoints: Path, exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"no image tower for onnx-int8.*semblance export clip --to onnx"):
        _engine(checkpoints, tmp_path, "onnx-int8")
    with pytest.raises(DataError, match="fewer than two pictures"):
        read_calibration(str(pictures), 1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png.*take it out"):
        read_calibration(str(tmp_path / "broken"), 2)
    with monkeypatch.context() as patched:
        patched.setattr("app.exports.serves_here", lambda backend, device: False)
        with pytest.raises(CheckpointError, match=r"torch-int8 is of no use on this processor.*choose another backend"):
            _engine(checkpoints, tmp_path, "torch-int8")
    for package, backend, extra in (("onnxruntime", "onnx-fp32", "onnx"), ("openvino", "openvino-int8", "openvino")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(CheckpointError, match=rf"{package} is not installed.*semblance\[{extra}\]"):
            _engine(checkpoints, exported, backend)


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99", ""])
def test_a_device_that_nothing_can_be_computed_on_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^DEVICE={name} cannot be used .*; here are: auto, cpu"):
        choose_device(name)


def test_a_second_export_keeps_the_files_of_the_first(checkpoints: Path, exported: Path, pictures: Path) -> None:
    model = load_model(checkpoints / "clip")
    exports = exports_of("clip", model, Settings(store=exported))
    before = {file.name: file.stat().st_mtime_ns for file in exports.folder.glob("*.onnx")}
    export_model(model, exports, "openvino", read_calibration(str(pictures), 4), 1)
    assert before == {file.name: file.stat().st_mtime_ns for file in exports.folder.glob("*.onnx")}
    assert not [file for file in exports.folder.iterdir() if file.is_dir() or file.suffix == ".tmp"]


def test_what_killed_exports_left_goes_with_the_next(
    checkpoints: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = exports_of("clip", load_model(checkpoints / "clip"), Settings(store=tmp_path))
    for name in ("tmpkilled", "tmpfirst", "tmpalive"):  # the first was killed before it had a lock
        (exports.folder / name).mkdir(parents=True)
        (exports.folder / name / "image.onnx").write_bytes(b"half")
    lock(exports.folder / "tmpkilled", "process 1").close()
    seen = []

    def ended(model: Any, tower: str, batch: Any, file: Path) -> None:
        file.write_bytes(b"half")
        seen.extend(each.name for each in exports.folder.glob("tmp*"))
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # type: ignore[operator,misc]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("app.exporter._write_ranges", ended)
    place = ["--checkpoints", str(checkpoints), "--data", str(tmp_path), "--pictures", str(pictures), "--threads", "1"]
    try:
        with lock(exports.folder / "tmpalive", "process 2"):
            assert main(["export", "clip", "--to", "torch", "--samples", "2", *place]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(seen) == 2
    assert [each.name for each in exports.folder.iterdir() if each.is_dir()] == ["tmpalive"]


def test_a_process_has_one_core_of_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    library: Any = ModuleType("openvino")
    library.Core = lambda: made.append(MagicMock()) or made[-1]
    monkeypatch.setitem(sys.modules, "openvino", library)
    for file in ("image.onnx", "text.onnx"):
        openvino_tower(Path(file), 1, "f32")
    assert len(made) == 1


def test_an_open_clip_model_and_one_without_text_are_exported_too(tmp_path: Path, pictures: Path) -> None:
    calibration = read_calibration(str(pictures), 6)
    model = load_model(open_clip_folder(tmp_path / "vit"))
    found = export_model(model, Exports("vit", tmp_path / "exports"), "onnx", calibration, 1)
    assert found["image"]["onnx-fp32"].cosine > 0.99999
    assert found["text"]["onnx-fp32"].cosine > 0.99999
    tokens = model.tokenizer(["a red star", "a blue circle beside a green square"])
    tokens = tokens[:, : int(model.text_lengths(tokens).max())]  # as they are served: shorter than they were exported
    with torch.inference_mode():
        expected = model.encode_text(tokens).numpy()
    encode = exported_tower("onnx-fp32", tmp_path / "exports", model, "text", 1)
    assert np.allclose(encode(tokens), expected, atol=1e-5)
    model.tokenizer = None
    assert set(export_model(model, Exports("vit", tmp_path / "blind"), "onnx", calibration, 1)) == {"image"}


def test_torch_alone_serves_without_exports(checkpoints: Path, tmp_path: Path) -> None:
    engine = _engine(checkpoints, tmp_path, "auto")
    assert set(engine.details["backends"].values()) <= {"torch-fp32", "torch-bf16"}
    model = load_model(checkpoints / "clip")
    rows = torch_tower("torch-fp32", model, "text", torch.device("cpu"))(model.tokenizer(["a"]))
    assert np.allclose(rows, engine.embed_texts(["a"]), atol=0.01)
    assert not (tmp_path / "exports").exists()


def test_graphs_have_few_shapes_and_what_fills_them_changes_nothing(checkpoints: Path, tmp_path: Path) -> None:
    """Capturing needs a GPU (tests/benchmarks/bench_device.py has a part for it); what it relies on does not."""
    assert [filled_shape((rows, 3, 8, 8), None)[0] for rows in (1, 2, 3, 8, 9, 32)] == [1, 2, 4, 8, 16, 32]
    assert filled_shape((5, 3, 8, 8), None)[1:] == (3, 8, 8)
    assert [filled_shape((1, length), 77)[1] for length in (1, 16, 17, 70, 77)] == [16, 16, 32, 77, 77]
    model = _engine(checkpoints, tmp_path, "torch-fp32").model
    tokens = model.tokenizer(["a red star", "two things"])
    filled = torch.zeros(filled_shape((3, tokens.shape[1]), model.tokenizer.context_length), dtype=torch.int64)
    filled[:2, : tokens.shape[1]] = tokens
    with torch.inference_mode():
        rows, expected = model.encode_text(filled), model.encode_text(tokens)
    assert torch.isfinite(rows).all()
    torch.testing.assert_close(rows[:2], expected, atol=1e-6, rtol=0)
    with pytest.raises(CheckpointError, match="needs a CUDA device"):
        _engine(checkpoints, tmp_path, "torch-graphs")


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_weights_in_bfloat16_give_the_rows_of_autocast(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    """Products have bfloat16 weights either way; norms, positions and embeddings stay in float32."""
    path = checkpoints / "clip" if kind == "clip" else open_clip_folder(tmp_path / "vit")
    model, held = load_model(path), in_bf16(load_model(path))
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for tower, batch in {"image": pixels, "text": model.tokenizer(CORPUS[:4])}.items():
        cpu = torch.device("cpu")
        exact, cast = (torch_tower(name, model, tower, cpu)(batch) for name in ("torch-fp32", "torch-bf16"))
        rows = torch_tower("torch-bf16", held, tower, cpu)(batch)
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(exact, axis=1)
        assert ((rows * exact).sum(1) / lengths).min() > 0.999
        np.testing.assert_allclose(rows, cast, atol=4e-3)
    kinds = {name: parameter.dtype for name, parameter in held.named_parameters()}
    assert torch.bfloat16 in kinds.values()
    assert {kinds[name] for name in kinds if "norm" in name or "ln_" in name or "embedding" in name} == {torch.float32}


def test_what_serves_in_bfloat16_holds_it(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _engine(checkpoints, tmp_path, "torch-fp32")
    monkeypatch.setattr("app.loading.has_native_bf16", lambda device: True)
    held = _engine(checkpoints, tmp_path, "torch-bf16")
    assert held.bytes < 0.75 * exact.bytes
    assert np.abs(held.embed_texts(CORPUS[:4]) - exact.embed_texts(CORPUS[:4])).max() < 0.02
