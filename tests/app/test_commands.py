"""The command line: filling collections, searching them, and the demo that a first start shows."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support import open_clip_folder, running, tiny_dalle
from tiny import encoder

from app.__main__ import main
from app.calls import IN_FLIGHT, AnswerError, send_all
from app.ingest import count
from app.locking import lock_note
from app.sqlite_collections import SQLiteCollections
from models.checkpoint import save_checkpoint
from training.scene_shard import write_shard

Encoded = Callable[..., bytes]
Run = Callable[..., str]


@pytest.fixture
def photos(tmp_path: Path, encoded: Encoded) -> Path:
    folder = tmp_path / "photos"
    for index in range(40):
        file = folder / ("cats" if index % 2 else "old dogs") / f"pic ture {index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(index))
    (folder / "cats" / "broken.jpg").write_bytes(encoded()[:200])
    (folder / "cats" / "page.png").write_bytes(b"<html>")
    (folder / "notes.txt").write_text("not a picture, and none by its name")
    return folder


@pytest.fixture
def run(tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, status: int = 0) -> str:
        place = ["--data", str(tmp_path / "data"), "--checkpoints", str(checkpoints), "--threads", "1"]
        assert main([*arguments, *place]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out + captured.err

    return call


def test_index_reports_resumes_and_updates(run: Run, photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    said = run("index", str(photos), "--collection", "pets")
    assert "40 added, 0 there already, 2 not read" in said
    assert f"not read: {photos}/cats/broken.jpg: the picture cannot be decoded" in said
    assert f"not read: {photos}/cats/page.png: not a picture that is read" in said
    assert "0 added, 40 there already, 2 not read" in run("index", str(photos), "--collection", "pets")
    changed = photos / "cats" / "pic ture 1.jpg"
    changed.write_bytes(encoded(99))
    os.utime(changed, (1, 1))
    (photos / "cats" / "new.jpg").write_bytes(encoded(100))
    assert "2 added, 39 there already" in run("index", str(photos), "--collection", "pets")
    text = photos / "cats" / "pic ture 3.txt"
    for caption in ("a cat asleep", "a cat awake", None):  # its caption is changed, and the picture is not
        text.unlink() if caption is None else text.write_text(f"{caption}\nanother\n")
        assert "1 added, 40 there already" in run("index", str(photos), "--collection", "pets")
        assert "0 added, 41 there already" in run("index", str(photos), "--collection", "pets")
        with SQLiteCollections(tmp_path / "data") as collections:
            found = {item.metadata["path"]: item.caption for item in collections.get("pets").page(100)}
        assert found["cats/pic ture 3.jpg"] == (caption or "cats")
    with SQLiteCollections(tmp_path / "data") as collections:
        items = collections.get("pets").page(100)
        assert len(items) == 41
        one = next(item for item in items if item.metadata["path"] == "old dogs/pic ture 0.jpg")
        assert (one.caption, one.metadata["label"]) == ("old dogs", "old dogs")
    run("index", str(photos), "--collection", "pets", "--max-bad", "1", status=1)


def _shard(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w:gz" if file.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_texts_that_are_not_utf8_are_reported_and_the_run_goes_on(run: Run, photos: Path) -> None:
    for number in (1, 2):
        kind = "cats" if number % 2 else "old dogs"
        (photos / kind / f"pic ture {number}.txt").write_bytes(["ein Hund", "ein Bär"][number % 2].encode("latin-1"))
    said = run("index", str(photos), "--collection", "pets")
    assert "39 added, 0 there already, 3 not read" in said
    assert f"not read: {photos}/cats/pic ture 1.jpg: its captions, pic ture 1.txt, cannot be read as UTF-8" in said
    run("index", str(photos), "--collection", "pets", "--max-bad", "2", status=1)
    table = photos / "captions.csv"
    table.write_bytes("path,caption\ncats/pic ture 1.jpg,süß\ncats/pic ture 3.jpg,plain\n".encode("latin-1"))
    said = run("index", str(table), "--collection", "table")
    assert "1 added, 0 there already, 1 not read" in said
    assert f"not read: {table}:2: not UTF-8" in said


def test_a_shard_that_breaks_off_is_reported_and_the_others_are_read(
    run: Run, encoded: Encoded, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("a.tar", "b.tar.gz", "c.tar", "e.tar"):
        _shard(folder / name, {f"{index}.jpg": encoded(index, size=(200, 200)) for index in range(4)})
    packed, plain = (folder / "b.tar.gz").read_bytes(), (folder / "c.tar").read_bytes()
    (folder / "b.tar.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "c.tar").write_bytes(plain[:-11_000])
    gzip = zlib.compressobj(wbits=31)
    (folder / "d.tar.gz").write_bytes(gzip.compress(plain[:-11_000]) + gzip.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 99)
    said = run("index", str(folder), "--collection", "shards")
    for name in ("b.tar.gz", "c.tar", "d.tar.gz"):
        assert f"not read: {folder / name}: cannot be read as a tar archive, or not to its end" in said
    assert "3 not read" in said
    with SQLiteCollections(tmp_path / "data") as collections:
        found = {item.id for item in collections.get("shards").page(100)}
    assert {f"{name}:{index}" for name in ("a.tar", "e.tar") for index in range(4)} < found
    assert {"b.tar.gz:0", "c.tar:0", "d.tar.gz:0"} < found


@pytest.mark.parametrize("in_place", [False, True])
def test_a_row_that_is_refused_is_named_and_the_rest_is_stored(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    monkeypatch.setenv("SEMBLANCE_PICTURE_ROOT", str(photos))
    refused: list[tuple[dict[str, object], str]] = [
        ({"share": float("nan")}, "a number of its metadata is not finite"),
        ({"k" * 65: 1}, f"metadata.{'k' * 64}.[key]: String should have at most 64 characters"),
        ({"big": 2**64}, "metadata.big: a text without NUL, a finite number (an integer: of 64 bits), true"),
        ({"long": "x" * 20_000}, "metadata: at most 16,384 bytes, as JSON, are kept of one item"),
        ({"path": "cats/a\0b.jpg"}, "path: text must not hold NUL" if in_place else "embedded null byte"),
        ({"path": "cats/" + "x" * 5000}, "path: Value should have at most 4096" if in_place else "File name too long"),
        ({"caption": "\ud83d"}, "its name, caption or metadata is no Unicode"),
        ({"caption": "x" * 100_000}, "the text has 100,000 characters"),
        ({"path": "cats/\ud800.jpg"}, "its name, caption or metadata is no Unicode"),
    ]
    rows = [{"path": f"cats/pic ture {2 * index + 1}.jpg", "caption": "a cat"} for index in range(19)]
    for place, (change, _) in enumerate(refused):
        rows[2 * place] = rows[2 * place] | change
    table = photos / "[b]captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for added, there in ((10, 0), (0, 10)):
        said = run("index", str(table), "--collection", "c", *["--in-place"] * in_place)
        assert f"{added} added, {there} there already, 9 not read" in said
        for place, (_, why) in enumerate(refused):
            assert f"not read: {table}:{2 * place + 1}: {why}" in said
    run("index", str(table), "--collection", "c", "--max-bad", "8", *["--in-place"] * in_place, status=1)


def test_of_several_rows_of_one_picture_the_first_counts(run: Run, photos: Path, tmp_path: Path) -> None:
    table = photos / "captions.csv"
    rows = [f"cats/pic ture {2 * index + 1}.jpg,caption {caption}" for index in range(20) for caption in range(2)]
    rows += ["cats/pic ture 1.jpg,of a later batch", "cats/broken.jpg,one", "cats/broken.jpg,two"]
    table.write_text("\n".join(["path,caption", *rows]))
    for added, there in ((20, 0), (0, 20)):
        said = run("index", str(table), "--collection", "c")
        assert f"{added} added, {there} there already, 23 not read" in said
        for line in (3, 5, 41, 42, 44):
            assert f"not read: {table}:{line}: an earlier row has this picture, which is stored once" in said
        assert f"not read: {table}:43: the picture cannot be decoded" in said
        with SQLiteCollections(tmp_path / "data") as collections:
            assert {item.caption for item in collections.get("c").page(100)} == {"caption 0"}


def test_names_that_are_no_unicode_are_reported(run: Run, photos: Path, encoded: Encoded) -> None:
    (photos / os.fsdecode(b"b\xe4r.jpg")).write_bytes(encoded(1))
    said = run("index", str(photos), "--collection", "c")
    assert "40 added, 0 there already, 3 not read" in said
    assert "its name, caption or metadata is no Unicode" in said


def test_what_is_no_file_and_names_that_read_alike(run: Run, encoded: Encoded, tmp_path: Path) -> None:
    folder = tmp_path / "col"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.jpg").write_bytes(encoded(1))
    (folder / "a:x.jpg").write_bytes(encoded(2))
    os.mkfifo(folder / "pipe.jpg")  # nobody ever writes into it
    said = run("index", str(folder), "--collection", "c")
    assert "2 added, 0 there already, 1 not read" in said
    assert "pipe.jpg: it is a folder, a pipe or a device" in said
    with SQLiteCollections(tmp_path / "data") as collections:
        assert len({item.id for item in collections.get("c").page(10)} - {"a:x.jpg"}) == 1


def test_what_is_wrong_with_a_source_or_a_name_is_said_before_anything_is_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is no file, folder" in run("index", str(tmp_path / "nothing"), "--collection", "c", status=1)
    assert run("models")
    with SQLiteCollections(tmp_path / "data") as collections:
        assert collections.names() == []
    assert "holds nothing to store" in run("index", str(tmp_path / "empty"), "--collection", "c", status=1)
    for name in ("frag#x", "q?x=1", "a/b"):
        run("index", str(tmp_path / "empty"), "--collection", name, status=1)
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
    assert f"{torn} cannot be read as Parquet" in run("index", str(torn), "--collection", "c", status=1)
    with SQLiteCollections(tmp_path / "data") as collections:
        assert collections.names() == ["c"]


def test_index_of_a_table_and_of_shards(run: Run, photos: Path, encoded: Encoded, tmp_path: Path) -> None:
    table = photos / "captions.csv"
    table.write_text("path,caption\ncats/pic ture 1.jpg,a cat asleep\nmissing.jpg,nothing\n")
    said = run("index", str(table), "--collection", "table")
    assert "1 added, 0 there already, 1 not read" in said
    assert "No such file" in said
    assert count(str(table)) == 2
    _shard(tmp_path / "shard.tar", {"x.jpg": encoded(1), "x.json": b'{"caption": "from a shard", "year": 1999}'})
    assert "1 added" in run("index", str(tmp_path / "shard.tar"), "--collection", "shard")
    assert count(str(tmp_path / "shard.tar")) == 1
    _shard(tmp_path / "packed.tar.gz", {"x.jpg": encoded(1)})
    assert count(str(tmp_path / "packed.tar.gz")) is count("torchvision:FakeData") is None
    with SQLiteCollections(tmp_path / "data") as collections:
        (item,) = collections.get("shard").page(10)
        assert (item.caption, item.metadata["year"]) == ("from a shard", 1999)
    # Keys of several shards may be alike; each picture keeps its place.
    (tmp_path / "shards").mkdir()
    for name in ("0.tar", "1.tar"):
        (tmp_path / "shards" / name).write_bytes((tmp_path / "shard.tar").read_bytes())
    assert "2 added" in run("index", str(tmp_path / "shards"), "--collection", "shards")
    with SQLiteCollections(tmp_path / "data") as collections:
        assert [item.id for item in collections.get("shards").page(10)] == ["0.tar:x", "1.tar:x"]


def test_search_embed_and_models(run: Run, photos: Path) -> None:
    run("index", str(photos))
    hits = json.loads(run("search", str(photos / "cats" / "pic ture 3.jpg"), "--image", "--json", "-k", "2"))["hits"]
    assert hits[0]["metadata"]["path"] == "cats/pic ture 3.jpg"
    assert len(hits) == 2
    assert "cats" in run("search", "a cat", "-k", "40")
    rows = [json.loads(line) for line in run("embed", "a", "b", "--dimensions", "4").splitlines()]
    assert [(row["input"], len(row["embedding"])) for row in rows] == [("a", 4), ("b", 4)]
    assert json.loads(run("models", "--json"))["data"][0]["id"] == "clip"
    assert "r1 0.25" in run("models")


def test_an_open_clip_model_is_indexed_and_searched(run: Run, photos: Path, tmp_path: Path) -> None:
    model = ["--model", f"mine={open_clip_folder(tmp_path / 'mine')}"]
    assert "40 added" in run("index", str(photos), "--collection", "theirs", "--embedder", "mine", *model)
    query = [str(photos / "cats" / "pic ture 3.jpg"), "--image", "--json", "--collection", "theirs", *model]
    answer = json.loads(run("search", *query))
    assert (answer["model"], answer["hits"][0]["metadata"]["path"]) == ("mine", "cats/pic ture 3.jpg")
    assert len(json.loads(run("models", "--json", *model))["data"]) == 2
    assert "model 'mine', which is not loaded" in run("search", "a cat", "--collection", "theirs", status=1)


def test_errors_are_sentences(run: Run, tmp_path: Path) -> None:
    assert "no collection 'nope'" in run("search", "a", "--collection", "nope", status=1)
    assert "is no file" in run("index", str(tmp_path / "absent"), status=1)
    assert "no model that generates pictures is loaded" in run("generate", "a red star", status=1)
    assert "--insecure" in run("serve", "--host", "0.0.0.0", status=1)
    assert "setting port" in run("serve", "--port", "99999", status=1)
    assert "cannot be reached" in run("models", "--server", "http://127.0.0.1:9", status=1)


def test_a_port_that_is_taken_ends_the_start_in_a_sentence(checkpoints: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = ["--data", str(tmp_path / "data"), "--checkpoints", str(checkpoints)]
        command = [sys.executable, "-m", "app", "serve", *place, "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"semblance: 127\.0\.0\.1:\d+ is taken: stop what listens there, .*\n", done.stderr)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_free_port_is_told_to_whoever_looks(run: Run, checkpoints: Path, tmp_path: Path, host: str) -> None:
    if ":" in host and not _has_ipv6():
        pytest.skip("there is no IPv6 here")
    place = ["--data", str(tmp_path / "data"), "--checkpoints", str(checkpoints), "--threads", "1"]
    command = [sys.executable, "-m", "app", "serve", *place, "--host", host, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            (address,) = next(told for line in lines if (told := re.findall(r"ready on (\S+)", line)))
            assert re.fullmatch(r"http://(127\.0\.0\.1|\[::1\]):[1-9]\d+", address)
            assert lock_note(tmp_path / "data") == address
            assert json.loads(run("models", "--json"))["data"][0]["id"] == "clip"
        finally:
            process.kill()


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_help_explains_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["serve"], ["index"], ["search"], ["embed"], ["generate"], ["models"]):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        assert "usage: semblance" in capsys.readouterr().out


def test_a_demo_is_filled_once_and_commands_find_the_running_server(
    tmp_path: Path, checkpoints: Path, photos: Path, run: Run
) -> None:
    import shutil

    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, folder)
    write_shard(folder / "scenes.tar.gz", each=1, others=5, size=32)
    with running(folder, tmp_path / "data", "--demo") as server:
        hits = httpx.get(f"{server.url}/search", params={"q": "a red star", "k": 200}).json()["hits"]
        assert len(hits) == 105
        assert httpx.get(server.url + hits[0]["url"]).headers["content-type"] == "image/jpeg"
        # The folder is in use, so these go through the server that has it.
        assert "40 added" in run("index", str(photos), "--collection", "pets")
        assert httpx.get(f"{server.url}/collections/pets").json()["count"] == 40
        assert httpx.delete(f"{server.url}/collections/default/items/{hits[0]['id']}").status_code == 204
        server.kill()
    with running(folder, tmp_path / "data", "--demo") as server:
        assert httpx.get(f"{server.url}/collections/default").json()["count"] == 104
        assert httpx.get(f"{server.url}/collections/pets").json()["count"] == 40


def test_an_export_of_nothing_says_why(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, model in {"dalle": tiny_dalle(), "simclr": encoder()}.items():
        save_checkpoint(model, tmp_path / "checkpoints" / name)
    for file in ("broken.jpg", "page.png"):
        (photos / "cats" / file).unlink()
    place = ["--data", str(tmp_path / "data"), "--checkpoints", str(tmp_path / "checkpoints"), "--threads", "1"]

    def said(*arguments: str) -> str:
        assert main(["export", *arguments, "--to", "torch", "--pictures", str(photos), *place]) == 1
        captured = capsys.readouterr()
        assert "takes the fastest" not in captured.out
        return captured.err

    assert "model 'dalle' (dalle) embeds neither pictures nor texts" in said("dalle")
    assert not (tmp_path / "data").exists()
    assert "no model 'clip'; there are: dalle, simclr" in said("clip")
    for supported, why in ((True, "it has no transformer blocks"), (False, "this processor has no VNNI")):
        monkeypatch.setattr("app.int8.supported", lambda answer=supported: answer)
        assert f"nothing of model 'simclr' can be in int8 by torch: {why}" in said("simclr", "--samples", "2")
    for samples in ("1", "-1", "few"):
        with pytest.raises(SystemExit, match="2"):
            main(["export", "simclr", "--to", "torch", "--samples", samples, *place])
        assert f"argument --samples: {samples} is not 2 or more" in capsys.readouterr().err


def test_a_second_interruption_ends_a_command_at_once() -> None:
    """What the first has begun, here the end of a thread's work, may take long."""
    script = """if True:
        import asyncio, sys, time
        from contextlib import asynccontextmanager
        import app.connection
        from app.__main__ import main

        @asynccontextmanager
        async def connect(*_):
            try:
                print("connected", flush=True)
                await asyncio.sleep(60)
                yield
            finally:
                await asyncio.to_thread(end)

        def end():
            print("interrupted", flush=True)
            time.sleep(60)

        app.connection.connect = connect
        sys.exit(main(["models"]))
    """
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            for said in ("connected", "interrupted"):
                assert process.stdout.readline().strip() == said
                process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert not process.stderr.read()
        finally:
            process.kill()


def test_of_batches_that_fail_together_one_error_is_said_and_none_printed(caplog: pytest.LogCaptureFixture) -> None:
    async def send_them() -> None:
        met = asyncio.Barrier(IN_FLIGHT)

        async def send(_: int) -> None:
            await met.wait()
            raise AnswerError("the server has gone", 0)

        with pytest.raises(AnswerError, match="has gone"):
            await send_all(iter(range(1, 9)), send)

    asyncio.run(send_them())
    gc.collect()
    assert not caplog.records
