"""Batches: formed, bounded, split around what breaks them, and dropped for those who left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support import in_python, tiny_clip

from app.batching import Batcher, Lanes
from app.engine import Engine, LocalEngine, ModelEngine, like_lengths
from app.fairness import CALLER, FairQueue, Flow
from app.settings import Settings
from models.errors import BusyError, DeadlineError, InputError, ModelError


class Recorder:
    """A readable fake: the result for a number is the number doubled; negative ones break the whole batch."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.seconds = seconds

    def __call__(self, items: list[int]) -> list[int | Exception]:
        self.batches.append(items)
        time.sleep(self.seconds)
        if any(item < 0 for item in items):
            raise InputError("negative") if -1 in items else RuntimeError("broken")
        return [2 * item for item in items]


class Held(Recorder):
    """Holds the batch that has 0 in it until told to go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def __call__(self, items: list[int]) -> list[int | Exception]:
        assert 0 not in items or self.go.wait(5)
        return super().__call__(items)


def _run(work: Any, forward: Callable[[list[int]], list[int | Exception]], **options: Any) -> Any:
    async def main() -> Any:
        with ThreadPoolExecutor(1) as pool:
            settings = {"max_batch": 4, "max_wait": 0.02, "queue_size": 8} | options
            batcher = Batcher(forward, pool, **settings)
            try:
                return await work(batcher, asyncio.get_running_loop().time() + 5)
            finally:
                await batcher.close()

    return asyncio.run(main())


def test_concurrent_items_share_batches_and_keep_their_order() -> None:
    forward = Recorder()
    got = _run(lambda b, d: asyncio.gather(*(b.submit(i, d) for i in range(10))), forward)
    assert got == [2 * i for i in range(10)]
    assert [len(batch) for batch in forward.batches] == [4, 4, 2]


def test_an_input_that_breaks_its_batch_fails_alone() -> None:
    forward = Recorder()

    async def work(batcher: Batcher[int, int], deadline: float) -> list[Any]:
        return await asyncio.gather(*(batcher.submit(i, deadline) for i in (1, -2, 3, -1)), return_exceptions=True)

    got = _run(work, forward)
    assert got[0] == 2
    assert got[2] == 6
    assert isinstance(got[1], ModelError)
    assert isinstance(got[3], InputError)


def test_a_full_queue_answers_at_once() -> None:
    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        with batcher.admit(8, deadline):
            started = asyncio.get_running_loop().time()
            with pytest.raises(BusyError, match="8 inputs are waiting"), batcher.admit(1, deadline):
                pass
            assert asyncio.get_running_loop().time() - started < 0.05
        with batcher.admit(1, deadline):
            pass

    _run(work, Recorder())


def test_who_would_be_late_by_the_pace_of_those_before_is_told_at_once_and_when() -> None:
    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        now = asyncio.get_running_loop().time
        with batcher.admit(1, deadline) as places:
            await places.submit(1)  # 0.2 seconds an item
        with batcher.admit(50, now() + 1):  # alone, whatever it takes
            started = now()
            with pytest.raises(BusyError, match=r"for about 1\d s") as refused, batcher.admit(9, now() + 4):
                pass
            assert 7 <= refused.value.retry_after <= 15
            assert now() - started < 0.05
            with (
                batcher.admit(9, now() + 20),
                batcher.admit(1, now() + 4),
            ):  # a short request does not wait for bulk work
                pass
        with batcher.admit(1, now() + 0.05):
            pass

    _run(work, Recorder(seconds=0.2), queue_size=100)


def test_a_batch_waits_for_what_is_on_its_way_and_for_nothing_else() -> None:
    forward = Recorder()

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        now = asyncio.get_running_loop().time

        async def decoded(number: int) -> int:
            with batcher.admit(1, deadline) as places:
                await asyncio.sleep(0.1 * number)
                return await places.submit(number)

        started = now()
        assert await decoded(0) == 0
        assert now() - started < 0.5  # alone: not the 30 seconds of max_wait
        assert await asyncio.gather(decoded(1), decoded(2), decoded(0)) == [2, 4, 0]
        with batcher.admit(2, deadline) as places:  # one of two that never comes, for it cannot be decoded
            alone = asyncio.ensure_future(places.submit(7))
            await asyncio.sleep(0.1)
            assert not alone.done()
        assert await alone == 14

    _run(work, forward, max_wait=30.0)
    assert [sorted(batch) for batch in forward.batches] == [[0], [0, 1, 2], [7]]


def test_late_and_cancelled_items_are_not_computed() -> None:
    forward = Recorder(seconds=0.15)

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        now = asyncio.get_running_loop().time()
        first = batcher.submit(1, deadline)
        await asyncio.sleep(0.05)
        late = batcher.submit(2, now + 0.08)
        gone = batcher.submit(3, deadline)
        kept = batcher.submit(4, deadline)
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(DeadlineError):
            await late
        assert await first == 2
        assert await kept == 8

    _run(work, forward)
    assert forward.batches == [[1], [4]]


def test_nobody_is_left_waiting_when_it_closes() -> None:
    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        waiting = batcher.submit(1, deadline)
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(BusyError):
            await waiting
        with pytest.raises(BusyError), batcher.admit(1, deadline):
            pass

    _run(work, Recorder(), max_wait=1.0)


def _order(pushed: list[tuple[Flow, int]]) -> list[int]:
    queue: FairQueue[int] = FairQueue()
    for flow, item in pushed:
        queue.push(flow, item)
    return [queue.pop() for _ in range(len(queue))]


def test_a_backlog_waits_behind_its_own_and_short_requests_come_first() -> None:
    hog, other = Flow("hog", True), Flow("other", True)
    backlog = [(hog, item) for item in range(6)]
    assert _order([*backlog, (other, 10), (other, 11)]) == [0, 10, 1, 11, 2, 3, 4, 5]
    shorts = [(Flow("hog", False), 20 + item) for item in range(3)]  # of the same caller too
    assert _order([*backlog, *shorts])[:4] == [0, 20, 21, 22]

    queue: FairQueue[int] = FairQueue()
    for flow, item in backlog:
        queue.push(flow, item)
    assert [queue.pop() for _ in range(5)] == [0, 1, 2, 3, 4]
    queue.push(other, 10)  # who was away has saved up no turns, and owes none
    queue.push(other, 11)
    queue.push(hog, 6)
    assert [queue.pop() for _ in range(4)] == [10, 5, 11, 6]


def test_lanes_run_batches_at_once_and_share_what_waits() -> None:
    both, forward = threading.Barrier(2, timeout=5), Recorder()
    threads: list[str] = []

    def meet(items: list[int]) -> list[int | Exception]:
        threads.append(threading.current_thread().name)
        if len(items) > 1:
            both.wait()
        return forward(items)

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        submit = partial(batcher.submit, deadline=deadline)
        assert await asyncio.gather(*map(submit, range(10))) == [2 * item for item in range(10)]
        assert await submit(1) == 2

    with ThreadPoolExecutor(2, "lane") as pool:
        _run(work, meet, max_batch=8, lanes=Lanes(pool, 2, 2))
    assert [len(batch) for batch in forward.batches] == [5, 5, 1]
    assert [name.startswith("lane") for name in threads] == [True, True, False]  # who is alone has every core


def test_beside_a_lane_with_much_to_do_a_few_wait_for_more() -> None:
    forward = Held()

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        with batcher.admit(4, deadline) as places:
            started = [places.submit(item) for item in range(4)]
            await asyncio.sleep(0.1)
            with batcher.admit(2, deadline) as later:
                assert await asyncio.gather(started[3], later.submit(4), later.submit(5)) == [6, 8, 10]
            assert await batcher.submit(6, deadline) == 12  # as soon as its time to wait is over
            forward.go.set()
            assert await asyncio.gather(*started) == [0, 2, 4, 6]

    with ThreadPoolExecutor(2) as pool:
        _run(work, forward, lanes=Lanes(pool, 2, 3), max_wait=1.0)
    assert forward.batches == [[3, 4, 5], [6], [0, 1, 2]]


def test_a_long_batch_in_a_lane_holds_nobody_up() -> None:
    forward = Held()

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        long = [batcher.submit(item, deadline) for item in range(3)]
        await asyncio.sleep(0.1)
        assert await batcher.submit(7, deadline) == 14
        assert not any(task.done() for task in long)
        forward.go.set()
        assert await asyncio.gather(*long) == [0, 2, 4]

    with ThreadPoolExecutor(2) as pool:
        _run(work, forward, lanes=Lanes(pool, 2, 3))
    assert forward.batches == [[7], [0, 1, 2]]


def test_callers_share_the_batches_and_one_leaves_places_for_another() -> None:
    forward = Recorder(seconds=0.02)

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        async def ask(caller: str, items: range) -> None:
            CALLER.set(caller)
            with batcher.admit(len(items), deadline) as places:
                await asyncio.gather(*(places.submit(item) for item in items))

        first = asyncio.create_task(ask("hog", range(12)))
        await asyncio.sleep(0.01)
        with pytest.raises(BusyError, match="12 of them yours"):
            await asyncio.create_task(ask("hog", range(12, 24)))
        await asyncio.gather(first, asyncio.create_task(ask("other", range(100, 102))))

    _run(work, forward, queue_size=16)
    assert forward.batches[0] == [0, 1, 2, 3]
    assert set(forward.batches[1]) >= {100, 101}


def test_one_call_of_more_than_all_places_leaves_some_to_others_and_none_to_its_caller() -> None:
    forward = Recorder()

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        async def ask(caller: str) -> int:
            CALLER.set(caller)
            with batcher.admit(1, deadline) as places:
                return await places.submit(1)

        CALLER.set("hog")
        with batcher.admit(700, deadline):
            assert await asyncio.create_task(ask("other")) == 2
            with pytest.raises(BusyError, match="700 of them yours"):
                await asyncio.create_task(ask("hog"))

    _run(work, forward)


def test_what_is_wrong_with_the_model_itself_is_tried_once() -> None:
    asked = []

    def forward(items: list[int]) -> list[int | Exception]:
        asked.append(len(items))
        raise ModelError("it cannot be loaded again")

    async def work(batcher: Batcher[int, int], deadline: float) -> None:
        found = await asyncio.gather(*(batcher.submit(i, deadline) for i in range(4)), return_exceptions=True)
        assert [str(each) for each in found] == ["it cannot be loaded again"] * 4

    _run(work, forward)
    assert asked == [4]


class Counting:
    """An engine whose row for a text begins with its length, for a picture (a tensor already) with its first level; 13
    is no number."""

    name, fingerprint, embed_dim, image_size, takes_text = "fake", "f", 2, 8, True
    details: ClassVar[dict[str, Any]] = {}
    lanes: ClassVar[dict[str, Any]] = {}

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.texts, self.pictures = seconds, 0, 0

    def prepare_texts(self, texts: Any) -> list[torch.Tensor]:
        return [torch.full((3,), len(text)) for text in texts]

    def encode_texts(self, rows: Any) -> np.ndarray:
        time.sleep(self.seconds)
        self.texts += len(rows)
        return self._rows(rows)

    def prepare_image(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def encode_images(self, rows: Any) -> np.ndarray:
        time.sleep(self.seconds)
        self.pictures += len(rows)
        return self._rows(rows)

    def _rows(self, rows: Any) -> np.ndarray:
        values = [[float("nan") if row[0] == 13 else float(row[0]), 1.0] for row in rows]
        return np.array(values, np.float32)


def _serve(work: Any, engine: Counting, **settings: Any) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as worker:
            served = LocalEngine(engine, Settings(**settings), pool, worker)  # type: ignore[arg-type]
            await work(served, asyncio.get_running_loop().time() + 5)
            await served.close()

    asyncio.run(main())


def test_served_texts_are_remembered_and_not_finite_rows_fail_alone() -> None:
    engine = Counting()

    async def work(served: LocalEngine, deadline: float) -> None:
        first, tokens = await served.embed_texts(["a", "bb", "a"], deadline)
        assert first[:, 0].tolist() == [1, 2, 1]
        assert (engine.texts, tokens) == (2, 9)
        await served.embed_texts(["a"], deadline)
        assert engine.texts == 2
        await served.embed_texts(["ccc"], deadline)
        await served.embed_texts(["bb"], deadline)  # the least recently used one had to leave
        assert engine.texts == 4
        for _ in range(2):  # a failure is not remembered
            with pytest.raises(ModelError, match="no finite numbers"):
                await served.embed_texts(["x" * 13], deadline)
        assert engine.texts == 6

    _serve(work, engine, text_cache=2)


def test_label_sets_are_remembered_whole() -> None:
    engine = Counting()

    async def work(served: LocalEngine, deadline: float) -> None:
        first = await served.embed_labels(["a", "bb"], ["{}", "{}{}"], deadline)
        texts, _ = await served.embed_texts(["a", "aa", "bb", "bbbb"], deadline)
        mean = texts.reshape(2, 2, -1).mean(1)
        assert np.allclose(first, mean / np.linalg.norm(mean, axis=1, keepdims=True))
        assert await served.embed_labels(["a", "bb"], ["{}", "{}{}"], deadline) is first
        assert await served.embed_labels(["bb", "a"], ["{}", "{}{}"], deadline) is not first
        for number in range(40):
            await served.embed_labels([f"label {number}"], ["{}"], deadline)
        assert len(served._label_sets) == 32
        assert await served.embed_labels(["a", "bb"], ["{}", "{}{}"], deadline) is not first

    _serve(work, engine)


@pytest.mark.parametrize("cache", [0, 100])
def test_a_text_that_several_ask_for_at_once_is_embedded_once(cache: int) -> None:
    engine = Counting(seconds=0.1)

    async def work(served: LocalEngine, deadline: float) -> None:
        asked = [["a", "bb"], ["bb", "ccc"], ["a"], ["a"]]
        found = await asyncio.gather(*(served.embed_texts(texts, deadline) for texts in asked))
        assert [rows[:, 0].tolist() for rows, _ in found] == [[1, 2], [2, 3], [1], [1]]
        assert [tokens for _, tokens in found] == [6, 6, 3, 3]

    _serve(work, engine, text_cache=cache)
    assert engine.texts == (3 if cache else 6)


def test_a_short_request_does_not_wait_for_bulk_work_that_has_its_text() -> None:
    engine = Counting(seconds=0.1)

    async def work(served: LocalEngine, deadline: float) -> None:
        async def ask(caller: str, *texts: str) -> Any:
            CALLER.set(caller)
            return (await served.embed_texts(texts, deadline))[0][:, 0].tolist()

        bulk = asyncio.create_task(ask("bulk", "a", *("b" * (20 + n) for n in range(60))))
        await asyncio.sleep(0.05)
        short = [asyncio.create_task(ask("short", "a")) for _ in range(2)]
        assert await asyncio.gather(*short) == [[1], [1]]
        assert not bulk.done()
        assert (await bulk)[:2] == [1, 20]
        assert engine.texts == 62  # "a" for the bulk and once for the others

    _serve(work, engine, batch_size=4)


def test_a_picture_that_several_ask_for_at_once_is_embedded_once() -> None:
    engine = Counting(seconds=0.2)

    def openers(*levels: int) -> list[Any]:
        return [lambda size, level=level: torch.full((4,), level) for level in levels]

    async def work(served: LocalEngine, deadline: float) -> None:
        first = asyncio.create_task(served.embed_images(openers(1), deadline))
        await asyncio.sleep(0.05)
        hurried = asyncio.create_task(served.embed_images(openers(1), asyncio.get_running_loop().time() + 0.05))
        others = [
            asyncio.create_task(served.embed_images(openers(*levels), deadline)) for levels in ((1, 2, 2), (2, 1))
        ]
        with pytest.raises(DeadlineError):
            await hurried
        assert [[row[0] for row in rows] for rows in await asyncio.gather(*others)] == [[1, 2, 2], [2, 1]]
        assert (await first)[:, 0].tolist() == [1]
        assert engine.pictures == 2
        leaves = asyncio.create_task(served.embed_images(openers(3), deadline))
        await asyncio.sleep(0.05)
        stays = asyncio.create_task(served.embed_images(openers(3), deadline))
        await asyncio.sleep(0.05)
        leaves.cancel()
        assert (await stays)[:, 0].tolist() == [3]
        assert engine.pictures == 4
        for _ in range(2):  # a failure is not remembered
            with pytest.raises(ModelError, match="no finite numbers"):
                await served.embed_images(openers(13), deadline)
        began = asyncio.get_running_loop().time()
        await served.embed_images(openers(5, 5), deadline)  # no batch waits for the second, which waits for the first
        assert asyncio.get_running_loop().time() - began < 0.2 + 0.5
        assert not served._on_their_way
        assert sum(served.depths().values()) == 0

    _serve(work, engine, batch_wait_ms=1000)


def test_who_waits_for_a_text_of_another_goes_on_alone_if_that_one_leaves_and_is_late_by_its_own_deadline() -> None:
    engine = Counting(seconds=0.2)

    async def work(served: LocalEngine, deadline: float) -> None:
        first = asyncio.create_task(served.embed_texts(["a"], deadline))
        await asyncio.sleep(0.05)
        hurried = asyncio.create_task(served.embed_texts(["a"], asyncio.get_running_loop().time() + 0.05))
        second = asyncio.create_task(served.embed_texts(["a", "bb"], deadline))
        with pytest.raises(DeadlineError):
            await hurried
        first.cancel()
        rows, _ = await second
        assert rows[:, 0].tolist() == [1, 2]
        assert first.cancelled()

    _serve(work, engine)


def test_rows_have_unit_length_in_any_precision(engines: dict[str, Engine]) -> None:
    rows = engines["clip"].embed_texts(["a", "b c", "d " * 20])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert engines["clip"].embed_texts([]).shape == (0, 24)


def test_texts_of_like_lengths_are_embedded_together_and_come_back_in_order() -> None:
    lengths = [5, 40, 16, 17, 77, 6, 33, 1]
    parts = like_lengths(lengths)
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    assert [[lengths[place] for place in part] for part in parts] == [[1, 5, 6, 16], [17], [33, 40], [77]]
    assert [len(part) for part in like_lengths([100] * 70)] == [32, 32, 6]  # 4096 tokens of 128 at once

    model = tiny_clip()
    seen: list[tuple[int, ...]] = []
    model.encode_text = in_python(model.encode_text, lambda tokens: seen.append(tuple(tokens.shape)))  # type: ignore[method-assign]
    engine = ModelEngine("clip", model, device="cpu")
    texts = ["a red star", "two hearts on a gray background " * 3, "a blue circle"]
    together = engine.embed_texts(texts)
    assert sorted(length for _, length in seen) == sorted({length for _, length in seen})
    assert len(seen) == 2
    assert np.allclose(together, np.concatenate([engine.embed_texts([text]) for text in texts]), atol=1e-6)


def test_row_39_out_of_memory_is_a_busy_answer_for_one_input() -> None:
    model = tiny_clip()

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    model.encode_text = fail  # type: ignore[method-assign]
    with pytest.raises(BusyError, match="no memory left"):
        ModelEngine("clip", model, device="cpu").embed_texts(["a"])
