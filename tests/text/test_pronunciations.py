"""The pronouncing dictionary as data, and the distance between a guess and the truth."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_atlas.core.assets import fetch
from llm_atlas.text.pronunciations import (
    CMUDICT,
    PHONEMES,
    edit_distance,
    error_rates,
    pronunciations,
    read_pronunciations,
    split_words,
)

SMALL = """\
'bout B AW1 T
a AH0
read R EH1 D # past
read(2) R IY1 D
read(3) R EH2 D

x-ray EH1 K S R EY2
co-op K OW1 AA2 P
vis-a-vis V IY1 Z AH0 V IY1
zoo Z UW1"""


def test_what_is_kept_of_a_dictionary():
    assert read_pronunciations(SMALL) == {
        "read": [("R", "EH", "D"), ("R", "IY", "D")],  # the third is the first with another stress
        "zoo": [("Z", "UW")],
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zoo", "line 1: 'zoo' has no sounds"),
        ("zoo Z UX1", "line 1: 'zoo' has the sound 'UX', which is none of the 39"),
        ("ok OW0 K EY1\nzoo(2) Z # UW", None),
    ],
)
def test_damaged_lines(line: str, message: str | None):
    if message is None:
        assert read_pronunciations(line)["zoo"] == [("Z",)]
    else:
        with pytest.raises(ValueError, match=message):
            read_pronunciations(line)


def test_the_real_dictionary():
    said = pronunciations()
    assert len(said) == 117_467
    assert said["thought"] == [("TH", "AO", "T")]
    assert said["record"][:2] == [("R", "AH", "K", "AO", "R", "D"), ("R", "EH", "K", "ER", "D")]
    assert {sound for ways in said.values() for way in ways for sound in way} == set(PHONEMES)
    lines = fetch(CMUDICT).read_text(encoding="utf-8").splitlines()
    words = {line.split()[0].split("(")[0] for line in lines}
    assert set(said) == {word for word in words if len(word) > 1 and word.isascii() and word.isalpha()}


def test_the_split_has_each_word_once():
    said = pronunciations()
    split = split_words(said)
    assert [len(part) for part in split] == [113_467, 2000, 2000]
    assert len(set().union(*split)) == sum(map(len, split)) == len(said)
    assert split == split_words(list(reversed(said)))
    assert split.test != split_words(said, seed=1).test
    # Drawn from everywhere, not from one end of the alphabet.
    assert len({word[0] for word in split.test}) == 26


@pytest.mark.parametrize("held_out", [0, 2, 3])
def test_a_split_leaves_something(held_out: int):
    with pytest.raises(ValueError, match=f"held_out {held_out} must be at least 1 and leave some of 4 words"):
        split_words(["aa", "bb", "cc", "dd"], held_out=held_out)


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_the_shortest_way(a: str, b: str):
    @functools.cache
    def fewest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        if a[i] == b[j]:
            return fewest(i + 1, j + 1)
        return 1 + min(fewest(i + 1, j), fewest(i, j + 1), fewest(i + 1, j + 1))

    assert edit_distance(a, b) == edit_distance(b, a) == fewest(0, 0)


def test_error_rates_take_the_nearest_way():
    guesses = [["R", "IY", "D"], ["Z", "UW", "Z"], []]
    references = [[("R", "EH", "D"), ("R", "IY", "D")], [("Z", "UW")], [("K", "AE", "T"), ("K", "IH")]]
    rates = error_rates(guesses, references)
    # 0 of 3, 1 of 2, and for the empty guess 2 of 2: the shorter way is nearer.
    assert rates.phoneme == pytest.approx(3 / 7)
    assert rates.word == pytest.approx(2 / 3)
    assert error_rates([("Z", "UW")], [[["Z", "UW"]]]) == (0, 0)
    # Two ways are equally near: the first, usual one counts.
    assert error_rates([["K", "AE"]], [[("K", "AE", "T"), ("K",)]]).phoneme == pytest.approx(1 / 3)


@pytest.mark.parametrize(("guesses", "references"), [([], []), ([["Z"]], [[]])])
def test_error_rates_need_words(guesses: list, references: list):
    with pytest.raises(ValueError, match="at least one is needed, and a reference for each"):
        error_rates(guesses, references)
