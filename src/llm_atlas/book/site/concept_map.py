"""The concept map of the front page: all concepts in their chapters, with the edges between them.

The drawing is laid out here, while the site is built, and stands in the page as inline SVG, so that its links
work without script. Five parts of the book are five columns from left to right; chapters are panels in them,
in reading order. A need points right or down wherever the order of the book allows it. The same concepts
stand below as a list, for phones. assets/site/map.js lights, filters and finds paths from the JSON beside them.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from llm_atlas.book.concepts import Chapter, Concept, chapters, load_concepts
from llm_atlas.book.site.links import json_script

__all__ = [
    "PARTS",
    "Box",
    "Drawing",
    "address",
    "draw",
    "map_markdown",
    "markdown",
    "needs_graph",
    "reading_path",
]

# The columns of the map: a title, and the chapters in it.
PARTS = (
    ("The model", (1, 2, 3, 16, 17)),
    ("Training", (4, 5, 10, 11, 20)),
    ("Changing it", (6, 7, 12, 21)),
    ("Running it", (8, 9, 13, 19)),
    ("Using and judging", (14, 15, 18, 22)),
)
_STATES = {"planned": "planned", "partial": "partly written", "done": "written"}

# One unit is a pixel at the width of the article on a laptop of 1280 pixels.
WIDTH = 960
_EDGE, _COLUMN, _GUTTER = 14, 179, 12.5  # left of the first column there is room for its arcs
_BANNER = 30  # titles of the parts
_PAD = 6  # between a panel and its nodes
_FONT, _LINE = 12.5, 15
_NODE_PAD, _NODE_GAP, _MARK = 4, 3, 20
_TITLE_LINE, _TITLE_PAD = 16, 7
_PANEL_GAP, _PANEL_GAP_MOST = 12, 30

# Advance widths of Arial and Helvetica in thousandths of the font's size; everything else counts as 556.
_ADVANCE = {
    character: width
    for characters, width in (
        ("ijl'|", 222),
        ("ftI .,:;/!", 278),
        ("r()-", 333),
        ("ckszvxyJ", 500),
        ("FTZ", 611),
        ("ABEKPSVXY&", 667),
        ("CDHNRUw", 722),
        ("GOQ", 778),
        ("mM", 833),
        ("W@", 944),
    )
    for character in characters
}
# Room for the reader's own font: the widest of the usual ones beside Arial is 8% wider.
_ROOM = 1.08


Number = int | float  # in the units of the drawing, which are pixels at its own width


@dataclass(frozen=True)
class Box:
    """A rectangle in the drawing's units, with the lines of text in it."""

    x: Number
    y: Number
    width: Number
    height: Number
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """Where everything stands: concepts by id, chapters by number, parts by place, and the whole height."""

    nodes: dict[str, Box]
    panels: dict[int, Box]
    parts: tuple[Box, ...]
    height: Number


def needs_graph(concepts: Mapping[str, Concept]) -> nx.DiGraph:
    """The needs as a graph, from what is needed to what needs it; all concepts are in it, in the book's order."""
    graph = nx.DiGraph()
    graph.add_nodes_from(concepts)
    graph.add_edges_from((need, concept.id) for concept in concepts.values() for need in concept.needs)
    return graph


def reading_path(target: str, concepts: Mapping[str, Concept], known: Iterable[str] = ()) -> list[str]:
    """What to read for `target`, in the book's order, `target` last: all that it needs, directly or not.

    Concepts in `known` are left out, and so is what only they need. ValueError for an unknown concept.
    """
    known = set(known)
    for id_ in (target, *known):
        if id_ not in concepts:
            raise ValueError(f"{id_!r} is no concept")
    graph = needs_graph(concepts)
    graph.remove_nodes_from(known - {target})
    wanted = nx.ancestors(graph, target) | {target}
    return [id_ for id_ in concepts if id_ in wanted]


def address(concept: Concept) -> str:
    """Where a concept is read, seen from the front page: its section, or its row while it is planned."""
    page = concept.chapter if concept.is_written else "tables"
    return f"{page}.html#{concept.id}"


def _chapter_address(chapter: Chapter, concepts: Mapping[str, Concept]) -> str:
    if any(concepts[id_].is_written for id_ in chapter.concepts):
        return f"{chapter.slug}.html"
    return f"tables.html#table-{chapter.number}"


# ---- layout


