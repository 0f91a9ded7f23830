"""What the generated pages share: plain text as MyST, the notebooks as they are committed, links to a concept's
section, exercise, sources and code.
"""

import ast
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_atlas.book.concepts import Concept
from llm_atlas.book.site.api import symbols
from llm_atlas.core.assets import bundled

__all__ = [
    "cell_text",
    "chapters_folder",
    "claim_cells",
    "code",
    "escape",
    "exercise_labels",
    "exercise_link",
    "json_script",
    "plural",
    "read_notebook",
    "ref",
    "source_links",
    "symbol_link",
]

_LABEL = re.compile(r"^:label: (ex-\S+)[ \t]*$", re.MULTILINE)


def chapters_folder() -> Path:
    """The folder of the notebooks and pages; only a checkout has one, beside its assets."""
    return bundled("concepts.yml").parent.parent / "chapters"


def escape(text: str) -> str:
    """Plain text such that MyST shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>{}$#|~])", r"\\\1", text)


def code(text: str) -> str:
    """Inline code that may itself hold backquotes; line ends become spaces."""
    text = re.sub(r"\s*\n\s*", " ", text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def json_script(data: Any) -> str:
    """Data for a page's script, as an element of the page."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # </script> and <!-- inside a string would end the element
    return f'<script type="application/json">{text.replace("<", chr(92) + "u003c")}</script>'


def plural(count: int, noun: str) -> str:
    """`1 claim`, `2 claims`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ---- notebooks


@lru_cache(maxsize=64)
def _parse(path: Path, _changed: int) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_notebook(slug: str, folder: Path | None = None) -> dict[str, Any] | None:
    """A chapter's notebook as committed, or None while the chapter is not written."""
    path = (folder or chapters_folder()) / f"{slug}.ipynb"
    return _parse(path, path.stat().st_mtime_ns) if path.is_file() else None


def cell_text(cell: Mapping[str, Any]) -> str:
    """A cell's source as one text, which a file may keep as a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def exercise_labels(notebook: Mapping[str, Any] | None) -> set[str]:
    """The labels of the exercises in a notebook, such as ex-lora."""
    cells = notebook["cells"] if notebook else []
    return {label for c in cells if c["cell_type"] == "markdown" for label in _LABEL.findall(cell_text(c))}


def claim_cells(notebook: Mapping[str, Any]) -> dict[str, int]:
    """The index of the code cell that calls `claim("id", ...)`, for each id; ValueError if two cells do."""
    found: dict[str, int] = {}
    for index, cell in enumerate(notebook["cells"]):
        text = cell_text(cell)
        if cell["cell_type"] != "code" or "claim(" not in text:
            continue
        # lines of IPython, which Python cannot read
        text = re.sub(r"^[%!].*$", "", text, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "claim" or not node.args:
                continue
            name = getattr(node.args[0], "value", None)
            if isinstance(name, str) and found.setdefault(name, index) != index:
                raise ValueError(f"cells {found[name]} and {index} both call claim({name!r})")
    return found


# ---- links


def ref(text: str, target: str) -> str:
    """A link to a target of the book. `[text](target)` would also find functions and terms of that name."""
    return f"{{ref}}`{text} <{target}>`"


def exercise_link(concept: Concept) -> str:
    """A link to the concept's exercise, or nothing while its chapter has none."""
    label = f"ex-{concept.id}"
    return ref("exercise", label) if label in exercise_labels(read_notebook(concept.chapter)) else ""


def source_links(concept: Concept) -> str:
    """The concept's sources as citations."""
    return f"{{cite:p}}`{','.join(concept.sources)}`"


def symbol_link(concept: Concept) -> str:
    """The concept's code and its module, linked where the API pages show it."""
    module, _, name = concept.symbol.rpartition(".")
    shown = f"{{py:obj}}`{name} <{concept.symbol}>`" if concept.symbol in symbols() else code(name)
    return f"{shown} in {code(module.removeprefix('llm_atlas.'))}"
