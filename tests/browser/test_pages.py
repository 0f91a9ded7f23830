"""Every page of the site in a browser, at a laptop's and at a phone's width."""

from __future__ import annotations

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


GOOD = "<!doctype html><html><head><title>t</title></head><body><p>fine</p>{}</body></html>"


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
    ],
)
def test_a_planted_fault_is_found(browser, tmp_path: Path, fault: str, problem: str):
    (tmp_path / "index.html").write_text(GOOD.format(fault))
    with check_pages.serve(tmp_path) as address:
        found = check_pages.page_problems(browser, f"{address}index.html", width=390)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize("extra", ["", '<div style="overflow: auto"><p style="width: 2000px">wide</p></div>'])
def test_a_good_page_passes(browser, tmp_path: Path, extra: str):
    (tmp_path / "index.html").write_text(GOOD.format(extra))
    with check_pages.serve(tmp_path) as address:
        assert check_pages.page_problems(browser, f"{address}index.html", width=390) == []
