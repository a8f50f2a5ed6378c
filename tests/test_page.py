"""The page in a real browser: images arrive block by block, a picture is scored, and what goes wrong is said."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from tarflow.quality import plots, report
from tarflow.runtime.backend import Array
from tarflow.runtime.flow import Flow, Guidance
from tarflow.runtime.image import grid, png, to_uint8
from tarflow.runtime.request import Resolved
from tarflow.runtime.samples import Preview, Samples, Watch
from tarflow.serve.app import create_app
from tarflow.serve.service import Service
from tarflow.serve.settings import Settings

from .conftest import DEMO, largest, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
TOKEN = "an-open-secret"
FREE = 100_000  # blocks that need not be waited for: more than all tests here draw
_UNWATCHED = Watch()
expect.set_options(timeout=120_000)


class PacedFlow(Flow):
    """A flow whose previews can be held, so that a test sees what is there between two blocks."""

    pace = threading.Semaphore(FREE)
    shown = 0

    def draw(self, request: Resolved, noise: Array | None = None, watch: Watch = _UNWATCHED) -> Samples:
        def held(seen: Preview) -> None:
            assert watch.preview is not None
            watch.preview(seen)
            self.shown += 1
            assert self.pace.acquire(timeout=600)

        return super().draw(request, noise, Watch(watch.progress, watch.preview and held))


class Server(uvicorn.Server):
    """A real server in a thread."""

    service: Service
    url: str


@contextlib.contextmanager
def serving(flow: Flow, **settings: Any) -> Iterator[Server]:
    app = create_app(flow, Settings(**settings))
    server = Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=3))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.service = app.state.service
        server.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            yield server
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def flow() -> PacedFlow:
    return PacedFlow.open(DEMO, spinning=False)


@pytest.fixture(scope="module")
def server(flow: PacedFlow) -> Iterator[Server]:
    with serving(flow) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield opened
        opened.close()


class Visit:
    """A page, and everything it asked for and complained of, but for ``refused``: statuses that a test provokes."""

    def __init__(self, browser: Browser, refused: tuple[str, ...] = (), **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | context)
        self.context.set_default_timeout(120_000)
        self.page: Page = self.context.new_page()
        self.draw = self.page.get_by_role("button", name="Draw", exact=True)
        self.alert, self.status = self.page.get_by_role("alert").first, self.page.get_by_role("status").first
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.refused = refused
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def open(self, address: str) -> Page:
        self.page.goto(address)
        expect(self.page.locator("#model span").first).to_be_visible()
        return self.page

    def draws(self, count: int) -> None:
        self.draw.click()
        expect(self.status).to_contain_text(f"{count} images in")


@contextlib.contextmanager
def visiting(browser: Browser, server: Server, *refused: str, **context: Any) -> Iterator[Visit]:
    """A visit during which the page may ask for nothing but the server, and complain of nothing but what is refused."""
    visit = Visit(browser, refused, **context)
    yield visit
    visit.context.close()
    own = (server.url, "data:", f"blob:{server.url}")
    assert not [asked for asked in visit.asked if not asked.startswith(own)]
    assert not [said for said in visit.complaints if not any(word in said for word in visit.refused)]


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    with visiting(browser, server) as found:
        yield found


@pytest.fixture
def paced(flow: PacedFlow) -> Iterator[PacedFlow]:
    """The flow stops after every block, until ``pace.release()``."""
    flow.pace, flow.shown = threading.Semaphore(0), 0
    yield flow
    flow.pace.release(FREE)


def pixels(canvas: Locator) -> np.ndarray:
    """(H, W) uint8: what a canvas shows, in grey."""
    data = canvas.evaluate(
        "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).filter((_, i) => i % 4 === 0)"
    )
    side = canvas.evaluate("c => c.width")
    return np.array(data, np.uint8).reshape(-1, side)


def expected(flow: Flow, n: int, seed: int = 0) -> np.ndarray:
    labels = np.arange(n) % 10
    return to_uint8(flow.sample(n, labels=labels, guidance=Guidance(1.0), seed=seed, reproducible=True))[:, 0]


def picture(label: int = 3, size: int = 8) -> bytes:
    """A digit the model knows well, as a PNG file."""
    digit = Flow.open(DEMO, spinning=False).sample(1, labels=label, guidance=Guidance(1.0), reproducible=True)
    return png(grid(digit, gap=0), {}, size // 8)


# --- drawing --------------------------------------------------------------------------------------------------------


def test_images_arrive_block_by_block_and_are_the_bits_the_flow_draws(
    visit: Visit, server: Server, paced: PacedFlow
) -> None:
    page = visit.open(server.url)
    visit.draw.click()
    rows = [page.locator("#board > *").nth(9 * state + 1) for state in range(5)]  # a title and 8 images each
    seen = []
    for block in (3, 2, 1, 0):
        expect(visit.status).to_have_text(f"Block {block} inverted…")
        filled = page.locator("#board canvas.filled")
        expect(filled).to_have_count(8 * (5 - block))  # noise, and the blocks so far
        seen.append(pixels(rows[4 - block]))
        paced.pace.release()
    expect(visit.status).to_contain_text("8 images in")
    assert all(largest(one, other) > 0 for one, other in pairwise(seen))
    for cell, image in zip(page.locator(".cell").all(), expected(paced, 8), strict=True):
        assert np.array_equal(pixels(cell.locator("canvas")), image)
    errors = [float(text) for text in page.locator(".certificate").all_inner_texts()]
    assert len(errors) == 8
    assert 0 < max(errors) < 1e-4
    assert page.locator("#board .time").nth(1).inner_text().strip().endswith("s")


def test_64_images_at_once_can_be_looked_at_after_any_block_and_one_by_one(
    visit: Visit, server: Server, flow: PacedFlow
) -> None:
    page = visit.open(f"{server.url}?n=64&seed=7")
    visit.draws(64)
    wanted = expected(flow, 64, seed=7)
    cells = page.locator(".cell")
    expect(cells).to_have_count(64)
    assert np.array_equal(pixels(cells.nth(63).locator("canvas")), wanted[63])
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight"), "64 images fit the window"

    page.get_by_role("radio", name="noise", exact=True).check(force=True)
    noise = flow.noise(7, range(63, 64)) * flow.deviation
    shown = pixels(cells.nth(63).locator("canvas"))
    assert np.array_equal(shown[:2, :2].ravel(), to_uint8(noise[0, 0]))  # the first patch
    cells.nth(42).click()
    expect(page.get_by_role("heading", name="Image 42, class 2")).to_be_visible()
    assert np.array_equal(pixels(page.locator("#sample-picture")), wanted[42])
    assert page.locator("#certificates circle").count() == 64

    href = page.get_by_role("link", name="Permalink").get_attribute("href")
    answer = httpx.get(f"{server.url}{href}")
    assert answer.headers["content-type"] == "image/png"
    image = np.asarray(Image.open(io.BytesIO(answer.content)).convert("L"))
    assert np.array_equal(image[:: len(image) // 8, :: len(image) // 8], wanted[42])


def test_a_drawing_can_be_stopped_and_a_closed_page_cancels_its_work(
    browser: Browser, server: Server, paced: PacedFlow
) -> None:
    visit = Visit(browser)
    page = visit.open(f"{server.url}?n=64")
    answered = server.service.metrics.responses.labels("/v1/samples/stream", "200")._value
    leaving: list[Callable[[], None]] = [lambda: page.keyboard.press("Escape"), lambda: visit.context.close()]
    for leave in leaving:
        shown, before = paced.shown, answered.get()
        visit.draw.click()
        until(lambda shown=shown: paced.shown > shown)  # type: ignore[misc]
        leave()
        until(lambda before=before: answered.get() > before)  # type: ignore[misc]
        paced.pace.release()  # out of the block it is in
        until(lambda: server.service.batcher._idle == 1)
        assert paced.shown == shown + 1, "it was drawn on for nobody"
    assert not visit.complaints


def test_class_guidance_seed_and_number_are_what_is_drawn(visit: Visit, server: Server, flow: PacedFlow) -> None:
    page = visit.open(server.url)
    page.get_by_role("radio", name="4", exact=True).check(force=True)
    page.get_by_label("Guidance", exact=True).fill("0.5")
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Images", exact=True).fill("2")
    visit.draws(2)
    wanted = to_uint8(flow.sample(2, labels=4, guidance=Guidance(0.5), seed=11, reproducible=True))[:, 0]
    assert np.array_equal(pixels(page.locator(".cell canvas").nth(1)), wanted[1])
    assert "class=4" in page.url, "the address remembers what was drawn"
    page.reload()
    expect(page.get_by_role("radio", name="4", exact=True)).to_be_checked()
    page.get_by_role("radio", name="no class").check(force=True)
    expect(page.get_by_label("Guidance", exact=True)).to_be_disabled()


def test_an_unconditional_model_offers_no_class(browser: Browser, bundle: Callable[..., Path]) -> None:
    flow = Flow.open(bundle("uncond"), spinning=False)
    with serving(flow) as server, visiting(browser, server) as visit:
        page = visit.open(server.url)
        expect(page.locator("#classes")).to_be_hidden()
        expect(page.get_by_label("Guidance", exact=True)).to_have_value("0")
        visit.draws(8)
        page.get_by_label("Guidance", exact=True).fill("0.5")
        page.get_by_label("Attention temperature").fill("0.4")
        visit.draw.click()
        expect(page.locator("#draw-error")).to_be_hidden()
        guided = flow.sample(8, guidance=Guidance(0.5, attention_temperature=0.4), reproducible=True)
        expect(page.locator("#stage")).to_have_attribute("aria-busy", "false")
        assert np.array_equal(pixels(page.locator(".cell canvas").first), to_uint8(guided)[0, 0])
        assert "guidance=0.5" in page.url
        assert "temperature=0.4" in page.url
        page.get_by_role("tab", name="Likelihood").click()
        page.locator("#file").set_input_files({"name": "any.png", "mimeType": "image/png", "buffer": picture()})
        expect(page.locator("#bits")).to_be_visible()
        expect(page.locator("#posterior")).to_be_hidden()


# --- likelihood -----------------------------------------------------------------------------------------------------


def drop(page: Page, name: str, kind: str, content: bytes) -> None:
    data = page.evaluate_handle(
        """([name, type, bytes]) => {
            const dropped = new DataTransfer();
            dropped.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type }));
            return dropped;
        }""",
        [name, kind, base64.b64encode(content).decode()],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})


def test_a_dropped_image_gets_its_bits_per_dimension_and_its_class(visit: Visit, server: Server) -> None:
    page = visit.open(server.url)
    page.get_by_role("tab", name="Likelihood").click()
    drop(page, "three.jpg", "image/jpeg", encoded(Image.open(io.BytesIO(picture(3, 16))), "JPEG"))
    expect(page.locator("#likelihood-status")).to_contain_text("most probably class 3")
    expect(page.locator("#notes")).to_have_text("the picture is 16x16 pixels: resized to 8x8")
    expect(page.locator("#bars li.best b")).to_have_text("3")
    expect(page.locator("#bars li")).to_have_count(10)
    assert 3 < float(page.locator("#bits").inner_text()) < 9
    drop(page, "notes.txt", "text/plain", b"no picture")
    expect(page.get_by_role("alert").last).to_contain_text("expected image/png or image/jpeg")
    visit.refused = ("415",)


def test_a_drawn_image_can_be_scored(visit: Visit, server: Server) -> None:
    page = visit.open(server.url)
    visit.draw.click()
    page.locator(".cell").nth(6).click()
    page.get_by_role("button", name="Likelihood").click()
    expect(page.get_by_role("tab", name="Likelihood")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#likelihood-status")).to_contain_text("Image 6, class 6: ")
    expect(page.locator("#verdict")).to_contain_text("6, with")
    expect(page.locator("#notes")).to_be_empty()


def test_classes_are_called_by_their_names(browser: Browser, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    manifest = json.loads((folder / "manifest.json").read_text())
    names = ["zero", "one", "two", "<b>three</b>", "four", "five", "six", "seven", "eight", "nine"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"class_names": names}))
    with serving(Flow.open(folder, spinning=False)) as server, visiting(browser, server) as visit:
        page = visit.open(server.url)
        page.get_by_role("radio", name="<b>three</b>").check(force=True)
        visit.draws(8)
        expect(page.locator(".cell").first).to_have_attribute("aria-label", re.compile("class <b>three</b>"))
        page.get_by_role("button", name="Likelihood").click()
        expect(page.locator("#verdict")).to_contain_text("<b>three</b>, with")
        expect(page.locator("#bars li.best b")).to_have_text("<b>three</b>")


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_numbers_that_cannot_be_are_refused_here_and_by_the_server(visit: Visit, server: Server) -> None:
    page = visit.open(server.url)
    for field, value, message in (
        ("Seed", "-1", "Seed must be a whole number from 0"),
        ("Seed", "1.5", "Seed must be a whole number"),
        ("Images", "257", "Images must be a whole number from 1 to 256."),
        ("Images", "", "Images must be"),
        ("Guidance", "-2", "Guidance must be a number from 0"),
    ):
        before = page.get_by_label(field, exact=True).input_value()
        page.get_by_label(field, exact=True).fill(value)
        visit.draw.click()
        expect(visit.alert).to_contain_text(message)
        expect(page.get_by_label(field, exact=True)).to_be_focused()
        page.get_by_label(field, exact=True).fill(before)
    assert not [asked for asked in visit.asked if "stream" in asked]
    page.evaluate("document.getElementById('n').max = 1000")
    page.get_by_label("Images", exact=True).fill("300")
    visit.draw.click()
    expect(visit.alert).to_contain_text("n is 300; expected 1 to 256")
    visit.refused = ("400",)


def test_a_full_queue_says_when_to_ask_again(browser: Browser, paced: PacedFlow) -> None:
    with serving(paced, queue=1) as server, ThreadPoolExecutor(2) as others:
        for waiting in (0, 1):  # one that is computed, one that waits
            others.submit(httpx.get, f"{server.url}v1/samples/stream?n=1", timeout=600)
            until(lambda w=waiting: paced.shown == 1 and len(server.service.batcher.waiting) == w)  # type: ignore[misc]
        with visiting(browser, server, "429") as visit:
            visit.open(server.url)
            visit.draw.click()
            expect(visit.alert).to_contain_text(re.compile(r"requests wait already.*Try again in \d+ s\."))
            paced.pace.release(FREE)
            expect(visit.alert).to_contain_text("Try again now.")
            visit.draws(8)
            expect(visit.alert).to_be_hidden()


def test_a_server_that_stops_is_said_before_and_during_a_drawing(browser: Browser, paced: PacedFlow) -> None:
    with contextlib.ExitStack() as last:
        with serving(paced) as server:
            visit = last.enter_context(visiting(browser, server, "ERR_", "503"))
            visit.open(server.url)
            visit.draw.click()
            expect(visit.status).to_have_text("Block 3 inverted…")
            server.should_exit = True
            expect(visit.alert).to_be_visible()
            expect(visit.alert).to_contain_text(re.compile("stopping|went away|closed the connection"))
            paced.pace.release(FREE)
        expect(visit.draw).to_be_enabled()
        visit.draw.click()
        expect(visit.alert).to_contain_text("The server does not answer. See whether tarflow serve is still running")


def test_a_page_that_finds_no_server_tries_again_with_draw(browser: Browser, server: Server) -> None:
    with visiting(browser, server, "ERR_") as visit:
        page = visit.page
        page.route("**/v1/model", lambda route: route.abort("connectionrefused"))
        page.goto(server.url)
        expect(visit.alert).to_contain_text("The server does not answer")
        page.unroute("**/v1/model")
        visit.draw.click()
        expect(page.locator("#model")).to_contain_text("digits")
        expect(visit.alert).to_be_hidden()


def test_a_token_is_asked_for_once(browser: Browser, flow: PacedFlow) -> None:
    with serving(flow, token=TOKEN) as server, visiting(browser, server, "401") as visit:
        page = visit.page
        page.goto(server.url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        expect(page.get_by_label("Bearer token")).to_be_focused()
        page.keyboard.type("a guess")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("did not accept that token")
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        visit.draws(8)
        page.reload()
        expect(page.locator("#model")).to_contain_text("digits")


# --- for everyone ---------------------------------------------------------------------------------------------------


def test_everything_can_be_done_with_the_keyboard(visit: Visit, server: Server) -> None:
    page = visit.open(server.url)
    focused = page.locator(":focus")
    page.get_by_role("tab", name="Draw").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Likelihood")).to_be_focused()
    expect(page.locator("#panel-likelihood")).to_be_visible()
    page.keyboard.press("Home")
    expect(page.locator("#panel-draw")).to_be_visible()

    page.keyboard.press("Tab")  # the class
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="0", exact=True)).to_be_checked()
    for name in ("Guidance, slider", "Guidance", "Seed"):
        page.keyboard.press("Tab")
        expect(page.get_by_label(name, exact=True)).to_be_focused()
    assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("3")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("16")
    page.keyboard.press("Enter")
    expect(visit.status).to_contain_text("16 images in")

    page.get_by_role("radio", name="denoised").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("radio", name="block 0")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.locator(".cell").first).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name="Image 5, class 0")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Permalink")).to_be_focused()


def test_a_chosen_picture_can_be_downloaded(visit: Visit, server: Server, flow: PacedFlow) -> None:
    page = visit.open(server.url)
    page.get_by_label("Seed", exact=True).fill("3")
    visit.draws(8)
    page.locator(".cell").nth(5).click()
    with page.expect_download() as arriving:
        page.get_by_role("link", name="Download").click()
    assert arriving.value.suggested_filename == "3-5.png"
    with Image.open(arriving.value.path()) as saved:
        assert saved.size == (48, 48)
        shown = np.asarray(saved.convert("L"))[::6, ::6]
    assert np.array_equal(shown, expected(flow, 8, seed=3)[5])


@pytest.mark.parametrize("width", [1200, 800])
@pytest.mark.parametrize("n", [8, 16])
def test_the_keyboard_goes_through_the_page_as_it_is_seen(browser: Browser, server: Server, n: int, width: int) -> None:
    """Column by column, and in a column from the top: never back to what was above."""
    with visiting(browser, server, viewport={"width": width, "height": 800}) as visit:
        page = visit.open(server.url)
        page.get_by_label("Images", exact=True).fill(str(n))
        visit.draws(n)
        seen = []
        page.get_by_role("tab", name="Draw").focus()
        while (place := page.evaluate(WHERE)) is not None and place not in seen:
            seen.append(place)
            page.keyboard.press("Tab")
        assert [name for name, *_ in seen][-1] == "sample-score"
        for (_, left, top, column), (name, x, y, other) in pairwise(seen):
            assert column != other or (y > top - 12 and (y > top + 12 or x > left)), f"{name} is above what came before"


WHERE = """() => {
    const focused = document.activeElement, box = focused.getBoundingClientRect();
    const column = focused.closest("form, .stage, .sample, [role=tablist]");
    if (!column) return null;
    const name = focused.id || focused.getAttribute("aria-label") || focused.textContent;
    return [name, box.left, box.top + scrollY, column.className || column.id];
}"""


def boxes(page: Page, selector: str) -> list[tuple[float, float]]:
    """From where to where labels reach, from left to right."""
    reach = "(all) => all.map((e) => e.getBoundingClientRect()).map((box) => [box.left, box.right])"
    found = page.locator(selector).evaluate_all(reach)
    return sorted((left, right) for left, right in found)


@pytest.mark.parametrize("spread", [0.02, 0.3, 0.75, 1.5, 3.0, 9.0, 40.0])
def test_tick_labels_of_a_plot_do_not_overlap(browser: Browser, spread: float) -> None:
    page = browser.new_context(viewport={"width": 700, "height": 500}).new_page()
    for decades in (True, False):
        values = 10 ** np.linspace(-5, -5 + spread, 50) if decades else 1234.5 + np.linspace(-spread, spread, 50) * 1e-4
        plot = plots.histogram({"a": values}, "x", "plot", decades=decades)
        page.set_content(f"<style>{report._STYLE}</style><figure class='plot'>{plot}</figure>")
        reaches = boxes(page, "text.below:not(.label)")
        assert len(reaches) >= 2
        for (_, right), (left, _) in pairwise(reaches):
            assert right + 2 < left, (spread, decades)
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: Browser, server: Server, scheme: Any) -> None:
    with visiting(browser, server, color_scheme=scheme) as visit:
        page = visit.open(server.url)
        ink, paper = (
            page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
            for name in ("color", "backgroundColor")
        )
        assert (np.mean(ink) < np.mean(paper)) == (scheme == "light")
        for selector in ("#guidance-note", "#go", ".facts", "#draw-status", "nav a"):
            assert contrast(page.locator(selector).first) >= 4.5, f"{selector} is faint when it is {scheme}"


def contrast(element: Locator) -> float:
    """WCAG's contrast of an element's text with what is behind it."""
    colours = element.evaluate(
        """e => {
            const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
            let behind = e;
            while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
            const colours = [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
            return colours.map((colour) => numbers(colour).slice(0, 3));
        }"""
    )
    linear = [[c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(x) / 255] for x in colours]
    dark, bright = sorted(float(np.dot(x, (0.2126, 0.7152, 0.0722))) for x in linear)
    return (bright + 0.05) / (dark + 0.05)


def test_a_narrow_window_is_enough(browser: Browser, server: Server) -> None:
    with visiting(browser, server, viewport={"width": 400, "height": 800}) as visit:
        page = visit.open(f"{server.url}?n=64")
        visit.draw.click()
        expect(page.locator("#sample")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


# --- what the page asks for, without a page -------------------------------------------------------------------------


def test_the_page_allows_nothing_from_elsewhere(server: Server) -> None:
    index = httpx.get(server.url)
    assert "default-src 'self'" in index.headers["content-security-policy"]
    assert "//" not in re.sub(r"<!doctype.*?>", "", index.text).replace("http-equiv", "")
    assert httpx.get(server.url, headers={"If-None-Match": index.headers["etag"]}).status_code == 304


def test_events_name_overflowing_samples_and_are_valid_json(server: Server) -> None:
    address = f"{server.url}v1/samples/stream?n=24&guidance=40&labels=0,1,2,3,4,5,6,7,8,9"
    told = re.findall(r"^event: (\w+)\ndata: (.*)\n$", httpx.get(address, timeout=60).text, re.MULTILINE)
    assert [name for name, _ in told] == ["start", *["block"] * 8, "done"]
    done = [json.loads(data, parse_constant=pytest.fail) for _, data in told][-1]
    assert done["nonfinite"], "guidance of 40 must overflow somewhere, or this test shows nothing"
    assert len(done["certificate"]) == len(done["log_prob"]) == 24
    assert all(error is None or error >= 0 for error in done["certificate"])


@pytest.mark.parametrize(
    "query",
    ["n=0", "n=257", "n=x", "labels=10", "labels=1,", "labels=0-9", "labels=" + "1," * 9000 + "1", "guidance=nan",
     "guidance=1", "seed=-1", f"seed={2**64}", f"first_sample={2**64}"],
)  # fmt: skip
def test_a_drawing_that_cannot_be_is_refused_before_anything_streams(server: Server, query: str) -> None:
    answer = httpx.get(f"{server.url}v1/samples/stream?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_class_probabilities_are_bayes_rule_over_the_flows_likelihoods(server: Server, flow: PacedFlow) -> None:
    content = picture(7)
    answer = httpx.post(f"{server.url}v1/likelihood?seed=4", content=content, headers={"Content-Type": "image/png"})
    found = answer.json()
    pixels = np.asarray(Image.open(io.BytesIO(content)), np.uint8)[None, None]
    draws = flow.dequantise(np.repeat(pixels, 4, 0), seed=4)
    nats = np.array([flow.log_likelihood(draws, k) for k in range(10)], np.float64)  # (classes, draws)
    assert largest(found["log_likelihoods"], nats.mean(1)) < 1e-3
    weights = np.exp(nats.mean(1) - nats.mean(1).max())
    assert largest(found["probabilities"], weights / weights.sum()) < 1e-4
    bits = (np.log(128) - (np.log(np.exp(nats).mean(0)) / 64)) / np.log(2)
    assert found["bits_per_dim"] == pytest.approx(bits.mean(), abs=1e-4)
    assert np.argmax(found["probabilities"]) == 7


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_a_picture_is_refused_by_its_type_its_size_and_what_it_holds(server: Server) -> None:
    gif, large = encoded(Image.new("L", (8, 8)), "GIF"), encoded(Image.new("1", (4097, 4096)))
    for content, kind, status, message in (
        (gif, "image/gif", 415, "expected image/png or image/jpeg"),
        (gif, "image/png; q=1", 400, "expected a whole PNG or JPEG file"),
        (large, "image/png", 400, "expected 16,777,216 at most"),
        (bytes((8 << 20) + 1), "image/png", 413, "larger than 8192 KiB"),
    ):
        answer = httpx.post(f"{server.url}v1/likelihood", content=content, headers={"Content-Type": kind})
        assert answer.status_code == status
        assert message in answer.json()["error"]
