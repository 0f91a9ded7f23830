"""The glossary: every name once, in order, and each term one that a chapter uses."""

import dataclasses
import re
import unicodedata
from pathlib import Path

import pytest

from llm_atlas.book.concepts import load_concepts
from llm_atlas.book.site.glossary import glossary_markdown, load_terms, markdown
from llm_atlas.book.site.links import cell_text, chapters_folder, escape, read_notebook


def _entries() -> dict[str, str]:
    # a term stands at the line's start inside a glossary, its definition is indented
    bodies = re.findall(r"^````\{glossary\}\n(.*?)^````", markdown(), re.MULTILINE | re.DOTALL)
    pairs = re.findall(r"^(\S.*)\n    (.+)$", "\n".join(bodies), re.MULTILINE)
    assert len({name.lower() for name, _ in pairs}) == len(pairs)
    # a name that is also a concept's id begins with a capital
    concepts = load_concepts()
    spelt = {name for c in concepts.values() for name in (c.name, *c.aliases)}
    ids = {id_.capitalize(): id_ for id_ in concepts if id_ in spelt}
    return {ids.get(name, name): text for name, text in pairs}


def test_no_term_is_spelt_as_a_target() -> None:
    concept = dataclasses.replace(load_concepts()["min-p"], aliases=("min-p", "MPS"))
    text = glossary_markdown({"min-p": concept}, [])
    assert "\nMin-p\n    See {term}`Min-p sampling`." in text
    assert "\nmin-p\n" not in text
    assert "\nMPS\n" in text


def test_every_name_and_alias_is_there_and_leads_on() -> None:
    entries = _entries()
    for concept in load_concepts().values():
        text = entries[escape(concept.name)]
        assert escape(concept.facts[0]) in text
        assert f"<table-{concept.id}>" in text
        assert (f"{{ref}}`section <{concept.id}>`" in text) is (concept.state != "planned")
        for alias in concept.aliases:
            if alias.lower() != concept.name.lower():
                assert entries[escape(alias)] == f"See {{term}}`{concept.name}`."
    for term in load_terms():
        assert escape(term.definition) in entries[escape(term.term)]
        for alias in term.aliases:
            assert entries[escape(alias)] == f"See {{term}}`{term.term}`."


def test_letters_and_names_are_in_order_and_every_letter_can_be_jumped_to() -> None:
    text = markdown()
    letters = re.findall(r"^## (\S+)$", text, re.MULTILINE)
    assert letters == sorted(letters)
    for letter in letters:
        assert f"- {{ref}}`{letter} <glossary-{letter[0].lower()}>`" in text
        assert f"(glossary-{letter[0].lower()})=\n## {letter}\n" in text
    plain = [unicodedata.normalize("NFKD", name).lower() for name in _entries()]
    names = [re.sub(r"[^a-z0-9]+", " ", name).strip() for name in plain]
    assert names == sorted(names)


def test_every_term_is_used_by_a_chapter() -> None:
    notebooks = [read_notebook(path.stem) for path in chapters_folder().glob("[0-9]*.ipynb")]
    text = " ".join(cell_text(c) for n in notebooks for c in n["cells"] if c["cell_type"] == "markdown")
    text = re.sub(r"[\s*]+", " ", text).lower()
    for term in load_terms():
        words = [re.escape(name.lower().removesuffix("s")) for name in (term.term, *term.aliases)]
        assert any(re.search(rf"\b{word}", text) for word in words), term.term


GOOD = """
- term: nat
  definition: "The unit of information of the natural logarithm."
  aliases: ["nats"]
  see: [perplexity]
"""


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "glossary.yml"
    path.write_text(GOOD)
    (term,) = load_terms(path)
    assert (term.term, term.aliases, term.see) == ("nat", ("nats",), ("perplexity",))
    text = glossary_markdown({}, [])
    assert "glossary}" not in text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("term: nat", "term: 3"), "2: term must be text, not 3"),
        (("term: nat", "term: ' nat'"), "2: term ' nat' must be text without space around it"),
        (("  definition", "  meaning"), "2: unknown field 'meaning'"),
        (('"The unit of', '"the unit of'), "2: the definition of 'nat' must be a sentence"),
        (('logarithm."', 'logarithm"'), "2: the definition of 'nat' must be a sentence"),
        (("[perplexity]", "[perplexed]"), "2: 'nat' points to 'perplexed', which is no concept"),
        (("[perplexity]", "perplexity"), "2: see must be a list of texts, not 'perplexity'"),
        (("term: nat", "term: dpo"), "2: 'dpo' is already the name of concept 'dpo'"),
        (('["nats"]', '["KV Cache"]'), "2: 'KV Cache' is already the name of concept 'kv-cache'"),
        (('["nats"]', '["Nat"]'), "2: 'Nat' is already the name of the term at glossary.yml:2"),
        (("- term: nat", "- term: [nat"), "3: not YAML"),
    ],
)
def test_a_planted_fault_names_file_and_line(tmp_path: Path, fault: tuple[str, str], message: str) -> None:
    path = tmp_path / "glossary.yml"
    assert fault[0] in GOOD
    path.write_text(GOOD.replace(*fault))
    with pytest.raises(ValueError, match=f"^glossary.yml:{re.escape(message)}"):
        load_terms(path)


def test_a_term_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "glossary.yml"
    path.write_text(GOOD + GOOD)
    with pytest.raises(
        ValueError, match=r"glossary.yml:7: 'nat' is already the name of the term at glossary.yml:2"
    ):
        load_terms(path)
