"""One browser for all browser tests.

Without one they are skipped, or fail where LLM_ATLAS_REQUIRE_BROWSER is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import check_pages
import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"


def _absent(what: str, variable: str) -> None:
    if os.environ.get(variable):
        pytest.fail(f"{what}, and {variable} is set")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = check_pages.launch(playwright)
        if browser is None:
            _absent("no Chromium", "LLM_ATLAS_REQUIRE_BROWSER")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site_folder() -> Path:
    return SITE


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The address of the served site."""
    if not (ROOT / "_build" / "site.json").exists():
        _absent("the site is not built", "LLM_ATLAS_REQUIRE_SITE")
    with check_pages.serve(SITE) as address:
        yield address


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "page_name" in metafunc.fixturenames:
        # One name at least: where the site is not built, the `site` fixture says so.
        metafunc.parametrize("page_name", check_pages.pages(SITE) or ["index.html"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
