"""The server beside infinity and clip-as-service, its own engine and FAISS, in one run: `make bench-serving`.

All three servers hold the same random ViT-B/32, run at the same time and are driven in turns by one client, which keeps
so many requests under way and no more; only one of them has work at a time. Prints rates, milliseconds and ratios;
nothing here passes or fails. The demo's CLIP is served by ours alone, for the others load only OpenAI's architectures.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
import torch
from lean_http import Connection
from peer import write_weights
from PIL import Image

from app.backends import has_native_bf16, serves_here
from app.images import Limits, decode
from app.loading import load_engine
from app.settings import Settings

ROOT = Path(__file__).parents[2]
SIDES = {"224 px": (224, 224, 64), "1024 x 768": (1024, 768, 64), "4000 x 3000": (4000, 3000, 32)}
CONCURRENCY = (1, 8, 32)


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    """Files of different pictures with coarse and fine structure, such as a photograph has."""
    files = []
    for number in range(count):
        rng = np.random.default_rng(number)
        picture = np.zeros((height, width, 3), np.float32)
        for side, weight in ((4, 0.6), (24, 0.3), (160, 0.1)):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            picture += weight * np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        out = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def _ours(**given: Any) -> tuple[str, dict[str, Any]]:
    picture = given.get("jpeg")
    return "/embed", {"model": "vit", "input": [given["text"] if picture is None else {"image": picture}]}


def _infinity(**given: Any) -> tuple[str, dict[str, Any]]:
    if picture := given.get("jpeg"):
        return "/embeddings", {"model": "vit", "modality": "image", "input": [f"data:image/jpeg;base64,{picture}"]}
    return "/embeddings", {"model": "vit", "input": [given["text"]]}


def _clip_as_service(**given: Any) -> tuple[str, dict[str, Any]]:
    picture = given.get("jpeg")
    item = {"text": given["text"]} if picture is None else {"uri": f"data:image/jpeg;base64,{picture}"}
    return "/post", {"data": [item], "execEndpoint": "/"}


@dataclass
class Server:
    """A process that serves; ask: what a request for a text or a base64 JPEG looks like."""

    name: str
    ask: Callable[..., tuple[str, dict[str, Any]]]
    process: subprocess.Popen[bytes]
    url: str
    started: float

    def body(self, **given: Any) -> tuple[str, bytes]:
        """Path and JSON of a request."""
        path, content = self.ask(**given)
        return self.url + path, json.dumps(content).encode()

    def bytes(self) -> int:
        """Resident memory of the process and all below it, shared pages counted once."""
        total, waiting = 0, [self.process.pid]
        while waiting:
            pid = waiting.pop()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            total += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) * 1024
        return total

    def resident(self) -> int:
        """What the process itself has, at once: to count who shares a page takes the kernel long enough to be seen in
        what is measured meanwhile."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(name: str, ask: Callable[..., tuple[str, dict[str, Any]]], *command: str, **given: str) -> Iterator[Server]:
    """Start a server with --port, wait until it answers, and end it with all its children."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | given
    start = time.perf_counter()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(
        [*command, "--port", str(port)], env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
    )
    try:
        server = Server(name, ask, process, f"http://127.0.0.1:{port}", 0.0)
        path, content = ("/readyz", None) if name.startswith("ours") else ask(text="a")
        while True:
            try:
                sent = httpx.request("POST" if content else "GET", server.url + path, json=content, timeout=20)
                if sent.status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.perf_counter() - start > 300:
                log.seek(0)
                raise SystemExit(f"{name} does not answer:\n{log.read().decode()[-3000:]}")
            time.sleep(0.05)
        server.started = time.perf_counter() - start
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Measured:
    """What a client saw. seconds: each good answer's. statuses: of all."""

    rate: float = 0.0
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def middle(self) -> float:
        """Median milliseconds."""
        return statistics.median(self.seconds) * 1e3 if self.seconds else float("nan")


