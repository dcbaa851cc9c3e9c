"""Ray Serve beside bare uvicorn: /embed with the same model, alone and 32 at once, in one run: `make bench-ray`.

Both run at the same time and are driven in turns by one client; only one of them has work at a time. Each has one
replica of a random ViT-B/32 and so many threads for it. Prints rates, milliseconds and ratios; nothing passes or fails.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_serving import asked, drive, jpegs, new_texts, serving
from peer import write_weights


def _ask(**given: Any) -> tuple[str, dict[str, Any]]:
    picture = given.get("jpeg")
    return "/embed", {"model": "vit", "input": [given["text"] if picture is None else {"image": picture}]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--threads", default="1", help="of each server's model")
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_weights(place)
        reference = f"open_clip:ViT-B-32/{place / 'vit.safetensors'}"
        common = ("--model", f"vit={reference}", "--checkpoints", str(place / "none"), "--threads", arguments.threads)
        servers = [
            stack.enter_context(
                serving(f"ours, {name}", _ask, sys.executable, "-m", "app", name, "--data", str(place / name), *common)
            )
            for name in ("serve", "ray-serve")
        ]
        pictures = [{"jpeg": base64.b64encode(each).decode()} for each in jpegs(1024, 768, 64)]
        loads: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "texts, new": new_texts,
            "texts, known": lambda: new_texts(64),
            "1024 x 768": lambda: pictures,
        }
        print(f"start to first answer: uvicorn {servers[0].started:.1f} s, Ray Serve {servers[1].started:.1f} s")
        print("\n| | at once | uvicorn, /s (p50, p95 ms) | Ray Serve, /s (p50, p95 ms) | rate beside | p50, ms more |")
        print("|---" * 6 + "|")
        for name, load in loads.items():
            for concurrency in (1, 32):
                found = [
                    asyncio.run(drive(asked(server, load()), concurrency, arguments.seconds)) for server in servers
                ]
                cells = []
                for each in found:
                    slow = sorted(each.seconds)[int(0.95 * len(each.seconds))] * 1e3
                    wrong = "" if set(each.statuses) <= {200} else f" {dict(each.statuses)}"
                    cells.append(f"{each.rate:,.1f} ({each.middle:,.1f}, {slow:,.1f}){wrong}")
                beside = f"{found[1].rate / found[0].rate:.2f} x | {found[1].middle - found[0].middle:+,.1f}"
                print(f"| {name} | {concurrency} | " + " | ".join(cells) + f" | {beside} |", flush=True)


if __name__ == "__main__":
    main()
