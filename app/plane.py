"""Vectors as points in the plane: by their principal components at once, by UMAP in a process of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.collection import Item
from app.index import Vectors
from models.errors import InputError

log = logging.getLogger(__name__)
Points = NDArray[np.float32]
# The least urgent of processes: it takes minutes of every core, and requests go first.
_SCRIPT = """
import os, sys
os.nice(19)
import numpy as np
from umap import UMAP
source, target = sys.argv[1:]
vectors = np.load(source)
told = {"disable": False, "file": sys.stdout, "bar_format": "{n_fmt}/{total_fmt} ", "mininterval": 0.5}
unfold = UMAP(metric="cosine", n_neighbors=min(15, len(vectors) - 1), tqdm_kwds=told)
np.save(target, unfold.fit_transform(vectors).astype("f4"))
"""
_EPOCH = re.compile(rb"(\d+)/(\d+) ")


def principal_plane(vectors: Vectors) -> Points:
    """The first two principal components (N, 2) of vectors (N, D), each with the sign that makes the largest entry of
    its direction positive, so that a map looks the same each time."""
    if len(vectors) == 0:
        return np.zeros((0, 2), np.float32)
    centred = vectors - vectors.mean(0)
    _, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    plane = directions[:, :-3:-1]
    if plane.shape[1] < 2:
        plane = np.pad(plane, ((0, 0), (0, 1)))
    plane = plane * np.sign(plane[np.abs(plane).argmax(0), np.arange(2)] + 1e-30)
    return np.asarray(centred @ plane, np.float32)


class Unfolding:
    """One run of UMAP (arXiv:1802.03426), and the points it found; `start` it inside the event loop.

    items: what the points stand for. share: of the epochs that are done.
    """

    def __init__(self, items: Sequence[Item], vectors: Vectors) -> None:
        self.items, self._vectors = items, vectors
        self.state: Literal["running", "done", "failed"] = "running"
        self.share = 0.0
        self.points: Points | None = None

    def start(self) -> None:
        """Begin. Raises InputError where UMAP is not installed, or there are too few items for it."""
        if importlib.util.find_spec("umap") is None:
            raise InputError("UMAP is not installed on this server: pip install 'semblance[analysis]', or take pca")
        if len(self.items) < 4:
            raise InputError(f"UMAP needs at least 4 items, and there are {len(self.items)}; take pca")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End it, if it has not ended."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                source, target = Path(folder) / "vectors.npy", Path(folder) / "points.npy"
                await asyncio.to_thread(np.save, source, self._vectors)
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", _SCRIPT, source, target, stdout=asyncio.subprocess.PIPE
                )
                try:
                    await self._follow(process)
                finally:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
                self.points = await asyncio.to_thread(np.load, target)
            self.state, self.share = "done", 1.0
        except Exception:
            log.exception("a map by UMAP could not be made")
            self.state = "failed"
        finally:
            del self._vectors

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        while told := await process.stdout.read(4096):
            if epochs := _EPOCH.findall(told):
                done, total = map(int, epochs[-1])
                self.share = done / total
        await process.wait()
