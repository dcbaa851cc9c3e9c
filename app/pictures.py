"""Stored pictures: files named by their content's SHA-256, on the disk before anything refers to them.

A thumbnail lies beside its picture, under its name and the size. A picture may also stay where it is, below a folder
that the operator names; its name then is its path, and it is read as long as it is there.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from models.errors import NotFoundError, StorageError
from models.files import sync

_JPEG_END = b"\xff\xd9"
_STEP, _LARGEST = 32, 512
_IN_PLACE = "at:"  # begins the name of a picture that stays where it is; no digest holds a colon


def place_of(name: str | None) -> Path | None:
    """Where a picture is that is not kept in the store; None for one that is."""
    return Path(name.removeprefix(_IN_PLACE)) if name is not None and name.startswith(_IN_PLACE) else None


def file_of(folder: Path, digest: str) -> Path:
    """Where a picture is that is kept in the store, below the folder of its pictures."""
    return folder / digest[:2] / digest


def name_of(content: bytes | Path) -> str:
    """What an item calls its picture: the SHA-256 of what is kept, or the place where it stays."""
    return f"{_IN_PLACE}{content}" if isinstance(content, Path) else hashlib.sha256(content).hexdigest()


def kept_size(size: int) -> bool:
    """Whether thumbnails of this size are kept: so many sizes at most, whatever is asked for."""
    return size % _STEP == 0 and size <= _LARGEST


class Places:
    """Pictures that stay where they are, below `root`; None: none is read."""

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else root.resolve()

    def read(self, place: Path) -> bytes:
        """A picture's bytes. Raises NotFoundError if it is gone or not below the root."""
        self._check(place)
        return _content(place)

    def version(self, place: Path) -> str:
        """A digest of what a look at the file tells. Raises NotFoundError."""
        self._check(place)
        try:
            state = place.stat()
        except OSError as error:
            raise NotFoundError("the picture has been deleted") from error
        return hashlib.sha256(f"{place} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()

    def _check(self, place: Path) -> None:
        if self._root is None or not place.resolve().is_relative_to(self._root):
            raise NotFoundError("the picture is at a place that this server does not read")


class Pictures:
    """Files under `folder`, by the first two digits of their names. Thread-safe. root: where others may be read."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self._folder = folder
        self._places = Places(root)
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, content: bytes | Path) -> str:
        """Store a picture durably, or note its place, and give its name. One that is there and damaged is mended.

        Raises StorageError when the disk refuses.
        """
        name = name_of(content)
        if isinstance(content, bytes) and (file := self._file(name)).is_file() and not _holds(file, content):
            self._write(name, content)
            for thumbnail in file.parent.glob(f"{name}.*"):
                thumbnail.unlink(missing_ok=True)
        self.ensure(name, content)
        return name

    def ensure(self, digest: str, content: bytes | Path) -> None:
        """Store it unless it is there."""
        if isinstance(content, bytes) and not self._file(digest).is_file():
            self._write(digest, content)

    def _write(self, digest: str, content: bytes) -> None:
        file = self._file(digest)
        temporary = file.parent / f".{uuid.uuid4().hex}"
        try:
            file.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(file)
            sync(file.parent)
            sync(self._folder)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StorageError(f"the disk refused a picture: {error.strerror}; free some space") from error

    def get(self, digest: str) -> bytes:
        """A picture's bytes. Raises NotFoundError if it was deleted since, or may not be read in its place."""
        place = place_of(digest)
        return _content(self._file(digest)) if place is None else self._places.read(place)

    def thumbnail(self, digest: str, size: int, make: Callable[[bytes], bytes]) -> bytes:
        """What `make` gives for a picture, made once for each size that is asked for often. Raises as `get` does."""
        file = self._file(self.version(digest)).with_suffix(f".{size}")
        # A file that a power cut left empty or half lacks a JPEG's end. Nothing is lost with it, so nothing is synced.
        with suppress(OSError):
            if (kept := file.read_bytes()).endswith(_JPEG_END):
                return kept
        made = make(self.get(digest))
        if kept_size(size) and made.endswith(_JPEG_END):
            temporary = file.parent / f".{uuid.uuid4().hex}"
            with suppress(OSError):
                file.parent.mkdir(exist_ok=True)
                temporary.write_bytes(made)
                temporary.replace(file)
        return made

    def version(self, digest: str) -> str:
        """A picture's digest; for one in its place, one of what a look at the file tells. Raises NotFoundError."""
        place = place_of(digest)
        return digest if place is None else self._places.version(place)

    def remove(self, digests: Iterable[str]) -> None:
        """Delete these, but not in their places; what fails now is swept up by `keep_only` at the next start."""
        for digest in digests:
            if place_of(digest) is not None:
                continue
            file = self._file(digest)
            with suppress(OSError):
                for each in (file, *file.parent.glob(f"{digest}.*")):
                    each.unlink(missing_ok=True)

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        return not any(self._files())

    def keep_only(self, digests: Collection[str]) -> None:
        """Delete every other file: pictures whose items were never committed, and halves of files."""
        for file in self._files():
            if file.stem not in digests:
                file.unlink(missing_ok=True)

    def _files(self) -> Iterator[Path]:
        return (file for folder in self._folder.iterdir() if folder.is_dir() for file in folder.iterdir())

    def _file(self, digest: str) -> Path:
        return file_of(self._folder, digest)


def _holds(file: Path, content: bytes) -> bool:
    try:
        return file.stat().st_size == len(content) and file.read_bytes() == content
    except OSError:
        return False


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError("the picture has been deleted") from error
    except OSError as error:
        raise StorageError(f"a picture cannot be read: {error.strerror}") from error
