"""More than a server can do, for three seconds; `make bench-serving` has twice of it for ten minutes."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from support import Server, running

from app.inputs import EXAMPLE_IMAGE, Input
from app.service import Service


def _peak_memory(server: Server) -> int:
    """Bytes that the process has had at once."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("only Linux tells what a process has taken")
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)[1]) * 1024  # type: ignore[index]


def test_more_than_can_be_done_is_refused_and_takes_no_memory(tmp_path: Path, checkpoints: Path) -> None:
    """64 callers at once for a queue of 16: each is answered or told when to come back, and the memory stays."""
    statuses: Counter[int] = Counter()
    with running(checkpoints, tmp_path / "data", SEMBLANCE_QUEUE_SIZE="16", SEMBLANCE_MAX_INPUTS="8") as server:

        async def flood(seconds: float) -> None:
            limits, end = httpx.Limits(max_connections=64), time.monotonic() + seconds
            async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=30) as client:

                async def caller(number: int) -> None:
                    turn = 0
                    while time.monotonic() < end:
                        texts = [f"a red star {number} {turn} {each}" for each in range(6)]
                        answer = await client.post("/embed", json={"model": "clip", "input": texts})
                        statuses[answer.status_code] += 1
                        assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
                        turn += 1

                await asyncio.gather(*(caller(number) for number in range(64)))

        asyncio.run(flood(1.0))
        before = _peak_memory(server)
        asyncio.run(flood(2.0))
        grown = _peak_memory(server) - before
        again = httpx.post(f"{server.url}/embed", json={"model": "clip", "input": "a red star"}, timeout=10)
    assert again.status_code == 200
    assert set(statuses) == {200, 503}
    assert grown < 32 * 2**20, f"{grown / 2**20:.0f} MiB"


def test_a_picture_that_waits_for_a_forward_waits_without_its_file(client: TestClient) -> None:
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    inputs = [Input(text="a red star"), Input(image=EXAMPLE_IMAGE), Input(image=EXAMPLE_IMAGE)]
    made = client.portal.call(service.embed, service.engine("clip", text=True), inputs)  # type: ignore[union-attr]
    assert [each.image for each in inputs] == [None] * 3
    assert inputs[0].text == "a red star"
    assert (made.vectors[1] == made.vectors[2]).all()
    assert not (made.vectors[0] == made.vectors[1]).all()
