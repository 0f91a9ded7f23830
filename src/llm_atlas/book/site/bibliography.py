"""The bibliography: entries by author and year, one link each, and back to where they are cited."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pybtex.plugin
from docutils import nodes
from pybtex.database import Entry
from pybtex.richtext import Text
from pybtex.style.formatting.unsrt import Style as Unsorted
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.template import Node, first_of, optional, sentence
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

from llm_atlas.book.concepts import load_concepts

__all__ = ["AtlasStyle", "AuthorYearLabels", "setup"]


class AuthorYearLabels(BaseLabelStyle):
    """Labels such as "Vaswani et al., 2017", as citations in the text are written; a, b where two are alike."""

    def format_labels(self, sorted_entries: Sequence[Entry]) -> Iterator[str]:
        """A label an entry, in their order."""
        labels = [_label(entry) for entry in sorted_entries]
        count = Counter(labels)
        used: Counter[str] = Counter()
        for label in labels:
            letter = chr(ord("a") + used[label]) if count[label] > 1 else ""
            used[label] += 1
            yield label + letter


def _label(entry: Entry) -> str:
    people = entry.persons.get("author", [])
    names = [" ".join(_plain(part) for part in (*one.prelast_names, *one.last_names)) for one in people]
    who = f"{names[0]} et al." if len(names) > 2 or "others" in names[1:] else " and ".join(names)
    return f"{who or entry.key}, {entry.fields.get('year', 'no year')}"


def _plain(latex: str) -> str:
    return str(Text.from_latex(latex))


class AtlasStyle(Unsorted):
    """Alphabetical, titles as their authors wrote them, one link: arXiv or DOI before an address."""

    default_label_style = AuthorYearLabels
    default_sorting_style = "author_year_title"

    def format_title(self, e: Entry, which_field: str, as_sentence: bool = True) -> Node:
        """The title with its capitals as the bibliography has them."""
        title = Text.from_latex(e.fields[which_field])
        return sentence[title] if as_sentence else title

    def format_names(self, role: str, as_sentence: bool = True) -> Any:
        """Names; "and others" as et al."""
        made = super().format_names(role, as_sentence=False)

        def format_data(data: dict[str, Any]) -> Text:
            text = made.format_data(data)
            for end in (", and others", " and others"):
                if text.endswith(end):
                    text = text[: -len(end)] + " et al."
                    break
            return text.add_period() if as_sentence else text

        return _Made(format_data)

    def format_web_refs(self, e: Entry) -> Node:
        """The one best link."""
        return sentence[
            first_of[
                optional[self.format_eprint(e)], optional[self.format_doi(e)], optional[self.format_url(e)]
            ]
        ]


class _Made:
    """A template's node from a function."""

    def __init__(self, format_data: Any) -> None:
        self.format_data = format_data


def _link_back(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Under each entry: the pages that cite it and the concepts that rest on it."""
    entries = [node for node in doctree.findall(nodes.citation) if node.get("docname") == page]
    if not entries:
        return
    domain = app.env.domains["cite"].data
    keys = {citation.citation_id: citation.key for citation in domain["citations"]}
    cited: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for reference in domain["citation_refs"]:
        for target in reference.targets:
            if reference.docname != page:
                cited[target.key][reference.docname].append(reference.citation_ref_id)
    labels = app.env.domains["std"].data["anonlabels"]
    concepts = defaultdict(list)
    for concept in load_concepts().values():
        for key in concept.sources:
            if concept.id in labels:
                concepts[key].append((concept.name, labels[concept.id]))
    for entry in entries:
        key = keys[entry["ids"][0]]
        places = [
            (app.env.titles[name].astext(), (name, ids[0])) for name, ids in sorted(cited[key].items())
        ] + concepts[key]
        if not places:
            continue
        line = nodes.paragraph(classes=["atlas-cited"])
        line += nodes.Text("Used in: ")
        for number, (text, (name, anchor)) in enumerate(places):
            line += [nodes.Text("; ")] * bool(number)
            line += make_refnode(app.builder, page, name, anchor, nodes.Text(text))
        entry += line


def _mend_roles(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Take docutils' roles off the list: they say that it has items, but name its entries something else."""
    if 'class="citation-list"' in context.get("body", ""):
        body = context["body"].replace(
            '<div role="list" class="citation-list">', '<div class="citation-list">'
        )
        context["body"] = body.replace(' role="doc-biblioentry"', "")


def _read_again(app: Sphinx, page: str, source: list[str]) -> None:
    """The list says which pages cite a work, and so depends on all of them."""
    if "```{bibliography}" in source[0]:
        app.env.note_reread()


def setup(app: Sphinx) -> dict[str, Any]:
    """The Sphinx extension; `_config.yml` names the style."""
    pybtex.plugin.register_plugin("pybtex.style.formatting", "atlas", AtlasStyle)
    app.connect("source-read", _read_again)
    app.connect("doctree-resolved", _link_back)
    app.connect("html-page-context", _mend_roles)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
