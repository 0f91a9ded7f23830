"""The concept map of the front page."""

__all__ = ["markdown"]


def markdown() -> str:
    return ""
