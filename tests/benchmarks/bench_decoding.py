"""Decoding in threads beside processes: `make bench-decoding`. Why the server and `semblance index` have threads.

Pillow lets go of the interpreter's lock while it decodes and resizes, so processes could only gain what is left of
Python around that, and pay for carrying the pixels back. Prints rates and ratios in one run; nothing here passes or
fails.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import numpy as np
from bench_serving import SIDES, jpegs

from app.images import Limits, decode
from models.preprocess import Preprocess

TARGET = 224


def pixels(data: bytes, target: int) -> np.ndarray:
    """uint8 (3, S, S) of a file as the server makes it ready for a model of that side."""
    return Preprocess(target, "crop")(decode(data, Limits(), target)).numpy()


def rate(pool: Executor, files: Sequence[bytes], seconds: float) -> float:
    """Pictures a second, whoever asked holding their pixels at the end."""
    list(pool.map(partial(pixels, target=TARGET), files[:8]))
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += len(list(pool.map(partial(pixels, target=TARGET), files)))
    return done / (time.perf_counter() - start)


def main() -> None:
    """Every size of picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads, and processes")
    arguments = parser.parse_args()
    count = arguments.workers
    print(f"| | 1 thread, /s | {count} threads | {count} processes | threads beside 1 | threads beside processes |")
    print("|---|---|---|---|---|---|")
    for name, size in SIDES.items():
        files = jpegs(*size)
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(count) as threads, ProcessPoolExecutor(count) as others:
            alone, many, apart = (rate(pool, files, arguments.seconds) for pool in (one, threads, others))
        cells = f"{alone:,.0f} | {many:,.0f} | {apart:,.0f} | {many / alone:.2f} x | {many / apart:.2f} x"
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
