"""What must hold before a page is built, each fault with its file and line.

`problems` reads the sources alone: no page is built and nothing of the book is imported, so that a build stops
within a second. What only the pages show, a dead link or anchor, is found in them and led back to its source
by `place`. A notebook's faults name the line in its file and the cell, counted from 1.
"""

import ast
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx

from llm_atlas.book.claims import load_claims
from llm_atlas.book.concepts import Concept, load_concepts, read_yaml
from llm_atlas.book.site.claims import measurements

__all__ = ["place", "problems", "setup"]

_TARGET = re.compile(r"^\(([a-z0-9-]+)\)=[ \t]*$", re.MULTILINE)
_CLAIM = re.compile(r"\bclaim\(\s*[\"']([^\"']+)[\"']")
_KEY = re.compile(r"^\s*@\w+\s*\{\s*([^\s,]+)\s*,", re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]\[]*\]\(\s*<?([^()\s<>]+)>?[^()]*\)|<a\s[^>]*?href=\"([^\"]+)\"")
_CODE = re.compile(r"^(```+|~~~+).*?^\1[`~]*[ \t]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_NOTEBOOK_LINE = re.compile(r"(.*\.ipynb):(\d{5,})$")


@dataclass(frozen=True)
class Cell:
    """One cell of a notebook; a Markdown page is one cell with `number` 0. `line` is its first in the file."""

    number: int
    kind: str
    text: str
    line: int


def cells(path: Path) -> list[Cell]:
    """The cells of a notebook, or a Markdown page as one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return [Cell(0, "markdown", text, 1)]
    # in a notebook as Jupyter writes it, each line of a cell has a line of its own, below its "source"
    starts = [n for n, line in enumerate(text.split("\n"), start=1) if re.match(r' {1,4}"source": ', line)]
    found = json.loads(text)["cells"]
    if len(starts) != len(found):
        starts = [1] * len(found)
    return [
        Cell(number, cell["cell_type"], "".join(cell["source"]), start + 1)
        for number, (cell, start) in enumerate(zip(found, starts, strict=True), start=1)
    ]


def _at(path: Path, cell: Cell, offset: int, root: Path) -> str:
    """`path:line`, with the cell, of a place in a cell's text."""
    line = cell.line + cell.text.count("\n", 0, offset)
    return f"{path.relative_to(root)}:{line}" + (f" (cell {cell.number})" if cell.number else "")


@lru_cache(maxsize=256)
def _names(path: Path) -> dict[str, ast.stmt | None]:
    """What a module defines or imports at its top level."""
    found: dict[str, ast.stmt | None] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: None for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: None for target in targets if isinstance(target, ast.Name)}
    return found


def _lacks_symbol(symbol: str, root: Path) -> bool:
    parts = symbol.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = root.joinpath("src", *parts[:end])
        file = next((f for f in (module.with_suffix(".py"), module / "__init__.py") if f.is_file()), None)
        if file:
            name, *rest = parts[end:]
            node = _names(file).get(name)
            if rest and isinstance(node, ast.ClassDef) and not node.bases:
                return rest[0] not in {getattr(child, "name", None) for child in node.body}
            return name not in _names(file)
    return True


def _lacks_test(test: str, root: Path) -> bool:
    path, _, name = test.partition("::")
    return not (root / path).is_file() or bool(name and name not in _names(root / path))


def _concept_problems(
    concept: Concept, where: str, root: Path, targets: dict[str, set[str]]
) -> Iterator[str]:
    if not concept.is_written:
        return
    said = f"{where}: {concept.id!r} is {concept.state}, but"
    if concept.chapter not in targets:
        yield f"{said} there is no chapters/{concept.chapter}.ipynb"
    elif concept.id not in targets[concept.chapter]:
        yield f"{said} chapters/{concept.chapter}.ipynb has no target ({concept.id})="
    if concept.state == "done" and _lacks_symbol(concept.symbol, root):
        yield f"{said} there is no {concept.symbol}"
    if concept.state == "done" and _lacks_test(concept.test, root):
        yield f"{said} there is no test {concept.test}"


def _link_problems(path: Path, root: Path) -> Iterator[str]:
    """Links from a page to files that do not exist. What MyST resolves itself (targets) it checks itself."""
    for cell in cells(path):
        if cell.kind != "markdown":
            continue
        # code is blanked, so that places stay
        text = _CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), cell.text)
        for found in _LINK.finditer(text):
            address = found[1] or found[2]
            parts = urlsplit(address)
            name = unquote(parts.path)
            if parts.scheme or parts.netloc or not Path(name).suffix or name.startswith("/"):
                continue
            file = path.parent / name
            pages = (
                [file.with_suffix(suffix) for suffix in (".md", ".ipynb")] if file.suffix == ".html" else []
            )
            if not any(candidate.is_file() for candidate in (file, *pages)):
                yield f"{_at(path, cell, found.start(), root)}: dead link {address}"


