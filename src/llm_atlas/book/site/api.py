"""The API pages: autodoc with our docstrings, each symbol linked with its concept."""

from sphinx.application import Sphinx

__all__ = ["setup"]


def setup(app: Sphinx) -> None:
    pass
