"""A data folder in one file, taken while it is served, and back again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import IO, NamedTuple

import apsw

from app.database import check, pictures_of, rows, way_out
from app.pictures import file_of, place_of
from models.errors import ConflictError, NotFoundError, StorageError
from models.files import sync

FORMAT = 1
_STORE, _MANIFEST, _KEYS = "store.db", "manifest.json", "keys"
_NAMES = re.compile(r"store\.db|pictures/[0-9a-f]{2}/[0-9a-f]{64}|keys/[A-Za-z0-9][A-Za-z0-9._-]*\.json")
_TRIES = 10
_MOUNTED = "lost+found"  # is in the empty root of a file system


class Saved(NamedTuple):
    """What a backup holds. elsewhere: pictures that items refer to in place, which no backup of this folder has."""

    items: int
    pictures: int
    elsewhere: int
    bytes: int


def back_up(store: Path, out: Path) -> Saved:
    """Write the data folder, as it is at one moment, to a tar file; whoever serves it goes on.

    SQLite copies the database, and then the pictures that it names, which never change, are added where they are not
    in the file yet. If one is gone, its item has been deleted since, and both is done again: each time there is less to
    add. Where the same item is there still, its picture was lost. Indexes are left out: they are made of the rest. The
    last member is a manifest with the SHA-256 of every other.

    Raises:
        NotFoundError: no data folder. ConflictError: `out` exists. StorageError: the disk refused, a file of the
        folder is damaged, or no moment was found.
    """
    source = store / _STORE
    if not source.is_file():
        raise NotFoundError(f"{store} is no data folder: it has no {_STORE}")
    if out.exists():
        raise ConflictError(f"{out} exists; a backup is never written over another")
    try:
        # In a folder of its own, so that of two that write one file at once neither writes into the other's.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".backup") as folder:
            draft, copy = Path(folder) / "draft", Path(folder) / _STORE
            with _Writing(draft) as archive:
                items, names = _add_moment(archive, store, copy)
                keys = sorted((store / _KEYS).glob("*.json"))
                for file in keys:
                    archive.add(f"{_KEYS}/{file.name}", file)
                if not keys and (store / _KEYS).is_dir():  # the last was revoked, and the server asks for one still
                    archive.add_folder(_KEYS)
                archive.add(_STORE, copy)
            if out.exists():
                raise ConflictError(f"{out} exists by now; a backup is never written over another")
            draft.rename(out)
            sync(out.parent)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}") from error
    kept = sum(place_of(name) is None for name in names)
    return Saved(items, kept, len(names) - kept, out.stat().st_size)


def restore(archive: Path, store: Path) -> Saved:
    """Make a data folder of a backup; nothing is there until every byte of it was checked.

    Raises:
        ConflictError: `store` exists and is not empty. StorageError: the backup is damaged, not whole, of a newer
        format or none.
    """
    into = store.exists()
    if into and any(each.name != _MOUNTED for each in store.iterdir()):
        raise ConflictError(
            f"{store} is not empty; give a folder that is not there yet, and move this one away if need be"
        )
    store.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there stays: a volume is mounted on it, and nothing beside it may be written or renamed to it.
    folder = Path(tempfile.mkdtemp(dir=store if into else store.parent, prefix=f".{store.name}.restoring"))
    try:
        try:
            with tarfile.open(archive, "r:") as tar:
                _extract(tar, folder, archive)
        except tarfile.TarError as error:
            raise StorageError(f"{archive} is damaged or no backup: {error}") from error
        copy = folder / _STORE
        items, names = _contents(copy)
        kept = {name for name in names if place_of(name) is None}
        if lost := [name for name in sorted(kept) if not _picture(folder, name).is_file()]:
            raise StorageError(f"{archive} is not whole: it lacks {len(lost)} pictures, first {lost[0]}")
        if into:  # the database last: pictures without one are refused by a server
            for each in sorted(folder.iterdir(), key=lambda each: each.name == _STORE):
                each.rename(store / each.name)
        else:
            folder.rename(store)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Saved(items, len(kept), len(names) - len(kept), archive.stat().st_size)


def _add_moment(archive: _Writing, store: Path, copy: Path) -> tuple[int, dict[str, int]]:
    """Copy the database and add every picture that it names. -> what `_contents` gives of the copy."""
    gone = dict[str, int]()
    for _ in range(_TRIES):
        _copy_database(store / _STORE, copy)
        items, names = _contents(copy)
        # The number of a row is never used twice, so what has it in both copies was there in between.
        if lost := sorted(gone.items() & names.items()):
            raise StorageError(_repair(copy, store, lost[0][0], "is missing"))
        kept = [name for name in names if place_of(name) is None]
        if not (gone := {name: names[name] for name in _add_pictures(archive, store, copy, kept)}):
            return items, names
    raise StorageError("items are deleted faster than they can be copied; try again at a quieter time")


def _copy_database(source: Path, copy: Path) -> None:
    try:
        # Opened for writing, for a reader needs that of a write-ahead log; and no byte of the file is changed.
        copy.unlink(missing_ok=True)
        with closing(apsw.Connection(str(source), flags=apsw.SQLITE_OPEN_READWRITE)) as here:
            here.set_busy_timeout(10_000)
            with closing(apsw.Connection(str(copy))) as there:
                with there.backup("main", here, "main") as running:
                    running.step()  # all pages at once: one moment
                there.pragma("journal_mode", "DELETE")  # one file
    except apsw.Error as error:
        raise StorageError(f"{source} cannot be copied: {error}") from error


def _contents(copy: Path) -> tuple[int, dict[str, int]]:
    """Of a database: how many items, and their pictures by name, each with the first row that has it. Raises
    StorageError if it is damaged."""
    try:
        with closing(apsw.Connection(str(copy), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            check(connection, Path(copy.name), whole=True)
            items = rows(connection, "SELECT COUNT(*) FROM items")[0][0]
            return int(items), pictures_of(connection)
    except apsw.Error as error:
        raise StorageError(f"{copy.name} is damaged: {error}") from error


def _add_pictures(archive: _Writing, store: Path, copy: Path, names: list[str]) -> list[str]:
    """Those that are not in it. -> the ones that are gone."""
    gone = []
    for name in names:
        file = _picture(store, name)
        member = str(file.relative_to(store))
        if member in archive.hashes:
            continue
        try:
            archive.add(member, file)
        except FileNotFoundError:
            gone.append(name)
            continue
        if archive.hashes[member] != name:
            raise StorageError(_repair(copy, store, name, "is damaged, it is not what was stored"))
    return gone


def _repair(copy: Path, store: Path, name: str, what: str) -> str:
    with closing(apsw.Connection(str(copy))) as connection:
        return f"{_picture(store, name)} {what}: {way_out(connection, name)}"


def _picture(store: Path, name: str) -> Path:
    return file_of(store / "pictures", name)


def _extract(tar: tarfile.TarFile, folder: Path, archive: Path) -> None:
    """Every member, each checked against the manifest; only names that a backup has are ever written."""
    hashes: dict[str, str] = {}
    expected = None
    for member in tar:
        content = tar.extractfile(member) if member.isreg() else None
        if member.name == _MANIFEST and content is not None:
            expected = _manifest(content.read(), archive)
            continue
        if member.isdir() and member.name == _KEYS:
            (folder / _KEYS).mkdir(mode=0o700, exist_ok=True)
            hashes[_KEYS] = ""
            continue
        if content is None or not _NAMES.fullmatch(member.name):
            raise StorageError(f"{archive} is no backup: it holds {member.name!r}")
        file = folder / member.name
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        hashing = _Hashing(content)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
            shutil.copyfileobj(hashing, target)
            target.flush()
            os.fsync(target.fileno())
        hashes[member.name] = hashing.hexdigest()
    if expected is None:
        raise StorageError(f"{archive} is not whole: its end is missing")
    wrong = sorted(expected.items() ^ hashes.items())
    if wrong:
        raise StorageError(f"{archive} is damaged: {wrong[0][0]} is not what was saved")


def _manifest(content: bytes, archive: Path) -> dict[str, str]:
    """The SHA-256 of every other member by its name."""
    try:
        found = json.loads(content)
        version, files = int(found["format"]), {str(name): str(digest) for name, digest in found["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{archive} is damaged: its manifest cannot be read") from error
    if version > FORMAT:
        raise StorageError(f"{archive} is of format {version}, this version reads up to {FORMAT}: upgrade")
    return files


class _Writing:
    """A tar file that ends with its manifest and is on the disk once the block is left."""

    def __init__(self, draft: Path) -> None:
        self._tar = tarfile.open(draft, "w")  # noqa: SIM115 - closed below
        self._draft = draft
        self.hashes: dict[str, str] = {}

    def add(self, name: str, file: Path) -> None:
        """A file as a member."""
        with file.open("rb") as content:
            told = self._tar.gettarinfo(arcname=name, fileobj=content)
            told.uid = told.gid = 0
            told.uname = told.gname = ""
            hashing = _Hashing(content)
            self._tar.addfile(told, hashing)
        self.hashes[name] = hashing.hexdigest()

    def add_folder(self, name: str) -> None:
        """An empty one."""
        told = tarfile.TarInfo(name)
        told.type, told.mode = tarfile.DIRTYPE, 0o700
        self._tar.addfile(told)
        self.hashes[name] = ""

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            manifest = json.dumps({"format": FORMAT, "files": self.hashes}, indent=1).encode()
            told = tarfile.TarInfo(_MANIFEST)
            told.size = len(manifest)
            self._tar.addfile(told, io.BytesIO(manifest))
        self._tar.close()
        with self._draft.open("rb") as file:
            os.fsync(file.fileno())


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        part = self._file.read(size)
        self._hash.update(part)
        return part

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
