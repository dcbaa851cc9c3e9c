"""What is on the disk, and not only on its way there."""

from __future__ import annotations

import os
from pathlib import Path


def sync(place: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk. Raises OSError."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
