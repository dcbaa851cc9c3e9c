"""What an item's metadata must be for a search to return it."""

from __future__ import annotations

import json
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
        """The same on a row of PostgreSQL, for psycopg. Each comparison is reached only by what it is made for."""
        conditions = ["facets ? %s"]
        values: list[Any] = [self.key]
        if self.texts or self.numbers:
            conditions.append(
                "(COALESCE(facets ->> %s, 'null') = ANY(%s) OR CASE jsonb_typeof(facets -> %s) WHEN 'number' "
                "THEN (facets ->> %s)::numeric = ANY(%s::text[]::numeric[]) ELSE false END)"
            )
            values += [self.key, list(self.texts), self.key, self.key, [repr(number) for number in self.numbers]]
        for sign, bound in self.bounds:
            text = isinstance(bound, str)
            compared = (
                f'(facets ->> %s) COLLATE "C" {sign} %s' if text else f"(facets ->> %s)::numeric {sign} %s::numeric"
            )
            conditions.append(f"CASE jsonb_typeof(facets -> %s) WHEN %s THEN {compared} ELSE false END")
            values += [self.key, "string" if text else "number", self.key, bound if text else repr(bound)]
        return f"({' AND '.join(conditions)})", values


_IS_NUMBER, _IS_TEXT = "type IN ('integer', 'real')", "type = 'text'"
_ONE_OF = "(SELECT asked.value FROM json_each(?) AS asked)"
# JSON's three words, which SQLite reads as numbers and NULL, as they are written.
_WRITTEN = "CASE WHEN type IN ('true', 'false', 'null') THEN type ELSE CAST(value AS TEXT) END"
