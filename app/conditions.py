"""What a request's `filter` says: conditions on the metadata of items, as texts or as objects."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from app.filters import Condition, Sign, number_of, values_of
from app.inputs import A_NUMBER, PLAIN, Body, Number, Text, in_a_sentence
from models.errors import InputError

Bound = Annotated[
    Number | Text, WrapValidator(in_a_sentence(f"a text that is not empty and has no NUL, or {A_NUMBER},"))
]
Value = Annotated[bool | Number | Text | Literal[""] | None, PLAIN]


class Filter(Body):
    """in: any of these values, 2 and "2" being two. gte, gt, lte, lt: bounds, numbers for numbers and texts for texts,
    such as dates."""

    key: Annotated[Text, Field(max_length=64)]
    any_of: list[Value] | None = Field(None, alias="in", min_length=1, max_length=1000)
    gte: Bound | None = None
    gt: Bound | None = None
    lte: Bound | None = None
    lt: Bound | None = None

    def condition(self) -> Condition:
        """The same for the store. Raises InputError if it asks for nothing."""
        given: list[tuple[Sign, Any]] = [(">=", self.gte), (">", self.gt), ("<=", self.lte), ("<", self.lt)]
        bounds = tuple((sign, bound) for sign, bound in given if bound is not None)
        if not (self.any_of or bounds):
            raise InputError(f"filter {self.key[:80]!r} needs one of in, gte, gt, lte, lt")
        return Condition(self.key, tuple(self.any_of or ()), bounds)


_a_text = in_a_sentence("key:value, key>=number, or an object with key and in, gte, gt, lte or lt, all without NUL,")


def _entry(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    # What is wrong with an object is said of its fields, and not that it is no text.
    return Filter.model_validate(value) if isinstance(value, dict) else _a_text(value, handler)


Entry = Annotated[Text | Filter, WrapValidator(_entry)]


_WRITTEN = re.compile(r"([^:<>]+)(?:(:)(.*)|([<>]=?)((?!=).+))", re.DOTALL)


def condition_of(entry: str | Filter) -> Condition:
    """One entry of `filter`, as it comes in a query or a body. Raises InputError if it is none."""
    if isinstance(entry, Filter):
        return entry.condition()
    if entry.startswith("{"):
        try:
            return Filter.model_validate_json(entry).condition()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            said = [".".join(str(part)[:64] for part in first["loc"]), first["msg"].removeprefix("Value error, ")]
            raise InputError(f"filter {entry[:80]!r}: {': '.join(filter(None, said))}") from error
    if (parts := _WRITTEN.fullmatch(entry)) is None:
        raise InputError(f"filter {entry[:80]!r} must be key:value, key>=number or an object with key and in")
    key, colon, value, sign, bound = parts.groups()
    if colon:
        return Condition(key, values_of(value))
    if (number := number_of(bound)) is not None and not math.isfinite(number):
        raise InputError(f"filter {entry[:80]!r}: a bound must be a finite number or a text")
    return Condition(key, bounds=((cast(Sign, sign), bound if number is None else number),))
