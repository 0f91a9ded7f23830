"""The reference tables: every concept has its row, every link from a chapter arrives."""

import dataclasses

from llm_atlas.book.concepts import chapters, load_concepts
from llm_atlas.book.site.tables import concept_row, tables_markdown


def test_every_concept_has_one_row_and_every_chapter_one_table() -> None:
    text = tables_markdown(chapters(), load_concepts())
    for concept in load_concepts().values():
        assert text.count(f"(table-{concept.id})=") == 1
    assert text.count("```{list-table}") == len(chapters()) == 22


def test_a_planned_row_answers_to_the_concept_itself_and_a_written_one_leads_there() -> None:
    concept = next(iter(load_concepts().values()))
    planned = concept_row(dataclasses.replace(concept, state="planned"))
    done = concept_row(dataclasses.replace(concept, state="done"))
    partial = concept_row(dataclasses.replace(concept, state="partial", missing="the rest, chapter 7"))
    assert f"\n    ({concept.id})=\n" in planned
    assert "planned" in planned
    for row in (done, partial):
        assert f"({concept.id})=" not in row
        assert f"[{concept.name}]({concept.id})" in row
    assert "the rest, chapter 7" in partial


def test_facts_and_formula_stand_in_the_row() -> None:
    concept = load_concepts()["self-attention"]
    row = concept_row(concept)
    assert concept.example in row
    assert all(fact in row for fact in concept.facts)
