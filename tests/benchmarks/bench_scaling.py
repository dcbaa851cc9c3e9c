"""Training by one process and by two of `torchrun`, a thread each, at one batch for all: `make bench-scaling`.

CIFAR-10 at 32 pixels with a ResNet-18 (SimCLR and CLIP), the command line's own rate of the second half of the steps.
Data parallel, and with `--shard`. Prints pictures a second and the ratio; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rate(method: str, processes: int, steps: int, *options: str) -> float:
    """Pictures a second of all processes together."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *launch,
            "-m",
            "training",
            method,
            "--data",
            "cifar10",
            "--encoder",
            "resnet18",
            "--image-size",
            "32",
        ]
        command += ["--steps", str(steps), "--batch-size", "128", "--threads", "1", "--log-every", "2", "--no-evaluate"]
        command += ["--run-dir", f"{folder}/run", "--out", f"{folder}/out", *options]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(rates[len(rates) // 2 :])


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    steps = parser.parse_args().steps
    for method in ("simclr", "clip"):
        one = rate(method, 1, steps)
        print(f"{method}: {one:.0f} pictures/s by one process", flush=True)
        for name, options in (("data parallel", []), ("in shares", ["--shard"])):
            two = rate(method, 2, steps, *options)
            print(f"{method}: {two:.0f} by two, {name}: {two / one:.2f} times", flush=True)


if __name__ == "__main__":
    main()
