"""Three servers behind HAProxy on hosts of their own, of which one is killed, one cut off and one stopped under load;
with their collections in PostgreSQL, which is killed as well.

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
from databases import PostgresServer
from hosts import ALLOWED, Hosts

from app.calls import AnswerError, call

ROOT = Path(__file__).parents[2]
KEY, AT_ONCE = "a-key-of-these-replicas", 12
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "SEMBLANCE_API_KEYS": KEY}


async def load(seconds: float, work: str) -> None:
    """Ask, so many at once and as `app.client` does, and print when each was answered and with what (0: not), and the
    ids of items that were acknowledged. work: "embed", or "items", which are added and looked for."""
    answers, added = list[tuple[float, int]](), list[str]()
    end = time.time() + seconds
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url="http://127.0.0.1:8000", headers=headers, timeout=30) as client:

        async def ask(caller: int) -> None:
            number = 0
            while time.time() < end:
                number += 1
                text, id = f"text {caller} {number}", f"{caller}-{number}"
                try:
                    if work == "embed":
                        await call(client, "POST", "/embed", json={"input": [text]}, patience=5)
                    else:
                        item = {"id": id, "text": text}
                        await call(client, "POST", "/collections/c/items", json={"items": [item]}, patience=20)
                        added.append(id)
                        found = await call(client, "GET", f"/search?q={text}&collection=c&k=1", patience=20)
                        assert len(found["hits"]) == 1
                    answers.append((time.time(), 200))
                except AnswerError as error:
                    answers.append((time.time(), error.status))

        await asyncio.gather(*(ask(caller) for caller in range(AT_ONCE)))
    print(json.dumps({"answers": answers, "added": added}))


needs_hosts = pytest.mark.skipif(
    not (ALLOWED and shutil.which("haproxy") and os.environ.get("FAULTS")),
    reason="needs root, HAProxy and FAULTS=1: make faults-serving",
)


class Replicas:
    """Three servers on hosts of their own, and on host 0 HAProxy before them and the load."""

    def __init__(self, hosts: Hosts, folder: Path, checkpoints: Path, **environment: str) -> None:
        self.hosts, self.folder, self.checkpoints = hosts, folder, checkpoints
        self.environment = {**ENVIRONMENT, **environment}
        self.began: dict[str, float] = {}
        self.servers = {host: self.serve(host) for host in (1, 2, 3)}
        behind = {f"REPLICA_{host}": f"{hosts.address(host)}:8000" for host in (1, 2, 3)}
        proxy = ["haproxy", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")]
        hosts.start(0, proxy, folder / "proxy", {**ENVIRONMENT, **behind}, folder)
        self.wait_for(3)
        time.sleep(2)  # and that HAProxy has seen it twice

    def serve(self, host: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "app", "serve", "--checkpoints", str(self.checkpoints), "--threads", "1"]
        command += ["--host", self.hosts.address(host), "--port", "8000", "--data", str(self.folder / f"data{host}")]
        return self.hosts.start(host, command, self.folder / f"said{host}", self.environment, self.folder)

    def ask(self, *options: str) -> str:
        """What curl prints of an answer."""
        return self.hosts.run(0, ["curl", "--silent", "--max-time", "5", "--oauth2-bearer", KEY, *options])

    def wait_for(self, count: int) -> None:
        """Until so many say that they are ready."""
        end, written = time.monotonic() + 120, ["--output", "/dev/null", "--write-out", "%{http_code}"]
        while True:
            asked = [self.ask(*written, f"http://{self.hosts.address(host)}:8000/readyz") for host in (1, 2, 3)]
            if asked.count("200") == count:
                return
            assert time.monotonic() < end
            time.sleep(0.2)

    def load(self, seconds: int, work: str) -> subprocess.Popen[str]:
        asking = [sys.executable, __file__, str(seconds), work]
        return self.hosts.start(0, asking, self.folder / "answers", ENVIRONMENT, self.folder)

    def phase(self, name: str, seconds: float) -> None:
        """What is answered from now on belongs to it."""
        self.began[name] = time.time()
        time.sleep(seconds)

    def ended(self, client: subprocess.Popen[str]) -> tuple[dict[str, Counter[int]], list[str]]:
        """What was answered in each phase, and the items that were acknowledged."""
        assert client.wait(120) == 0, (self.folder / "answers").read_text()[-2000:]
        said = json.loads((self.folder / "answers").read_text())
        counted = {}
        for name, start in self.began.items():
            end = min((other for other in self.began.values() if other > start), default=float("inf"))
            counted[name] = Counter(status for when, status in said["answers"] if start <= when < end)
            good = sorted(when for when, status in said["answers"] if start <= when < end and status == 200)
            gap = max(following - when for when, following in zip([start, *good], good, strict=False))
            print(f"{name}: {dict(counted[name])}, the longest without an answer {gap:.1f} s")
        return counted, said["added"]


@needs_hosts
def test_replicas_may_be_lost_under_load(tmp_path: Path, checkpoints: Path) -> None:
    with Hosts(4) as hosts:
        replicas = Replicas(hosts, tmp_path, checkpoints)
        client = replicas.load(40, "embed")
        replicas.phase("none", 5)
        hosts.kill(1)
        replicas.phase("killed", 5)
        replicas.servers[1] = replicas.serve(1)
        replicas.phase("killed one back", 8)
        hosts.cable(2, plugged=False)
        replicas.phase("cut off", 7)
        hosts.cable(2, plugged=True)
        replicas.phase("cut off one back", 4)
        # The process that serves is the child of `ip netns exec`, which becomes it.
        replicas.servers[3].send_signal(signal.SIGTERM)
        replicas.phase("stopped", 4)
        counted, _ = replicas.ended(client)
        assert replicas.servers[3].wait(30) == 0
    assert sum(found[200] for found in counted.values()) > 500
    # What was in flight on one that went was sent again, by HAProxy or by the client.
    assert all(set(found) == {200} for found in counted.values())


@needs_hosts
def test_replicas_share_their_collections_through_postgresql(tmp_path: Path, checkpoints: Path) -> None:
    """A replica killed and one cut off under load, and the database killed: nothing acknowledged is lost."""
    with Hosts(5) as hosts:
        database = PostgresServer(hosts.address(4), hosts.inside(4))
        try:
            url = database.database()
            replicas = Replicas(hosts, tmp_path, checkpoints, SEMBLANCE_DATABASE=url)
            there = f"http://{hosts.address(1)}:8000/collections/c"
            assert json.loads(replicas.ask("--request", "PUT", there))["count"] == 0
            client = replicas.load(40, "items")
            replicas.phase("none", 5)
            hosts.kill(1)
            replicas.phase("a replica killed", 5)
            replicas.servers[1] = replicas.serve(1)
            replicas.phase("it is back", 8)
            hosts.cable(2, plugged=False)
            replicas.phase("a replica cut off", 6)
            hosts.cable(2, plugged=True)
            replicas.phase("it is back too", 4)
            database.kill()
            database.start()
            replicas.phase("the database killed", 10)
            counted, added = replicas.ended(client)
            replicas.wait_for(3)
            for host in (1, 2, 3):
                content = replicas.ask(f"http://{hosts.address(host)}:8000/collections/c")
                assert json.loads(content)["count"] >= len(added)
            shown, after = set[str](), ""
            while True:
                page = json.loads(replicas.ask(f"http://127.0.0.1:8000/collections/c/items?limit=1000&after={after}"))
                shown |= {item["id"] for item in page["items"]}
                if page["next"] is None:
                    break
                after = page["next"]
        finally:
            database.stop()
    lost = set(added) - shown
    print(f"{len(added)} items acknowledged, {len(lost)} lost")
    assert not lost
    assert len(added) > 200
    # An item that was being added through a replica that went is not sent again by itself; nothing else may fail.
    assert all(found.total() - found[200] <= 2 * AT_ONCE for found in counted.values())
    assert all(set(counted[name]) == {200} for name in ("none", "it is back", "it is back too"))


if __name__ == "__main__":
    asyncio.run(load(float(sys.argv[1]), sys.argv[2]))