def text_width(text: str, size: Number) -> Number:
    """About how wide a line of text is in a sans-serif font."""
    return sum(_ADVANCE.get(character, 556) for character in text) * size / 1000 * _ROOM


def _wrap(text: str, width: Number, size: Number) -> tuple[str, ...]:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(joined, size) > width:
            lines.append(word)
        else:
            lines[-1] = joined
    return tuple(lines)


def _panel(
    chapter: Chapter, concepts: Mapping[str, Concept], x: Number, y: Number
) -> tuple[Box, dict[str, Box]]:
    """One chapter's panel with its top at `y`, and the boxes of its concepts."""
    inner = _COLUMN - 2 * _PAD
    # bold is wider
    title = _wrap(chapter.title, (inner - _MARK - 2) / 1.08, _FONT)
    top = y + _TITLE_PAD * 2 + _TITLE_LINE * len(title) - 2
    boxes = {}
    for id_ in chapter.concepts:
        lines = _wrap(concepts[id_].name, inner - _MARK - _NODE_PAD, _FONT)
        boxes[id_] = Box(x + _PAD, top, inner, _LINE * len(lines) + 2 * _NODE_PAD, lines)
        top += boxes[id_].height + _NODE_GAP
    return Box(x, y, _COLUMN, top - _NODE_GAP + _PAD - y, title), boxes


def draw(order: Sequence[Chapter], concepts: Mapping[str, Concept]) -> Drawing:
    """Place all concepts, chapters and parts; ValueError where a chapter is in no part, or in two."""
    by_number = {chapter.number: chapter for chapter in order}
    placed = sorted(number for _, numbers in PARTS for number in numbers)
    if placed != sorted(by_number):
        raise ValueError(f"the map's parts hold chapters {placed}, the book has {sorted(by_number)}")

    columns = []
    for place, (_, numbers) in enumerate(PARTS):
        x = _EDGE + place * (_COLUMN + _GUTTER)
        columns.append([_panel(by_number[number], concepts, x, 0) for number in numbers])
    heights = [sum(panel.height for panel, _ in column) for column in columns]
    top = _BANNER + _PANEL_GAP
    # columns begin together and, as far as wider gaps reach, end together
    bottom = top + max(h + _PANEL_GAP * (len(c) - 1) for h, c in zip(heights, columns, strict=True))

    nodes, panels, parts = {}, {}, []
    for (title, numbers), column, height in zip(PARTS, columns, heights, strict=True):
        gap = min(_PANEL_GAP_MOST, (bottom - top - height) / max(1, len(column) - 1))
        y = top
        for number, (panel, boxes) in zip(numbers, column, strict=True):
            panels[number] = _lowered(panel, y)
            nodes.update({id_: _lowered(box, y) for id_, box in boxes.items()})
            y += panel.height + gap
        parts.append(Box(column[0][0].x, 0, _COLUMN, _BANNER, (title,)))
    return Drawing({id_: nodes[id_] for id_ in concepts}, panels, tuple(parts), round(bottom) + 2)


def _lowered(box: Box, by: Number) -> Box:
    return Box(box.x, round(box.y + by, 1), box.width, box.height, box.lines)


def _curve(source: Box, target: Box) -> str:
    """The way from one node to another: across the gutters, or in an arc beside the own column."""
    y1, y2 = source.y + source.height / 2, target.y + target.height / 2
    if source.x == target.x:
        x1 = x2 = source.x
        reach = min(_EDGE + _PAD - 2, 7 + abs(y2 - y1) * 0.04)
        points = (x1, y1, x1 - reach, y1, x2 - reach, y2, x2, y2)
    else:
        right = target.x > source.x
        x1 = source.x + (source.width if right else 0)
        x2 = target.x + (0 if right else target.width)
        bend = (x2 - x1) * 0.5
        points = (x1, y1, x1 + bend, y1, x2 - bend, y2, x2, y2)
    return "M{:g} {:g}C{:g} {:g} {:g} {:g} {:g} {:g}".format(*(round(v, 1) for v in points))


# ---- markup


def _text(class_: str, x: Number, y: Number, lines: Sequence[str], step: Number) -> str:
    """Lines of text, the first on the base line `y`."""
    if len(lines) == 1:
        return f'<text class="{class_}" x="{x:g}" y="{y:g}">{html.escape(lines[0])}</text>'
    # the space is for a reader of the text: lines are no words
    spans = " ".join(
        f'<tspan x="{x:g}" y="{y + step * row:g}">{html.escape(line)}</tspan>'
        for row, line in enumerate(lines)
    )
    return f'<text class="{class_}">{spans}</text>'


