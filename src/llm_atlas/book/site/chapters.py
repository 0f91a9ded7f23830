"""What every chapter opens with: its number, its table, what it builds on, how long it takes to read.

The block is added to the end of the cell that holds the chapter's title, while Sphinx reads the notebook: a
warning names a cell and a line in it, and both stay as they are in the file. The same module gives each cell
that calls `claim("id", ...)` the target `claim-id`, where the claims page leads, and a way back.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from llm_atlas.book.concepts import Chapter, Concept, chapters, load_concepts
from llm_atlas.book.site.links import (
    cell_text,
    claim_cells,
    code,
    escape,
    exercise_labels,
    exercise_link,
    plural,
    ref,
)
from llm_atlas.book.site.tables import indent

__all__ = ["ClaimTargets", "ReadingTime", "opener", "reading_time", "setup"]

# Estimates, not measurements: plain prose, two seconds a line of code, a function of a few lines.
WORDS_PER_MINUTE = 200
LINES_PER_MINUTE = 30
MINUTES_PER_EXERCISE = 8
_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_NO_PROSE = re.compile(
    r"\$\$.*?\$\$|</?[a-z][^>\n]*>|^\(\S+\)=|^:\S+:[^\n]*|^[`~:]{3,}[^\n]*", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class ReadingTime:
    """What there is to read in a chapter: words of prose, lines of code shown, exercises."""

    words: int
    lines: int
    exercises: int

    @property
    def reading(self) -> int:
        """Minutes for prose and code, to the nearest five, at least five."""
        minutes = self.words / WORDS_PER_MINUTE + self.lines / LINES_PER_MINUTE
        return max(5, 5 * round(minutes / 5))

    @property
    def solving(self) -> int:
        """Minutes for the exercises, to the nearest five."""
        return 5 * round(self.exercises * MINUTES_PER_EXERCISE / 5)


def reading_time(notebook: Mapping[str, Any]) -> ReadingTime:
    """Count what a reader reads: prose without equations and solutions, code that is not folded, exercises."""
    words = lines = 0
    for cell in notebook["cells"]:
        text = cell_text(cell)
        if cell["cell_type"] == "code":
            if not {"hide-input", "remove-input", "remove-cell"} & set(cell["metadata"].get("tags", ())):
                lines += sum(bool(line.strip()) for line in text.splitlines())
        elif cell["cell_type"] == "markdown" and not re.match(r"[`~:]{3,}\{solution\}", text):
            # code inside an exercise's text is read as code
            for fence in _FENCE.finditer(text):
                if "{" not in fence[0].partition("\n")[0]:
                    lines += sum(bool(line.strip()) for line in fence[0].splitlines()[1:-1])
                    text = text.replace(fence[0], "")
            words += sum(any(map(str.isalnum, word)) for word in _NO_PROSE.sub(" ", text).split())
    return ReadingTime(words=words, lines=lines, exercises=len(exercise_labels(notebook)))


def _duration(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    return " ".join([f"{hours} h"] * bool(hours) + [f"{rest} min"] * bool(rest or not hours))


def _row(concept: Concept) -> str:
    first = [ref(concept.name, concept.id) if concept.is_written else f"{escape(concept.name)} (planned)"]
    if exercise := exercise_link(concept):
        first += ["", "{.atlas-links}", exercise]
    cells = (first, ["{.atlas-formula}", code(concept.example)], [escape(concept.facts[0])])
    return "\n".join(
        line
        for bullet, lines in zip(("* -", "  -", "  -"), cells, strict=True)
        for line in indent(bullet, lines)
    )


def _others(ids: Sequence[str], own: Chapter, concepts: Mapping[str, Concept]) -> str:
    """Concepts of other chapters in the book's order, grouped by their chapter."""
    groups: dict[int, list[str]] = {}
    for id_, concept in concepts.items():
        if id_ in ids and concept.number != own.number:
            groups.setdefault(concept.number, []).append(ref(concept.name, id_))
    return "; ".join(f"{', '.join(links)} (chapter {number})" for number, links in groups.items())


