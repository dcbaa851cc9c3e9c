"""Runs of several processes that lose one of them, a host or a cable, and end as if nothing had been.

The suite kills a worker. `make faults-training` puts the run on hosts of its own (network namespaces, which only root
can make), kills each of them and pulls a cable, and says how long each took to mend.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosts import ALLOWED, Hosts
from safetensors.torch import load_file
from support import wait_for

ROOT = Path(__file__).parents[2]
STEPS = 40
SMALL = json.dumps({"channels": 8, "blocks": [1], "depth": 0})
# Without clipping both ways of sharing work sum the same numbers in the same order: a norm is summed in another.
TRAINING = (
    f"simclr --data scenes --image-size 32 --batch-size 32 --chunk 8 --encoder-options {shlex.quote(SMALL)} "
    f"--hidden-dim 16 --steps {STEPS} --save-every 4 --log-every 1 --clip-norm 0 --ema-decay 0.9 --precision fp32 "
    "--device cpu --threads 1 --no-evaluate --patience 8 --out out --run-dir run"
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
needs_hosts = pytest.mark.skipif(
    not (ALLOWED and os.environ.get("FAULTS")), reason="needs root and FAULTS=1: make faults-training"
)


def _command(*launch: str, more: str = "") -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", *launch, "--max-restarts", "9"]
    return [*run, "-m", "training", *shlex.split(f"{TRAINING} {more}")]


def _step(folder: Path) -> int:
    """The last one that was logged."""
    log = folder / "run" / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return int(steps[-1]) if steps else 0


def _until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 180) -> None:
    wait_for(lambda: holds() or process.poll() is not None, seconds)
    assert holds(), "it ended before its fault"


def _workers(folder: Path) -> list[int]:
    """Processes of the run in a folder, by their ranks."""
    found: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cwd").resolve() != folder.resolve():
                continue
            environment = dict(part.partition("=")[::2] for part in (place / "environ").read_text().split("\0"))
        except OSError:
            continue
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(place.name)
    return [found[rank] for rank in sorted(found)]


def _same_checkpoints(one: Path, two: Path) -> bool:
    first, second = (load_file(folder / "out" / "model.safetensors") for folder in (one, two))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = _command("--standalone", "--nproc-per-node", "2")
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_killed_worker_costs_the_steps_since_the_last_state(tmp_path: Path, undisturbed: Path) -> None:
    """In shares; and what comes of it is, bit by bit, what data parallel training without a fault comes to."""
    command = _command("--standalone", "--nproc-per-node", "2", more="--shard")
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        _until(lambda: _step(tmp_path) >= 10, process)
        os.kill(_workers(tmp_path)[1], signal.SIGKILL)
        killed_at = _step(tmp_path)
        assert process.wait(300) == 0, (tmp_path / "said").read_text()[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    again = next(step for step, before in zip(steps[1:], steps, strict=False) if step != before + 1)
    assert killed_at - 4 <= again - 1 <= killed_at + 4  # it went on from a state at most four steps old
    assert steps[-1] == STEPS
    assert _same_checkpoints(tmp_path, undisturbed)


def _start(hosts: Hosts, host: int, folder: Path, more: str) -> subprocess.Popen[str]:
    """The run on a host, and again whenever it fails there, as systemd or Slurm would."""
    command = _command(
        "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run",
        "--rdzv-endpoint", f"{hosts.address(0)}:29400", "--local-addr", hosts.address(host),
        "--rdzv-conf", f"read_timeout=10,is_host={int(host == 0)}", more=more,
    )  # fmt: skip
    loop = f"until {shlex.join(command)}; do sleep 1; done"
    environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"}
    return hosts.start(host, ["bash", "-c", loop], folder / f"said-{host}", environment, folder)


@needs_hosts
@pytest.mark.parametrize("more", ["", "--shard"], ids=["data parallel", "in shares"])
def test_hosts_may_be_lost_and_cables_pulled(tmp_path: Path, undisturbed: Path, more: str) -> None:
    with Hosts(2) as hosts:
        running = [_start(hosts, host, tmp_path, more) for host in range(2)]

        def lost(what: str, at: int, fault: Callable[[], None]) -> None:
            _until(lambda: _step(tmp_path) >= at, running[0])
            before, began = _step(tmp_path), time.monotonic()
            fault()
            _until(lambda: _step(tmp_path) > before, running[0])
            print(f"{more or 'data parallel'}, {what}: {time.monotonic() - began:.1f} s until step {before + 1}")

        def kill(host: int) -> None:
            hosts.kill(host)
            time.sleep(2)
            running[host] = _start(hosts, host, tmp_path, more)

        def pull() -> None:
            hosts.cable(1, plugged=False)
            time.sleep(12)
            hosts.cable(1, plugged=True)

        lost("a worker killed", 6, lambda: os.kill(_workers(tmp_path)[1], signal.SIGKILL))
        lost("the second host lost for 2 s", 12, lambda: kill(1))
        lost("the first host lost for 2 s", 20, lambda: kill(0))
        lost("a cable pulled for 12 s", 28, pull)
        assert running[0].wait(300) == 0  # the other may miss its leave: the store is gone with the first
    assert _same_checkpoints(tmp_path, undisturbed)