def _mark(state: str, x: Number, y: Number) -> str:
    """The sign of a state: a full, a half or an empty circle."""
    circle = f'<circle class="mark" cx="{x:g}" cy="{y:g}" r="4"/>'
    if state == "partial":
        circle += f'<path class="half" d="M{x:g} {y - 4:g}a4 4 0 0 1 0 8z"/>'
    return circle


def _node(concept: Concept, box: Box) -> str:
    where = "chapter" if concept.is_written else "table"
    label = f"{concept.name}, {_STATES[concept.state]}, {where} {concept.number}"
    x, y = box.x + 11, box.y + _NODE_PAD + _LINE / 2
    return (
        f'<a class="node {concept.state}" href="{html.escape(address(concept))}" data-id="{concept.id}"'
        f' aria-label="{html.escape(label)}">'
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="5"/>'
        f"{_mark(concept.state, x, y)}"
        f'<text class="step" x="{x - 1:g}" y="{y + 4:g}"></text>'
        f"{_text('name', box.x + _MARK, box.y + _NODE_PAD + _LINE - 3.5, box.lines, _LINE)}</a>"
    )


def _panel_svg(chapter: Chapter, part: int, drawing: Drawing, concepts: Mapping[str, Concept]) -> str:
    box = drawing.panels[chapter.number]
    head = _TITLE_PAD + _TITLE_LINE - 4
    return (
        f'<g class="panel part-{part}" role="group" aria-label="Chapter {chapter.number}">'
        f'<rect class="ground" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="8"/>'
        f'<a class="title" href="{html.escape(_chapter_address(chapter, concepts))}"'
        f' aria-label="Chapter {chapter.number}: {html.escape(chapter.title)}">'
        f'<rect class="bar" x="{box.x + 1:g}" y="{box.y + 1:g}" width="{box.width - 2:g}"'
        f' height="{_TITLE_PAD * 2 + _TITLE_LINE * len(box.lines) - 5:g}" rx="7"/>'
        f'<text class="number" x="{box.x + _PAD + 11:g}" y="{box.y + head:g}">{chapter.number}</text>'
        f"{_text('heading', box.x + _PAD + _MARK + 2, box.y + head, box.lines, _TITLE_LINE)}</a>"
        f"{''.join(_node(concepts[id_], drawing.nodes[id_]) for id_ in chapter.concepts)}</g>"
    )


def _banner(place: int, box: Box) -> str:
    """The title of a part, as one link of a chain that points to the right."""
    x, y, w, h, tip = box.x, box.y, box.width, box.height, 9
    last = place == len(PARTS) - 1
    right = f"H{x + w:g}V{y + h:g}" if last else f"H{x + w:g}l{tip} {h / 2:g}l-{tip} {h / 2:g}"
    left = "" if place == 0 else f"l{tip} -{h / 2:g}"
    return (
        f'<g class="part part-{place}"><path d="M{x:g} {y:g}{right}H{x:g}{left}z"/>'
        f'<text x="{x + w / 2 + (0 if place == 0 else 4):g}" y="{y + h / 2 + 5:g}">'
        f"{html.escape(box.lines[0])}</text></g>"
    )


def _edges(drawing: Drawing, concepts: Mapping[str, Concept]) -> str:
    """All edges, each from what is read first to what is read later."""
    paths = []
    for concept in concepts.values():
        for kind, others in (("need", concept.needs), ("preview", concept.previews)):
            for other in others:
                a, b = (other, concept.id) if kind == "need" else (concept.id, other)
                curve = _curve(drawing.nodes[a], drawing.nodes[b])
                paths.append(f'<path class="{kind}" data-from="{a}" data-to="{b}" d="{curve}"/>')
    return "".join(paths)


def _svg(drawing: Drawing, order: Sequence[Chapter], concepts: Mapping[str, Concept]) -> str:
    by_number = {chapter.number: chapter for chapter in order}
    panels = "".join(
        _panel_svg(by_number[number], part, drawing, concepts)
        for part, (_, numbers) in enumerate(PARTS)
        for number in numbers
    )
    return (
        f'<svg class="atlas-map-drawing" viewBox="0 0 {WIDTH} {drawing.height:g}" width="{WIDTH}"'
        f' height="{drawing.height:g}" role="group" aria-label="Concept map">'
        f"{''.join(_banner(place, box) for place, box in enumerate(drawing.parts))}"
        f'<g class="edges" aria-hidden="true">{_edges(drawing, concepts)}</g>{panels}</svg>'
    )


