"""What an item's metadata must be for a search to return it."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Number = int | float
Value = str | Number | bool | None
Sign = Literal[">=", ">", "<=", "<"]


@dataclass(frozen=True)
class Condition:
    """On the metadata at `key`. It must be one of `values`, if there are any, and within all `bounds`.

    values: each for those of its own kind, so that neither 1 nor "true" is true. bounds: with numbers for numbers, and
    with texts for texts, by code point, such as dates; what is of the other kind is without.
    """

    key: str
    values: tuple[Value, ...] = ()
    bounds: tuple[tuple[Sign, Number | str], ...] = ()

    def sql(self) -> tuple[str, list[Any]]:
        """A condition on a row of `items`, and its values."""
        conditions = ["key = ?"]
        values: list[Any] = [self.key]
        if self.values:
            words = [json.dumps(each) for each in self.values if each is None or isinstance(each, bool)]
            others = [each for each in self.values if each is not None and not isinstance(each, bool)]
            # SQLite has 1 and 0 for true and false, but says of which type they are.
            conditions.append(f"(type IN {_ONE_OF} OR (({_IS_NUMBER} OR {_IS_TEXT}) AND value IN {_ONE_OF}))")
            values += [json.dumps(words), json.dumps(others)]
        for sign, bound in self.bounds:
            conditions.append(f"{_IS_TEXT if isinstance(bound, str) else _IS_NUMBER} AND value {sign} ?")
            values.append(bound)
        return f"EXISTS (SELECT 1 FROM json_each(items.metadata) WHERE {' AND '.join(conditions)})", values

    def postgres(self) -> tuple[str, list[Any]]:
        """The same on a row of PostgreSQL, for psycopg: containment where it can be, which has an index and statistics,
        and comparisons that are reached only by what they are made for."""
        conditions, values = list[str](), list[Any]()
        if self.values:
            conditions.append(f"({' OR '.join(['facets @> %s::jsonb'] * len(self.values))})")
            values += [json.dumps({self.key: each}) for each in self.values]
        for sign, bound in self.bounds:
            kind, type, asked = "::numeric", "number", repr(bound)
            if isinstance(bound, str):
                kind, type, asked = 'COLLATE "C"', "string", bound
            conditions.append(
                f"CASE jsonb_typeof(facets -> %s) WHEN %s THEN (facets ->> %s) {kind} {sign} %s {kind} ELSE false END"
            )
            values += [self.key, type, self.key, asked]
        if not conditions:
            return "facets ? %s", [self.key]
        return f"({' AND '.join(conditions)})", values


def number_of(text: str) -> Number | None:
    """The number that a text is, as an integer if 64 bits hold it, for a float would round it; None if it is none."""
    with suppress(ValueError):
        if -(2**63) <= (integer := int(text)) < 2**63:
            return integer
    with suppress(ValueError):
        return float(text)
    return None


def values_of(text: str) -> tuple[Value, ...]:
    """What a text stands for where it may be any value: itself, and the number or the word that it is as JSON writes
    them. A number has many ways of being written, and a database others than an answer."""
    if text in _WORDS:
        return text, _WORDS[text]
    number = number_of(text) if _JSON_NUMBER.fullmatch(text) else None
    return (text,) if number is None or not math.isfinite(number) else (text, number)


_WORDS = {"true": True, "false": False, "null": None}
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_IS_NUMBER, _IS_TEXT = "type IN ('integer', 'real')", "type = 'text'"
_ONE_OF = "(SELECT asked.value FROM json_each(?) AS asked)"
