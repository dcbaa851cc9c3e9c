"""The application on Ray: answers as those of the plain one, replicas that die under load, how many there are.

`make ray`, and `make faults-ray` (root) for the hosts; run as a script it is the load.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hosts import ALLOWED, Hosts
from PIL import Image
from ray_cluster import ENVIRONMENT, RAY, SMALL, places_for_ray, start_ray
from starlette.testclient import TestClient
from support import tiny_clip, tiny_dalle, wait_for
from test_readme_commands import ROOT, blocks

from app.loading import load_engines, load_generators
from app.main import create_app
from app.ray_serve import Plan, QueueWait, plans_of
from app.settings import Settings
from app.sqlite_collections import SQLiteCollections
from models.checkpoint import save_checkpoint
from models.errors import InputError

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray, in an environment of its own: make ray")
AT_ONCE = 12


def _decision(waits: list[float], current: int = 4, most: int = 10) -> float:
    context = SimpleNamespace(
        aggregated_metrics={"queue_wait_seconds": dict(enumerate(waits))} if waits else None,
        current_num_replicas=current, target_num_replicas=current,
        capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=most,
    )  # fmt: skip
    wanted, state = QueueWait(target=0.2)(context)
    assert state == {}
    return wanted


def test_replicas_follow_the_wait_in_their_queues() -> None:
    assert _decision([]) == 4  # nothing is known yet
    assert _decision([0.3, 0.3, 0.3, 0.3]) == pytest.approx(6)
    assert _decision([0.6, 0.0, 0.6, 0.0]) == pytest.approx(6)  # of all of them
    assert _decision([60.0] * 4) == 8  # not more than twice as many at a time
    assert _decision([60.0] * 4, most=7) == 7
    assert _decision([0.1] * 4) == 4  # near enough
    assert _decision([0.04] * 4) == 3
    assert _decision([0.0], current=1) == 1


def test_what_is_said_of_one_model_goes_before_what_is_said_of_all() -> None:
    plans = plans_of(["clip", "dalle"], ["clip=2-8", "3"], ["dalle=1", "0.5"])
    assert plans == {"clip": Plan(2, 8, 0.5), "dalle": Plan(3, 3, 1.0)}
    with pytest.raises(InputError, match="no model 'vit'; there are: clip, dalle"):
        plans_of(["clip", "dalle"], ["vit=2"], [])
    for wrong in ("clip=x", "0", "3-2"):
        with pytest.raises(InputError, match="--replicas"):
            plans_of(["clip"], [wrong], [])


@dataclass
class Cluster:
    """A head of Ray on this machine, and folders for what runs on it."""

    process: subprocess.Popen[bytes]
    address: str
    port: int
    folder: Path

    def replicas(self, of: str) -> list[int]:
        """Processes that are replicas of a deployment."""
        return [pid for pid in _below(self.process.pid) if f":semblance:{of}" in _title(pid)]

    def status(self) -> str:
        """What Ray says of it."""
        command = [RAY, "status", "--address", self.address]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60).stdout

    @contextmanager
    def serving(self, *options: str, log: str) -> Iterator[str]:
        """`semblance ray-serve` as the README has it, with more options -> its address."""
        (command,) = [each for each in blocks(ROOT / "app" / "README.md") if each.startswith("semblance ray-serve")]
        given = [sys.executable, "-m", "app", *shlex.split(command)[1:], "--address", self.address]
        given += ["--checkpoints", str(self.folder / "checkpoints"), "--data", str(self.folder / "data")]
        given += ["--port", str(self.port), "--threads", "1", *options]
        file = self.folder / log
        with file.open("wb") as said:
            process = subprocess.Popen(given, stdout=said, stderr=said, env=ENVIRONMENT, cwd=self.folder)
        try:
            wait_for(lambda: b" ready on " in file.read_bytes() or process.poll() is not None, 120)
            assert process.poll() is None, file.read_text()[-3000:]
            yield f"http://127.0.0.1:{self.port}"
        finally:
            process.terminate()
            assert process.wait(60) == 0, file.read_text()[-3000:]


def _below(pid: int) -> Iterator[int]:
    """All processes that a process has started, and they in turn."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(place.read_text().rpartition(")")[2].split()[1]), []).append(int(place.parent.name))
        except OSError:  # it has ended
            continue
    waiting = [pid]
    while waiting:
        found = parents.get(waiting.pop(), [])
        waiting += found
        yield from found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    save_checkpoint(tiny_clip(), folder / "checkpoints" / "clip", provenance={"data": "none"})
    save_checkpoint(tiny_dalle(), folder / "checkpoints" / "dalle", provenance={"data": "none"})
    port = _free_port()
    # Logical cores and GPUs: replicas of these models need hardly any, and run on the cores.
    command = [RAY, "start", "--head", "--block", "--port", str(port), "--num-cpus", "8", "--num-gpus", "1", *SMALL]
    with places_for_ray() as environment:
        with (folder / "head").open("wb") as said:
            head = subprocess.Popen([*command], stdout=said, stderr=said, env=environment)
        wait_for(lambda: b"Ray runtime started" in (folder / "head").read_bytes(), 60)
        yield Cluster(head, f"127.0.0.1:{port}", _free_port(), folder)
        started = list(_below(head.pid))
        head.kill()
        head.wait()
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Iterator[httpx.Client]:
    with (
        cluster.serving("--replicas", "clip=2", "--gpus", "clip=0.4", "--gpus", "dalle=0.2", log="served") as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture
def plain(cluster: Cluster, tmp_path: Path) -> Iterator[TestClient]:
    """The same models in this process."""
    settings = Settings(
        checkpoints=cluster.folder / "checkpoints", store=tmp_path, threads=1, device="cpu", backend="torch-fp32"
    )
    with SQLiteCollections(settings.store) as collections:
        app = create_app(settings, load_engines(settings), collections, load_generators(settings))
        with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
            yield client


def _same(one: Any, other: Any) -> bool:
    """Alike to 1e-5, times and ids of requests left out."""
    if isinstance(one, dict):
        own, theirs = (each.keys() - {"created", "created_at", "took_ms", "request_id"} for each in (one, other))
        return own == theirs and all(_same(one[key], other[key]) for key in own)
    if isinstance(one, list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == (pytest.approx(other, abs=1e-5) if isinstance(one, float) else other))


@needs_ray
def test_answers_are_those_of_the_plain_application(
    served: httpx.Client, plain: TestClient, encoded: Callable[..., bytes]
) -> None:
    pictures = [base64.b64encode(encoded(seed)).decode() for seed in range(4)]
    shown = [{"image": picture} for picture in pictures]
    items = [{"id": str(seed), "image": picture, "caption": f"picture {seed}"} for seed, picture in enumerate(pictures)]
    drawn = {"prompt": "a red star", "n": 3, "seed": 5}
    requests: list[tuple[str, str, Any]] = [
        ("GET", "/v1/models", None),
        ("POST", "/embed", {"input": ["a red star", {"text": "a blue circle"}, *shown]}),
        ("POST", "/embed", {"input": shown, "dimensions": 8}),
        ("POST", "/zero-shot", {"input": shown, "labels": ["red star", "blue circle"]}),
        ("PUT", "/collections/photos", {}),
        ("POST", "/collections/photos/items", {"items": items}),
        ("POST", "/search", {"query": "a blue circle", "collection": "photos"}),
        ("POST", "/search", {"query": shown[1], "collection": "photos", "k": 2}),
        ("POST", "/generate", drawn),
        ("POST", "/v1/images/edits", {**drawn, "image": pictures[0], "change": 0.5}),
    ]
    for method, path, body in requests:
        answers = [client.request(method, path, json=body) for client in (served, plain)]
        assert [each.status_code for each in answers] == [answers[1].status_code] * 2, answers[0].text
        assert answers[1].is_success, answers[1].text
        assert _same(answers[0].json(), answers[1].json()), path
        assert len(answers[0].headers.get_list("x-request-id")) == 1


@needs_ray
def test_replicas_share_a_gpu(served: httpx.Client, cluster: Cluster) -> None:
    """As Ray counts them: all three have a place on the one there is."""
    assert len(cluster.replicas("encoder-clip")) == 2
    assert len(cluster.replicas("generator-dalle")) == 1
    wait_for(lambda: "1.0/1.0 GPU" in cluster.status(), 30)


@needs_ray
def test_drawing_is_streamed(served: httpx.Client, plain: TestClient) -> None:
    body = {"prompt": "a red star", "n": 2, "seed": 5, "stream": True, "partial_images": 3}
    told = []
    for client in (served, plain):
        lines = client.post("/generate", json=body).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        told.append(events)
        steps = [each["step"] for each in events if each["type"].endswith("partial_image")]
        assert steps == sorted(steps)
        assert 0 < steps[0] < 16
    whole = [[each for each in events if each["type"].endswith("completed")] for events in told]
    assert [len(each) for each in whole] == [2, 2]
    assert _same(*whole)


@needs_ray
def test_what_is_wrong_is_told_in_the_same_words(
    served: httpx.Client, plain: TestClient, encoded: Callable[..., bytes]
) -> None:
    good, none = base64.b64encode(encoded()).decode(), base64.b64encode(b"no picture").decode()
    for path, body in (
        ("/embed", {"input": ["a", {"image": good}, {"image": none}]}),
        ("/embed", {"input": [{"image": "!"}]}),
        ("/embed", {"input": [{"image": "http://example.com/a.png"}]}),
        ("/embed", {"input": ["a" * 5000]}),
        ("/embed", {"input": ["a"], "model": "vit"}),
        ("/embed", {"input": ["a"], "dimensions": 1000}),
        ("/zero-shot", {"input": [{"image": none}], "labels": ["a"]}),
        ("/search", {"query": "a", "k": 0}),
        ("/generate", {"prompt": "a", "style": "none"}),
        ("/generate", {"prompt": "a", "size": "5x5"}),
        ("/generate", {"prompt": "a", "image": none}),
        ("/generate", {"prompt": "a", "image": good, "change": 2}),
    ):
        answers = [client.post(path, json=body) for client in (served, plain)]
        assert [each.status_code // 100 for each in answers] == [4, 4], (path, answers[0].text)
        assert answers[0].status_code == answers[1].status_code
        assert _same(answers[0].json(), answers[1].json()), (answers[0].text, answers[1].text)
        assert answers[0].json()["request_id"] == answers[0].headers["x-request-id"]


async def load(url: str, seconds: float, shown: tuple[dict[str, str], ...] = ()) -> list[tuple[float, int]]:
    """Embed a text and these pictures, so many requests at once, none sent twice: when each was answered, with what, 0
    for a hang-up."""
    answers: list[tuple[float, int]] = []
    end = time.time() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def ask(caller: int) -> None:
            number = 0
            while time.time() < end:
                number += 1
                try:
                    answer = await client.post("/embed", json={"input": [f"text {caller} {number}", *shown]})
                    answers.append((time.time(), answer.status_code))
                except httpx.TransportError:
                    answers.append((time.time(), 0))

        await asyncio.gather(*(ask(caller) for caller in range(AT_ONCE)))
    return answers


def slow_picture(width: int, height: int) -> dict[str, str]:
    """An input that is decoded for much longer than it travels."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return {"image": base64.b64encode(file.getvalue()).decode()}


def _resent(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("semblance_resent_calls_total"))


@needs_ray
def test_what_a_killed_replica_had_is_answered_by_another(served: httpx.Client, cluster: Cluster) -> None:
    large = slow_picture(4000, 3000)
    url, rounds = str(served.base_url), 0
    before = _resent(url)
    while _resent(url) == before:  # a kill may find nothing that was begun; then what waits is Ray's to send again
        rounds += 1
        assert rounds < 6
        wait_for(lambda: len(cluster.replicas("encoder-clip")) == 2, 60)
        victim, other = cluster.replicas("encoder-clip")

        def kill(victim: int = victim) -> None:
            os.kill(victim, signal.SIGSTOP)  # what it has begun it does not finish
            time.sleep(0.5)
            os.kill(victim, signal.SIGKILL)

        timer = threading.Timer(1.5, kill)
        timer.start()
        answers = asyncio.run(load(url, 5, (large,)))
        timer.join()
        assert Counter(status for _, status in answers).keys() == {200}
        assert len(answers) > AT_ONCE
        wait_for(lambda: len(cluster.replicas("encoder-clip")) == 2, 60)
        assert victim not in cluster.replicas("encoder-clip")
        assert other in cluster.replicas("encoder-clip")


@needs_ray
def test_a_picture_whose_generator_is_killed_is_drawn_by_the_next(served: httpx.Client, cluster: Cluster) -> None:
    body = {"prompt": "a blue circle", "seed": 9, "n": 2}
    expected = served.post("/generate", json=body).json()
    (victim,) = cluster.replicas("generator-dalle")
    os.kill(victim, signal.SIGSTOP)
    timer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
    timer.start()
    answer = served.post("/generate", json=body)
    timer.join()
    assert answer.status_code == 200, answer.text
    assert _same(answer.json(), expected)


@needs_ray
@pytest.mark.skipif(not os.environ.get("FAULTS"), reason="takes minutes: make faults-ray")
def test_there_are_more_replicas_while_inputs_wait(cluster: Cluster) -> None:
    """Last of those with this cluster. The replicas that are not needed any more go after the five minutes that Ray
    gives them."""
    # This model is done in a moment, so a moment is what is too long to wait for it.
    with cluster.serving("--replicas", "clip=1-3", "--gpus", "0.1", "--wait-ms", "0.1", log="scaled") as url:
        loading = threading.Thread(target=lambda: answers.extend(asyncio.run(load(url, 150))))
        answers: list[tuple[float, int]] = []
        began = time.monotonic()
        loading.start()
        came = []
        for count in (2, 3):
            wait_for(lambda count=count: len(cluster.replicas("encoder-clip")) >= count, 140)  # type: ignore[misc]
            came.append(time.monotonic() - began)
        loading.join()
        quiet = time.monotonic()
        wait_for(lambda: len(cluster.replicas("encoder-clip")) == 1, 700)
        went = time.monotonic() - quiet
    assert {status for _, status in answers} == {200}
    print(f"{AT_ONCE} callers: a second replica after {came[0]:.0f} s and a third after {came[1]:.0f};", end=" ")
    print(f"one again {went:.0f} s after the last of {len(answers)} requests, of which none was lost")


@needs_ray
@pytest.mark.skipif(not (ALLOWED and os.environ.get("FAULTS")), reason="needs root and FAULTS=1: make faults-ray")
@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_one_of_three_hosts_may_be_lost_under_load(tmp_path: Path, fault: str) -> None:
    save_checkpoint(tiny_clip(), tmp_path / "checkpoints" / "clip", provenance={"data": "none"})
    with Hosts(3) as hosts, places_for_ray() as environment:
        head = start_ray(hosts, tmp_path, environment, cores=1)  # one replica each: the router takes no core
        serve = [sys.executable, "-m", "app", "ray-serve", "--address", head, "--replicas", "3", "--threads", "1"]
        serve += ["--checkpoints", str(tmp_path / "checkpoints"), "--data", str(tmp_path / "data")]
        hosts.start(0, serve, tmp_path / "said", environment, tmp_path)
        wait_for(lambda: " ready on " in (tmp_path / "said").read_text(), 120)
        command = [sys.executable, __file__, "http://127.0.0.1:8000", "40"]
        client = hosts.start(0, command, tmp_path / "answers", ENVIRONMENT, tmp_path)
        metrics = ["curl", "--silent", "http://127.0.0.1:8000/metrics"]
        wait_for(lambda: 'route="/embed",status="200"' in hosts.run(0, metrics), 60)
        time.sleep(11)
        killed = time.time()
        if fault == "killed":
            hosts.kill(1)
        else:
            hosts.cable(1, plugged=False)
        assert client.wait(90) == 0, (tmp_path / "answers").read_text()[-2000:]
        told = hosts.run(0, metrics)
    answers: list[tuple[float, int]] = json.loads((tmp_path / "answers").read_text())
    began = min(when for when, _ in answers)
    seconds = Counter(int(when - killed + 1000) - 1000 for when, _ in answers)
    usual = sum(seconds[second] for second in range(-10, 0)) / 10
    back = next(second for second in range(60) if seconds[second] >= 0.8 * usual)
    resent = re.findall(r'^semblance_resent_calls_total{model="clip"} (\S+)', told, re.MULTILINE)
    print(f"{len(answers)} requests in {max(when for when, _ in answers) - began:.0f} s, {usual:.0f}/s before")
    print(f"answers: {dict(Counter(status for _, status in answers))}; sent again: {resent}")
    print(f"{fault}: second after it in which four fifths of that rate were back: {back}")
    print(f"answers in each second from the one before: {[seconds[second] for second in range(-1, 20)]}")
    assert {status for _, status in answers} == {200}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(sys.argv[1], float(sys.argv[2]), (slow_picture(1600, 1200),)))))
