"""The concept map: every concept once, every edge and link, nothing over anything else, paths in order."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from itertools import combinations

import pytest

from llm_atlas.book.concepts import Chapter, Concept, chapters, load_concepts
from llm_atlas.book.site.concept_map import (
    PARTS,
    WIDTH,
    Box,
    address,
    draw,
    map_markdown,
    markdown,
    reading_path,
)


class Reader(html.parser.HTMLParser):
    """The elements of the map with their attributes, and the text in them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[dict[str, str]] = []
        self._open: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {name: value or "" for name, value in attrs} | {"tag": tag, "text": ""}
        self.elements.append(element)
        if tag not in ("input", "br"):
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()["tag"] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data


def read(text: str) -> list[dict[str, str]]:
    reader = Reader()
    reader.feed(text.partition("html\n")[2].rpartition("``````")[0])
    assert not reader._open, "an element is left open"
    return reader.elements


def book(**state: str) -> tuple[tuple[Chapter, ...], dict[str, Concept]]:
    """The book's concepts with some states changed."""
    concepts = load_concepts()
    for id_, value in state.items():
        id_ = id_.replace("_", "-")
        missing = "the rest, chapter 9" if value == "partial" else ""
        concepts[id_] = dataclasses.replace(concepts[id_], state=value, missing=missing)
    return chapters(), concepts


def test_every_concept_stands_once_on_the_map_and_once_in_the_list() -> None:
    elements = read(markdown())
    on_map = [e["data-id"] for e in elements if e["tag"] == "a" and "node" in e.get("class", "").split()]
    in_list = [e["data-id"] for e in elements if e["tag"] == "li" and "data-id" in e]
    assert sorted(on_map) == sorted(in_list) == sorted(load_concepts())
    assert len([e for e in elements if e["tag"] == "details"]) == len(chapters()) == 22


def test_a_planned_concept_leads_to_its_row_and_a_written_one_to_its_section() -> None:
    order, concepts = book(dpo="planned", self_attention="done", kv_cache="partial")
    elements = read(map_markdown(order, concepts))
    for id_, wanted, name in (
        ("dpo", "tables.html#dpo", "DPO, planned, table 7"),
        ("self-attention", "01-core-transformer.html#self-attention", None),
        ("kv-cache", "08-inference.html#kv-cache", "KV cache, partly written, chapter 8"),
    ):
        (node,) = [e for e in elements if e["tag"] == "a" and e.get("data-id") == id_]
        assert node["href"] == wanted == address(concepts[id_])
        assert name is None or node["aria-label"] == name
    titles = {e["aria-label"]: e["href"] for e in elements if e.get("class") == "title"}
    assert titles["Chapter 1: Core Transformer Architecture"] == "01-core-transformer.html"
    assert titles["Chapter 7: Alignment and RLHF"] == "tables.html#table-7"
    assert titles["Chapter 8: Inference Optimization Techniques"] == "08-inference.html"
    assert len(titles) == 22


def test_a_state_has_a_sign_and_partly_is_in_the_legend_only_where_it_occurs() -> None:
    order, concepts = book(kv_cache="partial")
    partly = [concept for concept in concepts.values() if concept.state == "partial"]
    assert "kv-cache" in {concept.id for concept in partly}
    assert map_markdown(order, concepts).count('class="half"') == len(partly) + 1  # their nodes, the legend
    order, concepts = book(**{c: "done" for c in load_concepts() if load_concepts()[c].state == "partial"})
    assert "partly written" not in map_markdown(order, concepts)


def test_the_edges_are_those_of_the_concept_list() -> None:
    drawn = [
        (e["class"], e["data-from"], e["data-to"])
        for e in read(markdown())
        if e["tag"] == "path" and "data-to" in e
    ]
    listed = [("need", need, c.id) for c in load_concepts().values() for need in c.needs]
    listed += [("preview", c.id, later) for c in load_concepts().values() for later in c.previews]
    assert sorted(drawn) == sorted(listed)


def test_an_edge_begins_and_ends_at_its_nodes() -> None:
    boxes = draw(chapters(), load_concepts()).nodes
    for e in read(markdown()):
        if e["tag"] != "path" or "data-to" not in e:
            continue
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", e["d"])]
        for (x, y), box in zip(
            (numbers[:2], numbers[-2:]), (boxes[e["data-from"]], boxes[e["data-to"]]), strict=True
        ):
            assert min(abs(x - box.x), abs(x - box.x - box.width)) < 0.1
            assert abs(y - box.y - box.height / 2) < 0.1


