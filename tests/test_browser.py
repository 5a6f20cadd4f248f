"""The explore page in a real browser, served by the real command: what a user does, and that no request leaves it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Explored
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("EMBEDKIT_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 60_000
CASE = "phantom_003"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no browser at {CHROMIUM}; apt-get install chromium, or set EMBEDKIT_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(browser: Browser, explored: Explored) -> Iterator[str]:
    """Of a server that runs while these tests do, and that Ctrl-C ends in good order."""
    command = [sys.executable, "-c", "from embedkit.cli.main import main; main()", "serve"]
    parts = [str(explored.cache), str(explored.index), *map(str, explored.runs)]
    server = subprocess.Popen(
        [*command, *parts, "--no-browser", "--device", "cpu", "--upload-limit", "3MB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdout is not None
    line = server.stdout.readline().strip()
    assert line.startswith("http://127.0.0.1:"), (line, server.poll())
    yield line
    server.send_signal(signal.SIGINT)
    _, printed = server.communicate(timeout=60)
    assert server.returncode == 130 and printed.strip() == "stopped; uploads are removed", printed


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, ready; whatever it asks of another origin, or complains of, fails the test."""
    asked: list[str] = []
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.goto(address)
    opened.wait_for_selector("html[data-ready]")
    yield opened
    context.close()
    origin = address.partition("/?")[0]
    assert asked and [url for url in asked if not url.startswith(f"{origin}/")] == []
    expected = "the server responded with a status of 4"  # Chromium's own line on a refusal that the page shows
    assert [text for text in complaints if expected not in text] == []


def choose(page: Page, case: str = CASE) -> None:
    """Selects a case by its name and waits for its first neighbour to be there."""
    page.fill("#find-case", case)
    shows(page, "#query-name", case)
    shows(page, "#other-place", re.compile("^slice"))


def shows(page: Page, selector: str, text: str | re.Pattern[str]) -> None:
    """Waits until an element has this text, or one that the pattern matches."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text, timeout=PATIENCE_MS)


def counts(page: Page, selector: str, count: int) -> None:
    """Waits until there are so many elements."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=PATIENCE_MS)


