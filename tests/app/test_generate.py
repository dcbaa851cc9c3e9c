"""POST /generate: one decode loop for all, pictures by their seeds, OpenAI's shape and events, callers who leave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from PIL import Image
from starlette.testclient import TestClient
from support import problem, running, tiny_clip, tiny_dalle

from app.__main__ import main
from app.engine import LocalEngine
from app.fairness import CALLER
from app.generator import DecodeLoop, Drawing, LocalGenerator
from app.inputs import EXAMPLE_IMAGE
from app.loading import load_generators
from app.settings import Settings
from models.checkpoint import save_checkpoint
from models.dalle import DALLETransformer
from models.errors import BusyError, DeadlineError, ModelError
from models.generation import Sampling, generate_ids, generate_image

Start = Callable[..., TestClient]
PLAIN, GUIDED = Sampling(), Sampling(guidance_scale=2.0, top_k=8)


@pytest.fixture(scope="module")
def model() -> DALLETransformer:
    return tiny_dalle()


@pytest.fixture
def painter(start: Start, model: DALLETransformer) -> TestClient:
    return start(generators={"dalle": model})


def _drawing(prompt: str, seed: int, sampling: Sampling) -> Drawing:
    return Drawing(prompt, seed, sampling, torch.zeros(16, dtype=torch.int64))


def _alone(model: DALLETransformer, drawing: Drawing) -> torch.Tensor:
    return torch.cat(list(generate_ids(model, [drawing.prompt], [drawing.seed], drawing.sampling)))


def _picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_pictures_join_and_leave_at_any_step_and_are_what_they_would_be_alone(model: DALLETransformer) -> None:
    loop = DecodeLoop(model, lanes=5)
    first, second, third = (
        _drawing("a red star", 1, GUIDED), _drawing("a blue circle", 2, PLAIN), _drawing("two hearts", 3, GUIDED)
    )  # fmt: skip
    loop.join(first)
    for _ in range(4):
        assert loop.step() == []
    loop.join(second)
    loop.step()
    loop.join(third)
    assert loop.free == 0
    for _ in range(10):
        loop.step()
    assert (first.done, second.done, third.done) == (15, 11, 10)
    second.cancelled = True
    assert set(map(id, loop.step())) == {id(first), id(second)}
    assert loop.drawings == [third]
    late = _drawing("a photo of a green square", 4, PLAIN)
    loop.join(late)
    while loop.drawings:
        loop.step()
    assert loop.free == 5
    for drawing in (first, third, late):
        assert torch.equal(drawing.ids, _alone(model, drawing))
    assert second.done == 11  # nothing was drawn for nobody


def test_a_picture_without_finite_logits_fails_alone(model: DALLETransformer) -> None:
    loop = DecodeLoop(model, lanes=4)
    good, bad = _drawing("a red star", 1, PLAIN), _drawing("a red star", 2, PLAIN)
    loop.join(good)
    loop.join(bad)
    bad.logits = bad.logits * torch.nan
    assert loop.step() == [bad]
    assert isinstance(bad.error, ModelError)
    while loop.drawings:
        loop.step()
    assert torch.equal(good.ids, _alone(model, good))


def test_pictures_come_by_their_seeds_best_first(painter: TestClient, model: DALLETransformer) -> None:
    body = {"prompt": "a red star", "n": 4, "seed": 7, "guidance_scale": 2.0, "top_k": 8}
    answer = painter.post("/generate", json=body).json()
    assert answer["model"] == "dalle"
    assert sorted(each["seed"] for each in answer["data"]) == [7, 8, 9, 10]
    scores = [each["score"] for each in answer["data"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    again = painter.post("/v1/images/generations", json=body | {"n": 1, "seed": 9, "rerank": False}).json()["data"][0]
    (same,) = [each for each in answer["data"] if each["seed"] == 9]
    assert again["b64_json"] == same["b64_json"]
    assert again["score"] is None
    picture = _picture(same["b64_json"])
    assert (picture.format, picture.size, picture.info["prompt"], picture.info["seed"]) == (
        "PNG", (16, 16), "a red star", "9"
    )  # fmt: skip
    ids = _alone(model, _drawing("a red star", 9, GUIDED)).view(1, 4, 4)
    expected = model.dvae.decode(ids).mul(255).round().byte()[0]
    shown = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
    assert torch.equal(shown, expected)
    uri = painter.post("/generate", json=body | {"n": 1, "response_format": "url"}).json()["data"][0]["url"]
    assert uri.startswith("data:image/png;base64,")
    fresh = [painter.post("/generate", json={"prompt": "a red star"}).json()["data"][0]["seed"] for _ in range(2)]
    assert fresh[0] != fresh[1]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_picture_is_completed_and_varied(painter: TestClient, model: DALLETransformer) -> None:
    start = Image.open(io.BytesIO(base64.b64decode(EXAMPLE_IMAGE))).convert("RGB")
    hole = start.convert("RGBA")
    hole.paste((0, 0, 0, 0), (0, 8, 16, 16))
    mask = base64.b64encode(_png(hole)).decode()
    body = {"prompt": "a red star", "seed": 7, "n": 2, "rerank": False}
    made = painter.post("/generate", json=body | {"image": EXAMPLE_IMAGE, "mask": mask}).json()["data"]
    expected = generate_image(
        model, "a red star", n=2, seed=7, image=start, mask=hole, sampling=Sampling(guidance_scale=2.0)
    )
    assert [_picture(each["b64_json"]).tobytes() for each in made] == [image.tobytes() for image in expected]
    form = {"prompt": "a red star", "seed": "7", "n": "2", "rerank": "false"}
    files = {"image": ("a.png", _png(start), "image/png"), "mask": ("b.png", _png(hole), "image/png")}
    assert painter.post("/v1/images/edits", data=form, files=files).json()["data"] == made
    varied = painter.post("/v1/images/variations", json={"image": EXAMPLE_IMAGE, "seed": 7}).json()["data"]
    (expected_one,) = generate_image(model, "", seed=7, image=start)
    assert _picture(varied[0]["b64_json"]).tobytes() == expected_one.tobytes()
    assert varied[0]["score"] is None  # there is no text to rank by
    other = base64.b64encode(_png(hole.resize((20, 20)))).decode()
    answer = painter.post("/generate", json=body | {"image": EXAMPLE_IMAGE, "mask": other})
    problem(answer, 422, "must be the same")
    problem(painter.post("/v1/images/edits", json=body), 422, "image: ")


def test_the_best_picture_itself_where_a_png_is_accepted(painter: TestClient) -> None:
    body = {"prompt": "a red star", "n": 3, "seed": 5}
    best = painter.post("/generate", json=body).json()["data"][0]
    answer = painter.post("/generate", json=body, headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == base64.b64decode(best["b64_json"])
    assert answer.headers["x-seed"] == str(best["seed"])


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png, application/json;q=0.5", "image/png"),
        ("image/avif,IMAGE/*;q=0.9,*/*;q=0.8", "image/png"),
        ("application/json, image/png;q=0.1", "application/json"),
        ("image/png;q=0, */*", "application/json"),
        ("image/png;q=much, text/html", "application/json"),
        ("*/*", "application/json"),
        ("", "application/json"),
    ],
)
def test_a_png_is_given_to_whom_it_is_better_than_json(painter: TestClient, accept: str, kind: str) -> None:
    answer = painter.post("/generate", json={"prompt": "a red star", "seed": 5}, headers={"Accept": accept})
    assert answer.headers["content-type"] == kind


def test_events_show_pictures_on_their_way_and_then_the_whole_ones(painter: TestClient) -> None:
    body = {"prompt": "a red star", "n": 2, "seed": 5}
    answer = painter.post("/generate", json=body | {"stream": True, "partial_images": 3})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data")]
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event")]
    assert names == [event["type"] for event in events]
    assert names == ["image_generation.partial_image"] * 6 + ["image_generation.completed"] * 2
    steps = [event["step"] for event in events[:6]]
    assert steps == sorted(steps)
    assert [event["partial_image_index"] for event in events[:6]] == [0, 0, 1, 1, 2, 2]
    plain = painter.post("/generate", json=body).json()["data"]
    assert [event["b64_json"] for event in events[6:]] == [each["b64_json"] for each in plain]
    assert events[-1]["usage"]["output_tokens"] == 32
    assert _picture(events[0]["b64_json"]).size == (16, 16)


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"n": 0}, 422, "n: "),
        ({"n": 17}, 422, "n: "),
        ({"n": "2"}, 422, "n: "),
        ({"seed": -1}, 422, "seed"),
        ({"temperature": -0.1}, 422, "temperature"),
        ({"top_p": 0}, 422, "top_p"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": "x" * 2001}, 413, "2,001 characters"),
        ({"size": "512x512"}, 422, "16x16"),
        ({"model": "clip"}, 404, "those that do: dalle"),
        ({"quality": "hd"}, 422, "quality"),
        ({"change": 0.5}, 422, "need an image"),
        ({"image": EXAMPLE_IMAGE, "change": 0}, 422, "change"),
        ({"image": EXAMPLE_IMAGE, "mask": EXAMPLE_IMAGE}, 422, "transparent nowhere"),
        ({"image": "http://example.com/a.png"}, 403, "^image: .*fetches no URLs"),
        ({"image": "AAAA"}, 415, "^image: not a picture"),
        ({"image": EXAMPLE_IMAGE, "mask": "AAAA"}, 415, "^mask: not a picture"),
        ({"image": EXAMPLE_IMAGE, "mask": EXAMPLE_IMAGE[:60]}, 422, "^mask: "),
    ],
)
def test_wrong_values_are_refused_by_name(painter: TestClient, changes: dict[str, Any], status: int, says: str) -> None:
    problem(painter.post("/generate", json={"prompt": "a red star"} | changes), status, says)


def test_a_style_of_the_models_is_drawn_and_listed(start: Start) -> None:
    styled = tiny_dalle(styles=("drawing", "photo"))
    painter = start(generators={"dalle": styled})
    (listed,) = [each for each in painter.get("/models").json()["data"] if each["id"] == "dalle"]
    assert listed["styles"] == ["drawing", "photo"]
    body = {"prompt": "a red star", "seed": 3, "top_k": 8, "style": "photo"}
    shown = _picture(painter.post("/generate", json=body).json()["data"][0]["b64_json"])
    chosen = Sampling(guidance_scale=2.0, top_k=8)
    (expected,) = generate_image(styled, "a red star", seed=3, style="photo", sampling=chosen)
    assert shown.tobytes() == expected.tobytes()
    problem(painter.post("/generate", json=body | {"style": "opera"}), 422, "'dalle' has drawing, photo")


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_generators_are_loaded_in_the_precision_that_is_set(
    tmp_path: Path, start: Start, model: DALLETransformer, precision: Any, dtype: torch.dtype
) -> None:
    save_checkpoint(model, tmp_path / "dalle")
    settings = Settings(checkpoints=tmp_path, generate_precision=precision, device="cpu")
    loaded = load_generators(settings)
    assert loaded["dalle"].image_embedding.weight.dtype == dtype
    painter = start(generators=loaded)
    made = [painter.post("/generate", json={"prompt": "a red star", "seed": 3}).json()["data"] for _ in range(2)]
    assert made[0] == made[1]


def test_a_server_without_a_generator_says_so(client: TestClient) -> None:
    problem(client.post("/generate", json={"prompt": "a red star"}), 404, "generates pictures")


def test_models_tell_what_they_make(painter: TestClient) -> None:
    listed = {each["id"]: each for each in painter.get("/models").json()["data"]}
    assert (listed["clip"]["makes"], listed["dalle"]["makes"]) == (["embedding"], ["image"])
    assert (listed["dalle"]["takes"], listed["dalle"]["dimensions"], listed["dalle"]["size"]) == (["text"], None, 16)
    assert painter.get("/v1/models/dalle").json() == listed["dalle"]


def test_a_deadline_ends_the_wait_and_the_work(start: Start, model: DALLETransformer) -> None:
    painter = start(generators={"dalle": model}, generate_deadline=1e-6)
    problem(painter.post("/generate", json={"prompt": "a red star"}), 504, "drawn")


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_drawn_is_ranked_within_the_same_deadline(
    painter: TestClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    deadlines = []

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            deadlines.append(signature(method).bind(*arguments).arguments["deadline"])
            return method(*arguments)

        return noted

    for owner, name in ((LocalGenerator, "draw"), (LocalEngine, "embed_images"), (LocalEngine, "embed_texts")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    assert painter.post("/generate", json={"prompt": "a red star", "n": 2, "stream": stream}).status_code == 200
    assert len(deadlines) == 3
    assert len(set(deadlines)) == 1


def _served(model: DALLETransformer, pool: ThreadPoolExecutor, **options: Any) -> LocalGenerator:
    return LocalGenerator("dalle", model, Settings(**options), pool)


def test_row_32_who_leaves_is_drawn_for_no_more_and_others_share_the_steps(model: DALLETransformer) -> None:
    async def scene() -> None:
        calls = 0
        real = model.read_ids

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*arguments)

        model.read_ids = counted  # type: ignore[method-assign]
        try:
            with ThreadPoolExecutor(1) as pool:
                served = _served(model, pool, generate_lanes=4, generate_queue=6)
                deadline = asyncio.get_running_loop().time() + 60

                async def whole(seed: int) -> torch.Tensor:
                    async for drawings in served.draw("a red star", [seed], PLAIN, deadline):
                        found = drawings[0].ids
                    return found

                together = await asyncio.gather(*(whole(seed) for seed in range(4)))
                assert calls <= 20  # four pictures of 16 tokens, 15 steps if all joined at once
                for seed, ids in enumerate(together):
                    assert torch.equal(ids, _alone(model, _drawing("a red star", seed, PLAIN)))

                steps = served.draw("a red star", range(6), PLAIN, deadline)
                drawings = await anext(steps)
                with pytest.raises(BusyError, match="waiting already"):
                    await anext(served.draw("a red star", [1], PLAIN, deadline))
                await steps.aclose()
                at_leaving = [drawing.done for drawing in drawings]
                assert torch.equal(await whole(9), _alone(model, _drawing("a red star", 9, PLAIN)))
                assert all(d.done <= before + 1 for d, before in zip(drawings, at_leaving, strict=True))

                with pytest.raises(DeadlineError, match="drawn"):
                    await anext(served.draw("a", [1], PLAIN, asyncio.get_running_loop().time() - 1))
                await served.close()
                with pytest.raises(BusyError, match="shutting down"):
                    await anext(served.draw("a", [1], PLAIN, deadline))
        finally:
            del model.read_ids

    asyncio.run(scene())


def test_callers_take_turns_and_one_leaves_places_for_another(model: DALLETransformer) -> None:
    async def scene() -> None:
        go = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(go.wait)  # nothing is drawn before
            served = _served(model, pool, generate_lanes=4, generate_queue=16)
            deadline = asyncio.get_running_loop().time() + 60
            joined = []

            def join(drawing: Drawing) -> None:
                joined.append(drawing.flow.caller)
                DecodeLoop.join(served._steps, drawing)

            served._steps.join = join  # type: ignore[method-assign]

            async def draw(caller: str, seeds: range) -> None:
                CALLER.set(caller)
                async for _ in served.draw("a red star", seeds, PLAIN, deadline):
                    pass

            async def begun(caller: str, seeds: range) -> asyncio.Task[None]:
                task = asyncio.create_task(draw(caller, seeds))
                await asyncio.sleep(0)
                return task

            try:
                hog = await begun("hog", range(12))
                served._pace = 0.25
                with pytest.raises(BusyError, match="12 of them yours, for about 4 s") as busy:  # 16 steps, before bulk
                    await draw("hog", range(12, 13))
                assert busy.value.retry_after == 2
                others = [await begun("other", range(2)), await begun("third", range(3))]
                with pytest.raises(BusyError, match="17 pictures are waiting already, 0 of them yours"):
                    await draw("fourth", range(1))
            finally:
                go.set()
            await asyncio.gather(hog, *others)
            assert joined[:9] == ["hog"] * 4 + ["other", "third", "other", "third", "third"]
            assert served.depth == 0
            assert 0 < served._pace < 0.25
            await served.close()

    asyncio.run(scene())


def test_who_would_be_late_by_the_pace_of_those_before_is_told_at_once_and_when(model: DALLETransformer) -> None:
    async def scene() -> None:
        go = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(go.wait)  # nothing is drawn before
            served = _served(model, pool, generate_lanes=4)
            now = asyncio.get_running_loop().time

            async def draw(caller: str, pictures: int, seconds: float) -> None:
                CALLER.set(caller)
                async for _ in served.draw("a red star", range(pictures), PLAIN, now() + seconds):
                    pass

            try:
                for _ in range(19):
                    served._note(1.0)
                assert served._pace == 0  # the first steps are slow, and say nothing
                served._note(1.0)  # a step, in which each of 4 lanes has a token drawn; a picture has 16
                first = asyncio.create_task(draw("first", 12, 60))  # alone, whatever it takes
                await asyncio.sleep(0)
                with pytest.raises(
                    BusyError, match=r"12 pictures are waiting already, 0 of them yours, .* 16 s"
                ) as busy:
                    await draw("short", 1, 10)
                assert busy.value.retry_after in (6, 7)
                with pytest.raises(BusyError, match="for about 96 s"):  # its 12 and the first's, 4 at a time
                    await draw("bulk", 12, 60)
                second = asyncio.create_task(draw("short", 1, 20))  # does not wait for bulk work
            finally:
                go.set()
            await asyncio.gather(first, second)
            await served.close()

    asyncio.run(scene())


def test_a_call_of_more_than_the_queue_holds_is_drawn_if_nobody_waits(start: Start, model: DALLETransformer) -> None:
    painter = start(generators={"dalle": model}, generate_queue=2)
    assert len(painter.post("/generate", json={"prompt": "a red star", "n": 5}).json()["data"]) == 5


def test_a_failing_model_fails_its_callers_and_serves_the_next(model: DALLETransformer) -> None:
    async def scene() -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("no memory")

        with ThreadPoolExecutor(1) as pool:
            served = _served(model, pool)
            deadline = asyncio.get_running_loop().time() + 60
            for name in ("read_text", "read_ids"):
                setattr(model, name, broken)
                try:
                    with pytest.raises(ModelError, match="the model failed"):
                        async for _ in served.draw("a red star", [1], PLAIN, deadline):
                            pass
                finally:
                    delattr(model, name)
            async for drawings in served.draw("a red star", [1], PLAIN, deadline):
                found = drawings[0].ids
            assert torch.equal(found, _alone(model, _drawing("a red star", 1, PLAIN)))
            await served.close()

    asyncio.run(scene())


def test_openais_client_and_the_command_line(
    tmp_path: Path, model: DALLETransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tiny_clip(), tmp_path / "checkpoints" / "clip")
    save_checkpoint(model, tmp_path / "checkpoints" / "dalle")
    save_checkpoint(model.dvae, tmp_path / "checkpoints" / "dvae")  # passed over
    with running(tmp_path / "checkpoints", tmp_path / "data") as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            made = client.images.generate(model="dalle", prompt="a red star", n=2, response_format="b64_json")
            assert made.data is not None
            assert _picture(made.data[0].b64_json or "").size == (16, 16)
            kinds = []
            with client.images.generate(model="dalle", prompt="a red star", stream=True, partial_images=2) as stream:
                for event in stream:
                    kinds.append(event.type)
                    assert _picture(event.b64_json).size == (16, 16)
            assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
            start = base64.b64decode(EXAMPLE_IMAGE)
            edited = client.images.edit(image=[("a.png", start)], prompt="a red star", n=2, response_format="b64_json")
            with pytest.warns(DeprecationWarning, match="deprecated"):  # OpenAI's own models no longer do this
                varied = client.images.create_variation(image=("a.png", start), response_format="b64_json")
            for answer in (edited, varied):
                assert answer.data is not None
                assert _picture(answer.data[-1].b64_json or "").size == (16, 16)
            with client.images.edit(image=("a.png", start), prompt="a red star", stream=True) as edits:
                assert [event.type for event in edits] == ["image_edit.completed"]
        (tmp_path / "out").mkdir()
        place = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
        assert main(["generate", "a red star", "-n", "2", "--seed", "3", *place]) == 0
        said = capsys.readouterr().out
        assert "seed 3, score" in said
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["3.png", "4.png"]
    assert main(["generate", "a red star", "--server", server.url, *place]) == 1  # it is gone
    assert "cannot be reached" in capsys.readouterr().err
    place[1] = str(tmp_path / "other")
    arguments = ["--checkpoints", str(tmp_path / "checkpoints"), "--threads", "1"]
    first = (tmp_path / "out" / "3.png").read_bytes()
    assert main(["generate", "a red star", "--seed", "3", *place, *arguments]) == 0  # without a server: the same
    assert (tmp_path / "out" / "3.png").read_bytes() == first


def test_a_model_that_draws_is_known_to_embed_nothing(painter: TestClient) -> None:
    problem(painter.post("/embed", json={"input": "a", "model": "dalle"}), 422, "'dalle' draws pictures alone")
