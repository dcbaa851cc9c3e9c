"""Models: found, loaded within a budget of memory, warm when they are ready, and freed when they leave."""

from __future__ import annotations

import base64
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import in_python, open_clip_folder, tiny_clip, wait_for

from app.engine import ModelEngine
from app.loading import Shelf, ShelvedEngine, find_models, load_engine, load_engines, settle
from app.settings import Settings
from models.checkpoint import save_checkpoint
from models.clip import CLIPModel
from models.errors import CheckpointError, ModelError

TESTS = Path(__file__).parents[1]


def test_models_are_found_by_folder_and_by_name(checkpoints: Any) -> None:
    found = find_models(Settings(checkpoints=checkpoints, models=("vit=open_clip:ViT-B-32/x",)))
    assert found == {"vit": "open_clip:ViT-B-32/x", "clip": str(checkpoints / "clip")}
    with pytest.raises(CheckpointError, match="name=reference"):
        find_models(Settings(models=("vit",)))


def test_models_beyond_the_budget_leave_and_come_back_with_the_same_rows(tmp_path: Any, picture: Any) -> None:
    for seed, name in enumerate(("a", "b", "c")):
        save_checkpoint(tiny_clip(seed), tmp_path / name)
    whole = load_engines(Settings(checkpoints=tmp_path, threads=1))
    size = whole["a"].bytes  # type: ignore[attr-defined]
    bounded = load_engines(Settings(checkpoints=tmp_path, threads=1, model_memory=2 * size + 1))
    shelf: Shelf = bounded["a"]._get.func.__self__  # type: ignore[attr-defined]
    assert list(shelf._engines) == ["b", "c"]
    for name in ("a", "b", "c", "c", "a", "b"):
        assert np.array_equal(bounded[name].embed_texts(["a red star"]), whole[name].embed_texts(["a red star"]))
        assert np.array_equal(bounded[name].embed_images([picture()]), whole[name].embed_images([picture()]))
        assert len(shelf._engines) == 2
        assert list(shelf._engines)[-1] == name
    assert bounded["a"].fingerprint == whole["a"].fingerprint
    assert bounded["a"].scale == whole["a"].scale

    tiny = load_engines(Settings(checkpoints=tmp_path, threads=1, model_memory=1))  # one alone may be larger
    assert np.array_equal(tiny["a"].embed_texts(["x"]), whole["a"].embed_texts(["x"]))
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ModelError, match=r"model 'b' cannot be loaded again; the server's log says why$"):
        tiny["b"].embed_texts(["x"])


def test_a_model_that_was_changed_on_the_disk_is_not_served_as_the_one_it_was(tmp_path: Any) -> None:
    for seed, name in enumerate(("a", "b")):
        save_checkpoint(tiny_clip(seed), tmp_path / name)
    engines = load_engines(Settings(checkpoints=tmp_path, threads=1, model_memory=1))
    before = engines["a"].embed_texts(["x"])
    engines["b"].embed_texts(["x"])  # for which the other leaves
    (tmp_path / "a").rename(tmp_path / "kept")
    save_checkpoint(tiny_clip(7), tmp_path / "a")
    with pytest.raises(ModelError, match=f"'a' was {engines['a'].fingerprint} when the server started and is "):
        engines["a"].embed_texts(["x"])
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "kept").rename(tmp_path / "a")
    assert np.array_equal(engines["a"].embed_texts(["x"]), before)


def test_a_model_that_many_ask_for_is_loaded_once_and_those_there_do_not_wait_for_it() -> None:
    shelf, loads, may_go = Shelf(10**9), [], threading.Event()

    def load(name: str) -> ModelEngine:
        loads.append(name)
        if name == "slow":
            assert may_go.wait(10)
        return ModelEngine(name, tiny_clip(), device="cpu")

    with ThreadPoolExecutor(4) as pool:
        there = ShelvedEngine("there", lambda: load("there"), shelf)
        askers = [pool.submit(shelf.get, "slow", lambda: load("slow")) for _ in range(3)]
        assert there.embed_texts(["a"]).shape == (1, 24)
        may_go.set()
        assert len({id(each.result()) for each in askers}) == 1
    assert loads == ["there", "slow"]


def test_a_model_is_warm_when_it_is_ready(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = in_python(CLIPModel.encode_image, lambda _, images: seen.append(len(images)))
    monkeypatch.setattr(CLIPModel, "encode_image", encode)
    load_engine("clip", str(checkpoints / "clip"), Settings(threads=1))
    assert seen == [1, 2]


def test_one_thread_of_a_server_has_the_helpers_of_openmp(start: Any, checkpoints: Path, encoded: Any) -> None:
    """With more of them than cores they sleep between operations."""

    def helpers() -> int:
        return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()

    number, before = torch.get_num_threads(), helpers()
    try:
        client = start(load_engines(Settings(checkpoints=checkpoints, threads=2)))
        picture = {"image": base64.b64encode(encoded(1, "PNG", size=(1200, 900))).decode()}
        for _ in range(3):
            for inputs in (["a"], [picture]):
                assert client.post("/embed", json={"input": inputs}).status_code == 200
        wait_for(lambda: helpers() <= before + 1)
    finally:
        torch.set_num_threads(number)


def test_helpers_are_told_to_sleep_before_torch_is_there() -> None:
    code = "import os, sys, app; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    for given, expected in (({}, "5000 False"), ({"GOMP_SPINCOUNT": "7"}, "7 False")):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert told.stdout.strip() == expected


def test_what_a_start_has_made_is_not_looked_at_again() -> None:
    try:
        settle()
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 1_000
    finally:
        gc.unfreeze()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than GNU's")
def test_memory_between_what_is_used_is_given_back() -> None:
    """Of 4,000 blocks of 64 kB every second one is freed: the heap's end is in use, so only asking gives them back."""
    code = """
import ctypes, os, sys
from app.loading import settle
from support import wait_for

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if "settle" in sys.argv:
    settle(0.1)
blocks = [bytearray(65_536) for _ in range(4_000)]
held = resident()
del blocks[::2]
wait_for(lambda: held - resident() > 100_000_000, 5)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    for given, status in ((["settle"], 0), ([], 1)):
        done = subprocess.run([sys.executable, "-c", code, *given], env=environment, capture_output=True, check=False)
        assert done.returncode == status, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_a_model_that_leaves_is_freed_at_once(name: str, checkpoints: Any, tmp_path: Path) -> None:
    """By counted references alone, for the collector passes over it."""
    reference = checkpoints / "clip" if name == "clip" else open_clip_folder(tmp_path / "model")
    engine = load_engine(name, str(reference), Settings(store=tmp_path))
    weights = [weakref.ref(each) for each in engine.model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del engine
        assert not any(each() is not None for each in weights)
    finally:
        gc.enable()
