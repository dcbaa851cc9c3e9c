"""The description of the API: whole, and changed only on purpose."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

SNAPSHOT = Path(__file__).parent / "openapi.json"


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_it_is_what_was_reviewed(document: dict[str, Any]) -> None:
    """A change of the API shows in the file's diff: run this with UPDATE_SNAPSHOT=1 set, and look at it."""
    written = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(written, encoding="utf-8")
    assert written == SNAPSHOT.read_text(encoding="utf-8"), "run it with UPDATE_SNAPSHOT=1 and review the difference"


def test_each_operation_says_what_it_does_takes_and_answers(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert operation["description"] or operation["summary"], name
        good = [status for status in operation["responses"] if status.startswith("2")]
        assert len(good) == 1, name
        assert {"400", "401", "403", "404", "413", "415", "422", "429", "500", "503", "504"} <= operation[
            "responses"
        ].keys()
        for status, response in operation["responses"].items():
            if status >= "400":
                assert response == {"$ref": f"#/components/responses/{status}"}, name
        if body := operation.get("requestBody"):
            assert "example" in body["content"]["application/json"], name
    for response in document["components"]["responses"].values():
        assert response["content"] == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
