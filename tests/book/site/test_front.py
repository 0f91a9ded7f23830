"""The front page's numbers are those of the data, and its links arrive."""

import re

import pytest

from llm_atlas.book.claims import load_claims
from llm_atlas.book.concepts import chapters, load_concepts
from llm_atlas.book.site import front, generate


def test_the_numbers_are_counted() -> None:
    text = front.numbers()
    numbers = [int(number) for number in re.findall(r"<strong>(\d+)</strong>", text)]
    assert numbers == [len(chapters()), len(load_concepts()), len(load_claims())]
    written = [concept for concept in load_concepts().values() if concept.state != "planned"]
    assert f"{len(written)} written" in text
    whole = [c for c in chapters() if all(load_concepts()[id_].state != "planned" for id_ in c.concepts)]
    assert f"chapters, <br>{len(whole)} written" in text
    assert f"{sum(row.state == 'measured' for row in load_claims().values())} measured" in text


def test_the_first_way_in_is_the_first_written_chapter() -> None:
    first = re.search(r'<nav.*?<a href="([^"]+)">([^<]+)<', front.ways(), re.DOTALL)
    assert first
    assert first.groups() == ("01-core-transformer.html", "Start with chapter 1")


def test_an_unknown_generator_is_named() -> None:
    with pytest.raises(ValueError, match="'mapp' is none of api, "):
        generate("mapp")
