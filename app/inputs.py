"""Request bodies: strict JSON or multipart forms, one parser for both, and how they stand in OpenAPI."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, cast
from urllib.parse import unquote_to_bytes

import numpy as np
import pybase64
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from app.batching import late
from app.forms import Form, read_form
from app.images import Limits
from app.settings import Settings
from models.errors import ForbiddenError, InputError, MalformedError, MediaTypeError, SemblanceError, TooLargeError

if TYPE_CHECKING:
    from app.service import Service

# A 16 x 16 picture of a red disc, so that the examples work as pasted.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAUUlEQVR42mP8//8/AymAiYFEwIIpdF1VE87WvH0dTZYR2UnISpEBsjYmgqrRpEj2"
    "AxNB49EUkGsD7TVghjeukKXASXgsQZZixEx8JCQNmoQSAGpxIRMUFZP+AAAAAElFTkSuQmCC"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_PICTURES = frozenset({"image", "mask"})  # fields of the type Picture
MAX_IDS = 1000  # of items that a request names
_LARGE_BODY = 262_144  # bytes; above it, parsing moves off the event loop


def _clean(text: str) -> str:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("text must not hold NUL or half a surrogate pair")
    return text


def _no_integer(value: Any) -> Any:
    if isinstance(value, int):  # or one that is too large would be taken as a float, and rounded
        raise ValueError("an integer must fit into 64 bits")
    return value


def in_a_sentence(expected: str) -> Callable[[Any, ValidatorFunctionWrapHandler], Any]:
    """For WrapValidator: one sentence in place of several, of which each is about one type that a value might be."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"{expected} is expected") from None

    return check


def as_list(value: Any) -> Any:
    """One input stands for a list of one."""
    return value if isinstance(value, list) else [value]


Picture = Annotated[
    str | bytes,
    WithJsonSchema(
        {"type": "string", "description": "base64, a data: URI, or a URL of a host in the setting `fetch_hosts`"}
    ),
]
Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_clean)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
ItemId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}$")]
# Integers that 64 bits hold: what is stored must be answered again, and JSON writers stop there.
Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[float, BeforeValidator(_no_integer)]
A_NUMBER = "a finite number (an integer: of 64 bits)"
PLAIN = WrapValidator(in_a_sentence(f"a text without NUL, {A_NUMBER}, true, false or null"))
Metadata = dict[
    Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(_clean)],
    Annotated[Annotated[str, AfterValidator(_clean)] | Number | bool | None, PLAIN],
]


class Body(BaseModel):
    """A request body. JSON is taken at its word: no "3" for 3, no unknown keys, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    file_field: ClassVar[str] = ""
    named_files: ClassVar[frozenset[str]] = frozenset()
    list_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_form(cls, form: Form) -> dict[str, Any]:
        """A form's parts -> the values of this body. A file goes to the field of its name (OpenAI's clients write
        `image[]` too) if that is one of `named_files`; the others are inputs that `file_field` takes, beside its texts.
        Raises InputError for a part that has no place."""
        values: dict[str, Any] = {}
        for name, part in form:
            field, value = name, cast("Any", part)
            if isinstance(part, bytes) and (field := name.removesuffix("[]")) not in cls.named_files:
                if not cls.file_field:
                    raise InputError(f"no file {name[:64]!r} is taken here, but {sorted(cls.named_files) or 'none'}")
                field, value = cls.file_field, {"image": part}
            if field in cls.list_fields or field == cls.file_field:
                values.setdefault(field, []).append(value)
            elif field in values:
                raise InputError(f"{field[:64]!r} is given more than once, and one is taken")
            else:
                values[field] = value
        return values


class Input(Body):
    """A text or a picture: a string, {"text": ...} or {"image": base64, data: URI or URL}."""

    text: Text | None = None
    image: Picture | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> Input:
        if (self.text is None) == (self.image is None):
            raise ValueError('an input is a string, {"text": ...} or {"image": ...}')
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"type": "string", "minLength": 1}, dict(schema)]}


def written(vector: NDArray[np.float32]) -> str:
    """A vector as base64 of little-endian float32."""
    return pybase64.b64encode(vector.astype("<f4").tobytes()).decode()


def vector_of(text: str) -> NDArray[np.float32]:
    """What `written` gave, as a vector. Raises ValueError for anything else."""
    return np.frombuffer(pybase64.b64decode(text, validate=True), "<f4").astype(np.float32)


class StoredInput(Input):
    """A picture or a text to store. path: of a picture that stays where it is, below a folder that the operator names.
    An `embedding` (base64 of little-endian float32, or numbers) is stored as it is, so it must be the collection's own
    model's; then the picture may be missing."""

    path: Annotated[Text, Field(max_length=4096)] | None = None
    embedding: str | list[float] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> StoredInput:
        given = sum(value is not None for value in (self.text, self.image, self.path))
        if given > 1 or (given == 0 and self.embedding is None):
            raise ValueError('an item has {"text": ...} or {"image": ...}; with an embedding it may have neither')
        return self

    def place(self, settings: Settings, index: int) -> Path | None:
        """Where the picture at `path` is, checked.

        Raises:
            ForbiddenError: there is no folder for such pictures. InputError: it lies outside, or no file is there.
            TooLargeError: it is larger than a body may be.
        """
        if self.path is None:
            return None
        if settings.picture_root is None:
            raise ForbiddenError("this server keeps every picture itself; send the picture, or set PICTURE_ROOT")
        root = settings.picture_root.resolve()
        place = (root / self.path).resolve()
        if not place.is_relative_to(root):
            raise InputError("the path lies outside of the folder whose pictures may stay in their places", index)
        if not place.is_file():
            raise InputError("no file is at this path", index)
        if (size := place.stat().st_size) > settings.max_body:
            raise TooLargeError(f"the file has {size:,} bytes, at most {settings.max_body:,} are read", index)
        return place

    def vector(self, index: int) -> NDArray[np.float32] | None:
        """The embedding that is given, (D,). Raises InputError with the item's index if it is no base64 of float32."""
        if not isinstance(self.embedding, str):
            with np.errstate(over="ignore"):  # what does not fit becomes infinite, which the store refuses
                return None if self.embedding is None else np.array(self.embedding, np.float32)
        try:
            return vector_of(self.embedding)
        except ValueError:
            raise InputError("an embedding is base64 of little-endian float32, or numbers", index) from None


