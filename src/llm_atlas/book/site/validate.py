"""What must hold before a page is built, each fault with its file and line."""

from sphinx.application import Sphinx

__all__ = ["setup"]


def setup(app: Sphinx) -> None:
    app.setup_extension("llm_atlas.book.site.finish")
