"""The reference tables of the site, written from assets/concepts.yml whenever the site is built.

A concept's row carries the target `table-ID`; while its section does not exist yet, the row also answers to
the concept's own target, so that a link to a concept always arrives.
"""

from collections.abc import Mapping, Sequence

from llm_atlas.book.concepts import Chapter, Concept, chapters, load_concepts
from llm_atlas.book.site.links import (
    code,
    escape,
    exercise_link,
    read_notebook,
    ref,
    source_links,
    symbol_link,
)

__all__ = ["concept_row", "indent", "markdown", "tables_markdown", "written_line"]


def concept_row(concept: Concept) -> str:
    """One row of a list-table in MyST: name and state, formula and code, facts and links."""
    written = concept.is_written
    lines = [f"(table-{concept.id})="]
    if not written:
        lines.append(f"({concept.id})=")
    name = ref(concept.name, concept.id) if written else escape(concept.name)
    lines.append(f"**{name}**")
    if concept.aliases:
        lines += ["", "{.atlas-also}", escape(", ".join(concept.aliases))]
    if concept.state == "planned":
        lines += ["", "[planned]{.atlas-state .atlas-planned}"]
    elif concept.state == "partial":
        lines += ["", f"[partly]{{.atlas-state .atlas-partial}} {escape(concept.missing)}"]
    formula = [
        "{.atlas-formula}",
        code(concept.example),
        "",
        "{.atlas-code}",
        symbol_link(concept),
    ]
    links = [ref("section", concept.id)] if written else []
    if exercise := exercise_link(concept):
        links.append(exercise)
    links.append(source_links(concept))
    facts = [f"- {escape(fact)}" for fact in concept.facts]
    facts += ["", "{.atlas-links}", " · ".join(links)]
    return "\n".join(indent("* -", lines) + indent("  -", formula) + indent("  -", facts))


def written_line(chapter: Chapter, concepts: Mapping[str, Concept]) -> str:
    """How much of a table is written, as a bar and in words, with a link to the chapter where there is one."""
    states = [concepts[id_].state for id_ in chapter.concepts]
    done, partly = states.count("done"), states.count("partial")
    text = f"{done} of {len(states)} written"
    if partly:
        text += f", {partly} in part"
    share = round(100 * (done + partly / 2) / len(states))
    bar = f'<span class="atlas-meter" aria-hidden="true"><i style="width: {share}%"></i></span>'
    link = f" · {{doc}}`read the chapter </chapters/{chapter.slug}>`" if read_notebook(chapter.slug) else ""
    return f"{{.atlas-written}}\n{bar} {text}{link}"


def tables_markdown(order: Sequence[Chapter], concepts: Mapping[str, Concept]) -> str:
    """All tables as MyST: links to each, then a heading and a list-table a chapter."""
    jumps = [f"1. {ref(chapter.title, f'table-{chapter.number}')}" for chapter in order]
    parts = ["{.atlas-jump}\n" + "\n".join(jumps)]
    for chapter in order:
        rows = "\n".join(concept_row(concepts[id_]) for id_ in chapter.concepts)
        heading = f"(table-{chapter.number})=\n## {chapter.number}. {escape(chapter.title)}"
        options = ":header-rows: 1\n:widths: 24 30 46\n:class: atlas-table atlas-reference"
        header = "* - Concept\n  - In one line\n  - What to know"
        table = f"````{{list-table}}\n{options}\n\n{header}\n{rows}\n````"
        parts.append(f"{heading}\n\n{written_line(chapter, concepts)}\n\n{table}")
    return "\n\n".join(parts)


def indent(bullet: str, lines: Sequence[str]) -> list[str]:
    """The lines as one cell of a list-table."""
    first, *rest = lines
    return [f"{bullet} {first}", *(f"    {line}".rstrip() for line in rest)]


def markdown() -> str:
    """All tables of the book."""
    return tables_markdown(chapters(), load_concepts())
