"""The glossary: every name and abbreviation, and where it is explained."""

__all__ = ["markdown"]


def markdown() -> str:
    return ""