def _list(order: Sequence[Chapter], concepts: Mapping[str, Concept]) -> str:
    """The map in words: the chapters, each folded over its concepts."""
    parts = {number: place for place, (_, numbers) in enumerate(PARTS) for number in numbers}
    rows = []
    for chapter in order:
        own = [concepts[id_] for id_ in chapter.concepts]
        entries = "".join(
            f'<li class="{c.state}" data-id="{c.id}"><a href="{html.escape(address(c))}">{html.escape(c.name)}</a>'
            f" <span>{_STATES[c.state]}</span></li>"
            for c in own
        )
        written = sum(c.is_written for c in own)
        count = f"{len(own)} concepts, {f'{written} written' if written else 'planned'}"
        link = _chapter_address(chapter, concepts)
        whole = "Its table" if "#" in link else "The whole chapter"
        rows.append(
            f'<details class="part-{parts[chapter.number]}" data-chapter="{chapter.number}">'
            f"<summary><b>{chapter.number}</b> <span>{html.escape(chapter.title)}</span>"
            f" <small>{count}</small></summary>"
            f'<ul>{entries}</ul><p><a href="{html.escape(link)}">{whole}</a></p></details>'
        )
    return f'<div class="atlas-map-list">{"".join(rows)}</div>'


def _data(order: Sequence[Chapter], concepts: Mapping[str, Concept]) -> str:
    data = {
        "chapters": {chapter.number: chapter.title for chapter in order},
        "concepts": [
            {
                "id": c.id,
                "name": c.name,
                "aliases": c.aliases,
                "symbol": c.symbol,
                "chapter": c.number,
                "state": _STATES[c.state],
                "href": address(c),
                "needs": c.needs,
                "previews": c.previews,
            }
            for c in concepts.values()
        ],
    }
    return json_script(data)


_CONTROLS = """\
<div class="atlas-map-controls">
<p><label for="atlas-map-filter">Find a concept</label>
<input id="atlas-map-filter" type="search" autocomplete="off" spellcheck="false" placeholder="DPO, KV cache, BPE"></p>
<p><label for="atlas-map-target">Find the path to</label>
<select id="atlas-map-target"><option value="">choose a concept</option></select></p>
<p class="atlas-map-views" role="group" aria-label="Show as"><button type="button" data-show="map" aria-pressed="true">
Map</button><button type="button" data-show="list" aria-pressed="false">List</button></p>
</div>
<div class="atlas-map-path" role="region" aria-label="Reading path" hidden></div>
"""

_LEGEND = """\
<ul class="atlas-map-legend" aria-label="Legend">
<li><svg viewBox="0 0 10 10" aria-hidden="true"><circle class="mark done" cx="5" cy="5" r="4"/></svg>written</li>
<li class="partial-only"><svg viewBox="0 0 10 10" aria-hidden="true"><circle class="mark" cx="5" cy="5" r="4"/>\
<path class="half" d="M5 1a4 4 0 0 1 0 8z"/></svg>partly written</li>
<li><svg viewBox="0 0 10 10" aria-hidden="true"><circle class="mark" cx="5" cy="5" r="4"/></svg>planned</li>
<li class="pill before">it rests on</li><li class="pill after">builds on it</li>\
<li class="pill ahead">looked ahead to</li>
</ul>
"""


def map_markdown(order: Sequence[Chapter], concepts: Mapping[str, Concept]) -> str:
    """The whole map as a raw html block of MyST: controls, drawing, list and data."""
    legend = _LEGEND
    if not any(concept.state == "partial" for concept in concepts.values()):
        legend = "\n".join(
            line for line in legend.split("\n") if "half" not in line and "partial" not in line
        )
    body = _svg(draw(order, concepts), order, concepts)
    return (
        '``````{raw} html\n<div class="atlas-map">\n<div class="atlas-map-inside">\n'
        f'{_CONTROLS}<div class="atlas-map-bar">\n{legend}<p class="atlas-map-status" role="status"></p></div>\n'
        f"{body}\n{_list(order, concepts)}\n</div>\n"
        f"{_data(order, concepts)}\n</div>\n``````\n"
    )


def markdown() -> str:
    """The map of the book."""
    return map_markdown(chapters(), load_concepts())
