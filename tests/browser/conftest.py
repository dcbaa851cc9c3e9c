"""The demo in a process of its own, and chromium that looks at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support import Server, running
from watching import ROOT, watch

expect.set_options(timeout=20_000)  # a busy machine is no fault
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# Of a module, not the session: playwright keeps an event loop running in this thread, which no later test shall meet.
@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(ROOT / "checkpoints/demo", tmp_path_factory.mktemp("data"), "--demo") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        # Containers seldom let it make the namespaces of its sandbox, and it sees our own page alone.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def wrong() -> list[str]:
    """What goes wrong in the page of a test; a test that asks for something wrong may `forgive` it."""
    return []


@pytest.fixture
def page(browser: Browser, server: Server, wrong: list[str]) -> Iterator[Page]:
    """A tab of a new session; at the end nothing may have gone wrong in it."""
    context = browser.new_context(base_url=server.url, viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(20_000)
    watch(page, server.url, wrong)
    yield page
    context.close()
    assert wrong == []
