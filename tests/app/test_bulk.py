"""Embedding into files: what is in the parts, and that every input is in exactly one, whoever is killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hosts import ALLOWED, Hosts
from PIL import Image
from ray_cluster import places_for_ray, start_ray
from safetensors.numpy import load_file
from support import tiny_clip, wait_for

from app import bulk
from app.__main__ import main
from app.bulk import embed_source
from app.fetching import Fetcher
from app.loading import load_engine
from app.locking import lock
from app.settings import Settings
from app.vectors import _rows, belong_together, holds_vectors, own_of
from models.checkpoint import save_checkpoint
from models.errors import ConflictError, DataError, InputError, ModelError, StorageError
from models.readers import BadRows, Record, read

COUNT, BROKEN = 200, 77


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and pictures in two folders of which one is none."""
    folder = tmp_path_factory.mktemp("bulk")
    for seed in range(2):
        save_checkpoint(tiny_clip(seed), folder / "checkpoints" / f"clip{seed}")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        file = folder / "photos" / ("cats", "dogs")[number % 2] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    (folder / "photos" / ("cats", "dogs")[BROKEN % 2] / f"{BROKEN:03d}.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def settings(place: Path) -> Settings:
    return Settings(checkpoints=str(place / "checkpoints"), threads=1, device="cpu", backend="torch-fp32")


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PART", 32)


def _command(arguments: list[str], part: int) -> list[str]:
    """What runs `semblance` with parts of so many records."""
    code = f"import sys; from app import bulk; from app.__main__ import main; bulk.PART = {part}; "
    return [sys.executable, "-c", f"{code}sys.exit(main({arguments}))"]


def found_in(folder: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], list[str]]:
    """Embeddings by id, the rows, and the bad inputs of all parts; nothing is there twice or unfinished."""
    embeddings: dict[str, np.ndarray] = {}
    listed: list[dict[str, Any]] = []
    bad: list[str] = []
    for file in sorted(folder.glob("part-*.parquet")):
        table = pyarrow.parquet.read_table(file)
        vectors = load_file(file.with_suffix(".safetensors"))["embedding"]
        rows = table.to_pylist()
        assert len(rows) == len(vectors)
        listed += rows
        embeddings |= {row["id"]: vector for row, vector in zip(rows, vectors, strict=True)}
        own = own_of(file)
        assert own is not None
        assert belong_together(own, file.with_suffix(".safetensors"))
        bad += own["bad"]
    assert len(embeddings) == len(listed)
    return embeddings, listed, bad


def check_whole(folder: Path) -> None:
    """Every input is in exactly one place."""
    embeddings, listed, bad = found_in(folder)
    assert Counter(Path(row["where"]).stem for row in listed) == Counter(
        f"{number:03d}" for number in range(COUNT) if number != BROKEN
    )
    assert [f"{BROKEN:03d}.png" in line for line in bad] == [True]
    assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for vector in embeddings.values())


def test_parts_hold_what_the_model_gives_and_what_is_known_of_each_picture(
    place: Path, tmp_path: Path, settings: Settings
) -> None:
    told: list[int] = []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".part-000003.1234").write_bytes(b"what a killed process left")
    report = embed_source(str(place / "photos"), tmp_path / "out", settings, progress=told.append)
    assert (report.added, report.present, len(report.bad), sum(told)) == (COUNT - 1, 0, 1, COUNT)
    check_whole(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))
    with lock(tmp_path / "out", "process 7"), pytest.raises(StorageError, match="process 7"):
        embed_source(str(place / "photos"), tmp_path / "out", settings)
    embeddings, listed, _ = found_in(tmp_path / "out")
    assert json.loads(listed[5]["metadata"])["label"] == "cats"
    engine = load_engine("clip0", str(place / "checkpoints" / "clip0"), settings)
    with Image.open(listed[5]["where"]) as image:
        assert embeddings[listed[5]["id"]] @ engine.embed_images([image.convert("RGB")])[0] > 0.9999
    again = embed_source(str(place / "photos"), tmp_path / "out", settings)
    assert (again.added, again.present, again.bad) == (0, COUNT - 1, report.bad)


def test_parts_of_a_source_that_has_changed_since_are_refused(place: Path, tmp_path: Path, settings: Settings) -> None:
    folder, table = tmp_path / "photos", tmp_path / "photos" / "t.csv"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(place / "photos" / "cats" / "000.png", folder / name)
    table.write_text("path,caption\na.png,one\nb.png,two\n")
    assert embed_source(str(table), tmp_path / "out", settings).added == 2
    assert embed_source(str(table), tmp_path / "out", settings).present == 2
    table.write_text("path,caption\na.png,one\nb.png,three\n")
    with pytest.raises(ConflictError, match="the source has changed since"):
        embed_source(str(table), tmp_path / "out", settings)
    table.write_text("path,caption\na.png,one\nb.png,two\n")
    os.utime(folder / "b.png", ns=(1, 1))
    with pytest.raises(ConflictError, match="the source has changed since"):
        embed_source(str(table), tmp_path / "out", settings)