def opener(chapter: Chapter, concepts: Mapping[str, Concept], notebook: Mapping[str, Any]) -> str:
    """What stands below a chapter's title, as MyST."""
    own = [concepts[id_] for id_ in chapter.concepts]
    time = reading_time(notebook)
    parts = [
        plural(len(own), "concept"),
        f"about {_duration(time.reading)} to read",
        f"{plural(time.exercises, 'exercise')}, {_duration(time.solving)}" if time.exercises else "",
        f"{plural(count, 'claim')} measured" if (count := len(claim_cells(notebook))) else "",
    ]
    blocks = ["{.atlas-facts}\n" + " · ".join(filter(None, parts))]
    options = ":header-rows: 1\n:widths: 24 31 45\n:class: atlas-table atlas-opener"
    header = "* - In this chapter\n  - In one line\n  - What to know"
    rows = "\n".join(_row(concept) for concept in own)
    blocks.append(f"````{{list-table}}\n{options}\n\n{header}\n{rows}\n````")
    for label, edge in (("Builds on", "needs"), ("Opens later", "previews")):
        if others := _others([id_ for c in own for id_ in getattr(c, edge)], chapter, concepts):
            blocks.append(f"{{.atlas-edges}}\n**{label}** {others}.")
    return "\n\n".join(blocks)


def _open_chapter(app: Sphinx, page: str, source: list[str]) -> None:
    of = {chapter.slug: chapter for chapter in chapters()}
    chapter = of.get(page.rpartition("/")[2])
    if chapter is None or not app.env.doc2path(page).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    title = next(
        (c for c in notebook["cells"] if c["cell_type"] == "markdown" and cell_text(c).startswith("# ")), None
    )
    if title is None:
        raise ValueError(f"{app.env.doc2path(page)}: no cell begins with the title, '# ...'")
    text = cell_text(title).replace("# ", f"# {chapter.number}. ", 1)
    # for a notebook's reader; here the block below tells the time
    text = re.sub(r"^\*\*Time\*\*[^\n]*\n?", "", text, flags=re.MULTILINE)
    title["source"] = text + "\n\n" + opener(chapter, load_concepts(), notebook)
    source[0] = json.dumps(notebook)


class ClaimTargets(SphinxTransform):
    """Give each code cell that calls `claim("id", ...)` the explicit target `claim-id`, and a line below it that
    leads to the claim's row."""

    # before the standard domain collects the labels of the page
    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        if not self.env.doc2path(self.env.docname).endswith(".ipynb"):
            return
        with open(self.env.doc2path(self.env.docname), encoding="utf-8") as file:
            cells = claim_cells(json.load(file))
        for cell in list(self.document.findall(nodes.container)):
            if cell.get("nb_element") != "cell_code":
                continue
            here = [claim_id for claim_id, index in cells.items() if index == cell["cell_index"]]
            if here:
                links = ", ".join(
                    f'<a href="claims.html#{nodes.make_id(f"ledger-{id_}")}">{id_}</a>' for id_ in here
                )
                line = f'<p class="atlas-ledger">In the ledger: {links}</p>'
                cell.parent.insert(cell.parent.index(cell) + 1, nodes.raw("", line, format="html"))
            for claim_id in here:
                name = f"claim-{claim_id}"
                anchor = nodes.make_id(name)  # without the dots that an id may hold and a selector may not
                # not note_explicit_target: it gives a node one id, and a cell may hold several claims
                cell["ids"].append(anchor)
                cell["names"].append(name)
                self.document.ids[anchor] = cell
                self.document.nameids[name] = anchor
                self.document.nametypes[name] = True


def setup(app: Sphinx) -> None:
    app.connect("source-read", _open_chapter)
    app.add_transform(ClaimTargets)
