"""Three servers behind HAProxy on hosts of their own, of which one is killed, one cut off and one stopped under load.

`make faults-serving` (root, HAProxy); run as a script it is the load.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from hosts import ALLOWED, Hosts

from app.calls import AnswerError, call

ROOT = Path(__file__).parents[2]
KEY, AT_ONCE = "a-key-of-these-replicas", 12
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "SEMBLANCE_API_KEYS": KEY}


async def load(seconds: float) -> None:
    """Embed texts, so many at once and as `app.client` asks, and print when each was answered and with what; 0: not."""
    answers: list[tuple[float, int]] = []
    end = time.time() + seconds
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url="http://127.0.0.1:8000", headers=headers, timeout=30) as client:

        async def ask(caller: int) -> None:
            number = 0
            while time.time() < end:
                number += 1
                try:
                    await call(client, "POST", "/embed", json={"input": [f"text {caller} {number}"]}, patience=5)
                    answers.append((time.time(), 200))
                except AnswerError as error:
                    answers.append((time.time(), error.status))

        await asyncio.gather(*(ask(caller) for caller in range(AT_ONCE)))
    print(json.dumps(answers))


@pytest.mark.skipif(
    not (ALLOWED and shutil.which("haproxy") and os.environ.get("FAULTS")),
    reason="needs root, HAProxy and FAULTS=1: make faults-serving",
)
def test_replicas_may_be_lost_under_load(tmp_path: Path, checkpoints: Path) -> None:
    with Hosts(4) as hosts:

        def serve(host: int) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "app", "serve", "--checkpoints", str(checkpoints), "--threads", "1"]
            command += ["--host", hosts.address(host), "--port", "8000", "--data", str(tmp_path / f"data{host}")]
            return hosts.start(host, command, tmp_path / f"said{host}", ENVIRONMENT, tmp_path)

        def up() -> int:
            """How many replicas say that they are ready."""
            asked = ["curl", "--silent", "--max-time", "1", "--output", "/dev/null", "--write-out", "%{http_code}"]
            codes = [hosts.run(0, [*asked, f"http://{hosts.address(host)}:8000/readyz"]) for host in (1, 2, 3)]
            return codes.count("200")

        def wait_for(count: int) -> None:
            end = time.monotonic() + 120
            while up() != count:
                assert time.monotonic() < end
                time.sleep(0.2)

        replicas = {host: serve(host) for host in (1, 2, 3)}
        behind = {f"REPLICA_{host}": f"{hosts.address(host)}:8000" for host in (1, 2, 3)}
        proxy = ["haproxy", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")]
        hosts.start(0, proxy, tmp_path / "proxy", {**ENVIRONMENT, **behind}, tmp_path)
        wait_for(3)
        time.sleep(2)  # and that HAProxy has seen it twice
        client = hosts.start(0, [sys.executable, __file__, "40"], tmp_path / "answers", ENVIRONMENT, tmp_path)
        began: dict[str, float] = {}

        def phase(name: str, seconds: float) -> None:
            began[name] = time.time()
            time.sleep(seconds)

        phase("none", 5)
        hosts.kill(1)
        phase("killed", 5)
        replicas[1] = serve(1)
        phase("killed one back", 8)
        hosts.cable(2, plugged=False)
        phase("cut off", 7)
        hosts.cable(2, plugged=True)
        phase("cut off one back", 4)
        # The process that serves is the child of `ip netns exec`, which becomes it.
        replicas[3].send_signal(signal.SIGTERM)
        phase("stopped", 4)
        assert client.wait(60) == 0, (tmp_path / "answers").read_text()[-2000:]
        assert replicas[3].wait(30) == 0
    answers = json.loads((tmp_path / "answers").read_text())
    lost: Counter[str] = Counter()
    for name, start in began.items():
        end = min((other for other in began.values() if other > start), default=float("inf"))
        found = Counter(status for when, status in answers if start <= when < end)
        lost[name] = sum(found.values()) - found[200]
        print(f"{name}: {dict(found)}")
    assert sum(status == 200 for _, status in answers) > 500
    # What was in flight on one that went was sent again, by HAProxy or by the client.
    assert {name: count for name, count in lost.items() if count} == {}


if __name__ == "__main__":
    asyncio.run(load(float(sys.argv[1])))
