"""A running application in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from databases import MilvusServer, PostgresServer
from starlette.testclient import TestClient

from app.engine import Engine
from app.keys import Keyring
from app.loading import load_engines
from app.main import create_app
from app.settings import Settings
from app.stores import open_collections

Start = Callable[..., TestClient]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SEMBLANCE_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _warnings_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a library that some test has used did to logging."""
    caplog.set_level(logging.WARNING)


@pytest.fixture(scope="session")
def engines(checkpoints: Path) -> dict[str, Engine]:
    return load_engines(Settings(checkpoints=checkpoints, threads=1))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    what = "milvus" if os.environ.get("MILVUS_SERVER") else "milvus-lite"
    server = MilvusServer(what, tmp_path_factory.mktemp("milvus") / "data")
    yield server
    server.kill()


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str | None:
    """Where the collections of `start` are; None: in a folder. `of_every_store` marks tests that are run with each."""
    return request.getfixturevalue("postgres").database() if getattr(request, "param", "") == "postgres" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database" in metafunc.fixturenames and metafunc.definition.get_closest_marker("of_every_store"):
        metafunc.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def start(tmp_path: Path, engines: dict[str, Engine], database: str | None) -> Iterator[Start]:
    """Starts an application with the settings given, in this process."""
    with ExitStack() as stack:

        def begin(
            served: dict[str, Engine] | None = None,
            generators: dict[str, Any] | None = None,
            keys: Keyring | None = None,
            **options: Any,
        ) -> TestClient:
            settings = Settings(store=tmp_path / "data", database=database, threads=2, **options)
            collections = stack.enter_context(open_collections(settings))
            app = create_app(settings, engines if served is None else served, collections, generators, keys)
            return stack.enter_context(TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False))

        yield begin


@pytest.fixture
def client(start: Start) -> TestClient:
    return start()
