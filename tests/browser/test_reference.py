"""The reference pages in a browser: tables, claims, glossary, and what a chapter opens with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from docutils.nodes import make_id

from llm_atlas.book.claims import load_claims
from llm_atlas.book.concepts import load_concepts
from llm_atlas.book.site.claims import measurements

CHAPTER = "chapters/01-core-transformer.html"
SHOWN = "table.atlas-claims tbody tr:not([hidden])"


@pytest.fixture
def opened(browser, site: str) -> Iterator[Callable]:
    contexts = []

    def open_(name: str, *, width: int = 1280, theme: str = "light", script: bool = True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.goto(f"{site}chapters/{name}")
        return page

    yield open_
    for context in contexts:
        context.close()


def _outcomes() -> list[str]:
    measured = measurements()
    return [measured[id_].outcome if id_ in measured else "planned" for id_ in load_claims()]


def _in_view(page, target: str) -> bool:
    page.wait_for_function(
        """id => { const box = document.getElementById(id).getBoundingClientRect();
                   return box.top >= 0 && box.top < innerHeight }""",
        arg=target,
    )
    return True


# ---- claims


def test_claims_are_filtered_by_verdict_chapter_and_words(opened) -> None:
    page = opened("claims.html")
    outcomes = _outcomes()
    status = page.locator("[aria-live=polite]")
    assert page.locator(SHOWN).count() == len(outcomes)
    assert status.inner_text() == f"{len(outcomes)} of {len(outcomes)} claims shown"
    for outcome in ("held", "partly", "not here", "planned"):
        page.get_by_label("Verdict").select_option(outcome)
        assert page.locator(SHOWN).count() == outcomes.count(outcome) > 0
        assert set(page.locator(f"{SHOWN} .atlas-verdict").all_inner_texts()) == {outcome}
        assert status.inner_text() == f"{outcomes.count(outcome)} of {len(outcomes)} claims shown"
    page.get_by_label("Verdict").select_option("planned")
    page.get_by_label("Chapter").select_option("1")
    assert page.locator(SHOWN).count() == 0
    assert "No claim fits" in status.inner_text()
    page.get_by_role("button", name="Show all").click()
    assert page.locator(SHOWN).count() == len(outcomes)
    page.get_by_label("Words").fill("feed-forward WIDTH")
    assert "about 4×" in page.locator(SHOWN).first.inner_text()
    assert page.locator(SHOWN).count() < 5


def test_claims_are_sorted_by_each_column(opened) -> None:
    page = opened("claims.html")
    first = page.locator(f"{SHOWN} td:first-child").all_inner_texts()
    for column, name in ((2, "Claim"), (3, "What the source says"), (4, "Measured here")):
        button = page.locator("th").get_by_role("button", name=name)
        header = page.locator("th").nth(column - 1)
        button.click()
        assert header.get_attribute("aria-sort") == "ascending"
        assert page.locator("th[aria-sort]").count() == 1
        cells = page.locator(f"{SHOWN} td:nth-child({column})").all_inner_texts()
        if column == 4:
            order = ["held", "partly", "not here", "planned"]
            keys = [order.index(text.split("\n")[0].strip()) for text in cells]
            assert keys == sorted(keys)
        else:
            # as the browser's own comparison has it, without quotation marks and brackets
            assert page.evaluate(
                "texts => texts.map(t => t.replace(/^\\W+/, '').replace(/\\s+/g, ' ').toLowerCase())"
                ".every((t, i, all) => !i || all[i - 1].slice(0, 12).localeCompare(t.slice(0, 12)) <= 0)",
                cells,
            )
        button.click()
        assert header.get_attribute("aria-sort") == "descending"
        turned = page.locator(f"{SHOWN} td:nth-child({column})").all_inner_texts()
        assert turned[0] != cells[0]
        assert sorted(turned) == sorted(cells)
    page.get_by_role("button", name="Show all").click()
    assert page.locator(f"{SHOWN} td:first-child").all_inner_texts() == first


def test_a_view_of_the_claims_is_in_the_address(opened, site: str) -> None:
    page = opened("claims.html?verdict=not+here&chapter=1&sort=claim&order=descending")
    assert page.locator(SHOWN).count() == 3
    assert page.get_by_label("Verdict").input_value() == "not here"
    assert page.get_by_label("Chapter").input_value() == "1"
    assert page.locator("th[aria-sort=descending]").inner_text() == "Claim"
    page.get_by_label("Verdict").select_option("partly")
    assert page.url == f"{site}chapters/claims.html?verdict=partly&chapter=1&sort=claim&order=descending"
    page.reload()
    assert page.locator(SHOWN).count() == 3
    page.get_by_role("button", name="Show all").click()
    assert page.url == f"{site}chapters/claims.html"
    # what no one offers shows everything
    page.goto(f"{site}chapters/claims.html?verdict=sideways&chapter=99&sort=size")
    assert page.locator(SHOWN).count() == len(load_claims())


def test_a_link_to_a_claim_shows_it_even_if_the_filter_hides_it(opened) -> None:
    page = opened("claims.html?verdict=planned#ledger-ffn-4x")
    assert page.locator(SHOWN).count() == len(load_claims())
    assert _in_view(page, "ledger-ffn-4x")


def test_every_measured_claim_leads_to_the_cell_that_measures_it(opened, site: str) -> None:
    page = opened("claims.html")
    links = page.get_by_role("link", name="See the cell")
    addresses = [link.get_attribute("href") for link in links.all()]
    assert addresses == [
        f"{load_claims()[id_].chapter}.html#{make_id(f'claim-{id_}')}" for id_ in measurements()
    ]
    links.nth(list(measurements()).index("ffn-4x")).click()
    page.wait_for_url(f"{site}{CHAPTER}#claim-ffn-4x")
    assert _in_view(page, "claim-ffn-4x")
    for address in filter(lambda address: address.startswith(CHAPTER.rpartition("/")[2]), addresses):
        name = address.partition("#claim-")[2]
        cell = page.locator(f'.cell[id="claim-{name}"], .cell:has(> [id="claim-{name}"])')
        assert cell.count() == 1
        assert f'"{name}"' in cell.locator(".cell_input").inner_text()
        assert f"{name}: {measurements()[name].outcome}" in cell.locator(".cell_output").inner_text()


def test_the_claims_work_by_keyboard(opened) -> None:
    page = opened("claims.html")
    page.get_by_label("Words").focus()
    page.keyboard.type("recurrence")
    page.keyboard.press("Enter")  # no form is sent
    assert "q=recurrence" in page.url
    page.keyboard.press("Tab")
    page.keyboard.type("he")
    assert page.get_by_label("Verdict").input_value() == "held"
    assert page.locator(SHOWN).count() == 1
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(SHOWN).count() == len(load_claims())
    page.locator("th button").nth(3).focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Space")
    assert page.locator("th").nth(3).get_attribute("aria-sort") == "ascending"


def test_the_claims_are_complete_without_script(opened) -> None:
    page = opened("claims.html", script=False)
    assert page.locator(SHOWN).count() == len(load_claims())
    assert page.locator("form.atlas-claims-controls").count() == 0
    assert page.locator("th").all_inner_texts()[0] == "Concept"


# ---- all three


@pytest.mark.parametrize(("name", "row"), [("claims", "ledger-ffn-4x"), ("tables", "table-gqa")])
def test_on_a_phone_a_row_is_a_card(opened, name: str, row: str) -> None:
    boxes = """id => [...document.getElementById(id).closest('tr').cells].map(cell => {
        const box = cell.getBoundingClientRect(); return [box.left, box.width] })"""
    wide = opened(f"{name}.html").evaluate(boxes, row)
    assert len({left for left, _ in wide}) == len(wide)
    page = opened(f"{name}.html", width=390)
    narrow = page.evaluate(boxes, row)
    assert len({left for left, _ in narrow}) == 1
    assert all(width > 300 for _, width in narrow)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_row_of_the_tables_is_found_by_its_address(opened) -> None:
    page = opened("tables.html#table-gqa")
    assert _in_view(page, "table-gqa")
    colour = "row => getComputedStyle(row).outlineStyle"
    assert page.locator("tr:has(#table-gqa)").evaluate(colour) == "solid"
    assert page.locator("tr:has(#table-mla)").evaluate(colour) == "none"


def test_the_tables_link_what_is_written(opened, site: str) -> None:
    page = opened("tables.html")
    row = page.locator("tr:has(#table-self-attention)")
    assert row.get_by_role("link", name="section").get_attribute("href").endswith("#self-attention")
    row.get_by_role("link", name="exercise").click()
    page.wait_for_url(f"{site}{CHAPTER}#ex-self-attention")
    assert _in_view(page, "ex-self-attention")


def test_the_glossary_leads_to_letters_terms_and_sections(opened, site: str) -> None:
    page = opened("glossary.html")
    page.locator(".atlas-letters").get_by_role("link", name="S", exact=True).click()
    page.wait_for_url("**#glossary-s")
    terms = page.locator("dl.glossary dt")
    names = {name.lower() for c in load_concepts().values() for name in (c.name, *c.aliases)}
    shown = {text.removesuffix("#").strip().lower() for text in terms.all_inner_texts()}
    # the page sets typographic quotation marks
    assert {name.replace("'", "’") for name in names} <= shown
    page.locator("dt:has-text('SDPA') + dd a").first.click()
    page.wait_for_url("**#term-Self-attention-scaled-dot-product")
    page.locator("dt[id='term-Self-attention-scaled-dot-product'] + dd").get_by_role(
        "link", name="section"
    ).click()
    page.wait_for_url(f"{site}{CHAPTER}#self-attention")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_chapter_opens_with_its_table(opened, width: int) -> None:
    page = opened("01-core-transformer.html", width=width)
    table = page.locator("table.atlas-opener")
    assert table.locator("tbody tr").count() == 9
    # before the first cell of code
    assert page.evaluate(
        "() => !!(document.querySelector('table.atlas-opener')"
        ".compareDocumentPosition(document.querySelector('.cell')) & Node.DOCUMENT_POSITION_FOLLOWING)"
    )
    assert "9 concepts" in page.locator(".atlas-facts").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    table.get_by_role("link", name="QK-Norm").click()
    page.wait_for_url("**#qk-norm")
