"""Multipart forms, read to their end or refused."""

from __future__ import annotations

from contextlib import aclosing

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.settings import Settings
from models.errors import MalformedError, TooLargeError

Form = list[tuple[str, str | bytes]]  # its parts' names, and their texts or the files' bytes
_MAX_PART = 1_000_000  # bytes of a text


class _Parser(MultiPartParser):
    """Knows whether it has seen the end: what follows a boundary that never came is left out without a word."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def read_form(request: Request, settings: Settings) -> Form:
    """A request's parts, in their order.

    Raises:
        MalformedError: it is no multipart form, or breaks off. TooLargeError: it has more parts than any call may have
            inputs, labels and templates; they are refused while they are read, before they take memory.
    """
    fields = settings.max_prompts + 4 * settings.max_inputs
    limits = {"max_files": settings.max_inputs, "max_fields": fields, "max_part_size": _MAX_PART}
    try:
        async with aclosing(request.stream()) as stream:
            parser = _Parser(request.headers, stream, **limits)
            form = await parser.parse()
    except MultiPartException as error:
        too_large = error.message.startswith(("Too many", "Part exceeded"))
        raise (TooLargeError if too_large else MalformedError)(f"the form cannot be read: {error.message}") from error
    except UnicodeError as error:
        raise MalformedError("a text of the form is not of the charset that its type names; send UTF-8") from error
    try:
        if not parser.ended:
            raise MalformedError("the form breaks off before its closing boundary; send it again, whole")
        return [
            (name, await part.read() if isinstance(part, UploadFile) else part) for name, part in form.multi_items()
        ]
    finally:
        for file in parser._files_to_close_on_error:  # the form has none whose part did not end
            file.close()
