"""What the page does when something is in the way: a server that comes and goes, refusals, deletes taken up again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
from playwright.sync_api import Page, Route, expect
from support import Server

SEARCH = re.compile(r"/search\?q=")


def _refused(route: Route) -> None:
    body = json.dumps({"detail": "too many requests of this key", "title": "Too Many Requests"})
    route.fulfill(status=429, body=body, content_type="application/problem+json")


def test_a_server_that_comes_back_is_asked_again(page: Page, wrong: list[str]) -> None:
    for address, listed, shown in (("#search?q=a+red+star", ".grid li", 48), ("#map", ".legend", 1)):
        page.route(re.compile(r"/collections$"), lambda route: route.abort())
        page.goto(f"/{address}")
        expect(page.locator(".status")).to_contain_text("The server does not answer")
        page.unroute(re.compile(r"/collections$"))
        page.locator("#box").fill("a red star")
        page.locator("#box").press("Enter")
        expect(page.locator(listed)).to_have_count(shown)
        expect(page.locator(".status")).not_to_contain_text("does not answer")
        page.goto("about:blank")
    wrong.clear()


def test_enter_asks_again_what_failed(page: Page, wrong: list[str]) -> None:
    page.goto("/")
    expect(page.locator(".status")).to_contain_text("1,200")
    page.route(SEARCH, _refused)
    page.locator("#box").fill("a red star")
    page.locator("#box").press("Enter")
    expect(page.locator(".status")).to_contain_text("too many requests")
    page.unroute(SEARCH)
    page.locator("#box").press("Enter")
    expect(page.locator(".grid li")).to_have_count(48)
    wrong.clear()


def test_what_was_found_stays_when_more_is_refused(page: Page, wrong: list[str]) -> None:
    asked: list[str] = []

    def once(route: Route) -> None:
        asked.append(route.request.url)
        _refused(route) if len(asked) > 1 else route.continue_()

    page.route(SEARCH, once)
    page.goto("/#search?q=a+red+star")
    expect(page.locator(".grid li")).to_have_count(48)
    page.wait_for_load_state("networkidle")
    assert len(asked) == 2  # whether anything is close; it cannot be told now
    expect(page.locator(".status")).to_contain_text("48 results in")
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".status")).to_contain_text("too many requests")
    expect(page.locator(".grid li")).to_have_count(48)
    page.unroute(SEARCH)
    page.get_by_role("button", name="Show more").evaluate("button => (button.click(), button.click())")
    expect(page.locator(".status")).to_contain_text("96 results in")
    ids = page.locator(".grid a").evaluate_all("links => links.map(link => link.hash)")
    assert len(ids) == len(set(ids)) == 96  # a second click is no second page
    wrong.clear()


def test_an_item_is_shown_where_what_is_near_it_is_not(page: Page, wrong: list[str]) -> None:
    page.route(re.compile(r"/search$"), _refused)
    page.goto("/#search?item=single-0037")
    expect(page.locator(".near")).to_contain_text("too many requests")
    expect(page.locator(".detail figure img")).not_to_have_js_property("naturalWidth", 0)
    expect(page.get_by_role("button", name="Delete")).to_be_visible()
    wrong.clear()


def test_only_these_are_only_these(page: Page, server: Server) -> None:
    items = [{"id": name, "text": f"{name} star", "metadata": {"kind": name}} for name in ("red", "blue")]
    httpx.put(f"{server.url}/collections/kinds", json={"model": "clip"}).raise_for_status()
    httpx.post(f"{server.url}/collections/kinds/items", json={"items": items}).raise_for_status()
    page.goto("/#search?c=kinds&item=red")
    page.get_by_role("link", name="red", exact=True).click()
    expect(page.locator(".grid li")).to_have_count(1)
    expect(page.locator(".grid li")).to_contain_text("red star")
    page.goto("/#search?c=kinds&filter=kind:red")  # a filter of nothing that is asked
    expect(page.locator(".status")).to_contain_text("bounds a search")
    expect(page.locator(".grid li")).to_have_count(0)
    page.locator("#box").fill("a star")
    expect(page.locator(".grid li")).to_have_count(1)
    page.goto("about:blank")
    httpx.delete(f"{server.url}/collections/kinds")


def test_what_was_deleted_and_added_again_is_there(
    page: Page, server: Server, encoded: Callable[..., bytes], wrong: list[str]
) -> None:
    star: dict[str, Any] = {"name": "star.jpg", "mimeType": "image/jpeg", "buffer": encoded(1)}
    httpx.put(f"{server.url}/collections/again", json={"model": "clip"}).raise_for_status()
    page.goto("/#search?c=again")
    for _ in range(2):  # the second time before the server has heard of the delete
        page.get_by_label("Add pictures").set_input_files(star)
        expect(page.locator(".grid li")).to_have_count(1)
        page.locator(".grid a").click()
        page.get_by_role("button", name="Delete").click()
        expect(page.locator(".grid li")).to_have_count(0)
    for room in ("Models", "Search"):  # what is about to be deleted is not there in a room that is entered anew
        page.get_by_role("link", name=room, exact=True).click()
    page.goto("/#search?c=again")
    expect(page.locator(".status")).to_contain_text("in again")
    expect(page.locator(".grid li")).to_have_count(0)
    page.get_by_label("Add pictures").set_input_files(star)
    expect(page.locator(".grid li")).to_have_count(1)
    page.wait_for_timeout(8500)  # the time in which a delete can be taken back
    assert httpx.get(f"{server.url}/collections/again").json()["count"] == 1
    httpx.delete(f"{server.url}/collections/again")
    wrong.clear()
