"""Embedding into files beside the model alone, and by one process and two: `make bench-bulk`.

The model is a random ViT-B/32 of float32, or --model. Alone: pictures that are decoded already, in batches, in this
process. Beside it: JPEGs of 224 pixels, decoded, embedded and written by `app.bulk`, whose processes' start is in no
figure: a rate is that of the parts after each process's first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peer import write_weights
from PIL import Image

from app import bulk
from app.bulk import embed_source
from app.loading import load_engine
from app.settings import Settings


def rate_of_bulk(photos: Path, settings: Settings, workers: int, engine: bulk.EngineName) -> float:
    """Pictures a second, once every process has made its first part."""
    told: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as out:
        embed_source(
            str(photos), out, settings, engine=engine, workers=workers,
            progress=lambda done: told.append((time.perf_counter(), done)),
        )  # fmt: skip
    warm = told[workers - 1 :]
    return sum(done for _, done in warm[1:]) / (warm[-1][0] - warm[0][0])


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a reference (default: a random ViT-B/32)")
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--engine", choices=["processes", "ray"], default="processes")
    arguments = parser.parse_args()
    bulk.PART = 64  # several for each process of so few pictures
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if arguments.model is None:
            write_weights(folder)
        reference = arguments.model or f"open_clip:ViT-B-32/{folder / 'vit.safetensors'}"
        rng = np.random.default_rng(0)
        (folder / "photos").mkdir()
        for number in range(arguments.pictures):
            rough = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            rough.resize((224, 224), Image.Resampling.BICUBIC).save(folder / "photos" / f"{number:06d}.jpg", quality=90)

        def settings(threads: int) -> Settings:
            return Settings(
                checkpoints=str(folder / "none"), models=(f"vit={reference}",), threads=threads, backend="torch-fp32"
            )

        cores = settings(0).thread_count
        rates: dict[str, float] = {}

        def say(name: str, rate: float) -> None:
            rates[name] = rate
            print(f"{name}: {rate:.1f} pictures/s", flush=True)

        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            engine = load_engine("vit", reference, settings(threads))
            batch = [torch.randint(0, 256, (3, engine.image_size, engine.image_size), dtype=torch.uint8)] * 32
            spent = []
            for _ in range(12):
                began = time.perf_counter()
                engine.encode_images(batch)
                spent.append(time.perf_counter() - began)
            say(f"the model alone, {threads} threads", 32 / statistics.median(spent))
            del engine
        ways = {"1 process of 1 thread": (1, 1), f"1 process of {cores} threads": (1, cores)}
        ways[f"{cores} processes of 1 thread"] = (cores, cores)
        for name, (workers, threads) in ways.items():
            say(name, rate_of_bulk(folder / "photos", settings(threads), workers, arguments.engine))
    whole = rates[f"the model alone, {cores} threads"]
    best = max(rates[f"1 process of {cores} threads"], rates[f"{cores} processes of 1 thread"])
    print(f"into files, {arguments.engine}: {best / whole:.0%} of the model alone")
    scaled = rates[f"{cores} processes of 1 thread"] / rates["1 process of 1 thread"]
    print(f"{cores} processes make {scaled:.2f} times what one does")


if __name__ == "__main__":
    main()
