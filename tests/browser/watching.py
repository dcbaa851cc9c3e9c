"""What a page must not do, noted while a test uses it."""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
# Where `make screenshots` has them left for the README; nothing is left without it.
SHOTS = os.environ.get("SEMBLANCE_SCREENSHOTS")


def watch(page: Page, origin: str, wrong: list[str]) -> None:
    """Notes what a page does that it should not: errors, and requests that leave the server."""
    page.on("console", lambda told: wrong.append(told.text) if told.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((origin, "data:", "blob:")) else wrong.append(request.url),
    )


def forgive(wrong: list[str]) -> None:
    """Refusals of the server are in the browser's console too."""
    assert wrong
    assert all("the server responded with a status of 4" in each for each in wrong), wrong
    wrong.clear()
