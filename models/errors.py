"""Every error Semblance raises on purpose, as one tree.

SemblanceError
 ├─ InputError              a value the caller sent is wrong; `index` says which of several inputs
 │   ├─ MalformedError      it cannot even be parsed
 │   ├─ ImageError          a picture cannot be decoded
 │   ├─ MediaTypeError      not a kind of picture that is read
 │   └─ TooLargeError       more bytes, pixels, characters or items than the limits allow
 ├─ NotFoundError           no model, collection or item of that name
 ├─ ConflictError           it exists, but was made otherwise (another model, other dimensions)
 ├─ UnauthorizedError       no key, or a wrong one
 ├─ ForbiddenError          the key, host or address may not do this
 ├─ BusyError               full, draining or not ready; `retry_after` says in how many seconds to come back
 ├─ DeadlineError           the request's time ran out before its work was done
 ├─ StorageError            the disk refused a write
 ├─ ModelError              a model gave NaN or failed for one input
 ├─ CheckpointError         a checkpoint folder is missing, damaged, of a newer format or not ours
 ├─ DataError               a data set cannot be read
 └─ DivergedError           the loss is no longer a finite number

An error's text names the input, what was expected and the way out.
"""

from __future__ import annotations


class SemblanceError(Exception):
    """Base of every error raised on purpose; `index` is the position of the input that it is about, if it is one's."""

    index: int | None = None


class InputError(SemblanceError):
    """A wrong value from the caller; `index` is its position where several inputs were sent."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class MalformedError(InputError):
    """The request or file cannot be parsed at all."""


class ImageError(InputError):
    """The bytes claim to be a picture but cannot be decoded."""


class MediaTypeError(InputError):
    """The bytes are not of a kind of picture that is read."""


class TooLargeError(InputError):
    """More bytes, pixels, characters or items than the limits allow."""


class NotFoundError(SemblanceError):
    """There is no model, collection or item of that name."""


class ConflictError(SemblanceError):
    """It exists already, but was made otherwise."""


class UnauthorizedError(SemblanceError):
    """No API key, or a wrong one."""


class ForbiddenError(SemblanceError):
    """The key, host or address is not allowed to do this."""


class BusyError(SemblanceError):
    """No room now; come back after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitError(BusyError):
    """The key has made as many requests as it may; come back after `retry_after` seconds."""


class DeadlineError(SemblanceError):
    """The request's time ran out before its work was done."""


class StorageError(SemblanceError):
    """The disk refused a write; nothing of it was kept."""


class ModelError(SemblanceError):
    """A model gave NaN or failed for one input."""


class CheckpointError(SemblanceError):
    """A checkpoint folder is missing, damaged, of a newer format or not ours."""


class DataError(SemblanceError):
    """A data set cannot be read; the text names the file and the line."""


class DivergedError(SemblanceError):
    """The loss is no longer a finite number."""
