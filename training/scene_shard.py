"""Scenes as a WebDataset shard: to look at, to index, and for the collection that the demo server starts with."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from training import scenes
from training.scene_captions import caption


def write_shard(file: str | Path, *, each: int = 10, others: int = 200, size: int = 96, seed: int = 0) -> Path:
    """`each` single objects of every colour and shape and `others` with several objects, as JPEG with JSON captions.

    size: side in pixels. The same arguments give the same pictures. Held-out pairs are among them.
    """
    rng = np.random.default_rng([seed, 5])
    singles = scenes.sample_key((each + 5) * 200, rng, "any", ("single",))
    pair = singles.colours[:, 0] * len(scenes.SHAPES) + singles.shapes[:, 0]
    chosen = [np.flatnonzero(pair == wanted)[:each] for wanted in range(len(scenes.COLOURS) * len(scenes.SHAPES))]
    if min(map(len, chosen)) < each:
        raise ValueError(f"seed {seed} draws too few of some colour and shape; use another")
    several = scenes.sample_key(others, rng, "any", scenes.KINDS[1:])
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(path, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for key, prefix in ((singles.take(np.concatenate(chosen)), "single"), (several, "several")):
            for start in range(0, len(key), 256):
                part = key.take(np.arange(start, min(start + 256, len(key))))
                for row, picture in enumerate(scenes.render(part, size, rng).permute(0, 2, 3, 1).numpy()):
                    _add(tar, f"{prefix}-{start + row:04d}", picture, caption(part, row))
    return path


def _add(tar: tarfile.TarFile, name: str, picture: np.ndarray, caption: str) -> None:
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=85)
    for suffix, content in (("jpg", jpeg.getvalue()), ("json", json.dumps({"caption": caption}).encode())):
        member = tarfile.TarInfo(f"{name}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
