"""The search in a browser: every concept by whatever it is called, its own place first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from llm_atlas.book.concepts import load_concepts
from llm_atlas.book.site.search import entries

# What the search would show, best first, for many queries in one go.
ASK = """queries => queries.map(query => {
  const found = Search._performSearch(...Search._parseQuery(query)).reverse();
  return found.slice(0, 8).map(([page, title, anchor, context]) => [page + anchor, title, context]);
})"""

ALL = ASK.replace(".slice(0, 8)", "")


def place(id_: str) -> str:
    concept = load_concepts()[id_]
    planned = concept.state == "planned"
    return f"{'chapters/tables' if planned else f'chapters/{concept.chapter}'}#{id_}"


@pytest.fixture(scope="module")
def search_page(browser, site: str) -> Iterator:
    page = browser.new_page()
    page.goto(f"{site}search.html", wait_until="load")
    page.wait_for_function("Search.hasIndex()")
    yield page
    page.close()


def owners() -> dict[str, set[str]]:
    """Every query that an entry answers, and the concepts it may mean."""
    found = defaultdict(set)
    for id_, texts in entries(load_concepts()).items():
        for text in texts:
            found[text].add(id_)
    return found


def test_every_concept_is_first_by_whatever_it_is_called(search_page) -> None:
    wanted = owners()
    assert {id_ for ids in wanted.values() for id_ in ids} == set(load_concepts())
    texts = list(wanted)
    for typed in (texts, [text.upper() for text in texts], [f" {text.title()} " for text in texts]):
        answers = search_page.evaluate(ASK, typed)
        wrong = [
            (query, sorted(wanted[text]), [at for at, *_ in answer[:3]])
            for text, query, answer in zip(texts, typed, answers, strict=True)
            if {at for at, *_ in answer[: len(wanted[text])]} != {place(id_) for id_ in wanted[text]}
        ]
        assert wrong == []


def test_a_name_or_abbreviation_means_one_concept() -> None:
    for text, ids in owners().items():
        if len(ids) > 1:  # only one function that serves several concepts
            for id_ in ids:
                concept = load_concepts()[id_]
                assert text not in {concept.name.lower(), *(alias.lower() for alias in concept.aliases)}
                assert text in {concept.symbol.lower(), concept.symbol.rpartition(".")[2].lower()}


def test_a_planted_fault_is_found(search_page) -> None:
    # without its entries a concept is not the first any more: this is what the test above would see
    answers = search_page.evaluate(
        "query => { const kept = Search._index.indexentries; Search._index.indexentries = {}; "
        f"try {{ return ({ASK})([query]); }} finally {{ Search._index.indexentries = kept; }} }}",
        "ppl",
    )
    assert [at for at, *_ in answers[0][:1]] != [place("perplexity")]


def test_a_result_has_the_name_and_the_chapter(search_page) -> None:
    for id_, concept in load_concepts().items():
        (answer,) = search_page.evaluate(ASK, [concept.name])
        at, title, context = answer[0]
        assert at == place(id_)
        shown = search_page.evaluate(
            "text => { const e = document.createElement('p'); e.innerHTML = text; return e.innerText; }",
            title,
        )
        assert shown == concept.name
        assert f"chapter {concept.number}:" in context
        assert ("planned" in context) == (concept.state == "planned")


def test_the_start_of_a_name_is_enough(search_page) -> None:
    (answer,) = search_page.evaluate(ASK, ["scaled_dot_product"])
    assert answer[0][0] == place("self-attention")
    (answer,) = search_page.evaluate(ASK, ["speculative"])
    assert answer[0][0] == place("speculative-decoding")


def test_a_symbol_has_its_own_entry_too(search_page) -> None:
    dotted = "llm_atlas.nn.attention.scaled_dot_product_attention"
    (answer,) = search_page.evaluate(ASK, [dotted])
    assert answer[0][0] == place("self-attention")
    (answer,) = search_page.evaluate(ASK, ["scaled_dot_product_attention"])
    assert f"chapters/api/parts#{dotted}" in [at for at, *_ in answer[:3]]


def words(text: str) -> str:
    return f" {re.sub(r'[^a-z0-9]+', ' ', text.lower())} "


@pytest.mark.parametrize("typed", ["attention", "norm", "cache", "head", "encoding"])
def test_written_concepts_that_hold_the_word_come_before_planned_ones(search_page, typed: str) -> None:
    (found,) = search_page.evaluate(ALL, [typed])
    concepts = load_concepts()
    at = {place(id_): concept for id_, concept in concepts.items()}
    order = [at[one[0]] for one in found if one[0] in at]
    holding = {id_ for id_, concept in concepts.items() if re.search(f" {typed}s? ", words(concept.name))}
    assert holding <= {concept.id for concept in order}
    exact = owners().get(typed, set())
    rest = [concept for concept in order if concept.id not in exact]
    states = [concept.state == "planned" for concept in rest]
    assert states == sorted(states)
    written = {id_ for id_ in holding - exact if concepts[id_].state != "planned"}
    assert {concept.id for concept in rest[: len(written)]} == written


def test_a_word_of_a_name_leads_to_the_concept_and_the_chapter(search_page) -> None:
    attention, transformer = search_page.evaluate(ALL, ["attention", "transformer"])
    assert place("self-attention") in [at for at, *_ in attention[:2]]
    places = [at for at, *_ in transformer]
    planned = [rank for rank, (*_, context) in enumerate(transformer) if "planned" in (context or "")]
    assert places.index("chapters/01-core-transformer") < min(planned, default=len(places))


@pytest.mark.parametrize("typed", ["DPO", "LoRA", "RoPE", "MoE", "exercise"])
def test_no_python_object_is_found_inside_a_word(search_page, typed: str) -> None:
    (found,) = search_page.evaluate(ALL, [typed])
    objects = [(title, context) for _, title, context in found if (context or "").startswith("Python ")]
    for title, context in objects:
        split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", title)
        assert f" {typed.lower()}" in f"{words(title)}{words(split)}{words(context)}", title


def test_objects_of_the_books_own_code_come_last(search_page) -> None:
    for found in search_page.evaluate(ALL, ["exercise", "claim", "concept", "widget"]):
        own = [title.startswith("llm_atlas.book.") and bool(context) for _, title, context in found]
        assert own == sorted(own)
    (found,) = search_page.evaluate(ALL, ["exercise"])
    assert any(title.startswith("llm_atlas.book.") for _, title, _ in found)
    assert not found[0][1].startswith("llm_atlas.book.")


def test_the_page_shows_that_order(browser, site: str) -> None:
    # a page opened with its query searches as soon as it is ready, perhaps before our own script has heard of that
    page = browser.new_page()
    page.goto(f"{site}search.html?q=head", wait_until="load")
    shown = page.locator("#search-results ul.search li > a")
    shown.nth(3).wait_for()
    (wanted,) = page.evaluate(ASK, ["head"])
    assert [shown.nth(rank).inner_text() for rank in range(4)] == [title for _, title, _ in wanted[:4]]
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("where", ["search.html", "chapters/licences.html"])
def test_the_magnifier_stands_before_the_text(browser, site: str, where: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(f"{site}{where}", wait_until="load")
    if where != "search.html":
        page.keyboard.press("Control+k")
    field = page.locator("form.bd-search:visible").first
    icon = field.locator("svg, i").first.bounding_box()
    text = field.locator("input").evaluate(
        "e => e.getBoundingClientRect().left + parseFloat(getComputedStyle(e).paddingLeft)"
    )
    assert icon["x"] + icon["width"] + 4 <= text
    box, frame = field.locator("input").bounding_box(), field.bounding_box()
    # the field fills its frame: no strip of another colour beside it
    assert abs(box["x"] - frame["x"]) <= 2
    page.close()


@pytest.mark.parametrize(
    ("typed", "id_"), [("self-attention", "self-attention"), ("Top-p", "top-p"), ("pass@k", "humaneval")]
)
@pytest.mark.parametrize("width", [1280, 390])
def test_type_and_go(browser, site: str, typed: str, id_: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(10_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(site) else problems.append(request.url))
    page.goto(f"{site}chapters/licences.html", wait_until="load")
    page.keyboard.press("Control+k")
    page.wait_for_selector("input[name=q]:focus")
    page.keyboard.type(typed)
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "/search.html?q=" in url)
    first = page.locator("#search-results ul.search li a").first
    first.wait_for()
    assert first.inner_text() == load_concepts()[id_].name
    page.wait_for_load_state("networkidle")  # the summaries of other results
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url.endswith(place(id_).replace("#", ".html#")))
    assert page.evaluate("!!document.getElementById(decodeURIComponent(location.hash.slice(1)))")
    assert [line for line in problems if not line.startswith("data:")] == []
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_results_are_accessible(browser, site: str, theme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    page.goto(f"{site}search.html?q=attention", wait_until="networkidle")
    page.wait_for_timeout(500)
    page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
    assert page.locator("#search-results li").count() > 5
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (one["id"], [node["html"] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    page.close()
