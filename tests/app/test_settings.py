"""Settings come from keywords and the environment, and wrong ones are refused by name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError
from starlette.types import Scope

from app.connection import connect
from app.protocol import config_of
from app.settings import Settings


def test_environment_and_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMBLANCE_PORT", "9000")
    monkeypatch.setenv("SEMBLANCE_API_KEYS", "first-key, second-key")
    monkeypatch.setenv("SEMBLANCE_MODELS", "a=b,c=d")
    monkeypatch.setenv("SEMBLANCE_STORE", "/somewhere")
    monkeypatch.setenv("SEMBLANCE_DATA", "/pictures")  # training's, and never written to
    settings = Settings(threads=3)
    assert (settings.port, settings.threads, settings.models) == (9000, 3, ("a=b", "c=d"))
    assert [key.get_secret_value() for key in settings.api_keys] == ["first-key", "second-key"]
    assert settings.store == Path("/somewhere")
    assert "first-key" not in repr(settings)
    monkeypatch.delenv("SEMBLANCE_STORE")
    assert Settings().store == Path("data")
    assert Settings(store=Path("x")).store == Path("x")


def test_the_key_that_commands_bring_is_none_that_a_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMBLANCE_API_KEY", "theirs")
    assert Settings().api_keys == ()

    async def brought() -> str:
        async with connect(Settings(), "http://127.0.0.1:1") as client:
            return client.headers["Authorization"]

    assert asyncio.run(brought()) == "Bearer theirs"


@pytest.mark.parametrize(
    ("proxies", "caller"),
    [("", "10.1.2.3"), ("10.1.0.0/16,::1", "203.0.113.7"), ("10.2.0.0/16", "10.1.2.3"), ("*", "203.0.113.7")],
)
def test_who_calls_is_asked_of_the_proxies_that_are_named_alone(proxies: str, caller: str) -> None:
    seen = []

    async def app(scope: Scope, *_: object) -> None:
        seen.append(scope["client"][0])

    config = config_of(app, Settings(proxies=proxies))  # type: ignore[arg-type]
    config.load()
    told = {"type": "http", "client": ("10.1.2.3", 9), "headers": [(b"x-forwarded-for", b"203.0.113.7")]}
    asyncio.run(config.loaded_app(told, None, None))
    assert seen == [caller]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("batch_size", 0),
        ("deadline", -1),
        ("drain_seconds", "inf"),
        ("deadline", "nan"),
        ("proxies", "a.name"),
        ("proxies", "10.0.0.0/99"),
        ("unknown", 1),
    ],
)
def test_wrong_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]
