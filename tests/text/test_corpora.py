"""Corpora: the text itself, bytes and back, and windows that stay inside."""

import ast
import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_atlas.core.assets import fetch
from llm_atlas.core.seeds import generator
from llm_atlas.text import corpora
from llm_atlas.text.corpora import byte_ids, byte_text, king_james, random_windows, split_held_out


@pytest.fixture(scope="module")
def bible():
    return king_james()


def test_king_james_is_whole_and_plain(bible):
    assert bible.startswith("In the beginning God created the heaven and the earth. And the earth was")
    assert bible.endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert len(bible) == 4_138_977
    assert len(bible.splitlines()) == 4_635
    assert "For God so loved the world, that he gave his only begotten Son" in bible
    assert not set(bible) & set("[]<>{}0123456789\\")


def test_nothing_of_the_package_is_run(tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(
        "import no_such_package\nraise SystemExit\nbible = Bible(print('run'), '''\\nA [small] text.''', 1)\n"
    )
    assert corpora._read_king_james(trap) == "A small text."


def test_a_file_that_is_another_is_refused(tmp_path):
    other = tmp_path / "other.py"
    other.write_text("x = 1\n")
    with pytest.raises(ValueError, match="holds no text of the form"):
        corpora._read_king_james(other)


def test_the_text_is_the_literal_in_the_file(bible):
    # An independent way to it: the longest string constant of the whole file.
    tree = ast.parse(fetch(corpora.KING_JAMES).read_text(encoding="utf-8"))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    longest = max((value for value in constants if isinstance(value, str)), key=len)
    kept = collections.Counter(longest.strip())
    del kept["["], kept["]"]
    assert collections.Counter(bible) == kept


@given(st.text(min_size=1))
def test_bytes_and_back(text):
    ids = byte_ids(text)
    assert ids.dtype == torch.int64
    assert ids.tolist() == list(text.encode())
    assert byte_text(ids) == text


def test_bytes_cut_in_a_letter_become_the_replacement_sign():
    assert byte_text(byte_ids("aé")[:-1]) == "a\ufffd"


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="text is empty"):
        byte_ids("")


def test_the_split_takes_nothing_twice_and_loses_nothing():
    ids = torch.arange(103)
    train, held_out = split_held_out(ids, 0.1)
    assert torch.equal(torch.cat([train, held_out]), ids)
    assert len(held_out) == 10
    assert train.data_ptr() == ids.data_ptr()  # a view


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_that_is_none(fraction):
    with pytest.raises(ValueError, match=r"fraction .* must be above 0 and below 1"):
        split_held_out(torch.arange(10), fraction)


def test_too_few_tokens_to_split():
    with pytest.raises(ValueError, match=r"3 tokens are too few to hold out 0\.1 of them"):
        split_held_out(torch.arange(3), 0.1)


def test_windows_are_runs_of_the_text_and_reach_both_ends():
    ids = torch.arange(10)
    windows = random_windows(ids, batch=500, length=4, generator=generator(0))
    assert windows.shape == (500, 4)
    assert torch.equal(windows - windows[:, :1], torch.arange(4).expand(500, 4))
    assert set(windows[:, 0].tolist()) == set(range(7))


def test_the_generator_alone_decides_the_windows():
    ids = torch.arange(1000)
    first, again, other = (random_windows(ids, batch=4, length=8, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_window_may_be_the_whole_text_and_no_more():
    ids = torch.arange(5)
    assert torch.equal(random_windows(ids, batch=2, length=5, generator=generator(0)), ids.expand(2, 5))
    with pytest.raises(ValueError, match="windows of 6 tokens do not fit a text of 5"):
        random_windows(ids, batch=2, length=6, generator=generator(0))
    with pytest.raises(ValueError, match="batch 0 and length 5 must be at least 1"):
        random_windows(ids, batch=0, length=5, generator=generator(0))
