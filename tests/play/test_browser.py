"""The page in a real browser: the machine's, or what ``make browser`` fetches (``FXQ_CHROMIUM`` names another)."""

import os

import pytest

from fxq.comparison.bundles.contestant import FULL_PRECISION
from tests.features import needs
from tests.machine import browser as chromium
from tests.play.test_server import served  # noqa: F401  a fixture

pytestmark = needs("browser")
WAIT = 120_000


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        found = running.chromium.launch(executable_path=chromium.found(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, served):  # noqa: F811
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    opened = context.new_page()
    opened.faults = []
    opened.on("console", lambda said: opened.faults.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.goto(f"http://localhost:{served.port}/")
    opened.wait_for_selector("#start:enabled", timeout=WAIT)
    yield opened
    assert opened.faults == []
    context.close()


def shown(page):
    return int(page.evaluate("document.body.dataset.shown || 0"))


def wait(page, expression):
    """Until an expression of the page holds; its policy forbids what playwright itself would wait with."""
    for _ in range(WAIT // 50):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within {WAIT} ms: {expression}")


def until(page, frames):
    wait(page, f"Number(document.body.dataset.shown || 0) >= {frames}")


def test_a_video_plays_to_its_end(page, stage, bundle):
    assert page.input_value("#left") == FULL_PRECISION and page.input_value("#right") == bundle.name
    page.click("#start")
    until(page, 3 * stage.chunks)
    wait(page, "document.getElementById('state').textContent.includes('frames')")
    drift = page.text_content(".panel:nth-child(2) .drift")
    assert drift.endswith("dB") and page.text_content(".panel:nth-child(1) .drift") == "-"
    pixels = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 < 3)"
    brightest = page.evaluate(f"[...document.querySelectorAll('canvas')].map({pixels}).map(all => Math.max(...all))")
    assert len(brightest) == 2 and min(brightest) > 100
    assert f"chunk 1{stage.chunks}" in page.text_content("#memory"), "chunks count from 1, as in reports"
    assert page.is_visible("#film") and page.is_visible("#drift polyline.right")


def test_pause_holds_and_nothing_is_asked_meanwhile(page, served):  # noqa: F811
    page.check("#endless")
    page.click("#start")
    until(page, 4)
    page.click("#pause")
    page.wait_for_timeout(500)
    before, (show,) = shown(page), served.player.shows.values()
    done = show.done
    page.wait_for_timeout(1500)
    assert shown(page) == before and show.done <= done + 1
    page.click("#pause")
    until(page, before + 6)


def test_prompts_are_switched_and_wrong_ones_refused(page):
    page.check("#endless")
    page.click("#start")
    until(page, 2)
    page.fill("#prompt", "a dog")
    page.click("#ask")
    wait(page, "document.getElementById('why').textContent.includes('needs exactly one')")
    page.fill("#prompt", "cross blue left fast black row1 column2")
    page.click("#ask")
    wait(page, "!document.getElementById('why').textContent")
    until(page, shown(page) + 4)


def test_a_closed_tab_ends_its_work(browser, served, stage):  # noqa: F811
    pages = [browser.new_page() for _ in range(2)]
    for opened in pages:
        opened.goto(f"http://localhost:{served.port}/")
        opened.wait_for_selector("#start:enabled", timeout=WAIT)
        opened.check("#endless")
        opened.click("#start")
    for opened in pages:
        until(opened, 3)
    assert len(served.player.shows) == 2
    pages[0].close()
    until(pages[1], shown(pages[1]) + 6)
    assert len(served.player.shows) == 1
    pages[1].close()


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser, served, width, scheme):  # noqa: F811
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(f"http://localhost:{served.port}/")
    opened.wait_for_selector("#start:enabled", timeout=WAIT)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("FXQ_SCREENSHOTS"):
        opened.click("#start")
        until(opened, 21)
        opened.screenshot(path=f"{folder}/play-{width}-{scheme}.png", full_page=True)
    context.close()