def problems(root: Path) -> list[str]:
    """Faults of the book's sources below `root`, one line each that begins with file and line."""
    assets, chapters = root / "assets", root / "chapters"
    pages = sorted(path for suffix in ("*.md", "*.ipynb") for path in chapters.rglob(suffix))
    try:
        read = {path: cells(path) for path in pages}
    except (json.JSONDecodeError, KeyError) as error:
        broken = next(path for path in pages if path.suffix == ".ipynb" and not _is_notebook(path))
        line = getattr(error, "lineno", 1)
        return [f"{broken.relative_to(root)}:{line}: not a notebook: {error}"]
    found = [problem for path in pages for problem in _link_problems(path, root)]
    try:
        concepts = load_concepts(assets / "concepts.yml")
        claims = load_claims(assets / "claims.yml")
    except FileNotFoundError as error:
        return [*found, f"{Path(error.filename).relative_to(root)}:1: there is no such file"]
    except ValueError as error:
        return [*found, f"assets/{error}"]

    known = set(_KEY.findall((assets / "references.bib").read_text(encoding="utf-8")))
    targets = {
        path.stem: {id for cell in read[path] if cell.kind == "markdown" for id in _TARGET.findall(cell.text)}
        for path in pages
        if path.parent == chapters
    }
    calls = {
        path.stem: [
            (call[1], _at(path, cell, call.start(), root))
            for cell in read[path]
            if cell.kind == "code"
            for call in _CLAIM.finditer(cell.text)
        ]
        for path in pages
    }
    for row in read_yaml(assets / "concepts.yml"):
        for entry in row["concepts"]:
            where = f"assets/concepts.yml:{entry['__line__']}"
            concept = concepts[entry["id"]]
            found += _concept_problems(concept, where, root, targets)
            unknown = [key for key in concept.sources if key not in known]
            found += [
                f"{where}: {concept.id!r} has source {key!r}, no key of references.bib" for key in unknown
            ]
    for entry in read_yaml(assets / "claims.yml"):
        where, claim = f"assets/claims.yml:{entry['__line__']}", claims[entry["id"]]
        if claim.source not in known:
            found.append(f"{where}: claim {claim.id!r} has source {claim.source!r}, no key of references.bib")
        chapter, _, target = claim.cell.partition("#")
        if claim.state == "measured" and chapter in targets and target not in targets[chapter]:
            found.append(
                f"{where}: claim {claim.id!r} has cell {claim.cell!r}, but there is no target ({target})="
            )
        elif chapter != claim.chapter or target not in concepts:
            found.append(
                f"{where}: claim {claim.id!r} has cell {claim.cell!r}, wanted {claim.chapter}#target"
            )
        if claim.state == "measured" and claim.id not in {id for id, _ in calls.get(claim.chapter, [])}:
            found.append(
                f"{where}: claim {claim.id!r} is measured, "
                f'but no cell of {claim.chapter} calls claim("{claim.id}", ...)'
            )
    for chapter, made in calls.items():
        for id, at in made:
            if id not in claims:
                found.append(f"{at}: claim({id!r}) has no row in assets/claims.yml")
            elif claims[id].chapter != chapter:
                found.append(f"{at}: claim({id!r}) belongs to {claims[id].chapter}, assets/claims.yml says")
    if not found:
        try:
            measurements(assets / "claims.yml", chapters)
        except ValueError as error:
            found.append(f"assets/{error}")
    return found


def _is_notebook(path: Path) -> bool:
    try:
        return "cells" in json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False


def place(page: str, address: str, root: Path) -> str:
    """Where a link of a built page was written: `path:line`, its generator's if no source holds it.

    `page` is the page's address in the site, such as chapters/tables.html; `address` the link as it stands
    there.
    """
    stem = root / Path(page).with_suffix("")
    source = next((p for p in (stem.with_suffix(".ipynb"), stem.with_suffix(".md")) if p.is_file()), None)
    generated = [root / "assets" / name for name in ("concepts.yml", "claims.yml")]
    generated += sorted((root / "src/llm_atlas/book/site").glob("*.py"))
    anchor = address.partition("#")[2]
    # the address itself, as a Markdown page has it before its suffix changes, or the target alone
    wanted = [address, address.replace(".html", ".md"), address.replace(".html", ".ipynb")]
    wanted += [f"({anchor})"] if anchor else []
    for file in [*([source] if source else []), *generated]:
        if not file.is_file():
            continue
        for cell in cells(file):
            text = cell.text
            for text_wanted in wanted:
                if cell.kind == "markdown" and text_wanted and text_wanted in text:
                    return _at(file, cell, text.index(text_wanted), root)
    if source:
        text = source.read_text(encoding="utf-8")
        marker = re.search(r"^% atlas: (\S+)", text, re.MULTILINE)
        if marker:
            line = text.count("\n", 0, marker.start()) + 1
            return f"{source.relative_to(root)}:{line} (written by the generator {marker[1]!r})"
        return f"{source.relative_to(root)}:1"
    return page


class _NotebookLines(logging.Filter):
    """MyST-NB counts the lines of cell n from 10000 n; the reader wants the file's own."""

    def filter(self, record: logging.LogRecord) -> bool:
        location = getattr(record, "location", None)
        found = _NOTEBOOK_LINE.match(location) if isinstance(location, str) else None
        if found:
            number, line = divmod(int(found[2]), 10000)
            all_cells = cells(Path(found[1]))
            if 1 <= number <= len(all_cells):
                record.location = (
                    f"{found[1]}:{all_cells[number - 1].line + max(line, 1) - 1} (cell {number})"
                )
        return True


def setup(app: Sphinx) -> None:
    # after Sphinx's own filter, which writes the location as text
    for handler in logging.getLogger("sphinx").handlers:
        handler.addFilter(_NotebookLines())
