"""The glossary: every name and abbreviation, and where it is explained.

Names and aliases come from assets/concepts.yml; the field's other terms that the chapters use, with a sentence
each, from assets/glossary.yml.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_atlas.book.concepts import Concept, build, load_concepts, read_yaml
from llm_atlas.book.site.links import escape, ref
from llm_atlas.core.assets import bundled

__all__ = ["Term", "glossary_markdown", "load_terms", "markdown"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """A term that is no concept of its own: its definition, other names, and the concepts to read about it."""

    term: str
    definition: str
    aliases: tuple[str, ...] = ()
    see: tuple[str, ...] = ()


def _names(concept: Concept) -> list[str]:
    """The concept's name and aliases, each once whatever its case."""
    return list({name.lower(): name for name in (*concept.aliases[::-1], concept.name)}.values())[::-1]


def load_terms(path: Path | None = None) -> list[Term]:
    """The terms of glossary.yml.

    ValueError naming file and line for a field that is unknown or no text, an empty one, a definition that is
    no sentence, a name that stands twice or is a concept's, and a `see` that is no concept.
    """
    path = path or bundled("glossary.yml")
    concepts = load_concepts()
    taken = {name.lower(): f"concept {c.id!r}" for c in concepts.values() for name in _names(c)}
    terms = []
    for row in read_yaml(path):
        where = f"{path.name}:{row['__line__']}"
        term = build(Term, row, where)
        if not re.fullmatch(r"\S(.*\S)?", term.term):
            raise ValueError(f"{where}: term {term.term!r} must be text without space around it")
        if not re.fullmatch(r"[A-Z\d].{20,300}\.", term.definition):
            raise ValueError(
                f"{where}: the definition of {term.term!r} must be a sentence of 20 to 300 letters"
            )
        for name in (term.term, *term.aliases):
            if other := taken.get(name.lower()):
                raise ValueError(f"{where}: {name!r} is already the name of {other}")
            taken[name.lower()] = f"the term at {where}"
        for id_ in term.see:
            if id_ not in concepts:
                raise ValueError(f"{where}: {term.term!r} points to {id_!r}, which is no concept")
        terms.append(term)
    return terms


def _key(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name)
    return re.sub(r"[^a-z0-9]+", " ", plain.lower()).strip()


def _entry(name: str, text: str) -> str:
    # the directive reads ` : ` in a term as the start of an index key
    return f"{escape(name)}\n    {text}"


def _concept_entries(concept: Concept) -> dict[str, str]:
    name, *aliases = _names(concept)
    links = [ref(f"table\N{NO-BREAK SPACE}{concept.number}", f"table-{concept.id}")]
    if concept.is_written:
        links.insert(0, ref("section", concept.id))
    also = f" Also: {escape(', '.join(aliases))}." if aliases else ""
    entries = {name: f"{escape(concept.facts[0])}{also} {' · '.join(links)}"}
    return entries | {alias: f"See {{term}}`{name}`." for alias in aliases}


def _term_entries(term: Term, concepts: Mapping[str, Concept]) -> dict[str, str]:
    links = " · ".join(ref(concepts[id_].name, id_) for id_ in term.see)
    also = f" Also: {escape(', '.join(term.aliases))}." if term.aliases else ""
    entries = {term.term: f"{escape(term.definition)}{also}" + (f" More: {links}" if links else "")}
    return entries | {alias: f"See {{term}}`{term.term}`." for alias in term.aliases}


def glossary_markdown(concepts: Mapping[str, Concept], terms: list[Term]) -> str:
    """The glossary as MyST: links to the letters, then a heading and a glossary a letter."""
    entries: dict[str, str] = {}
    for concept in concepts.values():
        entries |= _concept_entries(concept)
    for term in terms:
        entries |= _term_entries(term, concepts)
    letters: dict[str, list[str]] = {}
    for name in sorted(entries, key=_key):
        # a chapter's link `[text](min-p)` would find a term spelt as the concept's id as well as the concept
        shown = name[0].upper() + name[1:] if name in concepts else name
        letter = _key(name)[0].upper()
        letters.setdefault(letter if letter.isalpha() else "0–9", []).append(_entry(shown, entries[name]))
    jumps = [f"- {ref(letter, f'glossary-{letter[0].lower()}')}" for letter in letters]
    parts = ["{.atlas-letters}\n" + "\n".join(jumps)]
    for letter, found in letters.items():
        body = "\n\n".join(found)
        parts.append(f"(glossary-{letter[0].lower()})=\n## {letter}\n\n````{{glossary}}\n{body}\n````")
    return "\n\n".join(parts)


def markdown() -> str:
    """The glossary of the book."""
    return glossary_markdown(load_concepts(), load_terms())
