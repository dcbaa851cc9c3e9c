"""Several "hosts" on one machine: network namespaces on a bridge; cables can be pulled, and hosts killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

ALLOWED = shutil.which("ip") is not None and os.geteuid() == 0


class Hosts:
    """Numbers 0 to count - 1 with the addresses 10.77.0.1 and on; the switch they are on is a namespace as well.

    As a context: the namespaces go at its end, and whatever runs in them is killed.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._name = f"semblance{os.getpid()}"
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Hosts:
        switch = f"{self._name}-switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in range(self.count):
            place, port = self._namespace(host), f"port{host}"
            _ip("netns", "add", place)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", place)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", place, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", place, "link", "set", device, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in range(self.count):
            self.kill(host)
            _ip("netns", "delete", self._namespace(host))
        _ip("netns", "delete", f"{self._name}-switch")
        for process in self._started:
            process.wait()

    def address(self, host: int) -> str:
        """Of a host."""
        return f"10.77.0.{host + 1}"

    def inside(self, host: int) -> list[str]:
        """What a command begins with that is to run on a host."""
        return ["ip", "netns", "exec", self._namespace(host)]

    def start(
        self, host: int, command: Sequence[str], output: Path, environment: Mapping[str, str], folder: Path
    ) -> subprocess.Popen[str]:
        """A process on a host, in a folder; what it says is added to a file."""
        with output.open("a") as said:
            process = subprocess.Popen(
                [*self.inside(host), *command],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                text=True,
            )
        self._started.append(process)
        return process

    def run(self, host: int, command: Sequence[str]) -> str:
        """What a short command on a host prints."""
        return subprocess.run([*self.inside(host), *command], capture_output=True, text=True, timeout=30).stdout

    def kill(self, host: int) -> None:
        """Every process on it, at once and without a word."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._namespace(host)], capture_output=True, text=True, check=True
        )
        for process in found.stdout.split():
            with suppress(ProcessLookupError):  # it went by itself
                os.kill(int(process), signal.SIGKILL)

    def cable(self, host: int, *, plugged: bool) -> None:
        """Pull it, or plug it in again."""
        _ip("-n", f"{self._name}-switch", "link", "set", f"port{host}", "up" if plugged else "down")

    def _namespace(self, host: int) -> str:
        return f"{self._name}-{host}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
