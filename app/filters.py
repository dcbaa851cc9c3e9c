"""What an item's metadata must be for a search to return it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Number = int | float
Sign = Literal[">=", ">", "<=", "<"]


@dataclass(frozen=True)
class Condition:
    """On the metadata at `key`. It must be one of `texts` or `numbers`, if there are any, and within all `bounds`.

    texts: values as they are written, so that "2", "true" and "null" stand for those too. bounds: with numbers for
    numbers, and with texts for texts, by code point, such as dates; what is of the other kind is without.
    """

    key: str
    texts: tuple[str, ...] = ()
    numbers: tuple[Number, ...] = ()
    bounds: tuple[tuple[Sign, Number | str], ...] = ()

    def sql(self) -> tuple[str, list[Any]]:
        """A condition on a row of `items`, and its values."""
        conditions = ["key = ?"]
        values: list[Any] = [self.key]
        if self.texts or self.numbers:
            conditions.append(f"({_WRITTEN} IN {_ONE_OF} OR ({_IS_NUMBER} AND value IN {_ONE_OF}))")
            values += [json.dumps(self.texts), json.dumps(self.numbers)]
        for sign, bound in self.bounds:
            conditions.append(f"{_IS_TEXT if isinstance(bound, str) else _IS_NUMBER} AND value {sign} ?")
            values.append(bound)
        return f"EXISTS (SELECT 1 FROM json_each(items.metadata) WHERE {' AND '.join(conditions)})", values

    def postgres(self) -> tuple[str, list[Any]]:
        """The same on a row of PostgreSQL, for psycopg: containment where it can be, which has an index and statistics,
        and comparisons that are reached only by what they are made for."""
        conditions, values = list[str](), list[Any]()
        if self.texts or self.numbers:
            either = [("facets @> %s::jsonb", [self._as_json(each)]) for each in (*self.texts, *self.numbers)]
            for text in self.texts:
                if (word := _word(text)) is not None:
                    # 2 and 2.0 are one number, and two ways of writing it.
                    written = "(facets @> %s::jsonb AND COALESCE(facets ->> %s, 'null') = %s)"
                    either.append((written, [f"{{{json.dumps(self.key)}: {word}}}", self.key, text]))
            conditions.append(f"({' OR '.join(condition for condition, _ in either)})")
            values += [value for _, asked in either for value in asked]
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

    def _as_json(self, value: str | Number) -> str:
        return json.dumps({self.key: value})


def number_of(text: str) -> Number | None:
    """The number that a text is, as an integer if 64 bits hold it, for a float would round it; None if it is none."""
    with suppress(ValueError):
        if -(2**63) <= (integer := int(text)) < 2**63:
            return integer
    with suppress(ValueError):
        return float(text)
    return None


def _word(text: str) -> str | None:
    """A text that is a number, true, false or null as JSON writes it; None for any other."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return text if value is None or isinstance(value, (int, float)) else None


_IS_NUMBER, _IS_TEXT = "type IN ('integer', 'real')", "type = 'text'"
_ONE_OF = "(SELECT asked.value FROM json_each(?) AS asked)"
# JSON's three words, which SQLite reads as numbers and NULL, as they are written.
_WRITTEN = "CASE WHEN type IN ('true', 'false', 'null') THEN type ELSE CAST(value AS TEXT) END"
