"""The description of the API against the server: whatever it allows, and what it does not, is answered as it says.

`make fuzz` runs 10,000 cases of a new seed; the suite 500 that are always the same.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks
from support import tiny_dalle, wait_for

from app.engine import Engine
from app.main import create_app
from app.settings import Settings
from app.sqlite_collections import SQLiteCollections

CASES = int(os.environ.get("FUZZ_CASES", "500"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engines: dict[str, Engine]) -> Iterator[str]:
    """A server over a real socket, with a generator and a collection."""
    store = tmp_path_factory.mktemp("data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with SQLiteCollections(store) as collections:
        app = create_app(Settings(store=store, threads=2), engines, collections, {"dalle": tiny_dalle()})
        running = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, log_level="critical"))
        thread = threading.Thread(target=running.run)
        thread.start()
        wait_for(lambda: running.started)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.should_exit = True
            thread.join()


def fill(url: str) -> None:
    """What a case may have deleted is there again."""
    items = [{"id": f"i{number}", "text": f"text {number}"} for number in range(5)]
    with httpx.Client(base_url=url, timeout=60) as client:
        client.put("/collections/default", json={}).raise_for_status()
        client.post("/collections/default/items", json={"items": items}).raise_for_status()


def test_whatever_the_document_says(server: str) -> None:
    document = httpx.get(f"{server}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 30
    share = -(-CASES // (2 * len(operations)))
    counts: Counter[int] = Counter()
    wrong: dict[str, str] = {}
    for turn in itertools.count():
        for operation, mode in itertools.product(operations, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)):
            fill(server)
            _run(operation, mode, share, SEED + turn, server, counts, wrong)
        if wrong or sum(counts.values()) >= CASES:  # an operation without parameters has fewer than its share
            break
    print(f"seed {SEED}: {sum(counts.values()):,} cases: {dict(sorted(counts.items()))}")
    assert not wrong, "\n\n".join(f"{what}\n{how}" for what, how in wrong.items())
    assert counts[200] > 0.1 * CASES


def _run(
    operation: Any,
    mode: GenerationMode,
    share: int,
    start: int,
    server: str,
    counts: Counter[int],
    wrong: dict[str, str],
) -> None:
    strategy = operation.as_strategy(generation_mode=mode)

    @seed(start)
    @settings(
        max_examples=share,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy, known=st.booleans())
    def ask(case: Case, known: bool) -> None:
        if known and "name" in (case.path_parameters or {}):
            case.path_parameters["name"] = "default"
            if "id" in case.path_parameters:
                case.path_parameters["id"] = "i3"
        response = case.call(base_url=server, timeout=60)
        counts[response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as failures:
            for failure in failures.exceptions:
                wrong.setdefault(f"{operation.label}: {failure.title}", f"{failure.message}\n{case.as_curl_command()}")

    with suppress(Unsatisfiable):  # nothing of the operation can be wrong
        ask()
