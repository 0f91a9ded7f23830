"""The site's side of the book: a Sphinx extension that draws what Jupyter Book alone does not.

A page holds a line such as `% atlas: tables`; while the site is built, the generator of that name writes what
stands there, as MyST, from concepts.yml, claims.yml and the notebooks. Generators live one to a module and are
listed in `GENERATORS`. A generator's html carries one class that begins with `atlas-`; the page that has this
class loads the script and the style listed for it in `FILES`, and no other page does.
"""

import importlib
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from llm_atlas.core.assets import bundled

__all__ = ["FILES", "GENERATORS", "generate", "setup"]

# The name on the page, and the function without arguments that writes it.
GENERATORS = {
    "api": "llm_atlas.book.site.api:index",
    "api-core": "llm_atlas.book.site.api:core",
    "api-parts": "llm_atlas.book.site.api:parts",
    "api-models": "llm_atlas.book.site.api:models",
    "api-methods": "llm_atlas.book.site.api:methods",
    "api-systems": "llm_atlas.book.site.api:systems",
    "api-recipes": "llm_atlas.book.site.api:recipes",
    "api-book": "llm_atlas.book.site.api:book",
    "api-cli": "llm_atlas.book.site.api:cli",
    "claims": "llm_atlas.book.site.claims:markdown",
    "glossary": "llm_atlas.book.site.glossary:markdown",
    "map": "llm_atlas.book.site.concept_map:markdown",
    "numbers": "llm_atlas.book.site.front:numbers",
    "syllabus": "llm_atlas.book.course:syllabus",
    "tables": "llm_atlas.book.site.tables:markdown",
    "ways": "llm_atlas.book.site.front:ways",
}
# A class on a page, and what that page then loads from assets/site.
FILES = {
    "atlas-claims": ("claims.css", "claims.js"),
    "atlas-explore": ("explore.css", "explore.js"),
    "atlas-map": ("map.css", "map.js"),
}
# Other modules here that set something up in Sphinx themselves.
PARTS = ("api", "bibliography", "chapters", "explorables", "finish", "search", "validate")
_MARKER = re.compile(r"^% atlas: (\S+)[ \t]*$", re.MULTILINE)


def generate(name: str) -> str:
    """The MyST of one generator; ValueError for a name that none has."""
    if name not in GENERATORS:
        raise ValueError(f"% atlas: {name!r} is none of {', '.join(GENERATORS)}")
    module, _, function = GENERATORS[name].partition(":")
    return getattr(importlib.import_module(module), function)()


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if not _MARKER.search(source[0]):
        return
    # what stands here depends on other files than this one
    app.env.note_reread()

    def fill(found: re.Match[str]) -> str:
        try:
            return generate(found[1])
        except ValueError as error:
            line = source[0][: found.start()].count("\n") + 1
            raise ValueError(f"{app.env.doc2path(page)}:{line}: {error}") from error

    source[0] = _MARKER.sub(fill, source[0])


def _add_static(app: Sphinx) -> None:
    if app.builder.format == "html":
        # file by file: Jupyter Book loads every script of a static folder on every page
        names = [name for files in FILES.values() for name in files]
        app.config.html_static_path.extend(str(bundled(f"site/{name}")) for name in names)


def _load_on_page(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    # Jupyter Book has put every file of its static folder on the page already
    loaded = {str(getattr(file, "filename", file)).rpartition("/")[2] for file in context["script_files"]}
    for name, files in FILES.items():
        if not re.search(rf'class="([^"]* )?{name}[ "]', context.get("body", "")):
            continue
        for file in files:
            if file.endswith(".css"):
                app.add_css_file(file)
            elif file not in loaded:
                app.add_js_file(file, loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    """The Sphinx extension `llm_atlas.book.site`."""
    for part in PARTS:
        importlib.import_module(f"{__name__}.{part}").setup(app)
    app.connect("builder-inited", _add_static)
    app.connect("source-read", _fill)
    app.connect("html-page-context", _load_on_page)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
