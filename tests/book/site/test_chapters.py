"""What a chapter opens with, its reading time, and the targets of its claims."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes
from docutils.utils import new_document

from llm_atlas.book.concepts import chapters, load_concepts
from llm_atlas.book.site import chapters as site_chapters
from llm_atlas.book.site.chapters import ClaimTargets, opener, reading_time
from llm_atlas.book.site.links import read_notebook


def _notebook(*cells: tuple[str, str] | tuple[str, str, list[str]]) -> dict:
    return {
        "cells": [
            {"cell_type": kind, "source": text, "metadata": {"tags": tags[0] if tags else []}, "outputs": []}
            for kind, text, *tags in cells
        ]
    }


# ---- reading time


def test_words_lines_and_exercises_are_counted() -> None:
    time = reading_time(
        _notebook(
            ("markdown", "(target)=\n# Two words\n\nThree more *words* - and $x + y$.\n\n$$a b c d e f$$"),
            ("code", "x = 1\n\ny = 2"),
            ("code", "hidden = 1\nhidden = 2", ["hide-input"]),
            ("markdown", "```{exercise} Title\n:label: ex-x\n\nWrite it.\n```"),
            ("markdown", "```{solution} ex-x\nLong words that nobody has to read before.\n```"),
            ("markdown", "As here:\n\n```python\nz = 3\n```\n\nEnd."),
            ("raw", "nothing to read"),
        )
    )
    # Two words; Three more words and, $x, y$.; Write it.; As here: End.
    assert (time.words, time.lines, time.exercises) == (13, 3, 1)


@pytest.mark.parametrize(
    ("words", "lines", "exercises", "reading", "solving"),
    [(0, 0, 0, 5, 0), (2000, 0, 0, 10, 0), (0, 300, 0, 10, 0), (2000, 300, 9, 20, 70), (2600, 0, 1, 15, 10)],
)
def test_minutes_go_by_the_stated_rates(
    words: int, lines: int, exercises: int, reading: int, solving: int
) -> None:
    time = site_chapters.ReadingTime(words=words, lines=lines, exercises=exercises)
    assert (time.reading, time.solving) == (reading, solving)


def test_the_first_chapter_takes_about_as_long_as_it_says_itself() -> None:
    time = reading_time(read_notebook("01-core-transformer"))
    assert time.exercises == 9
    assert 90 <= time.reading + time.solving <= 150  # "about two hours with the exercises"


# ---- the opening


def test_the_opening_lists_the_chapters_own_concepts_and_no_other() -> None:
    concepts, chapter = load_concepts(), chapters()[0]
    text = opener(chapter, concepts, read_notebook(chapter.slug))
    table = text[: text.rindex("````")]
    for concept in concepts.values():
        own = concept.number == 1
        assert (f"* - {{ref}}`{concept.name} <{concept.id}>`\n" in table) is own
    assert table.count("\n* - ") == len(chapter.concepts) + 1
    assert all(f"{{ref}}`exercise <ex-{id_}>`" in table for id_ in chapter.concepts)
    assert "9 concepts · about" in text
    assert "9 exercises" in text
    assert "13 claims measured" in text


def test_builds_on_and_opens_later_name_other_chapters() -> None:
    concepts, (first, second) = load_concepts(), chapters()[:2]
    assert "**Builds on**" not in opener(first, concepts, _notebook())
    id_ = second.concepts[0]
    concepts[id_] = dataclasses.replace(concepts[id_], needs=("self-attention",), previews=("yarn", "dpo"))
    unwritten = second.concepts[-1]
    concepts[unwritten] = dataclasses.replace(concepts[unwritten], state="planned")
    text = opener(second, concepts, _notebook())
    needs = text[text.index("**Builds on**") :].partition("\n\n")[0]
    assert "{ref}`Self-attention (scaled dot-product) <self-attention>`" in needs
    later = text[text.index("**Opens later**") :]
    assert later.index("{ref}`DPO <dpo>` (chapter 7)") < later.index("{ref}`YaRN <yarn>`")
    # what belongs to the chapter itself is no other chapter's
    own = [f"<{name}>" for name in second.concepts]
    assert not any(link in needs + later for link in own)
    assert "(planned)" in text


def _read(page: str, notebook: dict, suffix: str = ".ipynb") -> dict:
    app = SimpleNamespace(env=SimpleNamespace(doc2path=lambda name: f"/book/{name}{suffix}"))
    source = [json.dumps(notebook)]
    site_chapters._open_chapter(app, page, source)
    return json.loads(source[0])


@pytest.mark.untyped  # a stand-in for the application
def test_the_opening_stands_at_the_end_of_the_titles_cell() -> None:
    notebook = _notebook(("markdown", "A badge"), ("markdown", "# Title\n\nWords."), ("code", "x = 1"))
    read = _read("chapters/01-core-transformer", notebook)
    assert read["cells"][1]["source"].startswith("# 1. Title\n\nWords.\n\n")
    assert "atlas-opener" in read["cells"][1]["source"]
    # every other cell keeps its place, so that a warning names the right one
    assert [c["source"] for c in read["cells"][::2]] == ["A badge", "x = 1"]
    assert _read("chapters/other", notebook) == notebook
    assert _read("chapters/01-core-transformer", notebook, ".md") == notebook


@pytest.mark.untyped  # a stand-in for the application
def test_a_chapter_without_a_title_is_refused() -> None:
    with pytest.raises(ValueError, match=r"01-core-transformer.ipynb: no cell begins with the title"):
        _read("chapters/01-core-transformer", _notebook(("markdown", "Words.")))


# ---- targets of claims


def test_each_claim_of_a_cell_has_its_target(tmp_path: Path) -> None:
    path = tmp_path / "01-x.ipynb"
    path.write_text(
        json.dumps(
            _notebook(
                ("code", "x = 1"), ("code", 'claim("a", 1)\nclaim("b", 2)'), ("code", 'claim("c-0.1", 3)')
            )
        )
    )
    document = new_document("x")
    for index in range(3):
        document += nodes.container(nb_element="cell_code", cell_index=index)
    document.settings.env = SimpleNamespace(docname="x", doc2path=lambda name: str(path))
    ClaimTargets(document).apply()
    cells = [node for node in document.children if isinstance(node, nodes.container)]
    assert [cell["ids"] for cell in cells] == [[], ["claim-a", "claim-b"], ["claim-c-0-1"]]
    # and below each, the way to the claims' rows
    below = [node.astext() for node in document.children if isinstance(node, nodes.raw)]
    # docutils gives the row an id without a dot
    assert [re.findall(r"claims\.html#ledger-([^\"]+)", line) for line in below] == [["a", "b"], ["c-0-1"]]
    assert [document.children.index(cell) for cell in cells] == [0, 1, 3]
    for name, cell in (("claim-a", 1), ("claim-b", 1), ("claim-c-0.1", 2)):
        assert document.ids[document.nameids[name]] is cells[cell]
        assert document.nametypes[name]
