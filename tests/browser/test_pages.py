"""Every page of the site in a browser, at a laptop's and at a phone's width."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import check_pages
import pytest


@pytest.mark.parametrize(("width", "themes"), [(1280, ("light", "dark")), (390, ("light",))])
def test_page(browser, site: str, page_name: str, width: int, themes: tuple[str, ...]):
    assert check_pages.page_problems(browser, site + page_name, width=width, themes=themes) == []


def test_formulas_are_drawn(browser, site: str, site_folder: Path):
    names = check_pages.pages(site_folder)
    pages = [name for name in names if 'class="math' in (site_folder / name).read_text(encoding="utf-8")]
    if not pages:
        pytest.skip("no page has a formula yet")
    page = browser.new_page()
    page.goto(site + pages[0], wait_until="networkidle")
    # in the article: a formula in a heading also stands in the list of contents, which may be folded
    page.wait_for_selector("article mjx-container", timeout=20_000)
    assert page.locator(".math mjx-container mjx-math").count() > 0
    page.close()


CHAPTER = "chapters/01-core-transformer.html"


@pytest.fixture
def chapter(browser, site: str) -> Iterator:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(site + CHAPTER, wait_until="load")
    page.wait_for_function("() => window.MathJax?.startup?.promise?.then(() => true) ?? false")
    yield page
    page.close()


# The element that has the focus: what it is, and whether a reader sees that it has it.
FOCUSED = """() => {
    const e = document.activeElement;
    if (!e || e === document.body) return null;
    const look = () => { const s = getComputedStyle(e); return [s.outlineStyle, s.outlineWidth, s.boxShadow].join(); };
    const box = e.getBoundingClientRect(), focused = look();
    const ring = !focused.startsWith('none') || focused.split(',')[2] !== 'none';
    const name = e.getAttribute('aria-label') || e.textContent.trim() || e.title || e.value || e.placeholder || '';
    const seen = (window.tabbed ??= new Set());
    const again = seen.has(e);
    seen.add(e);
    return {again, ring, named: Boolean(name), drawn: box.width > 0 && box.height > 0,
            what: e.outerHTML.slice(0, 120), text: e.textContent.trim()};
}"""


def test_every_stop_of_the_tab_key_is_seen_and_none_holds_it(chapter) -> None:
    stops = []
    for _ in range(600):
        chapter.keyboard.press("Tab")
        stop = chapter.evaluate(FOCUSED)
        if stop is None or stop["again"]:
            break
        stops.append(stop)
    else:
        pytest.fail("no end after 600 stops")
    assert stops[0]["text"] == "Skip to main content"
    assert len(stops) > 50
    faults = [stop["what"] for stop in stops if not (stop["ring"] and stop["named"] and stop["drawn"])]
    assert not faults
    every = chapter.evaluate(
        "() => [...document.querySelectorAll('article :is(a[href], button, input, select, summary)')]"
        ".filter(e => e.checkVisibility({visibilityProperty: true}) && !e.disabled && e.tabIndex >= 0"
        " && !window.tabbed.has(e)).map(e => e.outerHTML.slice(0, 120))"
    )
    assert every == []


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_solution_opens_and_closes_by_keyboard(chapter, key: str) -> None:
    solution = chapter.locator(".admonition.dropdown").first
    text = solution.locator("pre").first
    button = solution.locator("button.toggle-button")
    assert not text.is_visible()
    button.press(key)
    assert text.is_visible()
    assert button.get_attribute("aria-expanded") == "true"
    button.press(key)
    assert not text.is_visible()


def test_the_code_of_a_figure_opens_by_keyboard(chapter) -> None:
    cell = chapter.locator("details.hide").first
    assert not cell.locator("pre").first.is_visible()
    cell.locator("summary").press("Enter")
    assert cell.locator("pre").first.is_visible()


def test_what_scrolls_can_be_reached(browser, site: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto(site + CHAPTER, wait_until="load")
    page.wait_for_selector("[data-atlas-wide]")
    wide = page.locator("[data-atlas-wide]").first
    assert wide.get_attribute("tabindex") == "0"
    assert wide.get_attribute("aria-label").endswith("scrolls sideways")
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_drawing_takes_the_room_that_was_kept_for_it(browser, site: str, width: int) -> None:
    heights = []
    for blocked in (True, False):
        page = browser.new_page(viewport={"width": width, "height": 900})
        if blocked:
            page.route("**/explore.js*", lambda route: route.abort())
        page.goto(site + CHAPTER, wait_until="load")
        bodies = page.locator(".atlas-explore-body")
        assert bodies.first.locator("svg").count() == 0 if blocked else bodies.first.locator("svg").count()
        heights.append([bodies.nth(i).bounding_box()["height"] for i in range(bodies.count())])
        page.close()
    kept, drawn = heights
    assert len(kept) == len(drawn) > 0
    assert [(k, d) for k, d in zip(kept, drawn, strict=True) if abs(k - d) > 60] == []


# The printed page: what is to be seen on it that belongs to a screen, and what leaves it on the right.
PRINTED = """() => {
    const shown = e => e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().width > 0;
    const screen = [...document.querySelectorAll('nav, button, input, select, summary, footer, header, .headerlink')];
    const width = document.documentElement.clientWidth;
    const out = [...document.querySelectorAll('article *')].filter(e => !e.closest('mjx-assistive-mml, svg'));
    const name = e => e.localName + '.' + (e.getAttribute('class') || '') + ' ' + e.textContent.trim().slice(0, 40);
    return {
        screen: screen.filter(e => shown(e) && !e.closest('#jb-print-docs-body')).map(name),
        cut: out.filter(e => shown(e) && e.getBoundingClientRect().right > width + 2).map(name),
        headings: [...document.querySelectorAll('article h2')].filter(shown).length,
        drawings: [...document.querySelectorAll('.atlas-explore-drawing')].filter(shown).length,
        solutions: [...document.querySelectorAll('.admonition.dropdown pre')].filter(shown).length,
        ground: getComputedStyle(document.body).backgroundColor,
    };
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_printed_chapter_is_the_text_alone_and_within_the_page(chapter, theme: str) -> None:
    chapter.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    chapter.set_viewport_size({"width": 673, "height": 960})  # A4 less its margins
    chapter.emulate_media(media="print")
    chapter.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    chapter.wait_for_timeout(300)
    printed = chapter.evaluate(PRINTED)
    assert printed["screen"] == []
    assert printed["cut"] == []
    assert printed["headings"] >= 10
    assert printed["drawings"] == chapter.locator(".atlas-explore").count() > 0
    assert printed["solutions"] > 0
    assert printed["ground"] == "rgb(255, 255, 255)"


GOOD = "<!doctype html><html lang='en'><head><title>t</title></head><body><p>fine</p>{}</body></html>"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (
            '<script src="https://example.org/x.js"></script>',
            "request to another origin: https://example.org/x.js",
        ),
        ('<img src="http://127.0.0.1:1/x.png">', "request to another origin"),
        ("<script>fetch('https://example.org/late')</script>", "request to another origin"),
        (
            "<style>p { background: url(https://example.org/f) }</style>",
            "request to another origin: https://example.org/f",
        ),
        ("<script>console.error('a planted error')</script>", "console: a planted error"),
        ("<script>setTimeout(() => { throw new Error('thrown') }, 10)</script>", "error: thrown"),
        ('<img src="missing.png">', "404 for"),
        ('<div style="width: 2000px">wide</div>', "scrolls sideways at 390 px"),
        ('<main><img src="p.png" alt="p"></main>', "an image without width and height: p.png"),
        (
            "<p>text</p><script>setTimeout(() => document.body.prepend(Object.assign(document.createElement('div'),"
            " {style: 'height: 500px'})), 150)</script>",
            "while it loads at 390 px",
        ),
        ('<script src="heavy.js"></script>', "bytes, more than 1,500,000"),
        ('<p style="color: #aaa">pale</p>', "light: color-contrast: '<p style"),
        ("<style>[data-theme=dark] body { background: #333 }</style>", "dark: color-contrast: '<p>fine"),
        ("<button></button>", "light: button-name: '<button>"),
    ],
)
def test_a_planted_fault_is_found(browser, tmp_path: Path, fault: str, problem: str):
    (tmp_path / "index.html").write_text(GOOD.format(fault))
    (tmp_path / "p.png").write_bytes(bytes.fromhex("89504e470d0a1a0a"))
    (tmp_path / "heavy.js").write_text(f"/* {random.Random(0).randbytes(1_600_000).hex()} */")
    with check_pages.serve(tmp_path) as address:
        found = check_pages.page_problems(
            browser, f"{address}index.html", width=390, themes=("light", "dark")
        )
    assert any(problem in line for line in found), found


@pytest.mark.parametrize("extra", ["", '<div style="overflow: auto"><p style="width: 2000px">wide</p></div>'])
def test_a_good_page_passes(browser, tmp_path: Path, extra: str):
    (tmp_path / "index.html").write_text(GOOD.format(extra))
    with check_pages.serve(tmp_path) as address:
        assert check_pages.page_problems(browser, f"{address}index.html", width=390, themes=("light",)) == []
