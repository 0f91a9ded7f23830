"""The book's machinery: concept list, self-grading exercises, claims, figures and explorables.

A chapter needs four names: `check` grades an exercise, `claim` judges a figure that others quote, `explore`
makes an interactive drawing, `style.use()` sets the look. All but `explore` are loaded on first use, so that
reading the concept list does not import torch or matplotlib.
"""

import importlib
from typing import TYPE_CHECKING

# Loaded now, not on first use: importing the module of the same name later would hide the function.
from llm_atlas.book.explore import Bars, Heatmap, Lines, Tokens, explore

if TYPE_CHECKING:
    from llm_atlas.book import style
    from llm_atlas.book.checks import check
    from llm_atlas.book.claims import claim

__all__ = ["Bars", "Heatmap", "Lines", "Tokens", "check", "claim", "explore", "style"]

_HOME = {"check": "checks", "claim": "claims"}


def __getattr__(name: str) -> object:
    if name == "style":
        return importlib.import_module(f"{__name__}.style")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