async def drive(requests: Iterator[tuple[str, bytes]], concurrency: int, seconds: float) -> Measured:
    """Keep `concurrency` requests under way for so long, after as many to warm up."""
    found = Measured()
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(Connection())) for _ in range(concurrency)]

        async def one(connection: Connection) -> tuple[int, float]:
            url, body = next(requests)
            start = time.perf_counter()
            return await connection.status(url, body), time.perf_counter() - start

        async def worker(connection: Connection, end: float) -> None:
            while time.perf_counter() < end:
                status, taken = await one(connection)
                found.statuses[status] += 1
                if status == 200:
                    found.seconds.append(taken)

        for _ in range(2 // concurrency or 1):
            await asyncio.gather(*map(one, connections))
        start = time.perf_counter()
        await asyncio.gather(*(worker(each, start + seconds) for each in connections))
        found.rate = len(found.seconds) / (time.perf_counter() - start)
    return found


def asked(server: Server, given: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Requests without an end. Their bodies are made before, for that is no server's work."""
    return itertools.cycle([server.body(**each) for each in given])


_TURNS = 3
_counter = itertools.count()


def new_texts(count: int = 3000) -> list[dict[str, Any]]:
    """Short queries that nobody has asked before."""
    kinds = ("a red star", "a photo of a dog", "two hearts above a blue circle", "the old harbour at night")
    return [{"text": f"{kinds[number % 4]} {next(_counter)}"} for number in range(count)]


def beside_peers(servers: Sequence[Server], files: dict[str, list[bytes]], seconds: float) -> None:
    """Every load at every concurrency, the servers in turns."""
    print("\n| | at once | " + " | ".join(f"{each.name}, /s (p50 ms)" for each in servers) + " | ours beside |")
    print("|---" * (len(servers) + 3) + "|")
    loads: dict[str, Callable[[], list[dict[str, Any]]]] = {
        name: lambda name=name: [{"jpeg": base64.b64encode(each).decode()} for each in files[name]] for name in files
    }
    loads |= {"texts, new": new_texts, "texts, known": lambda: new_texts(64)}
    for name, load in loads.items():
        for concurrency in CONCURRENCY:
            cells, rates = [], []
            for server in servers:
                found = asyncio.run(drive(asked(server, load()), concurrency, seconds))
                wrong = "" if set(found.statuses) <= {200} else f" {dict(found.statuses)}"
                cells.append(f"{found.rate:,.1f} ({found.middle:,.0f}){wrong}")
                rates.append(found.rate)
            ours = sum(each.name.startswith("ours") for each in servers)
            beside = "; ".join(
                ", ".join(f"{own / each:.1f} x" if each else "-" for each in rates[ours:]) for own in rates[:ours]
            )
            print(f"| {name} | {concurrency} | " + " | ".join(cells) + f" | {beside} |", flush=True)


def same_weights(servers: Sequence[Server], files: list[bytes]) -> None:
    """Lowest cosine of a picture's embedding by each server with ours."""
    rows = []
    for server in servers:
        mine = []
        for each in files[:16]:
            url, body = server.body(jpeg=base64.b64encode(each).decode())
            answer = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=60).json()
            mine.append(np.array(answer["data"][0]["embedding"], np.float32).ravel())
        rows.append(np.stack(mine) / np.linalg.norm(mine, axis=1, keepdims=True))
    cosines = ", ".join(
        f"{each.name} {(rows[0] * row).sum(1).min():.4f}" for each, row in zip(servers[1:], rows[1:], strict=True)
    )
    print(f"lowest cosine with ours: {cosines}")


def beside_engine(server: Server, reference: str, store: Path, files: dict[str, list[bytes]], seconds: float) -> None:
    """HTTP beside decoding in threads and embedding batches of 32 in this process, with the same backend; in turns, for
    a machine's pace changes within seconds."""
    engine = load_engine("vit", reference, Settings(store=store))
    print("\n| | bare engine, /s | HTTP, 32 at once, /s | of it | one alone: bare ms | HTTP p50 ms | more, ms |")
    print("|---|---|---|---|---|---|---|")

    def prepared(data: bytes) -> torch.Tensor:
        return engine.prepare_image(decode(data, Limits(), engine.image_size))

    for name, contents in files.items():
        given = [{"jpeg": base64.b64encode(each).decode()} for each in contents]
        rates, more, alone, once = [], [], [], []
        for _ in range(_TURNS):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                done, start = 0, time.perf_counter()
                waiting = [pool.submit(prepared, data) for data in contents[:32]]
                while time.perf_counter() - start < seconds / _TURNS:
                    batch, waiting = waiting, [pool.submit(prepared, data) for data in contents[-32:]]
                    engine.encode_images([each.result() for each in batch])
                    done += len(batch)
                bare = done / (time.perf_counter() - start)
            rates.append((bare, asyncio.run(drive(asked(server, given), 32, seconds / _TURNS)).rate))
            for data in contents[:24]:
                start = time.perf_counter()
                engine.encode_images([prepared(data)])
                alone.append((time.perf_counter() - start) * 1e3)
                once.append(asyncio.run(drive(asked(server, given), 1, 1e-3)).middle)
                more.append(once[-1] - alone[-1])
        bare, many = (statistics.median(each) for each in zip(*rates, strict=True))
        share = statistics.median(through / direct for direct, through in rates)
        print(
            f"| {name} | {bare:,.1f} | {many:,.1f} | {share:.2f} | {statistics.median(alone):.1f} | "
            f"{statistics.median(once):.1f} | {statistics.median(more):.1f} |",
            flush=True,
        )


def fill(server: Server, vectors: np.ndarray) -> None:
    """A collection of items with these embeddings, through the API; prints how many a second are on the disk."""
    httpx.put(f"{server.url}/collections/big", json={"model": "vit"}, timeout=60).raise_for_status()
    url, statuses = f"{server.url}/collections/big/items", Counter[int]()
    starts = iter(range(0, len(vectors), 64))

    def body(start: int) -> bytes:
        rows = enumerate(vectors[start : start + 64], start)
        coded = ((number, base64.b64encode(row.tobytes()).decode()) for number, row in rows)
        items = [{"id": f"i{number}", "caption": f"item {number}", "embedding": each} for number, each in coded]
        return json.dumps({"items": items}).encode()

    async def send() -> None:
        async with httpx.AsyncClient(timeout=120, headers={"content-type": "application/json"}) as client:

            async def worker() -> None:
                for start in starts:
                    statuses[(await client.post(url, content=body(start))).status_code] += 1

            await asyncio.gather(*(worker() for _ in range(8)))

    start = time.perf_counter()
    asyncio.run(send())
    rate = len(vectors) / (time.perf_counter() - start)
    print(
        f"\n{len(vectors):,} items with embeddings, 64 a call, 8 calls at once: {rate:,.0f}/s on the disk; {statuses}"
    )
    known = {"index": "flat", "indexed": 0}
    # Until the graph covers all but the twentieth that is searched beside it; below 50,000 items "auto" stays flat.
    while len(vectors) >= 50_000 and known["indexed"] < 0.95 * len(vectors):
        time.sleep(1)
        known = httpx.get(f"{server.url}/collections/big", timeout=60).json()
    index = f"{known['index']} over {known['indexed']:,}"
    print(f"index {index} after {time.perf_counter() - start:.0f} s; the server has {server.bytes() / 2**20:,.0f} MiB")


def searching(server: Server, count: int, seconds: float) -> None:
    """`GET /search` beside the encoder and beside FAISS. The items lie around the embeddings of a hundred texts."""
    headers = {"content-type": "application/json"}
    texts = new_texts(100)
    answers = [httpx.post(*(each := server.body(**text))[:1], content=each[1], headers=headers) for text in texts]
    centres = np.array([answer.json()["data"][0]["embedding"] for answer in answers], np.float32)
    vectors = np.random.default_rng(0).standard_normal((count, 512), dtype=np.float32) * (0.7 / 512**0.5)
    vectors += centres[np.arange(count) % len(centres)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fill(server, vectors)
    index = faiss.IndexFlatIP(512)
    index.add(vectors)

    def urls(given: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        asking = ({"q": each["text"], "collection": "big"} for each in given)
        return itertools.cycle([(str(httpx.URL(f"{server.url}/search", params=each)), b"") for each in asking])

    taken, recall = [], []
    for (url, _), centre in zip(urls(texts), centres[:, None], strict=False):
        hits = httpx.get(url, timeout=60).json()["hits"]
        start = time.perf_counter()
        _, (best,) = index.search(centre, 10)
        taken.append(time.perf_counter() - start)
        recall.append(len({f"i{row}" for row in best} & {hit["id"] for hit in hits}) / 10)
    encoded = asyncio.run(drive(asked(server, new_texts()), 1, seconds))
    found = asyncio.run(drive(urls(new_texts()), 1, seconds))
    known = asyncio.run(drive(urls(texts), 1, seconds))
    many = asyncio.run(drive(urls(new_texts()), 32, seconds))
    print(
        f"GET /search p50: a new text {found.middle:.1f} ms, whose embedding alone takes {encoded.middle:.1f}: "
        f"+ {found.middle - encoded.middle:.1f} ms; a known text {known.middle:.1f} ms; 32 at once {many.rate:,.0f}/s; "
        f"recall@10 {np.mean(recall):.3f}; FAISS IndexFlatIP, called directly: {statistics.median(taken) * 1e3:.1f} ms"
    )


def overload(server: Server, files: list[bytes], seconds: float) -> None:
    """Twice what it can do, for so long: memory, refusals and the pace of what is accepted."""
    given = [{"jpeg": base64.b64encode(each).decode()} for each in files]
    able = asyncio.run(drive(asked(server, given), 64, 10)).rate  # as many as fill its batches beside those in decoding
    held, statuses, slow, waited = [server.resident()], Counter[int](), [], []
    requests, idle = asked(server, given), list[Connection]()

    async def flood() -> None:

        async def one() -> None:
            url, body = next(requests)
            connection = idle.pop() if idle else Connection()
            start = time.perf_counter()
            status = await connection.status(url, body)
            statuses[status] += 1
            (waited if status == 200 else slow).append(time.perf_counter() - start)
            idle.append(connection)

        tasks, start = set(), time.perf_counter()
        for number in itertools.count():
            due = start + number / (2 * able)
            if due > start + seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.add(task := asyncio.create_task(one()))
            task.add_done_callback(tasks.discard)
            if time.perf_counter() > start + 5 * len(held):
                held.append(server.resident())
        await asyncio.gather(*tasks)
        for each in idle:
            each.close()

    asyncio.run(flood())
    late = np.percentile(slow, [50, 99]) * 1e3 if slow else [float("nan")] * 2
    print(
        f"\n2 x {able:.0f} requests/s for {seconds:.0f} s: {dict(statuses)}, {len(waited) / seconds:.0f}/s answered "
        f"(p50 {statistics.median(waited) * 1e3:,.0f} ms, slowest {max(waited) * 1e3:,.0f}), refused within "
        f"{late[0]:.0f} ms (p50) and {late[1]:.0f} ms (p99); memory, MiB: {held[0] >> 20:,} before, at most "
        f"{max(held[: len(held) // 10 + 2]) >> 20:,} in the first tenth, {max(held) >> 20:,} in all, "
        f"{server.resident() >> 20:,} after"
    )


def main() -> None:
    """Every part, or those that are named."""
    parts = ("peers", "engine", "search", "start", "overload")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=parts, help=f"of {', '.join(parts)}")
    parser.add_argument("--to", nargs="+", default=("torch", "onnx", "openvino"), help="what the model is exported for")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--items", type=int, default=100_000, help="of the collection that is searched")
    parser.add_argument("--overload-seconds", type=float, default=600.0)
    parser.add_argument("--infinity", default=".venv-infinity", help="its environment; one that is missing is left out")
    parser.add_argument("--clip-as-service", default=".venv-clip-as-service", help="the same")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_weights(place)
        files = {name: jpegs(*size) for name, size in SIDES.items()}
        (place / "pictures").mkdir()
        for number, data in enumerate(files["1024 x 768"]):
            (place / "pictures" / f"{number}.jpg").write_bytes(data)
        reference, store = f"open_clip:ViT-B-32/{place / 'vit.safetensors'}", place / "data"
        semblance = (sys.executable, "-m", "app")
        common = ("--model", f"vit={reference}", "--data", str(store), "--checkpoints", str(place / "none"))
        for runtime in arguments.to:
            export = [*semblance, "export", "vit", "--to", runtime, "--pictures", str(place / "pictures"), *common]
            subprocess.run(export, check=False, cwd=ROOT)  # says itself what this processor cannot
        ours = stack.enter_context(serving("ours", _ours, *semblance, "serve", *common))
        details = httpx.get(f"{ours.url}/models").json()
        print(f"ours: {json.dumps(details)[:2000]}")
        if "peers" in arguments.parts:
            servers = []
            exact = "torch-bf16" if has_native_bf16(cpu := torch.device("cpu")) else "torch-fp32"
            for backend in (exact, "torch-int8" if serves_here("torch-int8", cpu) else "onnx-int8"):
                shutil.copytree(store / "exports", place / backend / "exports")
                start = (*semblance, "serve", *common, "--data", str(place / backend))
                chosen = {"SEMBLANCE_BACKEND": backend}
                servers.append(stack.enter_context(serving(f"ours, {backend}", _ours, *start, **chosen)))
            for name, ask, folder, weights in (
                ("infinity", _infinity, arguments.infinity, place / "hf"),
                ("clip-as-service", _clip_as_service, arguments.clip_as_service, place / "vit.pt"),
            ):
                if not Path(folder, "bin/python").exists():
                    print(f"{folder} is missing: {name} is left out")
                    continue
                starter = [f"{folder}/bin/python", "tests/benchmarks/peer.py", name, "--weights", str(weights)]
                servers.append(stack.enter_context(serving(name, ask, *starter)))
            same_weights(servers, files["224 px"])
            beside_peers(servers, files, arguments.seconds)
            print(
                "\nstart to first answer, memory after: "
                + "; ".join(f"{each.name} {each.started:.1f} s, {each.bytes() / 2**20:,.0f} MiB" for each in servers)
            )
        if "engine" in arguments.parts:
            beside_engine(ours, reference, store, files, arguments.seconds)
        if "search" in arguments.parts:
            searching(ours, arguments.items, arguments.seconds)
        if "start" in arguments.parts:
            folder = ROOT / "checkpoints" / "demo"
            weights = sum(each.stat().st_size for each in folder.glob("*/*.safetensors"))
            demo = (*semblance, "serve", "--checkpoints", str(folder), "--data", str(place / "demo"))
            with serving("ours", _ours, *demo) as server:
                more = (server.bytes() - weights) / 2**20
                held = f"{more:,.0f} MiB beyond the {weights / 2**20:.0f} MiB of its weights"
                print(f"\nthe demo: ready after {server.started:.1f} s, {held}")
        if "overload" in arguments.parts:
            # More than wait at once, for equal pictures are embedded once.
            overload(ours, jpegs(1024, 768, 512), arguments.overload_seconds)


if __name__ == "__main__":
    main()
