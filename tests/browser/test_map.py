"""The concept map in a browser: links, light, filter, path finder, keys, list, themes, print, without script."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import networkx as nx
import pytest

from llm_atlas.book.concepts import load_concepts
from llm_atlas.book.site.concept_map import address, needs_graph, reading_path

pytestmark = pytest.mark.usefixtures("site")
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture
def front(browser, site: str) -> Iterator[Callable]:
    """Opens the front page: in a theme, at a width, at an address, with or without script."""
    contexts, problems = [], []

    def open_(*, theme="light", viewport=LAPTOP, part="", before="", **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        context.add_init_script(
            f"try {{ localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}') }} catch {{}}"
        )
        context.add_init_script(before)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(f"{site}chapters/index.html{part}", wait_until="load")
        if options.get("java_script_enabled", True):
            page.wait_for_selector(".atlas-map[data-ready]", state="attached")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems


def node(page, id_: str):
    return page.locator(f'.atlas-map-drawing .node[data-id="{id_}"]')


def ids(page, selector: str) -> list[str]:
    return page.eval_on_selector_all(selector, "all => all.map(one => one.dataset.id)")


def lit(page, *states: str) -> set[str]:
    return set(ids(page, ".atlas-map-drawing .node." + ".".join(states)))


def said(page) -> str:
    return page.locator(".atlas-map-status").inner_text()


def on_path(page) -> list[str]:
    return ids(page, ".atlas-map-path ol li")


# ---- links


@pytest.mark.parametrize("state", ["done", "planned"])
def test_a_click_lands_on_the_section_or_the_row(front, state: str) -> None:
    concept = next((c for c in list(load_concepts().values())[::-1] if c.state == state), None)
    if concept is None:
        pytest.skip(f"no concept is {state}")
    page = front()
    node(page, concept.id).click()
    page.wait_for_url(f"**/{address(concept)}")
    assert page.evaluate("location.hash") == f"#{concept.id}"
    page.wait_for_function(
        """id => {
            const {top, bottom} = document.getElementById(id).getBoundingClientRect();
            return bottom > 0 && top < innerHeight;
        }""",
        arg=concept.id,
    )
    place = page.locator(f'[id="{concept.id}"]')
    assert (
        concept.name.split()[0].casefold()
        in place.locator("xpath=ancestor-or-self::*[3]").inner_text().casefold()
    )


def test_every_link_of_drawing_and_list_arrives(front, site: str) -> None:
    page = front()
    links = page.eval_on_selector_all(".atlas-map a", "all => all.map(one => one.getAttribute('href'))")
    assert len(links) == 2 * (147 + 22)
    found: dict[str, set[str]] = {}
    for link in links:
        file, _, anchor = link.partition("#")
        if file not in found:
            answer = page.request.get(f"{site}chapters/{file}")
            assert answer.ok, file
            found[file] = set(re.findall(r'\bid="([^"]+)"', answer.text()))
        assert not anchor or anchor in found[file], link


# ---- drawing


@pytest.mark.parametrize("width", [1280, 1440])
def test_labels_fit_their_boxes_and_are_large_enough(front, width: int) -> None:
    page = front(viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate("""() => [...document.querySelectorAll('.atlas-map-drawing a')].map(link => {
        const box = r => [r.left, r.top, r.right, r.bottom];
        const text = link.querySelector('.name, .heading');
        const scale = text.getCTM().a;
        const mark = link.querySelector('.mark, .number');
        const panel = link.closest('.panel').querySelector('.ground');
        return {name: link.getAttribute('aria-label'), size: parseFloat(getComputedStyle(text).fontSize) * scale,
            rect: box(link.querySelector('rect').getBoundingClientRect()), text: box(text.getBoundingClientRect()),
            mark: box(mark.getBoundingClientRect()), panel: box(panel.getBoundingClientRect())};
    })""")
    assert len(boxes) == 147 + 22
    for box in boxes:
        (left, top, right, bottom), text, mark, panel = box["rect"], box["text"], box["mark"], box["panel"]
        assert text[0] >= mark[2] + 1, box
        assert text[2] <= right - 1, box
        assert text[1] >= top - 1, box
        assert text[3] <= bottom + 1, box
        assert panel[0] <= left, box
        assert panel[2] >= right, box
        assert box["size"] >= 12, box
    for one in boxes:
        for other in boxes:
            (a, b, c, d), (e, f, g, h) = one["text"], other["text"]
            assert one is other or not (a < g - 1 and e < c - 1 and b < h - 1 and f < d - 1), (one, other)


def test_the_drawing_keeps_its_room_while_it_loads(front) -> None:
    page = front(
        before="""window.shifts = 0; new PerformanceObserver(list => {
            for (const e of list.getEntries()) if (!e.hadRecentInput) window.shifts += e.value;
        }).observe({type: 'layout-shift', buffered: true});"""
    )
    page.wait_for_timeout(500)
    assert page.evaluate("window.shifts") < 0.01
    assert page.locator(".atlas-map-drawing").get_attribute("viewBox")


@pytest.mark.parametrize("id_", ["dpo", "decoder-only", "self-attention"])
@pytest.mark.parametrize("way", ["hover", "focus"])
def test_pointing_lights_what_it_rests_on_and_what_builds_on_it(front, id_: str, way: str) -> None:
    page = front()
    getattr(node(page, id_), way)()
    concepts, graph = load_concepts(), needs_graph(load_concepts())
    before, after = nx.ancestors(graph, id_), nx.descendants(graph, id_)
    assert lit(page, "self") == {id_}
    assert lit(page, "before") == before
    assert lit(page, "after") == after
    assert lit(page, "before", "direct") == set(concepts[id_].needs)
    assert lit(page, "after", "direct") == set(graph.successors(id_))
    assert lit(page, "ahead") == set(concepts[id_].previews) - after
    text = said(page)
    rests = f"rests on {len(before)} concept" if before else "rests on no other concept"
    assert text.startswith(f"{concepts[id_].name}: {rests}")
    assert f"{len(after)} build" in text
    assert all(concepts[need].name in text for need in (*concepts[id_].needs, *concepts[id_].previews))
    edges = page.eval_on_selector_all(
        ".edges path.before, .edges path.after", "all => all.map(e => [e.dataset.from, e.dataset.to])"
    )
    related = before | after | {id_}
    wanted = {
        (a, b)
        for a, b in graph.subgraph(related).edges
        if {a, b} <= before | {id_} or {a, b} <= after | {id_}
    }
    assert {tuple(edge) for edge in edges} >= wanted
    assert all(b in before | {id_} or a in after | {id_} for a, b in edges)


def test_the_looks_differ_and_go_when_the_pointer_leaves(front) -> None:
    page = front(reduced_motion="reduce")
    node(page, "dpo").hover()

    def look(id_: str) -> list[str]:
        return page.evaluate(
            """id => { const node = document.querySelector(`.node[data-id="${id}"]`);
            const s = getComputedStyle(node.querySelector('rect'));
            return [s.fill, s.stroke, s.strokeWidth, s.strokeDasharray, getComputedStyle(node).opacity]; }""",
            id_,
        )

    looks = [look(i) for i in ("dpo", "rlhf-ppo", "causal-lm", "kto", "reward-model", "bleu")]
    assert len({tuple(one) for one in looks}) == 6
    assert [one[-1] for one in looks] == ["1"] * 5 + ["0.3"]
    page.mouse.move(5, 5)
    assert not lit(page, "self")
    assert not page.locator(".atlas-map-drawing.lit").count()


def test_the_drawing_stands_still_while_texts_of_any_length_are_said(front) -> None:
    page = front()
    top = "document.querySelector('.atlas-map-drawing').getBoundingClientRect().top + scrollY"
    tops = set()
    for id_ in ("self-attention", "dpo", "decoder-only"):  # one, two and three lines
        node(page, id_).focus()
        tops.add(round(page.evaluate(top), 1))
    assert len(tops) == 1


def test_what_is_said_stays_in_view_at_the_foot_of_the_drawing(front) -> None:
    page = front()
    node(page, "linear-attention").scroll_into_view_if_needed()
    node(page, "linear-attention").hover()
    box = page.locator(".atlas-map-status").bounding_box()
    assert 0 <= box["y"] < 850
    covering = page.evaluate(
        "([x, y]) => document.elementFromPoint(x, y).className", [box["x"] + 20, box["y"] + box["height"] / 2]
    )
    assert covering == "atlas-map-status"


# ---- filter


@pytest.mark.parametrize(
    ("typed", "first", "others"),
    [
        ("dpo", "dpo", set()),
        ("MQA", "mqa", set()),  # a name's abbreviation
        ("sdpa", "self-attention", set()),  # an alias
        ("MultiHeadAttention", "multi-head-attention", {"cross-attention"}),  # a symbol
        ("merging", "slerp", {"ties", "dare", "model-soup"}),  # a chapter
        ("chapter 7", "rlhf-ppo", {"dpo", "reward-model"}),
        ("key value cache", "kv-cache", set()),  # words in any order
    ],
)
def test_the_filter_finds_names_aliases_symbols_and_chapters(
    front, typed: str, first: str, others: set[str]
) -> None:
    page = front()
    page.get_by_label("Find a concept").fill(typed)
    found = lit(page, "match")
    assert {first} | others <= found
    assert len(found) < 30
    number = len(found)
    assert said(page).startswith(f"{number} concept{'s match' if number > 1 else ' matches'}.")
    assert said(page).endswith(f"Enter opens {load_concepts()[first].name}.") or others
    entries = ids(page, ".atlas-map-list li:not([hidden])")
    assert set(entries) == found


def test_enter_opens_the_best_match_and_escape_clears(front) -> None:
    page = front()
    box = page.get_by_label("Find a concept")
    box.fill("zzz")
    assert said(page).startswith("No concept matches.")
    assert not lit(page, "match")
    box.press("Enter")
    assert page.url.endswith("index.html")
    box.press("Escape")
    assert box.input_value() == ""
    assert not page.locator(".atlas-map-drawing.lit").count()
    box.fill("PE")  # also the beginning of other words: the abbreviation comes first
    box.press("Enter")
    page.wait_for_url(f"**/{address(load_concepts()['positional-encoding'])}")


# ---- path


def test_the_path_is_the_order_of_the_book(front) -> None:
    page = front()
    page.get_by_label("Find the path to").select_option("dpo")
    path = reading_path("dpo", load_concepts())
    assert on_path(page) == path
    numbers = page.locator(".atlas-map-path ol b").all_inner_texts()
    assert numbers == [str(n) for n in range(1, len(path) + 1)]
    head = page.locator(".atlas-map-path-head p").inner_text()
    written = sum(load_concepts()[id_].state != "planned" for id_ in path)
    assert head == f"DPO: {len(path)} concepts to read in this order, {written} written"
    rows = page.locator(".atlas-map-path ol li")
    for place, id_ in enumerate(path):
        concept = load_concepts()[id_]
        assert rows.nth(place).locator("a").get_attribute("href") == address(concept)
        assert f"chapter {concept.number}, " in rows.nth(place).inner_text()
        assert ("planned" in rows.nth(place).inner_text()) == (concept.state == "planned")
    assert lit(page, "onpath") == set(path)
    assert [node(page, id_).locator(".step").text_content() for id_ in path] == numbers
    assert page.evaluate("location.hash") == "#path=dpo"


def test_an_address_with_a_path_opens_it_and_the_back_button_returns(front) -> None:
    page = front(part="#path=agentic-rl")
    assert on_path(page) == reading_path("agentic-rl", load_concepts())
    assert page.get_by_label("Find the path to").input_value() == "agentic-rl"
    page.wait_for_function(
        "document.querySelector('.atlas-map').getBoundingClientRect().top < innerHeight / 2"
    )
    page.get_by_label("Find the path to").select_option("rope")
    assert on_path(page) == reading_path("rope", load_concepts())
    page.go_back()
    page.wait_for_function("document.querySelectorAll('.atlas-map-path ol li').length > 20")
    assert on_path(page)[-1] == "agentic-rl"
    page.get_by_role("button", name="Clear the path").click()
    assert not page.locator(".atlas-map-path").is_visible()
    assert page.evaluate("location.hash") == ""
    assert page.evaluate("document.activeElement.id") == "atlas-map-target"


@pytest.mark.parametrize("part", ["#path=nothing", "#path=%", "#path=", "#the-map"])
def test_an_unknown_path_is_none(front, part: str) -> None:
    page = front(part=part)
    assert not page.locator(".atlas-map-path").is_visible()
    name = part.removeprefix("#path=") if "path=" in part else ""
    assert (f"No concept is called '{name}'." in said(page)) == bool(name)


def test_an_unknown_path_is_named_as_text_until_another_is_chosen(front) -> None:
    page = front(part="#path=<img src=x>")
    assert said(page) == "No concept is called '<img src=x>'."
    assert not page.locator(".atlas-map-status img").count()
    page.get_by_label("Find the path to").select_option("dpo")
    assert said(page).startswith("The path to DPO has ")
    page.go_back()
    page.wait_for_function("document.querySelector('.atlas-map-path').hidden")
    assert said(page) == "No concept is called '<img src=x>'."


@pytest.mark.parametrize(
    ("part", "id_"), [("DPO", "dpo"), ("kv cache", "kv-cache"), ("SDPA", "self-attention")]
)
def test_an_address_may_call_a_concept_by_any_of_its_names(front, part: str, id_: str) -> None:
    page = front(part=f"#path={part}")
    assert on_path(page) == reading_path(id_, load_concepts())


def test_all_that_is_known_can_be_unticked_and_all_that_is_left_out_is_counted(front) -> None:
    known = ("self-attention", "rlhf-ppo")  # the second needs the first
    page = front(
        part="#path=dpo",
        before=f"localStorage.setItem('llm-atlas-known', '{json.dumps(known)}')",
    )
    concepts = load_concepts()
    path = reading_path("dpo", concepts, known)
    assert on_path(page) == path
    assert set(known) <= nx.ancestors(needs_graph(concepts), "dpo")
    assert ids(page, ".atlas-map-path ul input") == [id_ for id_ in concepts if id_ in known]
    below = len(reading_path("dpo", concepts)) - len(path) - len(known)
    assert below > 0
    assert said(page).endswith(f"; left out: 2 that you know, and {below} that only they need.")
    # its row is gone: the focus goes elsewhere in the panel
    page.get_by_label("I know Self-attention").click()
    assert page.evaluate("document.activeElement.closest('.atlas-map-path') !== null")
    assert ids(page, ".atlas-map-path ul input") == ["rlhf-ppo"]
    assert f"1 that you know, and {below + 1} that only it needs" in said(page)
    assert f"and {below + 1} that only it needs" in page.locator(".atlas-map-path ul").inner_text()


def test_what_is_known_leaves_the_path_and_stays_known(front) -> None:
    page = front(part="#path=agentic-rl")
    page.get_by_label("I know Causal language modelling").check()
    path = reading_path("agentic-rl", load_concepts(), {"causal-lm"})
    assert on_path(page) == path
    # the shorter path has moved the map below the pointer
    page.mouse.move(2, 2)
    assert lit(page, "onpath") == set(path)
    # its tick has moved below the path, and the focus with it
    assert page.evaluate("document.activeElement.dataset.id") == "causal-lm"
    assert page.evaluate("document.activeElement.checked")
    page.reload()
    page.wait_for_selector(".atlas-map[data-ready]", state="attached")
    assert on_path(page) == path
    page.get_by_label("I know Causal language modelling").uncheck()
    assert on_path(page) == reading_path("agentic-rl", load_concepts())
    assert json.loads(page.evaluate("localStorage.getItem('llm-atlas-known')")) == []


@pytest.mark.parametrize(
    "before",
    [
        "for (const f of ['getItem', 'setItem']) { const real = Storage.prototype[f]; Storage.prototype[f] ="
        " function (key, ...rest) { if (key === 'llm-atlas-known') throw new DOMException('no', 'SecurityError');"
        " return real.call(this, key, ...rest) } }",
        "localStorage.setItem('llm-atlas-known', '{broken')",
        "localStorage.setItem('llm-atlas-known', '{}')",
        "localStorage.setItem('llm-atlas-known', '[\"gone\", 3, null]')",
    ],
)
def test_without_storage_or_with_rubbish_in_it_ticks_work(front, before: str) -> None:
    page = front(part="#path=dpo", before=before)
    assert on_path(page) == reading_path("dpo", load_concepts())
    page.get_by_label("I know Causal language modelling").check()
    assert on_path(page) == reading_path("dpo", load_concepts(), {"causal-lm"})


# ---- keys


def test_the_map_is_one_stop_and_arrows_go_between_neighbours(front) -> None:
    page = front()
    assert page.locator('.atlas-map-drawing a[tabindex="0"]').count() == 1
    page.get_by_role("button", name="List", exact=True).focus()
    page.keyboard.press("Tab")

    def here() -> str:
        return page.evaluate(
            "document.activeElement.dataset.id || document.activeElement.getAttribute('aria-label')"
        )

    assert here() == "self-attention"
    steps = (
        ("ArrowDown", "multi-head-attention"),
        ("ArrowUp", "self-attention"),
        ("ArrowUp", "Chapter 1: Core Transformer Architecture"),
        ("ArrowUp", "Chapter 1: Core Transformer Architecture"),
        ("ArrowLeft", "Chapter 1: Core Transformer Architecture"),
        ("ArrowRight", "Chapter 4: Tokenization Algorithms"),
        ("End", "data-augmentation"),
        ("ArrowRight", "model-soup"),
        ("Home", "Chapter 6: Fine-Tuning Techniques"),
    )
    for key, place in steps:
        page.keyboard.press(key)
        assert here() == place, key
        top, bottom = page.evaluate(
            "(({top, bottom}) => [top, bottom])(document.activeElement.getBoundingClientRect())"
        )
        bar = page.evaluate("document.querySelector('.atlas-map-bar').getBoundingClientRect().bottom")
        assert bar <= top, key
        assert bottom <= 900, key
    assert page.locator('.atlas-map-drawing a[tabindex="0"]').count() == 1
    page.keyboard.press("ArrowDown")
    assert lit(page, "self") == {"full-fine-tuning"}
    outline = "getComputedStyle(document.activeElement.querySelector('rect'))"
    assert page.evaluate(f"{outline}.outlineStyle") == "solid"
    assert page.evaluate(f"parseFloat({outline}.outlineWidth)") >= 2
    page.keyboard.press("Escape")
    assert not lit(page, "self")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{address(load_concepts()['full-fine-tuning'])}")


def test_every_stop_is_reached_by_arrows(front) -> None:
    page = front()
    seen = page.evaluate("""() => {
        const press = key => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        const seen = new Set();
        document.querySelector('.node').focus();
        for (let i = 0; i < 5; i++) press('ArrowLeft');
        for (let column = 0; column < 5; column++) {
            if (column) press('ArrowRight');
            press('Home');
            for (let i = 0; i < 60; i++) {
                seen.add(document.activeElement.getAttribute('aria-label'));
                press('ArrowDown');
            }
        }
        return [...seen];
    }""")
    assert len(seen) == 147 + 22


# ---- list


def test_a_phone_has_the_list_and_not_the_drawing(front) -> None:
    page = front(viewport=PHONE)
    assert not page.locator(".atlas-map-drawing").is_visible()
    assert not page.locator(".atlas-map-views").is_visible()
    assert page.locator(".atlas-map-list details").count() == 22
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("details[data-chapter='7'] summary").click()
    link = page.locator(".atlas-map-list").get_by_role("link", name="DPO", exact=True)
    assert link.is_visible()
    page.get_by_label("Find a concept").fill("rope")
    shown = set(ids(page, ".atlas-map-list li:not([hidden])"))
    assert {"rope", "ntk-rope"} <= shown
    assert "dpo" not in shown
    assert page.locator(".atlas-map-list li:not([hidden]) a").first.is_visible()
    assert not page.locator("details[data-chapter='7']").is_visible()
    page.get_by_label("Find a concept").press("Escape")
    assert link.is_visible()  # what was unfolded is so again
    assert not page.locator("details[data-chapter='2'] li").first.is_visible()
    page.get_by_label("Find the path to").select_option("dpo")
    assert on_path(page) == reading_path("dpo", load_concepts())
    assert set(ids(page, ".atlas-map-list li.onpath")) == set(on_path(page))
    marked = page.locator(".atlas-map-list li.onpath")
    assert all(marked.nth(place).is_visible() for place in range(marked.count()))
    assert not page.locator("details[data-chapter='22'] li").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    link.click()
    page.wait_for_url(f"**/{address(load_concepts()['dpo'])}")


def test_a_laptop_has_one_of_the_two_at_a_time(front) -> None:
    page = front()
    for name, drawing in (("Map", True), ("List", False), ("Map", True)):
        button = page.get_by_role("button", name=name, exact=True)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator(".atlas-map-drawing").is_visible() == drawing
        assert page.locator(".atlas-map-list").is_visible() != drawing


@pytest.mark.parametrize("name", ["Map", "List"])
def test_the_status_line_lies_inside_the_map(front, name: str) -> None:
    page = front()
    page.get_by_role("button", name=name, exact=True).click()
    page.get_by_label("Find a concept").fill("attention")
    line, whole = page.locator(".atlas-map-status").bounding_box(), page.locator(".atlas-map").bounding_box()
    for start, size in (("x", "width"), ("y", "height")):
        assert line[start] >= whole[start]
        assert line[start] + line[size] <= whole[start] + whole[size]
    below = page.locator(".atlas-map-drawing" if name == "Map" else ".atlas-map-list").bounding_box()
    assert line["y"] + line["height"] <= below["y"]


# ---- themes, print, script, access


def colors(page, selector: str, part: str) -> list[tuple[float, ...]]:
    """The distinct colours of a property, over what lies below."""
    values = page.eval_on_selector_all(selector, f"all => all.map(one => getComputedStyle(one).{part})")
    return sorted(
        {tuple(float(n) for n in re.findall(r"[\d.]+", value)[:3]) for value in values if "none" not in value}
    )


def luminance(rgb: tuple[float, ...], scale: float) -> float:
    linear = [
        c / scale / 12.92 if c / scale <= 0.04045 else ((c / scale + 0.055) / 1.055) ** 2.4 for c in rgb
    ]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    # color-mix is reported as color(srgb 0..1), all else as rgb(0..255)
    low, high = sorted(luminance(c, 255 if max(c) > 1 else 1) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_names_are_legible_in_every_state(front, theme: str) -> None:
    page = front(theme=theme, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.dataset.theme") == theme

    def check(state: str) -> None:
        for ink in colors(page, f".atlas-map-drawing .node{state} .name", "fill"):
            for ground in colors(page, f".atlas-map-drawing .node{state} rect", "fill"):
                assert contrast(ink, ground) >= 4.5, (state, ink, ground)

    check("")
    check(".done")
    node(page, "dpo").focus()
    for state in (".self", ".before.direct", ".before:not(.direct)", ".after", ".ahead"):
        assert page.locator(f".atlas-map-drawing .node{state}").count()
        check(state)
    for number in colors(page, ".atlas-map-drawing .number", "fill"):
        (ground,) = colors(page, "body", "backgroundColor")
        assert contrast(number, ground) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("part", ["", "#path=dpo"], ids=["map", "path"])
def test_axe_finds_nothing_in_the_map(front, theme: str, viewport: dict, part: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = front(theme=theme, viewport=viewport, part=part, reduced_motion="reduce")
    # without preload: axe looks for the sheets that the theme's import in the wrong folder, and fails to load one
    found = Axe().run(page, context=".atlas-map", options={"preload": False})
    assert found.violations_count == 0, found.generate_report()


def test_names_and_states_reach_the_accessibility_tree(front) -> None:
    page = front()
    assert page.get_by_role("link", name="DPO, planned, table 7", exact=True).count() == 1
    assert page.get_by_role("group", name="Concept map", exact=True).count() == 1
    assert page.get_by_role("group", name="Chapter 22", exact=True).count() == 1
    # the list is not read a second time
    assert page.get_by_role("link", name="DPO", exact=True).count() == 0


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_without_script_links_work_and_controls_are_not_shown(front, viewport: dict) -> None:
    page = front(java_script_enabled=False, viewport=viewport)
    assert not page.locator(".atlas-map-controls").is_visible()
    concept = load_concepts()["dpo"]
    if viewport is PHONE:
        page.locator("details[data-chapter='7'] summary").click()
        page.locator(".atlas-map-list li[data-id=dpo] a").click()
    else:
        assert page.locator('.atlas-map-drawing a[tabindex="-1"]').count() == 0
        node(page, "dpo").click()
    page.wait_for_url(f"**/{address(concept)}")


def test_print_shows_the_drawing_on_white_without_controls(front) -> None:
    page = front(theme="dark")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 with the browser's margins
    assert page.locator(".atlas-map-drawing").is_visible()
    for hidden in (".atlas-map-controls", ".atlas-map-list", ".atlas-map-status"):
        assert not page.locator(hidden).is_visible()
    (ink,) = colors(page, ".atlas-map-drawing .node.planned .name", "fill")
    assert contrast(ink, (255, 255, 255)) > 10
    assert page.locator(".atlas-map-drawing").bounding_box()["height"] < 1000  # one sheet


@pytest.mark.parametrize(("motion", "seconds"), [("reduce", {"0s"}), ("no-preference", {"0.12s"})])
def test_nothing_moves_for_who_asks_for_it(front, motion: str, seconds: set[str]) -> None:
    page = front(reduced_motion=motion)
    times = page.eval_on_selector_all(
        ".atlas-map-drawing .node", "all => all.map(one => getComputedStyle(one).transitionDuration)"
    )
    assert set(times) == seconds


def test_the_page_is_light(front, site: str) -> None:
    page = front()
    assert len(page.request.get(f"{site}chapters/index.html").body()) < 250_000
