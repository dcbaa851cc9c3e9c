"""What holds of everything that is parsed, for whatever hypothesis thinks of: an answer or an error with a name."""

from __future__ import annotations

import asyncio
import base64
import json
import operator
import string
from collections.abc import Iterator
from typing import Any

import apsw
import numpy as np
import psycopg
import pytest
from databases import PostgresServer
from fastapi.exceptions import RequestValidationError
from hypothesis import assume, example, given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span

from app import inputs, tracing
from app.conditions import Filter, condition_of
from app.fetching import Fetcher
from app.filters import Condition
from app.inputs import Body, image_bytes, vector_of, written
from app.middleware import _hostname
from app.routes.collections import CollectionRequest, ItemsRequest
from app.routes.embed import EmbedRequest
from app.routes.generate import GenerateRequest
from app.routes.rank import RankRequest
from app.routes.search import SearchRequest
from app.routes.similarity import SimilarityRequest
from app.routes.zero_shot import ZeroShotRequest
from app.settings import Settings
from models.errors import SemblanceError

BODIES = (
    CollectionRequest, EmbedRequest, GenerateRequest, ItemsRequest, RankRequest, SearchRequest, SimilarityRequest,
    ZeroShotRequest,
)  # fmt: skip
FIELDS = sorted(
    {name for body in BODIES for name in body.model_fields} | {"text", "image", "weight", "key", "in", "id"}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=4),
    max_leaves=12,
)
# Read by SQLite's JSON exactly as it is written.
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-1000, 1000).map(lambda number: number / 4)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
VALUES = st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(["true", "false", "null", "0", "0.0"])


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
@given(content=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5) | JSON, cut=st.integers(0, 400))
def test_a_body_is_read_or_refused(model: type[Body], content: Any, cut: int) -> None:
    whole = json.dumps(content).encode()
    for body in (whole, whole[:cut], whole[:cut] + b"\xff" + whole[cut:]):
        try:
            assert isinstance(inputs._from_json(model, body), model)
        except (SemblanceError, RequestValidationError):
            continue


@given(st.binary(), st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]), st.booleans(), st.integers(1, 80))
def test_base64_comes_in_its_ways(content: bytes, encode: Any, padded: bool, line: int) -> None:
    text = encode(content).decode()
    text = text if padded else text.rstrip("=")
    lines = "\r\n".join(text[start : start + line] for start in range(0, len(text), line))
    assert image_bytes(lines, Settings()) == image_bytes(f"data:image/png;base64,{lines}", Settings()) == content


@given(st.text() | st.text(string.printable))
def test_a_picture_is_bytes_or_refused(text: str) -> None:
    try:
        assert isinstance(image_bytes(text, Settings()), bytes)
    except SemblanceError:
        return


@given(st.lists(st.floats(width=32)))
def test_vectors_are_written_and_read(numbers: list[float]) -> None:
    vector = np.array(numbers, np.float32)
    assert np.array_equal(vector_of(written(vector)), vector, equal_nan=True)


@given(st.text())
@example("")
@example(":")
@example("a>=")
@example('{"key": "a"}')
def test_a_filter_is_a_condition_or_refused(text: str) -> None:
    try:
        assert isinstance(condition_of(text), Condition)
    except SemblanceError:
        return


@given(st.text(min_size=1).filter(lambda key: not set(key) & set(":<>") and not key.startswith("{")), st.text())
def test_a_filter_says_key_and_value_as_they_were_written(key: str, value: str) -> None:
    condition = condition_of(f"{key}:{value}")
    assert (condition.key, condition.values[0]) == (key, value)


@given(st.sampled_from([">=", ">", "<=", "<"]), NUMBERS)
@example(">=", 2**53 + 1)
def test_a_bound_is_exact_in_a_text_too(sign: Any, bound: float) -> None:
    assert condition_of(f"a{sign}{bound}") == Condition("a", bounds=((sign, bound),))


FILTERED = given(
    st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), max_size=6),
    st.fixed_dictionaries({"key": st.sampled_from("abc")}, optional={
        "in": st.lists(VALUES, min_size=1, max_size=3),
        **dict.fromkeys(("gte", "gt", "lte", "lt"), NUMBERS | TEXTS.filter(bool)),
    }),
)  # fmt: skip


# A text that may be any value, and what else than itself it is.
EITHER = {
    "1e+20": 1e20, "1e20": 1e20, "1.0E20": 1e20, "100000000000000000000": 1e20, "1e-07": 1e-7, "2": 2, "2.0": 2,
    "-0": 0, "9007199254740993": 2**53 + 1, "true": True, "false": False, "null": None,
}  # fmt: skip
NOTHING_ELSE = ["1e999", "NaN", "True", "None", "02", " 2", ""]


