"""One process at a time has a data folder open, and says who it is."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from models.errors import StorageError

# What a server writes of a data folder. Where it may not, SQLite opens and reads, and only a write is refused.
_WRITTEN = ("lock", "store.db", "store.db-wal", "store.db-shm", "pictures", "index")


def check_writable(folder: Path) -> None:
    """Raises StorageError, naming it and the way out, for what this user may not write in a data folder, as where
    another one restored or copied it."""
    for place in (folder, *(folder / name for name in _WRITTEN), *(folder / "pictures").glob("??")):
        if place.exists() and not os.access(place, os.R_OK | os.W_OK | (os.X_OK if place.is_dir() else 0)):
            raise StorageError(
                f"{place} cannot be read and written by this user: give all of the folder to the user that serves it "
                "(chown -R), or use another one"
            )


def lock(folder: Path, note: str) -> TextIO:
    """Hold the folder until the returned file is closed or the process ends, however it ends.

    Raises StorageError, naming the process that has it, or what keeps this one from writing there.
    """
    try:
        file = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written to ({error.strerror}); make it writable, or use another"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        holder = lock_note(folder)
        raise StorageError(
            f"{folder} is in use by another process{f' ({holder})' if holder else ''}: stop it, or use another folder"
        ) from error
    with suppress(OSError):  # a full disk has no room to say who it is, and no need to keep a server from starting
        file.truncate(0)
        os.write(file.fileno(), note.encode())
    return file


def lock_note(folder: Path) -> str:
    """What the process that has the folder open says of itself; empty if it says nothing."""
    try:
        return (folder / "lock").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def held(folder: Path) -> bool:
    """Whether a process has the folder open; nothing is written to find out."""
    try:
        with (folder / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
