"""Index entries, so that the search finds a concept by name, abbreviation and symbol."""

from sphinx.application import Sphinx

__all__ = ["setup"]


def setup(app: Sphinx) -> None:
    pass
