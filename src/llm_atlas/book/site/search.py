"""The search finds a concept by name, abbreviation and symbol, and puts its section first.

Sphinx's search ranks an index entry that the reader typed whole above every other hit. Each concept gets such
entries for all it is called by, in the search index alone: the general index keeps only what pages put there.
A result is titled with the concept's name; the page's title, Sphinx's own choice, is the same for a whole chapter.
"""

import functools
import html
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from llm_atlas.book.concepts import Chapter, Concept, chapters, load_concepts
from llm_atlas.core.assets import bundled

__all__ = ["entries", "queries", "result_titles", "setup"]


def queries(concept: Concept) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a reader may type for a concept, in lower case: what it is called, and spellings derived from that.

    The first are names, aliases, id and symbol as they stand; the second leave out or keep only the
    parenthesis of a name, and write a space for a hyphen.
    """
    named = [concept.name, *concept.aliases, concept.id]
    named += [concept.symbol, concept.symbol.rpartition(".")[2]]
    derived = []
    for name in (concept.name, *concept.aliases):
        without = re.sub(r"\s*\([^)]*\)", "", name)
        derived.append(without)
        derived.append(re.sub(r"[()]", "", name))
        for inside in re.findall(r"\(([^)]*)\)", name):
            derived += [inside, *inside.split(", ")]
            # "Top-p (nucleus) sampling" is nucleus sampling too
            if not name.endswith(")"):
                derived.append(f"{inside}{name.rpartition(')')[2]}")
    derived += [re.sub(r"[-_]", " ", text) for text in (*named[:-2], *derived)]
    called = tuple(dict.fromkeys(text.lower() for text in named if text))
    spelt = dict.fromkeys(text.lower().strip() for text in derived)
    return called, tuple(text for text in spelt if text and text not in called)


def entries(concepts: Mapping[str, Concept]) -> dict[str, list[str]]:
    """The index entries of each concept. A derived spelling that another concept is called by is left to that."""
    called = defaultdict(set)
    for concept in concepts.values():
        for text in queries(concept)[0]:
            called[text].add(concept.id)
        for text in (concept.name, *concept.aliases, concept.id):
            called[re.sub(r"[-_]", " ", text.lower())].add(concept.id)
    # the very name of another concept belongs to that one, though a symbol be called the same
    own = {concept.name.lower(): concept.id for concept in concepts.values()}
    found = {}
    for concept in concepts.values():
        named, derived = queries(concept)
        kept = [text for text in named if own.get(text, concept.id) == concept.id]
        found[concept.id] = kept + [text for text in derived if not called[text] - {concept.id}]
    return found


def result_titles(concepts: Mapping[str, Concept], order: tuple[Chapter, ...]) -> dict[str, tuple[str, str]]:
    """Title and context, as html, of the search result at each concept's place (`page#anchor`)."""
    titles = {chapter.number: chapter.title for chapter in order}
    found = {}
    for concept in concepts.values():
        planned = concept.state == "planned"
        page = "chapters/tables" if planned else f"chapters/{concept.chapter}"
        where = f"concept, chapter {concept.number}: {titles[concept.number]}{', planned' if planned else ''}"
        found[f"{page}#{concept.id}"] = (html.escape(concept.name), html.escape(where))
    return found


def _write_scorer(app: Sphinx) -> None:
    """The script that Sphinx asks for each result's score, with the titles of our concepts in it."""
    if app.builder.format != "html":
        return
    titles = result_titles(load_concepts(), chapters())
    text = bundled("site/search-scorer.js").read_text(encoding="utf-8")
    made = Path(app.doctreedir) / "search-scorer.js"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(text.replace("{} /* titles */", json.dumps(titles, ensure_ascii=False)), encoding="utf-8")
    app.config.html_search_scorer = str(made)


def _add_entries(app: Sphinx, doctree: nodes.document, page: str) -> None:
    if app.builder.format != "html":
        return
    # the glossary has entries of its own for its terms: a concept's name leads to the concept
    known = {text for texts in _entries().values() for text in texts}
    for index in doctree.findall(addnodes.index):
        index["entries"] = [entry for entry in index["entries"] if entry[1].lower() not in known]
    labels = app.env.domains["std"].data["anonlabels"]
    for id_, texts in _entries().items():
        where, anchor = labels.get(id_, ("", ""))
        if where == page:
            # the doctree of this build's output alone, so that genindex does not list every spelling
            rows = [("single", text, anchor, "main", None) for text in texts]
            doctree += addnodes.index(entries=rows)


@functools.cache
def _entries() -> dict[str, list[str]]:
    return entries(load_concepts())


def setup(app: Sphinx) -> None:
    """Connect the search index and the titles of results."""
    app.connect("builder-inited", _write_scorer)
    app.connect("doctree-resolved", _add_entries)