class WeightedInput(Input):
    """One part of a mixed query; a negative weight leads away from it. item: the id of one that the collection holds,
    whose own embedding takes part."""

    item: ItemId | None = None
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0

    @model_validator(mode="after")
    def _one_of_two(self) -> WeightedInput:
        if sum(value is not None for value in (self.text, self.image, self.item)) != 1:
            raise ValueError('a part of a query is a string, {"text": ...}, {"image": ...} or {"item": ...}')
        return self


Inputs = Annotated[list[Input], Field(min_length=1), BeforeValidator(as_list)]

B = TypeVar("B", bound=Body)


def body_of(model: type[B], *, optional: bool = False) -> Callable[[Request], Awaitable[B]]:
    """A dependency that reads the request's body as `model`, from JSON or a multipart form.

    optional: no body at all stands for an empty one.
    """

    async def parse(request: Request) -> B:
        body = await read(request)
        await fetch_pictures(body, request.app.state.service)
        return body

    async def read(request: Request) -> B:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        form = kind == "multipart/form-data"
        if not form and kind != "application/json" and not kind.endswith("+json"):
            raise MediaTypeError("the body must be application/json or multipart/form-data")
        if (coding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
            raise MediaTypeError(f"the body is sent with Content-Encoding {coding[:64]!r}; only plain bodies are read")
        if form:
            return await _from_form(model, request)
        body = b"".join([part async for part in request.stream()])  # request.body() would hold it until the answer
        if optional and not body:
            return model()
        if len(body) > _LARGE_BODY:
            return await asyncio.to_thread(_from_json, model, body)
        return _from_json(model, body)

    return parse


async def fetch_pictures(body: BaseModel, service: Service) -> None:
    """Put in the place of each picture's URL what is there, if the operator allows that.

    Raises what Fetcher.fetch does, with the input's index; TooLargeError, too, if there are more than a call may have,
    or all are larger together than its body may be.
    """
    if service.fetcher is None:
        return
    found, settings = list(_urls(body)), service.settings
    if len(found) > settings.max_inputs:
        raise TooLargeError(f"{len(found)} pictures are more than the {settings.max_inputs} of one call")
    left = settings.max_body

    async def fetch(holder: BaseModel, name: str, index: int | None) -> None:
        nonlocal left
        with at_index(index):
            content = await service.fetcher.fetch(getattr(holder, name))  # type: ignore[union-attr]
        left -= len(content)
        if left < 0:
            raise TooLargeError(f"the pictures have more than {settings.max_body:,} bytes together")
        setattr(holder, name, content)

    tasks = [asyncio.ensure_future(fetch(*each)) for each in found]
    try:
        async with asyncio.timeout(settings.deadline):
            await asyncio.gather(*tasks)
    except TimeoutError:
        raise late("read from its URLs") from None
    finally:
        for task in tasks:
            task.cancel()


def _urls(node: Any, index: int | None = None) -> Iterator[tuple[BaseModel, str, int | None]]:
    """Every field of a body that has a picture's URL: its holder, its name, and the place of the input in its list."""
    if isinstance(node, list):
        for place, each in enumerate(node):
            yield from _urls(each, place)
    elif isinstance(node, BaseModel):
        for name, value in node:
            if name in _PICTURES and isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
                yield node, name, index
            elif isinstance(value, (BaseModel, list)):
                yield from _urls(value, index)


def _from_json(model: type[B], body: bytes) -> B:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        # Half a surrogate pair is valid JSON with a wrong value; everything else here is not JSON at all.
        if "hex escape" in problems[0]["msg"]:
            raise InputError("text must not hold half a surrogate pair")
        raise MalformedError(f"the body is not JSON: {problems[0]['msg'].removeprefix('Invalid JSON: ')}")
    raise RequestValidationError(problems)


async def _from_form(model: type[B], request: Request) -> B:
    form = await read_form(request, request.app.state.service.settings)
    try:
        return model.model_validate(model.from_form(form), strict=False)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
    raise RequestValidationError(problems)


def known_query(request: Request) -> None:
    """A dependency that refuses a query with what no parameter is: a misspelt one would be passed over without a word.
    Raises InputError, or MalformedError for one that is no UTF-8."""
    try:
        unquote_to_bytes(request.scope["query_string"]).decode()
    except UnicodeDecodeError:
        raise MalformedError("the query is not UTF-8 when it is percent-decoded") from None
    known = [each.alias for each in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise InputError(f"there is no parameter {name[:64]!r} here; known: {', '.join(known) or 'none'}")


@contextmanager
def at_index(index: int | None) -> Iterator[None]:
    """Errors of an input carry its place among those of the call."""
    try:
        yield
    except SemblanceError as error:
        error.index = index
        raise


@contextmanager
def of_fields(*fields: tuple[str, int | None]) -> Iterator[None]:
    """Errors of inputs that are looked at together say of which field each is, and carry its place there. fields: their
    names, and how many inputs each has; None: it is one, not a list."""
    try:
        yield
    except SemblanceError as error:
        for name, count in fields:
            if error.index is not None and error.index < (count or 1):
                error.index = None if count is None else error.index
                error.args = (f"of `{name}`: {error}",)
                break
            error.index = None if error.index is None else error.index - (count or 1)
        raise


def image_bytes(value: str | bytes | Path, settings: Settings) -> bytes:
    """The file behind an `image` value: an upload's bytes, base64, a data: URI, or a file in its place.

    Raises:
        ForbiddenError: an http(s) URL, for fetching is off. InputError: another scheme, or no base64.
        MediaTypeError: a data: URI of something else than a picture.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, Path):
        try:
            return value.read_bytes()
        except OSError as error:
            raise InputError(f"the file cannot be read: {error.strerror}") from error
    scheme = _SCHEME.match(value)
    if scheme is None:
        return _unbase64(value)
    match scheme[1].lower():
        case "data":
            header, _, payload = value.partition(",")
            if not header[5:].lower().startswith("image/") or not header.lower().endswith(";base64"):
                raise MediaTypeError("a data: URI must be data:image/...;base64,...")
            return _unbase64(payload)
        case "http" | "https":
            raise ForbiddenError(
                "this server fetches no URLs (its setting `fetch_hosts`); send the picture itself, as base64 or a file"
                if not settings.fetch_hosts
                else "a picture's URL is http(s)://host/path"
            )
    raise InputError("an image is base64, a data: URI or a file; other schemes are not read")


def _unbase64(value: str) -> bytes:
    with suppress(ValueError):
        return pybase64.b64decode(value, validate=True)  # as nearly all is sent: what follows copies it several times
    compact = "".join(value.split()).replace("-", "+").replace("_", "/")
    try:
        return pybase64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError:
        raise InputError("the image is not base64; encode the file's bytes, or send them as multipart") from None


def check_inputs(inputs: list[Input] | list[WeightedInput], settings: Settings, what: str = "inputs") -> None:
    """Refuse too many inputs, or too long a text. Raises TooLargeError."""
    if len(inputs) > settings.max_inputs:
        raise TooLargeError(f"{len(inputs)} {what} are more than the {settings.max_inputs} of one call")
    for index, each in enumerate(inputs):
        check_text(each.text, settings, index)


def check_text(text: str | None, settings: Settings, index: int | None = None) -> None:
    """Refuse a text over the limit. Raises TooLargeError, which does not repeat it."""
    if text is not None and len(text) > settings.max_text:
        raise TooLargeError(f"the text has {len(text):,} characters, at most {settings.max_text:,} are read", index)


def image_limits(settings: Settings) -> Limits:
    """The settings' limits for one picture."""
    return Limits(settings.max_body, settings.max_pixels, settings.max_side)


def request_body(model: type[Body], example: Any, *, files: bool = True, required: bool = True) -> dict[str, Any]:
    """What a route passes as `openapi_extra`: its JSON body with an example, and its form where it takes files."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if files:
        file = {"type": "string", "format": "binary"}
        parts: dict[str, Any] = {
            name: file if name in model.named_files else {} for name in schema["properties"] if name != model.file_field
        }
        if model.file_field:
            parts["file"] = {"type": "array", "items": file}
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": parts}}
    return {"requestBody": {"required": required, "content": content}}