def test_a_name_that_is_no_unicode_is_a_bad_input_of_its_part(place: Path, tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"a.png", b"b\xff.png"):
        shutil.copy(place / "photos" / "cats" / "000.png", folder / os.fsdecode(name))
    for added, present in ((1, 0), (0, 1)):
        report = embed_source(str(folder), tmp_path / "out", settings)
        assert (report.added, report.present, len(report.bad)) == (added, present, 1)
        assert "no Unicode" in report.bad[0]


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_a_part_whose_files_are_of_two_processes_or_one_is_gone_is_made_again(
    place: Path, tmp_path: Path, settings: Settings, suffix: str
) -> None:
    """A process that is cut off from the command goes on, and may write between what follows it."""
    for name in ("one", "two"):
        embed_source(str(place / "photos"), tmp_path / name, settings)
    shutil.copy(tmp_path / "two" / f"part-000002.{suffix}", tmp_path / "one")
    (tmp_path / "one" / f"part-000004.{suffix}").unlink()
    with pytest.raises(DataError, match="of two processes"):
        list(_rows(tmp_path / "one", 24))
    report = embed_source(str(place / "photos"), tmp_path / "one", settings)
    assert (report.added, report.present) == (64 - (BROKEN // 32 in (2, 4)), COUNT - 65 + (BROKEN // 32 in (2, 4)))
    check_whole(tmp_path / "one")


def test_folders_of_another_model_or_source_are_refused(place: Path, tmp_path: Path, settings: Settings) -> None:
    source = tmp_path / "photos"
    shutil.copytree(place / "photos", source)
    out = tmp_path / "out"
    embed_source(str(source), out, settings)
    (out / "part-000003.parquet").unlink()
    with pytest.raises(ConflictError, match="model 'clip0'"):
        embed_source(str(source), out, settings, embedder="clip1")
    with pytest.raises(DataError, match="there are: clip0, clip1"):
        embed_source(str(source), out, settings, embedder="vit")
    next(source.rglob("*.png")).rename(source / "aaa.png")
    with pytest.raises(ConflictError, match="the source has changed"):
        embed_source(str(source), out, settings)


def test_a_killed_worker_is_followed_by_another(place: Path, tmp_path: Path, settings: Settings) -> None:
    killed: list[int] = []

    def kill(done: int) -> None:
        if len(killed) < 2:  # three, if it was the same part each time, would be the part's fault
            # One that was killed may not have ended yet.
            living = [child.pid for child in multiprocessing.active_children() if child.pid not in killed]
            assert living[0] is not None
            os.kill(living[0], signal.SIGKILL)
            killed.append(living[0])

    report = embed_source(str(place / "photos"), tmp_path, settings, workers=2, progress=kill)
    assert len(set(killed)) == 2
    # A worker that had written its part and was killed before it said so: the part is made again, as it was.
    assert report.added == COUNT - 1
    check_whole(tmp_path)


class _Deadly(bytes):
    """Ends the process that gets it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_a_part_that_ends_every_process_is_named(
    place: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    records = [Record(f"row {row}", file.getvalue() if row < 40 else _Deadly()) for row in range(50)]
    monkeypatch.setattr(bulk, "read", lambda source, rows: iter(records))
    with pytest.raises(ModelError, match=r"part-000001, from row 32 on, ended 3 processes"):
        embed_source("anywhere", tmp_path, settings)
    assert (tmp_path / "part-000000.parquet").is_file()
    assert not multiprocessing.active_children()


def test_a_killed_command_goes_on_where_it_was(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["index", "photos", "--to", str(tmp_path / "out"), "--checkpoints", "checkpoints", "--workers", "2"]
    environment = {**os.environ, "SEMBLANCE_BACKEND": "torch-fp32"}
    command = _command(arguments, 32)
    process = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: list((tmp_path / "out").glob("part-*.parquet")) or process.poll() is not None, 120)
    assert process.poll() is None
    process.kill()
    process.communicate()
    before = len(list((tmp_path / "out").glob("part-*.parquet")))
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    added, present, _ = (int(word) for word in done.stdout.split() if word.isdigit())
    assert added + present == COUNT - 1
    assert present >= 31 * min(before, COUNT // 32)
    check_whole(tmp_path / "out")


def test_parts_are_read_into_a_collection_of_their_model(
    place: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    embed_source(str(place / "photos"), tmp_path / "out", settings)
    assert holds_vectors(tmp_path / "out")
    shared = ["--checkpoints", str(place / "checkpoints"), "--data", str(tmp_path / "data")]
    index = ["index", str(tmp_path / "out"), *shared]
    assert main([*index, "--embedder", "clip0", "--collection", "photos"]) == 0
    assert capsys.readouterr().out.startswith(f"{COUNT - 1} added, 0 there already")
    _, listed, _ = found_in(tmp_path / "out")
    assert main(["search", listed[8]["where"], "--image", "--json", "--collection", "photos", *shared]) == 0
    hit = json.loads(capsys.readouterr().out)["hits"][0]
    assert (hit["id"], hit["metadata"]["label"]) == (listed[8]["id"], "cats")
    assert main([*index, "--embedder", "clip1", "--collection", "others"]) == 1
    assert "embeddings of model 'clip0'" in capsys.readouterr().err


def test_pictures_at_urls_come_from_the_hosts_that_are_allowed(
    place: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How they are fetched is test_fetching's matter; here it is by a table of what is there."""
    picture = (place / "photos" / "cats" / "000.png").read_bytes()

    async def fetch(self: Fetcher, url: str) -> bytes:
        self._check(url)
        if "gone" in url:
            raise InputError("the picture's URL answers with status 404")
        return picture

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    urls = ["https://pictures.example/a.png", "https://elsewhere.example/b.png", "https://pictures.example/gone.png"]
    table = pyarrow.table({"url": urls, "caption": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "urls.parquet")
    source = str(tmp_path / "urls.parquet")
    part = bulk.Part(0, list(read(source, BadRows())))
    told = {}
    for hosts in ((), ("pictures.example",)):
        out = tmp_path / f"out{len(hosts)}"
        out.mkdir()
        fetching = settings.model_copy(update={"fetch_hosts": hosts})
        writer = bulk.PartWriter("clip0", str(place / "checkpoints" / "clip0"), fetching, source, str(out))
        told[hosts] = writer(part)
    assert [line.partition(": ")[2][:40] for line in told[()].bad] == ["[Errno 95] the picture is at a URL, whic"] * 3
    assert told[("pictures.example",)].added == 1
    assert "fetches nothing from 'elsewhere.example'" in told[("pictures.example",)].bad[0]
    assert "status 404" in told[("pictures.example",)].bad[1]
    _, listed, _ = found_in(tmp_path / "out1")
    assert (listed[0]["caption"], json.loads(listed[0]["metadata"])["url"]) == ("a", urls[0])


def test_the_command_says_what_it_needs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["index", str(place / "photos"), "--to", str(tmp_path), "--checkpoints", str(place / "checkpoints")]
    try:
        import ray  # noqa: F401
    except ImportError:
        assert main([*arguments, "--engine", "ray"]) == 1
        assert "pip install 'semblance[ray]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # they are Ray's own
def test_ray_makes_the_same_parts(place: Path, tmp_path: Path, settings: Settings) -> None:
    """`make ray`, in an environment of its own; an actor is killed under way."""
    ray = pytest.importorskip("ray", reason="needs Ray: make ray")
    killed: list[int] = []

    def kill(done: int) -> None:
        actors = [
            int(pid)
            for pid in subprocess.run(
                ["pgrep", "-f", "ray::.*_RayWriter"], capture_output=True, text=True
            ).stdout.split()
        ]
        if not killed and actors:
            os.kill(actors[0], signal.SIGKILL)
            killed.append(actors[0])

    try:
        report = embed_source(str(place / "photos"), tmp_path, settings, engine="ray", workers=2, progress=kill)
    finally:
        ray.shutdown()
    assert killed
    assert report.added == COUNT - 1
    check_whole(tmp_path)


@pytest.mark.skipif(
    not (ALLOWED and os.environ.get("FAULTS") and find_spec("ray")), reason="needs Ray, root and FAULTS=1"
)
@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_a_host_is_lost_while_three_embed(place: Path, tmp_path: Path, fault: str) -> None:
    """`make faults-ray`. All hosts see the same folders, as they must; one that is cut off from the others goes on
    writing into them."""
    pictures, size, out = 600, 8, tmp_path / "out"
    (tmp_path / "photos").mkdir()
    for number in range(pictures):
        Image.new("RGB", (1600, 1200), (number % 256, number // 256, 0)).save(tmp_path / "photos" / f"{number}.png")
    with Hosts(3) as hosts, places_for_ray() as environment:
        head = start_ray(hosts, tmp_path, environment, cores=2)
        arguments = ["index", "photos", "--to", "out", "--engine", "ray"]
        command = _command([*arguments, "--checkpoints", str(place / "checkpoints")], size)
        started = time.monotonic()
        process = hosts.start(0, command, tmp_path / "said", {**environment, "RAY_ADDRESS": head}, tmp_path)

        def parts() -> int:
            return len(list(out.glob("part-*.parquet")))

        wait_for(lambda: parts() >= 12 or process.poll() is not None, 120)
        writers = hosts.run(1, ["pgrep", "-f", "ray::.*_RayWriter"]).split()
        assert process.poll() is None, (tmp_path / "said").read_text()[-3000:]
        assert writers, "nothing to lose on that host"
        lost, before = time.monotonic(), parts()
        if fault == "killed":
            hosts.kill(1)
        else:
            hosts.cable(1, plugged=False)
        assert process.wait(180) == 0, (tmp_path / "said").read_text()[-3000:]
        ended = time.monotonic()
    said = (tmp_path / "said").read_text()
    embeddings, listed, bad = found_in(out)
    assert Counter(Path(row["where"]).stem for row in listed) == Counter(map(str, range(pictures)))
    assert not bad
    assert f"{pictures} added" in said, said[-2000:]
    print(
        f"{fault} with {before} of {pictures // size} parts there, after {lost - started:.0f} s; {len(embeddings)} of "
        f"{pictures} pictures are in them once each {ended - lost:.0f} s later"
    )
