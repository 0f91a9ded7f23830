"""What every chapter opens with: its table, what it builds on, how long it takes to read."""

from sphinx.application import Sphinx

__all__ = ["setup"]


def setup(app: Sphinx) -> None:
    pass
