"""The site's drawing of explorables: every kind, by mouse and keyboard, in both themes, without script."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from llm_atlas.book.explore import Bars, Explorable, Heatmap, Lines, Tokens, explore
from llm_atlas.book.site.explorables import figure_html
from llm_atlas.core.assets import bundled

TEXTS = {"caption": "What it shows.", "alt": "A drawing"}
WORDS = [" The", " cat", " sat", " on", " the", " mat"]
DARK = (
    "--pst-color-text-base:#ced6dd;--pst-color-background:#14181e;--pst-color-surface:#222832;"
    "--pst-color-border:#48566b;--pst-color-text-muted:#9ca4af"
)


@cache
def drawings() -> dict[str, Explorable]:
    def lines(k: float, log: bool) -> Lines:
        x = [0.1 * 1.3**i for i in range(20)]
        curves = {"rising": [v**k for v in x], "falling": [v**-k for v in x], "flat": [1.0] * 20}
        return Lines(x, curves, "size", "loss", x_log=log, y_log=True, note=f"slope {k:g}")

    return {
        "lines": explore(lines, title="Lines", k=(0.5, 2.5, 0.5), log=[True, False], **TEXTS),
        "bars": explore(lambda k: Bars(WORDS, [k, 1, 2, -1, 0, 3]), title="Bars", k=range(1, 5), **TEXTS),
        "long": explore(
            lambda k: Bars([f"a rather long label {i}" for i in range(9)], range(9), y_label="logit"),
            title="Long bars",
            k=[1, 2],
            **TEXTS,
        ),
        "heatmap": explore(
            lambda head: Heatmap(
                [[math.cos(head * (i - j)) ** 2 if j <= i else math.nan for j in range(6)] for i in range(6)],
                WORDS,
                WORDS,
                "key",
                "query",
            ),
            title="Heatmap",
            head=range(4),
            **TEXTS,
        ),
        "whole": explore(lambda k: Heatmap([[k, 0], [0, 1]]), title="Whole", k=[1, 2], **TEXTS),
        "tokens": explore(
            lambda query: Tokens(WORDS, [i / 6 for i in range(6)], focus=query),
            title="Tokens",
            query=range(6),
            **TEXTS,
        ),
    }


@cache
def still(name: str) -> bytes:
    return drawings()[name].png()


def written(folder: Path, *, theme: str = "light") -> str:
    script, style = (bundled(f"site/explore.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    parts = []
    for name, shown in drawings().items():
        before, after = figure_html({**shown.spec, **shown.data})
        (folder / f"{name}.png").write_bytes(still(name))
        parts.append(f'<section id="{name}">{before}<img src="{name}.png" alt="A drawing">{after}</section>')
    colors = DARK if theme == "dark" else ""
    path = folder / f"{theme}.html"
    path.write_text(
        f'<!doctype html><html lang="en" data-theme="{theme}" style="{colors}"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>t</title><style>{style}'
        "body{font-family:system-ui;background:var(--pst-color-background,#fff);"
        "color:var(--pst-color-text-base,#222);margin:10px}</style></head>"
        f"<body><main><h1>Page</h1>{''.join(parts)}</main>"
        # twice, as some themes do
        f"<script>{script}</script><script>{script}</script></body></html>",
        encoding="utf-8",
    )
    return path.as_uri()


@pytest.fixture
def opened(browser, tmp_path: Path) -> Iterator:
    pages, problems = [], []

    def open_page(*, width: int = 900, theme: str = "light", javascript: bool = True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, java_script_enabled=javascript
        )
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(written(tmp_path, theme=theme))
        pages.append(context)
        return page

    yield open_page
    for context in pages:
        context.close()
    assert not problems


def test_the_slider_redraws_by_keyboard(opened) -> None:
    page = opened()
    figure = page.locator("#lines")
    paths = figure.locator("svg path[stroke-width]")
    assert paths.count() == 3
    before = paths.first.get_attribute("d")
    slider = figure.get_by_role("slider")
    assert slider.get_attribute("aria-valuetext") == "1.5"
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "2"
    assert figure.locator("output").inner_text() == "2"
    assert paths.first.get_attribute("d") != before
    assert figure.locator(".atlas-explore-note").inner_text() == "slope 2"
    assert "k 2, log yes" in figure.locator("[role=img]").get_attribute("aria-label")


def test_the_dropdown_changes_the_axis(opened) -> None:
    figure = opened().locator("#lines")
    before = figure.locator("svg path[stroke-width]").first.get_attribute("d")
    figure.get_by_role("combobox").select_option(label="no")
    assert figure.locator("svg path[stroke-width]").first.get_attribute("d") != before


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("lines", ["ArrowRight"], "size 0.1: rising 0.03162, falling 31.62, flat 1"),
        ("bars", ["ArrowRight", "ArrowRight"], " cat: 1"),
        ("long", ["ArrowDown", "ArrowDown", "ArrowDown"], "a rather long label 2: 2"),
        ("heatmap", ["ArrowRight", "ArrowDown"], "query  cat, key  The: 0.1732"),
        ("heatmap", ["ArrowRight", "ArrowRight"], "query  The, key  cat: masked"),
        ("tokens", ["ArrowRight", "ArrowRight", "ArrowRight"], "sat: 0.3333"),
    ],
)
def test_values_are_read_by_the_arrow_keys(opened, name: str, keys: list[str], said: str) -> None:
    figure = opened().locator(f"#{name}")
    drawing = figure.locator("[role=img]")
    for key in keys:
        drawing.press(key)
    note = figure.locator(".atlas-explore-note")
    assert " ".join(note.text_content().split()) == " ".join(said.split())
    drawing.press("Escape")
    assert note.text_content() != said


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("media", ["screen", "print"])
def test_a_masked_cell_is_hatched_and_named(opened, theme: str, media: str) -> None:
    page = opened(theme=theme)
    page.emulate_media(media=media)
    figure = page.locator("#heatmap")
    blank = figure.locator(".atlas-explore-drawing > svg > rect.ae-blank")
    assert blank.count() == 15
    key = figure.locator(".atlas-explore-scale .atlas-explore-masked")
    assert key.inner_text() == "masked"
    for rect in (blank.first, key.locator("rect.ae-blank")):
        fill = rect.evaluate("e => getComputedStyle(e).fill")
        pattern = page.locator(
            f"pattern#{fill.removeprefix('url(').split('#')[1].rstrip(')').strip(chr(34))}"
        )
        assert pattern.count() == 1
        colors = pattern.evaluate(
            "e => [getComputedStyle(e.querySelector('rect')).fill,"
            " getComputedStyle(e.querySelector('line')).stroke]"
        )
        assert colors[0] != colors[1]
        if media == "print":
            assert colors == ["rgb(255, 255, 255)", "rgb(95, 101, 112)"]


def test_without_a_masked_cell_nothing_is_said_of_one(opened) -> None:
    page = opened()
    assert page.locator("#bars .atlas-explore-masked, #tokens .atlas-explore-masked").count() == 0
    assert page.locator("#whole .ae-blank, #whole .atlas-explore-masked").count() == 0
    assert page.locator("#whole .atlas-explore-scale").count() == 1


def test_values_are_read_by_pointing(opened) -> None:
    figure = opened().locator("#bars")
    figure.locator("svg rect").nth(5).hover()
    assert figure.locator(".atlas-explore-note").text_content().strip() == "mat: 3"


def test_play_runs_to_the_end_and_stops(opened) -> None:
    page = opened()
    play = page.locator("#bars").get_by_role("button", name="Play k")
    play.click()
    assert play.get_attribute("aria-pressed") == "true"
    page.wait_for_function("document.querySelector('#bars button').ariaPressed === 'false'", timeout=10_000)
    assert page.locator("#bars").get_by_role("slider").get_attribute("aria-valuetext") == "4"


def test_one_script_twice_draws_once(opened) -> None:
    page = opened()
    assert page.locator("#lines svg path[stroke-width]").count() == 3
    assert page.locator("#lines .atlas-explore-controls").count() == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_leaves_its_box_and_text_stays_large(opened, width: int) -> None:
    page = opened(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for text in page.locator(".atlas-explore-drawing svg text").all():
        box = text.bounding_box()
        assert box["x"] >= 0, text.text_content()
        assert box["x"] + box["width"] <= width + 1, text.text_content()
    sizes = page.eval_on_selector_all(
        ".atlas-explore *", "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_a_narrower_window_redraws(opened) -> None:
    page = opened(width=900)
    wide = page.locator("#lines .atlas-explore-drawing svg").get_attribute("viewBox")
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function(
        "before => document.querySelector('#lines .atlas-explore-drawing svg').getAttribute('viewBox')"
        " !== before",
        arg=wide,
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(opened, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(opened(theme=theme))
    assert found.violations_count == 0, found.generate_report()


def test_without_script_the_still_is_shown(opened) -> None:
    page = opened(javascript=False)
    for name in drawings():
        image = page.locator(f"#{name} img")
        assert image.is_visible()
        assert image.get_attribute("alt") == "A drawing"
        assert page.locator(f"#{name} figcaption").is_visible()


def test_print_shows_the_drawing_without_controls(opened) -> None:
    page = opened()
    page.emulate_media(media="print")
    assert page.locator("#lines .atlas-explore-drawing svg").is_visible()
    assert not page.locator("#lines input").is_visible()
