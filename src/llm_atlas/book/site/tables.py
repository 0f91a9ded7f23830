"""The reference tables of the site, written from assets/concepts.yml whenever the site is built.

A concept's row carries the target `table-ID`; while its section does not exist yet, the row also answers to
the concept's own target, so that a link to a concept always arrives.
"""

from collections.abc import Mapping, Sequence

from llm_atlas.book.concepts import Chapter, Concept, chapters, load_concepts

__all__ = ["concept_row", "markdown", "tables_markdown"]


def concept_row(concept: Concept) -> str:
    """One row of a list-table in MyST: name and links, formula, facts."""
    written = concept.state != "planned"
    name = f"[{concept.name}]({concept.id})" if written else f"{concept.name}"
    lines = [f"(table-{concept.id})="]
    if not written:
        lines.append(f"({concept.id})=")
    lines.append(f"**{name}**")
    if concept.state == "planned":
        lines += ["", "{octicon}`clock` planned"]
    elif concept.state == "partial":
        lines += ["", f"{{octicon}}`hourglass` partly: {concept.missing}"]
    formula = [f"`` {concept.example.replace('``', '` `')} ``"] if concept.example else [""]
    facts = [f"- {fact}" for fact in concept.facts]
    return "\n".join(_cell("* -", lines) + _cell("  -", formula) + _cell("  -", facts))


def tables_markdown(order: Sequence[Chapter], concepts: Mapping[str, Concept]) -> str:
    """All tables as MyST, a heading and a list-table a chapter."""
    parts = []
    for chapter in order:
        rows = "\n".join(concept_row(concepts[id_]) for id_ in chapter.concepts)
        heading = f"(table-{chapter.number})=\n## {chapter.number}. {chapter.title}"
        options = ":header-rows: 1\n:widths: 26 30 44\n:class: atlas-table"
        header = "* - Concept\n  - In one line\n  - What to know"
        parts.append(f"{heading}\n\n```{{list-table}}\n{options}\n\n{header}\n{rows}\n```")
    return "\n\n".join(parts)


def _cell(bullet: str, lines: Sequence[str]) -> list[str]:
    first, *rest = lines
    return [f"{bullet} {first}", *(f"    {line}".rstrip() for line in rest)]


def markdown() -> str:
    """All tables of the book."""
    return tables_markdown(chapters(), load_concepts())