def becomes(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def picture(page: Page, canvas: str = "query-image") -> dict[str, int]:
    """What is on a canvas in three numbers: a sum that tells pictures apart, its lightest red, its most colour."""
    script = """id => {
        const canvas = document.getElementById(id);
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let [sum, light, colour] = [0, 0, 0];
        for (let place = 0; place < data.length; place += 4) {
            sum = (sum * 31 + data[place] * 7 + data[place + 1] * 3 + data[place + 2]) % 1000000007;
            light = Math.max(light, data[place]);
            colour = Math.max(colour, Math.abs(data[place] - data[place + 2]));
        }
        return {sum, light, colour};
    }"""
    found: dict[str, int] = page.evaluate(script, canvas)
    return found


def coloured(page: Page, canvas: str = "query-image") -> bool:
    """True where a picture is more than grey; the letters at its edges are bluish, by less than this."""
    return picture(page, canvas)["colour"] > 60


def place_on_map(page: Page, case: str) -> dict[str, float]:
    """Where a case lies on the map, in pixels of the canvas."""
    script = """async name => {
        const told = async path => (await fetch(path)).json();
        const [cohort, map] = [await told('/api/cohort'), await told('/api/map')];
        const number = cohort.cases.indexOf(name);
        const [width, height] = ['clientWidth', 'clientHeight'].map(side => document.getElementById('map')[side]);
        const scale = Math.min(width, height) / 2 - 22;
        return {
            x: width / 2 + map.x[number] * scale * Math.min(width / height, 1.35),
            y: height / 2 - map.y[number] * scale,
        };
    }"""
    found: dict[str, float] = page.evaluate(script, case)
    return found


def test_a_click_on_the_map_selects_a_case_and_a_pointer_names_it(page: Page) -> None:
    place: Any = place_on_map(page, "phantom_007")
    page.hover("#map", position=place)
    assert page.inner_text("#tooltip").startswith("phantom_007")
    page.click("#map", position=place)
    shows(page, "#query-name", "phantom_007")
    becomes(lambda: page.evaluate("location.href").endswith("/#case=phantom_007"))
    assert "volume_mm3" in page.inner_text("#labels table")
    page.focus("#map")
    width = page.evaluate("document.querySelector('#map').clientWidth")
    page.keyboard.press("ArrowLeft" if place["x"] > width / 2 else "ArrowRight")  # to where there are other cases
    shows(page, "#query-name", re.compile("^phantom_00[^7]|^phantom_01"))


def test_scrubbing_shows_another_slice_and_its_match_follows(page: Page) -> None:
    choose(page)
    before, where = picture(page), page.inner_text("#query-place")
    assert before["light"] > 100 and not coloured(page)
    assert "2 of 4" in where
    page.focus("#query-slice")
    page.keyboard.press("ArrowRight")
    assert "3 of 4" in page.inner_text("#query-place") and picture(page) != before
    assert "matched" in page.inner_text("#other-place")
    page.locator("#query-slice").blur()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#query-place") == where and picture(page) == before
    last = page.locator("#match-list button").last
    last.click()
    assert last.get_attribute("aria-pressed") == "true" and page.inner_text("#query-place") != where


def test_neighbours_are_ranked_and_a_click_sets_one_beside_the_query(page: Page) -> None:
    choose(page)
    counts(page, "#neighbours button", 10)
    cards = page.locator("#neighbours button")
    assert cards.first.get_attribute("aria-pressed") == "true"
    second, third = (cards.nth(place).locator(".name").inner_text() for place in (1, 2))
    cards.nth(2).click()
    shows(page, "#other-name", third)
    assert page.locator("#labels thead").inner_text().split()[-1] == third
    page.keyboard.press("k")
    shows(page, "#other-name", second)
    page.fill("#count", "4")
    page.press("#count", "Tab")
    counts(page, "#neighbours button", 4)


def test_a_filter_thins_out_map_and_neighbours_and_a_wrong_one_is_explained(page: Page) -> None:
    choose(page)
    page.fill("#where", "lesion = 0")
    shows(page, "#where-count", re.compile("^[1-9] of 12$"))
    allowed = int(page.inner_text("#where-count").split()[0])
    becomes(lambda: 0 < page.locator("#neighbours button").count() <= allowed)
    before, names = page.inner_text("#where-count"), page.locator("#neighbours .name").all_inner_texts()
    page.fill("#where", "lesoin = 0")
    shows(page, "#where-error", re.compile(r"lesoin.* Still shown: lesion = 0$"))
    assert page.is_visible("#where-error") and page.get_attribute("#where", "aria-invalid") == "true"
    assert page.inner_text("#where-count") == before
    assert page.locator("#neighbours .name").all_inner_texts() == names
    choose(page, names[0])
    becomes(lambda: names[0] not in page.locator("#neighbours .name").all_inner_texts())
    becomes(lambda: 0 < page.locator("#neighbours button").count() <= allowed)
    page.fill("#where", "")
    counts(page, "#neighbours button", 10)
    assert page.is_hidden("#where-error")


def test_a_run_is_laid_over_the_slices_and_taken_off_again(page: Page) -> None:
    choose(page)
    page.select_option("#heat", "lesion.raptor")
    shows(page, "#heat-note", re.compile("out of fold"))
    becomes(lambda: coloured(page))
    assert "of the evidence" in page.inner_text("#query-place")
    page.select_option("#class", "0")
    shows(page, "#heat-note", re.compile("lesion = 0"))
    becomes(lambda: coloured(page))
    page.fill("#opacity", "0")
    becomes(lambda: not coloured(page))
    page.fill("#opacity", "80")
    becomes(lambda: coloured(page))
    page.locator("#opacity").blur()
    page.keyboard.press("o")
    becomes(lambda: not coloured(page))
    assert page.input_value("#heat") == ""
    page.select_option("#heat", "match")
    shows(page, "#heat-note", re.compile("what each patch adds to the similarity of the two slices, 0"))
    becomes(lambda: coloured(page) and coloured(page, "other-image"))


def test_a_new_scan_finds_similar_cases_and_a_wrong_one_is_explained(page: Page, explored: Explored) -> None:
    page.click("#new-scan")
    assert page.is_disabled("#upload-start")
    page.set_input_files("#files", {"name": "holiday.jpg", "mimeType": "image/jpeg", "buffer": b"\xff\xd8\xff no scan"})
    page.click("#upload-start")
    shows(page, "#upload-error", re.compile("^holiday.jpg: not a format that embedkit reads"))
    page.set_input_files("#files", {"name": "large.nii", "mimeType": "", "buffer": b"0" * 3_000_001})
    shows(page, "#upload-error", re.compile("large.nii is larger than 3 MB"))
    assert page.is_disabled("#upload-start")
    page.set_input_files("#files", str(explored.scans / "volumes" / "phantom_005.nii.gz"))
    assert page.is_hidden("#upload-error")
    page.click("#upload-start")
    shows(page, "#query-name", "phantom_005.nii.gz")
    shows(page, "#other-place", re.compile("^slice"))
    assert page.is_hidden("#upload")
    first = page.locator("#neighbours button").first.inner_text()
    assert "phantom_005" in first and "1.000" in first
    assert "all fold models" in page.inner_text("#predictions")
    assert picture(page)["light"] > 100
    assert page.is_disabled("#other-patients") and not page.input_value("#find-case")
    choose(page)
    assert page.is_enabled("#other-patients")


def test_the_map_takes_other_colours_and_another_layout(page: Page) -> None:
    assert "0 (" in page.inner_text("#legend")
    page.select_option("#colour", "side")
    shows(page, "#legend", re.compile("left.*right.*unknown"))
    before = picture(page, "map")
    page.select_option("#colour", "volume_mm3")
    counts(page, "#legend canvas", 1)
    becomes(lambda: picture(page, "map") != before)
    before = picture(page, "map")
    page.select_option("#projection", "tsne")
    becomes(lambda: picture(page, "map") != before)


def test_dark_and_narrow_the_page_stays_whole(page: Page) -> None:
    choose(page)
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark"
    becomes(lambda: page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 22)")
    page.set_viewport_size({"width": 390, "height": 800})
    becomes(lambda: page.evaluate("document.documentElement.scrollWidth") <= 390)
    page.reload()
    shows(page, "#query-name", CASE)
    assert page.get_attribute("html", "data-theme") == "dark"


def test_every_control_has_a_name_for_those_who_cannot_see_it(page: Page) -> None:
    choose(page)
    script = """() => [...document.querySelectorAll('button, input, select, canvas[role]')]
        .filter(each => each.offsetParent && !(each.labels?.length || each.getAttribute('aria-label')
            || each.textContent.trim()))
        .map(each => each.id || each.outerHTML)"""
    assert page.evaluate(script) == []


MAP_OF_MANY = """
async () => {
  const { CohortMap } = await import("/static/map.js");
  const canvas = document.createElement("canvas");
  canvas.style = "position:fixed;left:0;top:0;width:900px;height:700px;z-index:9999";
  document.body.append(canvas);
  const count = 10000;
  const draw = (seed) => Array.from({ length: count }, (_, i) => Math.sin(seed * (i + 1)) );
  const chosen = [];
  const map = new CohortMap(canvas, { onSelect: (number) => chosen.push(number), onHover: () => {} });
  const points = { x: draw(12.9898), y: draw(78.233) };
  map.setColours(points.x.map((_, i) => ["#1b9e77", "#d95f02", "#7570b3"][i % 3]));
  map.setPoints(points);
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  for (let step = 0; step < 30; step += 1) {
    const event = { deltaY: step % 2 ? 60 : -60, offsetX: 450, offsetY: 350, cancelable: true };
    canvas.dispatchEvent(new WheelEvent("wheel", event));
    canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: 300 + step, clientY: 300 }));
    await frame();
  }
  const place = map.place(1234);
  for (const type of ["pointerdown", "pointerup"]) {
    const event = new PointerEvent(type, { clientX: place.x, clientY: place.y, pointerId: 1 });
    canvas.setPointerCapture = () => {};
    canvas.dispatchEvent(event);
  }
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let inked = 0;
  for (let i = 3; i < data.length; i += 4) if (data[i] > 0) inked += 1;
  const near = chosen.map((n) => Math.hypot(map.place(n).x - place.x, map.place(n).y - place.y));
  canvas.remove();
  return { inked, near };
}
"""


def test_a_map_of_ten_thousand_cases_follows_the_hand(page: Page) -> None:
    told = page.evaluate(MAP_OF_MANY)
    assert told["inked"] > 20_000 and told["near"] and told["near"][0] < 2
