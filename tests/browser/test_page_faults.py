"""What the page does when something is in the way: a server that comes and goes, refusals, deletes taken up again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
from playwright.sync_api import Page, Route, expect
from support import Server
from watching import forgive

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
    items = [{"id": name, "text": f"{name} star", "metadata": {"kind": name, "of:a": 1}} for name in ("red", "blue")]
    httpx.put(f"{server.url}/collections/kinds", json={"model": "clip"}).raise_for_status()
    httpx.post(f"{server.url}/collections/kinds/items", json={"items": items}).raise_for_status()
    page.goto("/#search?c=kinds&item=red")
    page.get_by_role("link", name="red", exact=True).click()
    expect(page.locator(".grid li")).to_have_count(1)
    expect(page.locator(".grid li")).to_contain_text("red star")
    page.goto("/#search?c=kinds&item=red")
    page.get_by_role("link", name="1", exact=True).click()  # of a key that no short filter can name
    expect(page.locator(".status")).to_contain_text("2 results")
    page.goto("/#search?c=kinds&filter=kind:red")  # where nothing is asked the collection is narrowed
    expect(page.locator(".status")).to_have_text("1 item in kinds")
    expect(page.locator(".grid li")).to_contain_text(["red star"])
    page.locator("#box").fill("a star")
    expect(page.locator(".status")).to_contain_text("1 result in")
    page.goto("/#search?c=kinds&target=image")
    expect(page.locator(".status")).to_contain_text("take one away")
    page.goto("/#search?c=kinds&min=0.5")
    expect(page.locator(".status")).to_contain_text("bounds a search")
    expect(page.locator(".grid li")).to_have_count(0)
    page.goto("/#search?c=kinds&item=red")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".status")).to_have_text("1 item in kinds", timeout=15_000)  # once it cannot be taken back
    page.goto("about:blank")
    httpx.delete(f"{server.url}/collections/kinds")


def test_what_was_deleted_and_added_again_is_there(
    page: Page, server: Server, encoded: Callable[..., bytes], wrong: list[str]
) -> None:
    star: Any = {"name": "star.jpg", "mimeType": "image/jpeg", "buffer": encoded(1)}
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


def test_what_was_set_stays_when_a_picture_is_chosen(page: Page, server: Server, encoded: Callable[..., bytes]) -> None:
    chosen: Any = {"name": "star.jpg", "mimeType": "image/jpeg", "buffer": encoded(1)}
    page.goto("/#generate")
    page.locator(".options summary").click()
    page.get_by_label("Top k").fill("7")
    page.locator("#box").fill("a red star")
    page.get_by_label("Start from a picture").set_input_files(chosen)
    expect(page.locator(".chip")).to_contain_text("Starts from this picture")
    expect(page.locator("#box")).to_have_value("a red star")
    expect(page.get_by_label("Top k")).to_have_value("7")
    page.locator("#box").fill("a blue circle")
    page.get_by_label("Take the picture away").click()
    expect(page.locator(".chip")).to_have_count(0)
    expect(page.locator("#box")).to_have_value("a blue circle")
    page.go_back()  # with the prompt still focused
    expect(page.locator("#box")).to_have_value("a red star")
    page.get_by_role("button", name="Copy as code").click()
    expect(page.get_by_role("dialog")).to_contain_text("from pathlib import Path")


def test_what_an_empty_collection_and_a_part_of_one_hold_is_told(page: Page, server: Server) -> None:
    httpx.put(f"{server.url}/collections/bare", json={"model": "clip"}).raise_for_status()
    page.goto("/#search?c=bare&q=a+red+star")  # which no filter is to blame for
    expect(page.locator(".empty")).to_contain_text("Nothing is here yet")
    page.goto("/#search?c=default&id=single-0037&id=single-0035")
    expect(page.locator(".status")).to_have_text("2 items in default")
    page.goto("about:blank")
    httpx.delete(f"{server.url}/collections/bare")


def test_a_wrong_number_that_is_folded_away_is_shown(page: Page) -> None:
    page.goto("/#generate?q=a+red+star&top_k=1.5")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_label("Top k")).to_be_visible()
    expect(page.get_by_label("Top k")).to_be_focused()


def test_a_drawing_that_breaks_off_says_so(page: Page, wrong: list[str]) -> None:
    page.add_init_script("""
        const fetched = window.fetch;
        window.fetch = (path, ...rest) => path !== "/generate" ? fetched(path, ...rest) : Promise.resolve(new Response(
            new ReadableStream({ start: (controller) => controller.error(new TypeError("network error")) })));
    """)
    page.goto("/#generate?q=a+red+star")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".status")).to_contain_text("The server's answer broke off")
    wrong.clear()


def test_a_browser_that_stores_nothing_has_every_room(page: Page) -> None:
    page.add_init_script("""
        const denied = () => { throw new DOMException("denied", "SecurityError"); };
        Object.defineProperty(window, "sessionStorage", { get: denied });
    """)
    page.goto("/#generate?q=a+red+star&picture=12345678")
    expect(page.locator(".chip")).to_contain_text("is gone")
    expect(page.locator(".status")).to_contain_text("Draw to see it")


def test_a_key_that_no_header_can_hold_is_asked_for_again(page: Page, wrong: list[str]) -> None:
    keys: list[str] = []

    def guarded(route: Route) -> None:
        keys.append(route.request.headers.get("authorization", ""))
        route.continue_() if keys[-1] == "Bearer open-sesame" else route.fulfill(status=401, json={"detail": "a key"})

    page.route(re.compile(r"/(collections|search\?)"), guarded)
    page.goto("/#search?q=a+red+star")
    for key in ("ключ", "open\u2026sesame", "   "):
        page.get_by_label("API key", exact=True).last.fill(key)
        page.keyboard.press("Enter")
        assert page.get_by_role("dialog").is_visible()
    assert not any(keys)
    page.get_by_label("API key", exact=True).last.fill(" open-sesame ")
    page.keyboard.press("Enter")
    expect(page.locator(".grid li")).to_have_count(48)
    wrong.clear()


def test_files_that_cannot_be_read_are_named_and_the_others_added(
    page: Page, server: Server, encoded: Callable[..., bytes], wrong: list[str]
) -> None:
    page.add_init_script("""
        const read = File.prototype.arrayBuffer;
        File.prototype.arrayBuffer = function () {
            if (this.name === "gone.jpg") return Promise.reject(new DOMException("", "NotReadableError"));
            return read.call(this);
        };
    """)
    httpx.put(f"{server.url}/collections/read", json={"model": "clip"}).raise_for_status()
    files: Any = [
        {"name": name, "mimeType": "image/jpeg", "buffer": encoded(at)}
        for at, name in enumerate(("first.jpg", "gone.jpg", "third.jpg"))
    ]
    page.goto("/#search?c=read")
    page.get_by_label("Add pictures").set_input_files(files)
    expect(page.get_by_role("dialog").get_by_role("status")).to_have_text("2 pictures added, 1 left out.")
    expect(page.locator(".skipped")).to_contain_text("gone.jpg cannot be read")
    page.keyboard.press("Escape")
    expect(page.locator(".grid li")).to_have_count(2)
    # A folder with one picture, and a folder in it that may not be opened.
    page.evaluate("""
        const picture = new File([new Uint8Array(3)], "a.jpg", { type: "image/jpeg" });
        const listing = (entries) => ({ readEntries: (done) => done(entries.splice(0)) });
        const file = { isFile: true, fullPath: "/album/a.jpg", file: (done) => done(picture) };
        const closed = { isDirectory: true, fullPath: "/album/closed",
            createReader: () => ({ readEntries: (_, fail) => fail(new DOMException("", "NotReadableError")) }) };
        const folder = { isDirectory: true, fullPath: "/album", createReader: () => listing([closed, file]) };
        const event = new Event("drop", { bubbles: true, cancelable: true });
        event.dataTransfer = { types: ["Files"], items: [{ webkitGetAsEntry: () => folder }], files: [] };
        document.querySelector(".room").dispatchEvent(event);
    """)
    expect(page.locator(".toast")).to_contain_text("album/closed")
    expect(page.locator(".chips img")).to_have_count(1)  # one picture is searched with
    expect(page.locator(".status")).to_contain_text("not a picture")  # as the server says of those three bytes
    forgive(wrong)
    page.goto("about:blank")
    httpx.delete(f"{server.url}/collections/read")


def test_a_room_that_does_not_come_says_so(page: Page, wrong: list[str]) -> None:
    page.goto("/")
    expect(page.locator(".status")).to_contain_text("1,200")
    page.route("**/static/models.js", lambda route: route.abort())
    page.get_by_role("link", name="Models", exact=True).click()
    expect(page.locator(".status")).to_contain_text("could not be loaded")
    page.unroute("**/static/models.js")
    page.get_by_role("button", name="Load the page again").click()
    expect(page.locator("#model-clip")).to_be_visible()
    wrong.clear()


def test_a_picture_alone_is_varied(page: Page, encoded: Callable[..., bytes]) -> None:
    chosen: Any = {"name": "star.jpg", "mimeType": "image/jpeg", "buffer": encoded(1)}
    page.goto("/#generate?n=1&change=0.05")
    page.get_by_label("Start from a picture").set_input_files(chosen)
    expect(page.locator(".chip")).to_contain_text("Starts from this picture")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".status")).to_contain_text("1 picture in", timeout=60_000)
    expect(page.locator(".grid img")).to_have_count(1)
