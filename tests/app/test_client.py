"""The Python client against a server: the API's answers, any number of inputs, and what it does where one refuses."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support import running

from app.calls import BATCH, IN_FLIGHT, AnswerError, call
from app.client import AsyncClient, Client
from app.connection import connect
from app.settings import Settings
from models.errors import InputError

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(DEMO, tmp_path_factory.mktemp("store"), "--demo") as made:
        yield made.url


@pytest.fixture
def demo(server: str) -> Iterator[Client]:
    with Client(server) as client:
        yield client


def _post(server: str, path: str, **body: Any) -> Any:
    return httpx.post(server + path, json=body, timeout=60).raise_for_status().json()


def test_every_form_of_a_picture_has_the_same_embedding(
    server: str, demo: Client, tmp_path: Path, picture: Callable[..., Image.Image]
) -> None:
    file = io.BytesIO()
    picture().save(file, "PNG")
    content = file.getvalue()
    (tmp_path / "a.png").write_bytes(content)
    coded = base64.b64encode(content).decode()
    expected = _post(server, "/embed", input=[{"image": coded}, "a red star"])["data"]
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), content, f"data:image/png;base64,{coded}", picture()]
    rows = demo.encode(images=forms, texts=["a red star"])
    assert rows.shape == (6, len(expected[0]["embedding"]))
    assert rows.dtype == np.float32
    assert np.allclose(rows[:5], expected[0]["embedding"], atol=1e-4)
    assert np.allclose(rows[5], expected[1]["embedding"], atol=1e-4)
    assert demo.encode(texts=["a"], dimensions=64).shape == (1, 64)
    assert demo.encode().shape == (0, 0)


def _sent(image: Image.Image) -> Image.Image:
    """What a server gets of a picture."""
    got: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        got.append(base64.b64decode(json.loads(request.content)["query"][0]["image"]))
        return httpx.Response(200, json={"hits": []})

    with Client("http://there", transport=httpx.MockTransport(answer)) as client:
        client.search(image=image)
    return Image.open(io.BytesIO(got[0]))


def test_a_picture_is_sent_upright(picture: Callable[..., Image.Image]) -> None:
    upright, file, exif = picture(), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned right
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    with Image.open(file) as image:
        assert np.array_equal(_sent(image), upright)
        assert image.getexif()[0x0112] == 6  # the caller's own is as it was
    damaged = picture()
    damaged.info["exif"] = b"Exif\0\0damaged"
    assert np.array_equal(_sent(damaged), upright)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "F", "I", "RGBX", "PA", "RGBa", "La", "I;16L"])
def test_a_picture_of_any_mode_is_sent(mode: str) -> None:
    sent = _sent(Image.new(mode, (4, 4)))
    assert sent.mode == {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(mode, "RGB")
    assert sent.size == (4, 4)
    if mode in ("CMYK", "RGBX"):  # no ink, and no light
        assert sent.getpixel((0, 0)) == ((255,) * 3 if mode == "CMYK" else (0,) * 3)


def test_any_number_in_order_with_progress_and_what_is_bad_by_its_place(
    demo: Client, tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    texts = [f"a red star {number}" for number in range(2 * BATCH + 5)]
    done: list[int] = []
    rows = demo.encode(texts=iter(texts), progress=done.append)
    assert sum(done) == len(texts)
    assert np.allclose(rows[[0, -1]], demo.encode(texts=[texts[0], texts[-1]]), atol=1e-4)
    good = encoded()
    images: list[Any] = [good] * BATCH + [b"no picture", good, tmp_path / "missing.jpg", good]
    bad: dict[int, str] = {}
    rows = demo.encode(images=images, bad=bad)
    assert bad.keys() == {BATCH, BATCH + 2}
    assert "missing.jpg" in bad[BATCH + 2]
    assert np.isnan(rows[[BATCH, BATCH + 2]]).all()
    assert np.allclose(rows[[0, BATCH + 1, BATCH + 3]], rows[0], atol=1e-4)
    with pytest.raises(AnswerError, match=f"^input {BATCH}: ") as refused:
        demo.encode(images=images[: BATCH + 2])
    assert refused.value.input == BATCH
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        demo.encode(images=images[BATCH + 2 :])


def _embedding(request: httpx.Request) -> httpx.Response:
    """Ones for each input; one that is large is refused, without its place."""
    inputs = json.loads(request.content)["input"]
    if any(len(value) > 100 for each in inputs for value in each.values()):
        return httpx.Response(413, json={"detail": "the body is too large"})
    row = base64.b64encode(np.ones(4, "<f4").tobytes()).decode()
    return httpx.Response(200, json={"data": [{"embedding": row}] * len(inputs)})


def test_what_no_request_can_say_is_bad_by_its_place_and_ends_nothing(tmp_path: Path) -> None:
    wrong: dict[int, Any] = {
        1: (b"large" * 100, AnswerError, "the body is too large"),
        3: ("a\0.jpg", ValueError, "embedded null byte"),
        5: (tmp_path / "missing.jpg", FileNotFoundError, "missing.jpg"),
        7: ("http://there/\ud800", ValueError, "no Unicode"),
    }
    images = [wrong[place][0] if place in wrong else b"good" for place in range(8)]
    wrong[9] = ("half \ud800", ValueError, "no Unicode")
    wrong[10] = ("long" * 100, AnswerError, "the body is too large")
    texts = ["good", wrong[9][0], wrong[10][0], "good"]
    bad: dict[int, str] = {}
    done: list[int] = []
    with Client("http://there", transport=httpx.MockTransport(_embedding)) as client:
        rows = client.encode(images=images, texts=texts, bad=bad, progress=done.append)
        assert bad.keys() == wrong.keys()
        assert all(why in bad[place] for place, (_, _, why) in wrong.items())
        assert np.flatnonzero(np.isnan(rows).all(axis=1)).tolist() == sorted(wrong)
        assert sum(done) == len(rows) == 12
        for place, (each, kind, why) in wrong.items():
            given = {"images": [b"good", each]} if place < 8 else {"texts": ["good", each]}
            with pytest.raises(kind, match=why) as refused:
                client.encode(**given)
            assert kind is FileNotFoundError or str(refused.value).startswith("input 1: ")
        assert client.encode(images=[tmp_path / "missing.jpg"], bad=bad, progress=done.append).shape == (1, 0)
        assert sum(done) == 13


def test_search_classification_and_models_are_the_api_s_own(server: str, demo: Client) -> None:
    hits = demo.search("a red star", k=3, target="image", filters=["kind:image"], min_score=-1, offset=1)
    asked = {"query": "a red star", "k": 3, "target": "image", "filter": ["kind:image"], "offset": 1}
    assert [vars(hit) for hit in hits] == _post(server, "/search", **asked)["hits"]
    best = demo.search("a red star", k=1)[0]
    assert best.url is not None
    content = httpx.get(server + best.url, timeout=60).content
    assert demo.search(image=content, k=1)[0].id == best.id
    away = demo.search(mixed=[("a red star", 1.0), (content, -1.0)], k=50)
    assert best.id not in [hit.id for hit in away[:10]]
    ids, count = np.array([best.id, away[0].id]), np.int64(2)
    assert {hit.id for hit in demo.search("a red star", ids=ids, k=count)} == set(ids)
    with pytest.raises(ValueError, match="a text, an image or a mixture"):
        demo.search()
    (made,) = demo.zero_shot([content], ["red star", "blue heart"], templates=["a {}"])
    (expected,) = _post(
        server, "/zero-shot", input={"image": base64.b64encode(content).decode()}, labels=["red star", "blue heart"],
        templates=["a {}"],
    )["data"]  # fmt: skip
    assert (made.label, made.score) == (expected["label"], pytest.approx(expected["score"], abs=1e-3))
    assert list(made.scores) == [each["label"] for each in expected["scores"]]
    assert {each["id"] for each in demo.models()} == {"byol", "clip", "dalle", "moco", "simclr"}


def test_a_folder_is_indexed_and_found(demo: Client, tmp_path: Path, picture: Callable[..., Image.Image]) -> None:
    (tmp_path / "cats").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "cats" / f"{number}.png")
    report = demo.index(tmp_path, "mine")
    assert (report.added, report.present, report.bad) == (3, 0, [])
    assert demo.index(tmp_path, "mine").present == 3
    assert {hit.metadata["label"] for hit in demo.search("a", collection="mine")} == {"cats"}


def test_drawings_come_on_their_way_and_whole(server: str, demo: Client) -> None:
    asked = {"prompt": "a red star", "n": 2, "seed": 5}
    expected = _post(server, "/generate", **asked)["data"]
    made = demo.generate("a red star", n=2, seed=5)
    assert [(base64.b64encode(each.png).decode(), each.seed) for each in made] == [
        (each["b64_json"], each["seed"]) for each in expected
    ]
    assert made[0].image().size == (64, 64)
    seen = list(demo.drawing("a red star", n=2, seed=5, partial_images=2))
    assert [each.whole for each in seen] == [False] * 4 + [True] * 2
    assert seen[0].step < seen[0].steps == seen[-1].step
    assert [each.png for each in seen[4:]] == [each.png for each in made]
    again = demo.generate("a red star", image=made[0].png, change=0.2, seed=1)
    assert again[0].png != made[0].png
    assert demo.generate("", image=made[0].png, change=0.2, seed=1)[0].seed == 1
    stream = demo.drawing("a red star", n=4)
    next(stream)
    stream.close()  # the server is left before the pictures are whole
    assert demo.generate("a blue heart", seed=1, rerank=False)[0].score is None


def test_threads_share_one_client(demo: Client) -> None:
    expected, found = demo.encode(texts=["a red star"]), []
    threads = [threading.Thread(target=lambda: found.append(demo.encode(texts=["a red star"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.allclose(rows, expected, atol=1e-4) for rows in found)


def test_closing_ends_what_other_threads_wait_for_and_later_calls() -> None:
    asked = threading.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.sleep(600)
        return httpx.Response(500)

    def ask() -> None:
        try:
            client.encode(texts=["a"] * (2 * BATCH))
        except Exception as error:
            found.append(error)

    client, found = Client("http://there", transport=httpx.MockTransport(answer)), list[Exception]()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert asked.wait(10)
    client.close()
    thread.join(10)
    assert [(type(error), str(error)) for error in found] == [(AnswerError, "the client is closed")]
    client.close()
    for call_on in (client.models, lambda: client.search("a"), lambda: next(client.drawing("a"))):
        with pytest.raises(AnswerError, match="the client is closed"):
            call_on()

    async def late() -> None:
        alone = AsyncClient("http://there")
        await alone.close()
        with pytest.raises(AnswerError, match="the client is closed"):
            await alone.models()

    asyncio.run(late())


def test_a_busy_server_is_asked_again_after_what_it_says_and_never_by_too_many_at_once() -> None:
    seen: list[str] = []
    under_way = most = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        seen.append(request.headers["authorization"])
        if len(seen) in (1, 3):
            return httpx.Response(503 if len(seen) == 1 else 429, headers={"retry-after": "0.01"})
        count = len(json.loads(request.content)["input"])
        row = base64.b64encode(np.ones(4, "<f4").tobytes()).decode()
        return httpx.Response(200, json={"data": [{"embedding": row}] * count})

    async def work() -> None:
        transport = httpx.MockTransport(answer)
        async with AsyncClient("http://there", api_key="secret", transport=transport) as client:
            assert (await client.encode(texts=["a"] * (10 * BATCH))).shape == (10 * BATCH, 4)
        refusing = httpx.MockTransport(lambda request: httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2026"}))
        async with AsyncClient("http://there", transport=refusing, patience=0) as client:
            with pytest.raises(AnswerError, match="the server answered 503") as refused:
                await client.encode(texts=["a"])
            assert refused.value.status == 503
            with pytest.raises(AnswerError, match="the server answered 503"):  # without its own patience
                await asyncio.wait_for(client.index(DEMO / "scenes.tar.gz"), 5)

    asyncio.run(work())
    assert len(seen) == 12
    assert set(seen) == {"Bearer secret"}
    assert most == IN_FLIGHT


def test_it_loads_nothing_of_what_the_server_loads() -> None:
    code = "import sys, app.client; sys.exit(bool({'torch', 'fastapi', 'faiss', 'apsw'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=DEMO.parents[1], check=False).returncode == 0


def test_errors_say_what_the_server_said(demo: Client) -> None:
    with pytest.raises(AnswerError, match="'none'") as refused:
        demo.encode(texts=["a"], model="none")
    assert refused.value.status == 404
    with pytest.raises(AnswerError) as refused:
        demo.generate("a red star", temperature=-1.0)
    assert refused.value.status == 422
    with Client("http://127.0.0.1:1") as nobody, pytest.raises(AnswerError, match="cannot be reached") as refused:
        nobody.search("a")
    assert refused.value.status == 0


def test_the_time_of_a_request_is_of_all_its_answer_and_its_end_has_a_reason() -> None:
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/models":
            return httpx.Response(200, content=drip())
        raise httpx.ReadTimeout("")

    async def ask() -> None:
        async with AsyncClient("http://there", timeout=0.2, transport=httpx.MockTransport(answer)) as client:
            with pytest.raises(AnswerError, match="cannot be reached: TimeoutError"):
                await asyncio.wait_for(client.models(), 10)
            with pytest.raises(AnswerError, match="cannot be reached: ReadTimeout"):
                await client.search("a")

    asyncio.run(ask())


def test_a_key_that_no_header_can_hold_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("schlüssel", "a\nb"):
        with pytest.raises(InputError, match="the API key has a character"):
            AsyncClient(api_key=key)
    monkeypatch.setenv("SEMBLANCE_API_KEY", "schlüssel")

    async def command() -> None:
        async with connect(Settings(), "http://there"):
            raise AssertionError("not refused")

    with pytest.raises(InputError, match="the API key has a character"):
        asyncio.run(command())


@pytest.mark.parametrize(
    ("method", "url", "losses", "answered"),
    [
        ("POST", "/embed", 3, True),
        ("POST", "/embed", 4, False),
        ("GET", "/models", 2, True),
        ("PUT", "/collections/a", 1, True),
        ("POST", "/collections/a/items", 1, False),  # an item without an id would be there twice
    ],
)
def test_what_changes_nothing_is_asked_again_when_the_connection_was_lost(
    method: str, url: str, losses: int, answered: bool
) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if len(asked) <= losses:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return httpx.Response(200, json={"ok": True})

    async def ask() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://a") as client:
            return await call(client, method, url)

    if answered:
        assert asyncio.run(ask()) == {"ok": True}
        assert asked == [url] * (losses + 1)
    else:
        with pytest.raises(AnswerError, match="cannot be reached"):
            asyncio.run(ask())
        assert len(asked) == (4 if url == "/embed" else 1)
