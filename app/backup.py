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

from app.database import check, rows
from app.pictures import file_of, place_of
from models.errors import ConflictError, NotFoundError, StorageError

FORMAT = 1
_STORE, _MANIFEST, _KEYS = "store.db", "manifest.json", "keys"
_NAMES = re.compile(r"store\.db|pictures/[0-9a-f]{2}/[0-9a-f]{64}|keys/[A-Za-z0-9][A-Za-z0-9._-]*\.json")
_TRIES = 10


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
    add. Indexes are left out: they are made of the rest. The last member is a manifest with the SHA-256 of every other.

    Raises:
        NotFoundError: no data folder. ConflictError: `out` exists. StorageError: the disk refused, a file of the
        folder is damaged, or no moment was found.
    """
    source = store / _STORE
    if not source.is_file():
        raise NotFoundError(f"{store} is no data folder: it has no {_STORE}")
    if out.exists():
        raise ConflictError(f"{out} exists; a backup is never written over another")
    draft = out.with_name(f".{out.name}.part")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".backup") as folder, _Writing(draft) as archive:
            copy = Path(folder) / _STORE
            for _ in range(_TRIES):
                _copy_database(source, copy)
                items, names = _contents(copy)
                kept = [name for name in names if place_of(name) is None]
                if _add_pictures(archive, store, kept):
                    break
            else:
                raise StorageError("items are deleted faster than they can be copied; try again at a quieter time")
            keys = sorted((store / _KEYS).glob("*.json"))
            for file in keys:
                archive.add(f"{_KEYS}/{file.name}", file)
            if not keys and (store / _KEYS).is_dir():  # the last was revoked, and the server asks for one still
                archive.add_folder(_KEYS)
            archive.add(_STORE, copy)
        draft.rename(out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
    return Saved(items, len(kept), len(names) - len(kept), out.stat().st_size)


def restore(archive: Path, store: Path) -> Saved:
    """Make a data folder of a backup; nothing is there until every byte of it was checked.

    Raises:
        ConflictError: `store` exists and is not empty. StorageError: the backup is damaged, not whole, of a newer
        format or none.
    """
    if store.exists() and any(store.iterdir()):
        raise ConflictError(
            f"{store} is not empty; give a folder that is not there yet, and move this one away if need be"
        )
    store.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=store.parent, prefix=f".{store.name}.restoring"))
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
        if store.exists():
            store.rmdir()
        folder.rename(store)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Saved(items, len(kept), len(names) - len(kept), archive.stat().st_size)


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


def _contents(copy: Path) -> tuple[int, list[str]]:
    """Of a database: how many items, and the names of their pictures. Raises StorageError if it is damaged."""
    try:
        with closing(apsw.Connection(str(copy), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            check(connection, Path(copy.name), whole=True)
            items = rows(connection, "SELECT COUNT(*) FROM items")[0][0]
            names = rows(connection, "SELECT DISTINCT picture FROM items WHERE picture NOTNULL ORDER BY picture")
    except apsw.Error as error:
        raise StorageError(f"{copy.name} is damaged: {error}") from error
    return int(items), [row[0] for row in names]


def _add_pictures(archive: _Writing, store: Path, names: list[str]) -> bool:
    """Those that are not in it; False if some are gone."""
    whole = True
    for name in names:
        file = _picture(store, name)
        member = str(file.relative_to(store))
        if member in archive.hashes:
            continue
        try:
            archive.add(member, file)
        except FileNotFoundError:
            whole = False
            continue
        if archive.hashes[member] != name:
            raise StorageError(f"{file} is damaged: it is not what was stored; delete its item, and add it anew")
    return whole


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
