"""Ray for tests: its environment, and a cluster on several "hosts"."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hosts import Hosts
from support import wait_for

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")
SMALL = ("--object-store-memory", "100000000", "--include-dashboard", "false")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A host that is silent is lost after three seconds and not after half a minute (app/README.md).
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "SEMBLANCE_BACKEND": "torch-fp32",
}


@contextmanager
def places_for_ray() -> Iterator[dict[str, str]]:
    """The environment of a cluster, with a folder of its own: what it leaves behind leads no other astray. Sockets lie
    in it, whose paths have a hundred characters at most."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield {**ENVIRONMENT, "RAY_TMPDIR": folder}


def start_ray(hosts: Hosts, folder: Path, environment: Mapping[str, str], *, cores: int) -> str:
    """A cluster of all hosts, each with so many logical cores, its head on the first -> the head's address."""
    head = f"{hosts.address(0)}:6379"
    for host in range(hosts.count):
        command = [RAY, "start", "--block", "--num-cpus", str(cores), "--node-ip-address", hosts.address(host)]
        command += SMALL[:2]
        command += ["--head", "--port", "6379", *SMALL[2:]] if host == 0 else ["--address", head]
        said = folder / f"host{host}"
        hosts.start(host, command, said, environment, folder)
        wait_for(lambda said=said: "Ray runtime started" in said.read_text(), 60)  # type: ignore[misc]
    return head
