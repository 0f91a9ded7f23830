"""WordPiece: the tokenizer of BERT and of the sentence encoders made from it."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),  # 2B820 to 2B91F are left out by a slip that every copy of the code has kept
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""CJK ideographs, which are written without spaces; Hangul and kana are not among them."""


def words(text: str, *, lowercase: bool = True) -> list[str]:
    """BERT's words: cut at white space, around each punctuation mark and around each Chinese character.

    Control characters are dropped. With `lowercase`, as in the uncased models, accents are dropped too (the marks of
    Unicode's decomposed form NFD) and letters become small. Devlin et al. 2018, the released code's `BasicTokenizer`.
    """
    spaced = "".join(map(_spaced, text))
    if lowercase:
        bare = (c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn")
        # Letter by letter: as a whole word "ΟΔΟΣ" would end in another small sigma.
        spaced = "".join(c.lower() for c in bare)
    return "".join(f" {c} " if _is_punctuation(c) else c for c in spaced).split()


class WordPiece:
    """WordPiece with a given vocabulary: text -> words -> the longest pieces of them that the vocabulary has.

    Pieces that do not begin a word are written with `##`. A word that cannot be cut into pieces, or is longer than
    `longest` characters, becomes [UNK] as a whole. Cost: at most the square of a word's length.
    Schuster and Nakajima 2012, section 3 (the vocabulary); Devlin et al. 2018, the released code (the cutting).

    tokens: the vocabulary in the order of ids; [UNK], [CLS], [SEP] and [PAD] must be among them.
    """

    def __init__(self, tokens: Sequence[str], *, lowercase: bool = True, longest: int = 100) -> None:
        self.names = list(tokens)
        self.ids = {token: number for number, token in enumerate(self.names)}
        if len(self.ids) < len(self.names):
            twice = next(token for number, token in enumerate(self.names) if self.ids[token] != number)
            raise ValueError(f"token {twice!r} is in the vocabulary twice")
        if missing := [name for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if name not in self.ids]:
            raise ValueError(f"the vocabulary lacks {missing[0]}")
        self.unk_id, self.cls_id, self.sep_id, self.pad_id = (
            self.ids[name] for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]")
        )
        self.lowercase, self.longest = lowercase, longest

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, lowercase: bool = True) -> "WordPiece":
        """The tokenizer of a `vocab.txt`: one token a line, its id the line's number from 0."""
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return cls(
            [line.removesuffix("\r") for line in lines[: -1 if lines[-1] == "" else None]],
            lowercase=lowercase,
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.names)

    def tokens(self, text: str) -> list[str]:
        """The pieces of a text: "embeddings" -> em, ##bed, ##ding, ##s."""
        return [piece for word in words(text, lowercase=self.lowercase) for piece in self._pieces(word)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text's pieces. What looks like a special token in it is text: no [CLS] comes out."""
        return [self.ids[piece] for piece in self.tokens(text)]

    def frame(self, first: Sequence[int], second: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """[CLS] first [SEP], or [CLS] first [SEP] second [SEP], and the token type of each: 0, then 1 for the second.

        Devlin et al. 2018, section 3 and figure 2 (arXiv 1810.04805).
        """
        ids = [self.cls_id, *first, self.sep_id]
        types = [0] * len(ids)
        if second is not None:
            ids += [*second, self.sep_id]
            types += [1] * (len(second) + 1)
        return ids, types

    def _pieces(self, word: str) -> list[str]:
        if len(word) > self.longest:
            return ["[UNK]"]
        pieces: list[str] = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self.ids), None)
            if end is None:
                return ["[UNK]"]
            pieces.append(mark + word[start:end])
            start = end
        return pieces


def _spaced(c: str) -> str:
    """A character as it goes on: dropped, made a space, set between spaces, or as it is."""
    if c in "\t\n\r":
        return " "
    kind = unicodedata.category(c)
    if kind[0] == "Z":
        return " "
    # Not all of C: what is not assigned yet (Cn) may be a letter one day.
    if c in "\0\ufffd" or kind in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return f" {c} " if any(low <= ord(c) <= high for low, high in _CHINESE) else c


def _is_punctuation(c: str) -> bool:
    """Unicode's punctuation, and all of ASCII that is neither letter, digit, control nor space (such as $ and ^)."""
    return unicodedata.category(c)[0] == "P" or ("!" <= c <= "~" and not c.isalnum())
