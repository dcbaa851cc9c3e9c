"""Keys with scopes and limits; whose requests are let in."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support import problem

from app.__main__ import main
from app.keys import FOLDER, SCOPES, Keyring
from models.errors import ConflictError, NotFoundError, RateLimitError, StorageError

Start = Callable[..., TestClient]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_key_is_hashed_at_rest_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    token = ring.create("site", "write", rate=60, concurrency=2)
    (file,) = (tmp_path / FOLDER).iterdir()
    assert token.removeprefix("sem_") not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    found = Keyring(tmp_path).find(token)
    assert found is not None
    assert (found.name, found.scope, found.rate, found.concurrency) == ("site", "write", 60, 2)
    assert ring.find(token[:-1]) is None
    with pytest.raises(ConflictError, match="'site' already"):
        ring.create("site")
    assert ring.find(token) is not None  # not replaced


def test_a_key_that_comes_or_goes_is_seen_at_once_and_the_last_leaves_the_server_closed(tmp_path: Path) -> None:
    serving = Keyring(tmp_path)
    assert not serving.required
    token = Keyring(tmp_path).create("first")
    assert serving.required
    assert serving.find(token) is not None
    Keyring(tmp_path).revoke("first")
    assert serving.find(token) is None
    assert serving.required
    assert Keyring(tmp_path).required
    (tmp_path / FOLDER).rmdir()
    assert serving.required
    with pytest.raises(NotFoundError, match="no key 'first'; there are: none"):
        Keyring(tmp_path).revoke("first")


def test_a_damaged_key_is_named_and_hurts_no_other(tmp_path: Path) -> None:
    serving = Keyring(tmp_path)
    good = serving.create("good")
    (tmp_path / FOLDER / "bad.json").write_text("{")
    with pytest.raises(StorageError, match=r"bad\.json is damaged"):
        serving.names()
    assert serving.find(good) is not None  # a server that runs goes on with the others
    assert serving.find("x") is None


def test_the_rate_lets_a_minutes_worth_in_and_then_one_each_interval(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    key = ring.find(ring.create("slow", rate=6))
    assert key is not None

    def ask(now: float) -> float:
        """0, or the seconds until there is room."""
        try:
            with ring.use(key, lambda: now):
                return 0
        except RateLimitError as error:
            return error.retry_after

    assert [ask(1000) for _ in range(8)] == [0] * 6 + [10] * 2
    assert ask(1009) == pytest.approx(1)
    assert [ask(1010), ask(1010)] == [0, 10]
    assert [ask(4600) for _ in range(7)] == [0] * 6 + [10]  # an idle hour saves up a minute's worth, not an hour's


def test_concurrency_counts_what_is_under_way(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    key = ring.find(ring.create("two", concurrency=2))
    assert key is not None
    with ring.use(key), ring.use(key), pytest.raises(RateLimitError, match="2 requests under way"), ring.use(key):
        pass
    with ring.use(key):
        pass


@pytest.fixture
def keyed(start: Start, tmp_path: Path) -> tuple[TestClient, dict[str, dict[str, str]]]:
    """A server, and the headers for a key of each scope."""
    ring = Keyring(tmp_path / "data")
    headers = {scope: bearer(ring.create(scope, scope)) for scope in SCOPES}
    return start(keys=Keyring(tmp_path / "data")), headers


def test_row_25_each_route_that_changes_something_asks_for_its_scope(
    keyed: tuple[TestClient, dict[str, dict[str, str]]],
) -> None:
    client, headers = keyed
    paths = client.get("/openapi.json").json()["paths"]
    changing = {
        (method.upper(), path)
        for path, operations in paths.items()
        if path.startswith("/collections")
        for method in operations.keys() - {"get"}
    }
    admin = {
        ("DELETE", "/collections/{name}"),
        ("POST", "/collections/{name}/reindex"),
        ("DELETE", "/collections/{name}/reindex"),
    }
    assert len(changing) >= 8
    assert admin < changing
    for method, path in changing:
        url = path.format(name="nowhere", id="none")
        needed = "admin" if (method, path) in admin else "write"
        for scope in SCOPES:
            status = client.request(method, url, headers=headers[scope]).status_code
            assert (status == 403) == (SCOPES.index(scope) < SCOPES.index(needed)), (method, path, scope, status)
            assert status != 401


def test_row_25_a_reader_reads_and_a_stranger_does_not(keyed: tuple[TestClient, dict[str, dict[str, str]]]) -> None:
    client, headers = keyed
    body = {"input": "a red star"}
    assert client.post("/embed", json=body, headers=headers["read"]).status_code == 200
    basic = headers["read"]["Authorization"].replace("Bearer", "Basic")
    for wrong in ({}, bearer("sem_wrong"), {"Authorization": basic}):
        answer = client.post("/embed", json=body, headers=wrong)
        problem(answer, 401, "Bearer <key>")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    refused = client.put("/collections/mine", json={}, headers=headers["read"])
    problem(refused, 403, "key 'read' has the scope read, and this needs write")


def test_row_27_over_the_rate(start: Start, tmp_path: Path) -> None:
    token = Keyring(tmp_path / "data").create("slow", rate=2)
    client = start(keys=Keyring(tmp_path / "data"))
    answers = [client.get("/models", headers=bearer(token)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 30
    problem(answers[-1], 429, "2 requests a minute")


def test_row_27_over_the_concurrency(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = Keyring(tmp_path / "data").create("one", concurrency=1)
    client = start(keys=Keyring(tmp_path / "data"))
    entered, leave = threading.Event(), threading.Event()
    collections = client.app.state.service.collections  # type: ignore[attr-defined]
    original = collections.names

    def held() -> list[str]:
        entered.set()
        leave.wait(10)
        return original()

    monkeypatch.setattr(collections, "names", held)
    first: list[int] = []
    thread = threading.Thread(
        target=lambda: first.append(client.get("/collections", headers=bearer(token)).status_code)
    )
    thread.start()
    try:
        assert entered.wait(10)
        problem(client.get("/models", headers=bearer(token)), 429, "1 requests under way")
    finally:
        leave.set()
        thread.join()
    assert first == [200]
    assert client.get("/models", headers=bearer(token)).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::2]:80"])
def test_row_26_a_foreign_host_is_refused(client: TestClient, host: str) -> None:
    problem(client.get("/models", headers={"Host": host}), 400, "`hosts`")
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000"])
def test_row_26_its_own_names_are_not(client: TestClient, host: str) -> None:
    assert client.get("/models", headers={"Host": host}).status_code == 200


def test_row_26_named_hosts(start: Start) -> None:
    client = start(hosts=("photos.example",), host="0.0.0.0", insecure=True)
    assert client.get("/models", headers={"Host": "photos.example:443"}).status_code == 200
    assert client.get("/models", headers={"Host": "localhost"}).status_code == 200
    problem(client.get("/models", headers={"Host": "other.example"}), 400, "`hosts`")


def test_an_open_address_has_any_name(start: Start) -> None:
    client = start(host="0.0.0.0", api_keys=("k",))
    assert client.get("/models", headers={"Host": "photos.example", **bearer("k")}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://127.0.0.1", 200), ("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:81", 200), (None, 200)],
)
def test_row_26_another_sites_page_changes_nothing(client: TestClient, origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"Origin": origin}
    assert client.post("/embed", json={"input": "a"}, headers=headers).status_code == status
    assert client.get("/models", headers=headers).status_code == 200


def test_every_answer_has_the_headers_of_safety(client: TestClient) -> None:
    for path in ("/", "/models", "/nowhere", "/static/main.js", "/healthz"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers


def test_the_document_tells_who_may(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "security" not in document["paths"]["/embed"]["post"]
    assert {"401", "403", "429"} <= document["paths"]["/embed"]["post"]["responses"].keys()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path)]
    assert main(["keys", "create", "site", "--scope", "write", "--rate", "60", *data]) == 0
    token = capsys.readouterr().out.strip()
    key = Keyring(tmp_path).find(token)
    assert key is not None
    assert (key.scope, key.rate, key.concurrency) == ("write", 60, None)
    assert main(["keys", "list", *data]) == 0
    assert "site" in capsys.readouterr().out
    assert main(["keys", "create", "site", *data]) == 1
    assert main(["keys", "create", "../site", *data]) == 1
    assert main(["keys", "create", "other", "--rate", "0", *data]) == 1
    assert main(["keys", "revoke", "site", *data]) == 0
    assert Keyring(tmp_path).find(token) is None
    assert main(["keys", "revoke", "site", *data]) == 1
    assert "no key 'site'" in capsys.readouterr().err
