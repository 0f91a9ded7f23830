"""The reference tables: every concept has its row, every link from a chapter arrives."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from llm_atlas.book.concepts import Concept, chapters, load_concepts
from llm_atlas.book.site import links
from llm_atlas.book.site.tables import concept_row, tables_markdown, written_line


@pytest.fixture
def concept() -> Concept:
    return load_concepts()["self-attention"]


def test_every_concept_has_one_row_and_every_chapter_one_table() -> None:
    text = tables_markdown(chapters(), load_concepts())
    for concept in load_concepts().values():
        assert text.count(f"(table-{concept.id})=") == 1
    assert text.count("````{list-table}") == len(chapters()) == 22
    for chapter in chapters():
        assert text.count(f"(table-{chapter.number})=") == 1
        assert f"<table-{chapter.number}>`" in text


def test_a_planned_row_answers_to_the_concept_itself_and_a_written_one_leads_there(concept: Concept) -> None:
    planned = concept_row(dataclasses.replace(concept, state="planned"))
    done = concept_row(dataclasses.replace(concept, state="done"))
    partial = concept_row(dataclasses.replace(concept, state="partial", missing="the rest, chapter 7"))
    assert f"\n    ({concept.id})=\n" in planned
    assert "[planned]" in planned
    assert "`section <" not in planned
    for row in (done, partial):
        assert f"({concept.id})=" not in row
        assert f"**{{ref}}`{concept.name} <{concept.id}>`**" in row
        assert f"{{ref}}`section <{concept.id}>`" in row
        assert "[planned]" not in row
    assert "the rest, chapter 7" in partial


def test_a_row_says_what_the_list_says(concept: Concept) -> None:
    row = concept_row(concept)
    assert f"`{concept.example}`" in row
    assert all(fact in row for fact in concept.facts)
    assert all(alias in row for alias in concept.aliases)
    assert "{cite:p}`vaswani2017`" in row
    assert "{ref}`exercise <ex-self-attention>`" in row
    assert concept.symbol.rpartition(".")[2] in row
    many = dataclasses.replace(concept, sources=("vaswani2017", "he2016"), id="no-exercise")
    assert "{cite:p}`vaswani2017,he2016`" in concept_row(many)
    assert "`exercise <" not in concept_row(many)


def test_text_that_is_markup_is_shown_as_it_is(concept: Concept) -> None:
    row = concept_row(dataclasses.replace(concept, facts=("a_b *c* <d> [e]",), example="a `b`"))
    assert r"a\_b \*c\* \<d\> \[e\]" in row
    assert "`` a `b` ``" in row


def test_a_heading_says_how_much_is_written() -> None:
    concepts = {id_: dataclasses.replace(c, state="planned") for id_, c in load_concepts().items()}
    chapter = chapters()[-1]  # the last to be written
    assert "0 of 7 written" in written_line(chapter, concepts)
    assert "width: 0%" in written_line(chapter, concepts)
    assert "{doc}" not in written_line(chapter, concepts)
    first, second, third, *_ = chapter.concepts
    for id_, state in ((first, "done"), (second, "done"), (third, "partial")):
        concepts[id_] = dataclasses.replace(concepts[id_], state=state)
    line = written_line(chapter, concepts)
    assert "2 of 7 written, 1 in part" in line
    assert "width: 36%" in line
    assert "</chapters/01-core-transformer>" in written_line(chapters()[0], load_concepts())


# ---- what the generators share


def test_code_is_linked_only_where_the_api_pages_document_it() -> None:
    concept = load_concepts()["causal-mask"]
    assert (
        links.symbol_link(concept) == "{py:obj}`causal_mask <llm_atlas.nn.masks.causal_mask>` in `nn.masks`"
    )
    for name in ("not_written_yet", "_hidden"):
        other = dataclasses.replace(concept, symbol=f"llm_atlas.nn.masks.{name}")
        assert links.symbol_link(other) == f"`{name}` in `nn.masks`"


def test_claim_cells_reads_calls_and_nothing_else(tmp_path: Path) -> None:
    def notebook(*cells: str) -> dict:
        return {"cells": [{"cell_type": "code", "source": text, "metadata": {}} for text in cells]}

    found = links.claim_cells(
        notebook(
            "x = 1",
            "%matplotlib inline\n# claim('no')\nclaim('a', 1)\nclaim(\n  'b', 2)",
            "s = \"claim('c')\"",
        )
    )
    assert found == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match=r"cells 0 and 1 both call claim\('a'\)"):
        links.claim_cells(notebook("claim('a', 1)", "claim('a', 2)"))


def test_a_notebook_that_changed_is_read_again(tmp_path: Path) -> None:
    assert links.read_notebook("01-x", tmp_path) is None
    path = tmp_path / "01-x.ipynb"
    for number in (1, 2):
        path.write_text(json.dumps({"cells": [], "n": number}))
        # a fast disk may give both writes one time
        os.utime(path, ns=(number, number))
        assert links.read_notebook("01-x", tmp_path)["n"] == number