def overlap(a: Box, b: Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


def test_no_two_boxes_overlap_and_all_lie_within_the_drawing() -> None:
    drawing = draw(chapters(), load_concepts())
    for boxes in (drawing.nodes.values(), (*drawing.panels.values(), *drawing.parts)):
        assert not [(a, b) for a, b in combinations(boxes, 2) if overlap(a, b)]
    for box in (*drawing.nodes.values(), *drawing.panels.values(), *drawing.parts):
        assert box.x >= 0
        assert box.y >= 0
        assert box.x + box.width <= WIDTH
        assert box.y + box.height <= drawing.height
    for concept in load_concepts().values():
        panel, node = drawing.panels[concept.number], drawing.nodes[concept.id]
        assert panel.x < node.x
        assert panel.y < node.y
        assert node.x + node.width < panel.x + panel.width
        assert node.y + node.height < panel.y + panel.height


def test_most_needs_point_right_or_down() -> None:
    boxes = draw(chapters(), load_concepts()).nodes
    needs = [(boxes[n], boxes[c.id]) for c in load_concepts().values() for n in c.needs]
    forward = [(a, b) for a, b in needs if b.x > a.x or (b.x == a.x and b.y > a.y)]
    assert len(forward) > 0.9 * len(needs)


def test_every_chapter_is_in_one_part() -> None:
    placed = [number for _, numbers in PARTS for number in numbers]
    assert sorted(placed) == [chapter.number for chapter in chapters()]
    with pytest.raises(ValueError, match=r"the map's parts hold chapters .* the book has"):
        draw(chapters()[:-1], load_concepts())


def test_the_map_is_the_same_each_time_and_small() -> None:
    assert markdown() == markdown()
    assert draw(chapters(), load_concepts()) == draw(chapters(), load_concepts())
    assert len(markdown().encode()) < 200_000


@pytest.mark.parametrize("name", ['A <b>"bold"</b> & </script><!-- name', "<b>&"], ids=["lines", "line"])
def test_names_are_escaped_everywhere(name: str) -> None:
    order, concepts = book()
    concepts["dpo"] = dataclasses.replace(concepts["dpo"], name=name)
    text = map_markdown(order, concepts)
    assert "<b>" not in text.replace("<summary><b>", "")
    assert "<!--" not in text
    assert text.count("</script>") == 1
    elements = read(text)
    (node,) = [e for e in elements if e["tag"] == "a" and e.get("data-id") == "dpo"]
    assert node["aria-label"].startswith(f"{name}, planned")
    assert "".join(node["text"].split()) == "".join(name.split())
    (data,) = [json.loads(e["text"]) for e in elements if e["tag"] == "script"]
    assert [c["name"] for c in data["concepts"] if c["id"] == "dpo"] == [name]


def test_the_data_for_the_script_is_that_of_the_list() -> None:
    (data,) = [json.loads(e["text"]) for e in read(markdown()) if e["tag"] == "script"]
    concepts = load_concepts()
    assert [c["id"] for c in data["concepts"]] == list(concepts)
    for row in data["concepts"]:
        concept = concepts[row["id"]]
        assert (row["name"], row["aliases"], row["symbol"]) == (
            concept.name,
            list(concept.aliases),
            concept.symbol,
        )
        assert (row["needs"], row["previews"]) == (list(concept.needs), list(concept.previews))
        assert (row["chapter"], row["href"]) == (concept.number, address(concept))
    assert data["chapters"] == {str(c.number): c.title for c in chapters()}


def closure(target: str, known: frozenset[str] = frozenset()) -> set[str]:
    """All needs of a concept, by recursion and without a graph library."""
    found: set[str] = set()
    for need in load_concepts()[target].needs:
        if need not in known:
            found |= {need} | closure(need, known)
    return found


@pytest.mark.parametrize(
    "target", ["self-attention", "dpo", "kv-cache", "agentic-rl", "mla", "evolutionary-merging"]
)
def test_a_path_holds_all_that_is_needed_in_the_order_of_the_book(target: str) -> None:
    path = reading_path(target, load_concepts())
    order = list(load_concepts())
    assert path[-1] == target
    assert set(path[:-1]) == closure(target)
    assert path == sorted(path, key=order.index)
    for place, id_ in enumerate(path):
        assert set(load_concepts()[id_].needs) <= set(path[:place])


def test_what_is_known_leaves_the_path_with_what_only_it_needs() -> None:
    concepts = load_concepts()
    known = frozenset({"causal-lm"})
    path = reading_path("dpo", concepts, known)
    assert path == ["full-fine-tuning", "rlhf-ppo", "dpo"]
    assert set(path[:-1]) == closure("dpo", known)
    assert reading_path("agentic-rl", concepts, known) != reading_path("agentic-rl", concepts)
    assert "decoder-only" in reading_path("agentic-rl", concepts, known)  # few-shot needs it as well
    assert reading_path("dpo", concepts, {"dpo"}) == reading_path("dpo", concepts)
    with pytest.raises(ValueError, match="'nothing' is no concept"):
        reading_path("nothing", concepts)
    with pytest.raises(ValueError, match="'nothing' is no concept"):
        reading_path("dpo", concepts, {"nothing"})
