"""Stored pictures: files named by their content's SHA-256, on the disk before anything refers to them.

A thumbnail lies beside its picture, under its name and the size.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

from models.errors import NotFoundError, StorageError

_JPEG_END = b"\xff\xd9"
_STEP, _LARGEST = 32, 512  # sizes of thumbnails that are kept: so many at most, whatever is asked for


class Pictures:
    """Files under `folder`, by the first two digits of their names. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, content: bytes) -> str:
        """Store a picture durably and return its name. Raises StorageError when the disk refuses."""
        digest = hashlib.sha256(content).hexdigest()
        self.ensure(digest, content)
        return digest

    def ensure(self, digest: str, content: bytes) -> None:
        """Store it unless it is there."""
        file = self._file(digest)
        if file.is_file():
            return
        temporary = file.parent / f".{uuid.uuid4().hex}"
        try:
            file.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(file)
            _sync_folder(file.parent)
            _sync_folder(self._folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StorageError(f"the disk refused a picture: {error.strerror}; free some space") from error

    def get(self, digest: str) -> bytes:
        """A picture's bytes. Raises NotFoundError if it was deleted in the meantime."""
        try:
            return self._file(digest).read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError("the picture has been deleted") from error
        except OSError as error:
            raise StorageError(f"a picture cannot be read: {error.strerror}") from error

    def thumbnail(self, digest: str, size: int, make: Callable[[bytes], bytes]) -> bytes:
        """What `make` gives for a picture, made once for each size that is asked for often. Raises as `get` does."""
        file = self._file(digest).with_suffix(f".{size}")
        # A file that a power cut left empty or half lacks a JPEG's end. Nothing is lost with it, so nothing is synced.
        with suppress(OSError):
            if (kept := file.read_bytes()).endswith(_JPEG_END):
                return kept
        made = make(self.get(digest))
        if size % _STEP == 0 and size <= _LARGEST and made.endswith(_JPEG_END):
            temporary = file.parent / f".{uuid.uuid4().hex}"
            with suppress(OSError):
                temporary.write_bytes(made)
                temporary.replace(file)
        return made

    def remove(self, digests: Iterable[str]) -> None:
        """Delete these; what fails now is swept up by `keep_only` at the next start."""
        for digest in digests:
            file = self._file(digest)
            with suppress(OSError):
                for each in (file, *file.parent.glob(f"{digest}.*")):
                    each.unlink(missing_ok=True)

    def keep_only(self, digests: Collection[str]) -> None:
        """Delete every other file: pictures whose items were never committed, and halves of files."""
        for folder in self._folder.iterdir():
            for file in folder.iterdir() if folder.is_dir() else ():
                if file.stem not in digests:
                    file.unlink(missing_ok=True)

    def _file(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
