"""Where a checkpoint comes from, as its model card tells it."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from training.options import RunOptions
from training.pictures import SETS, name_and_weight


def provenance(method: str, options: RunOptions, data: Sequence[str], origin: Mapping[str, Any]) -> dict[str, Any]:
    """{data, license, command, commit, seed, hardware} of a run that begins.

    origin: the provenance of the model it goes on from, whose data and licences are this one's too; else empty.
    """
    names = [name_and_weight(spec)[0] for spec in options.data]
    licences = [SETS[name].license for name in names if name in SETS]
    licences += ["scenes: made by training/scenes.py"] if "scenes" in names else []
    licences = licences or ["that of your pictures"]
    if origin:
        data = [*data, f"before, {origin.get('command', 'elsewhere')}: {origin.get('data', 'unknown')}"]
        known = str(origin.get("license", "unknown"))
        licences = [known, *(licence for licence in licences if licence not in known)]
    return {
        "data": "; ".join(data),
        "license": "; ".join(licences),
        "command": command(method),
        "commit": _commit(),
        "seed": options.trainer.seed,
        "hardware": hardware(),
    }


def command(method: str) -> str:
    """The command line of this run, as it can be pasted."""
    if Path(sys.argv[0]).name in ("semblance-train", "__main__.py"):
        given = sys.argv[1:]
        for place in ("--run-dir", "--data-root"):  # where things lie on one machine is nobody else's business
            while place in given:
                at = given.index(place)
                given = given[:at] + given[at + 2 :]
        return shlex.join(["semblance-train", *given])
    return f"train_{method}(...) from Python"


def hardware() -> str:
    """The processor or GPU that torch computes on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"
