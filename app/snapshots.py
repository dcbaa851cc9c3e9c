"""What FAISS built, kept beside the store so that a start need not build it again; hashed, for FAISS reads anything."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from app.graphs import Graph
    from app.index import ExactIndex, Ids

log = logging.getLogger(__name__)

FORMAT = 1
_PART = 10_000  # vectors that are held twice at once
_ROW = np.dtype([("id", "<i8"), ("crc", "<u4")])


def save(place: Path, graph: Graph, exact: ExactIndex) -> None:
    """Write a graph over vectors of `exact` to files that begin with `place`. A full disk is logged, no more."""
    import faiss

    file, table, note = _files(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)  # without it the other two say nothing
        faiss.write_index(graph.index, str(file))
        np.save(table, _table(exact, graph.ids))
        content = {"format": FORMAT, "kind": graph.kind, "graph": file_hash(file), "table": file_hash(table)}
        content["breadth"] = graph.breadth
        written = note.with_suffix(".tmp")
        written.write_text(json.dumps(content))
        written.replace(note)
    except (OSError, RuntimeError) as error:  # RuntimeError: FAISS's own
        log.warning("an index is not kept, and will be built again at the next start: %s", error)


def load(place: Path, exact: ExactIndex) -> tuple[str, Any, Ids, int | None] | None:
    """(kind, FAISS's index, the ids it took, its breadth if that is known), or None, with a line in the log, unless the
    files are whole and every vector that both know is the one in `exact`."""
    import faiss

    graph, table, note = _files(place)
    if not note.is_file():
        return None
    try:
        content = json.loads(note.read_text())
        if content["format"] != FORMAT or content["graph"] != file_hash(graph) or content["table"] != file_hash(table):
            raise ValueError("a file of it is not what was written")
        taken = np.load(table, allow_pickle=False)
        there = _table(exact, taken["id"])
        if not np.array_equal(taken[np.isin(taken["id"], there["id"])], there):
            raise ValueError("it was made of other vectors than the store holds")
        breadth = content.get("breadth")  # earlier versions did not measure it
        return str(content["kind"]), faiss.read_index(str(graph)), taken["id"].astype(np.int64), breadth
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning("the index kept in %s is dropped and will be built again: %s", note.name, error)
        remove(place)
        return None


def kept_at(place: Path) -> float | None:
    """When a snapshot was written (POSIX time), if there is one."""
    try:
        return _files(place)[2].stat().st_mtime
    except FileNotFoundError:
        return None


def remove(place: Path) -> None:
    """Delete a snapshot's files, if there are any."""
    for file in _files(place):
        file.unlink(missing_ok=True)


def keep_only(places: Iterable[Path], folder: Path) -> None:
    """Delete every snapshot in the folder but these."""
    kept = {place.name for place in places}
    for file in folder.glob("*"):
        if file.stem not in kept:
            file.unlink()


def _files(place: Path) -> tuple[Path, Path, Path]:
    return place.with_suffix(".faiss"), place.with_suffix(".npy"), place.with_suffix(".json")


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _table(exact: ExactIndex, ids: Ids) -> NDArray[Any]:
    """Those of the ids that are there, in their order, each with a checksum of its vector."""
    parts = [np.empty(0, _ROW)]
    for start in range(0, len(ids), _PART):
        known, vectors = exact.vectors(ids[start : start + _PART])
        part = np.empty(len(known), _ROW)
        part["id"], part["crc"] = known, [zlib.crc32(row) for row in vectors]
        parts.append(part)
    return np.concatenate(parts)