@FILTERED
def test_a_filter_finds_what_a_loop_over_the_items_finds(items: list[dict[str, Any]], asked: dict[str, Any]) -> None:
    assume(len(asked) > 1)
    assert _found(items, Filter.model_validate(asked).condition()) == _passing(items, asked)


@pytest.mark.parametrize("text", [*EITHER, *NOTHING_ELSE])
def test_a_text_finds_itself_and_what_it_is(connection: psycopg.Connection[Any], text: str) -> None:
    among = [*EITHER, *NOTHING_ELSE, *EITHER.values(), 2**53, 1e-8, 1]
    items = [*({"a": value} for value in among), {"b": text}, {}]
    asked = {"key": "a", "in": [text, EITHER[text]] if text in EITHER else [text]}
    condition = condition_of(f"a:{text}")
    assert _found(items, condition) == _found_by_postgresql(connection, items, condition) == _passing(items, asked)


def _found(items: list[dict[str, Any]], asked: Condition) -> list[int]:
    condition, values = asked.sql()
    database = apsw.Connection(":memory:")
    database.execute("CREATE TABLE items (metadata TEXT)")
    database.executemany("INSERT INTO items VALUES (?)", [(json.dumps(item),) for item in items])
    rows = database.execute(f"SELECT rowid FROM items WHERE {condition} ORDER BY rowid", values)
    return [row[0] - 1 for row in rows]


@pytest.fixture(scope="module")
def connection(postgres: PostgresServer) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres.database()) as connected:
        yield connected


@FILTERED
def test_so_does_a_filter_of_postgresql(
    connection: psycopg.Connection[Any], items: list[dict[str, Any]], asked: dict[str, Any]
) -> None:
    assume(len(asked) > 1 and not any("\\u0000" in each for each in map(json.dumps, (*items, asked))))
    found = _found_by_postgresql(connection, items, Filter.model_validate(asked).condition())
    assert found == _passing(items, asked)


def _found_by_postgresql(
    connection: psycopg.Connection[Any], items: list[dict[str, Any]], asked: Condition
) -> list[int]:
    condition, values = asked.postgres()
    table = (
        "(SELECT place, metadata::jsonb AS facets FROM unnest(%s::text[]) WITH ORDINALITY AS given (metadata, place))"
    )
    rows = connection.execute(
        f"SELECT place FROM {table} AS items WHERE {condition} ORDER BY place",
        ([json.dumps(item) for item in items], *values),
    )
    return [place - 1 for (place,) in rows]


def _passing(items: list[dict[str, Any]], asked: dict[str, Any]) -> list[int]:
    return [place for place, item in enumerate(items) if asked["key"] in item and _fits(item[asked["key"]], asked)]


def _fits(value: Any, asked: dict[str, Any]) -> bool:
    if "in" in asked and not any(_same(value, each) for each in asked["in"]):
        return False
    signs = {"gte": operator.ge, "gt": operator.gt, "lte": operator.le, "lt": operator.lt}
    for name in asked.keys() & signs.keys():
        bound = asked[name]
        if not (isinstance(value, str) if isinstance(bound, str) else _is_number(value)):
            return False
        # Python's texts compare by code point, as SQLite's UTF-8 does by byte.
        if not signs[name](value, bound):
            return False
    return True


def _same(value: Any, asked: Any) -> bool:
    """2 and 2.0 are one number; a text, a number and a word are three kinds."""
    if _is_number(asked):
        return _is_number(value) and value == asked
    return type(value) is type(asked) and value == asked


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@given(st.text() | st.text(string.printable).map("http://".__add__), st.lists(st.text(string.printable), max_size=2))
def test_an_address_is_allowed_or_refused(url: str, hosts: list[str]) -> None:
    async def check() -> None:
        fetcher = Fetcher(["pictures.example", *hosts], 10, 1)
        try:
            fetcher._check(url)
        except SemblanceError:
            return
        finally:
            await fetcher.close()
        assert url.lower().startswith(("http://", "https://"))

    asyncio.run(check())


@given(st.text(st.characters(max_codepoint=255)))
@example("[::1]:80")
@example("[")
@example(":80")
def test_headers_of_any_kind_are_read(value: str) -> None:
    assert _hostname(value) == _hostname(value).lower()
    assert not get_current_span(tracing.sent_by(value)).get_span_context().is_valid
