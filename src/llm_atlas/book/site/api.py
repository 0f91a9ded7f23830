"""The API pages: every public name of the package by layer, each linked with its concept and back.

What a page lists is read from the sources when the site is built: a new module appears by itself. A new
package goes into `PAGES`; tests/book/site/test_api.py finds the module that is on no page.
"""

import ast
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from llm_atlas.book.concepts import Concept, load_concepts
from llm_atlas.book.site.docstrings import escape, markdown_to_rst

__all__ = ["PAGES", "Module", "Page", "concepts_of", "markdown", "modules", "setup", "symbols"]

PACKAGE = "llm_atlas"
_ROOT = Path(__file__).parents[2]
_PARAMETERS = re.compile(r'<dl>\n((?:<dd><em class="sig-param">.*?</dd>\n)+)</dl>', re.DOTALL)
# A value longer than this is not shown beside its constant.
_SHOWN = 70


@dataclass(frozen=True, kw_only=True)
class Page:
    """One API page: its layer, the packages on it, and what they have in common in a few words."""

    layer: int
    packages: tuple[str, ...]
    about: str


# In the order of the layers; a package may import those above its own line, and what is said in tests/test_layers.py.
PAGES = {
    "core": Page(layer=0, packages=("core",), about="devices, seeds, fetched files, weight files"),
    "parts": Page(layer=1, packages=("nn", "text"), about="what models are made of, and text as numbers"),
    "models": Page(layer=2, packages=("models", "train", "infer"), about="whole models, trained and run"),
    "methods": Page(
        layer=3,
        packages=("adapt", "align", "compress", "parallel", "merge", "scaling"),
        about="what is done to a model",
    ),
    "systems": Page(
        layer=4,
        packages=("prompt", "retrieve", "agents", "evaluate"),
        about="what is built around a model",
    ),
    "recipes": Page(layer=5, packages=("recipes",), about="how house models and committed results were made"),
    "book": Page(layer=6, packages=("book",), about="concept list, exercises, claims, drawings, this site"),
    "cli": Page(layer=7, packages=("cli",), about="the command line"),
}


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module as its source has it: `names` are the public ones defined in it, in order, each with its kind
    (function, class or data) and, for data, the expression."""

    name: str
    path: Path
    names: Mapping[str, tuple[str, str]]
    methods: frozenset[str]
    is_package: bool


@functools.cache
def modules() -> dict[str, Module]:
    """All public modules of the package by dotted name, a package before its modules."""
    found = {}
    for path in sorted(_ROOT.rglob("*.py"), key=lambda path: (*path.parent.parts, path.stem)):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        if any(part.startswith("_") for part in parts):
            continue
        name = ".".join((PACKAGE, *parts))
        found[name] = _read(name, path, is_package)
    return dict(sorted(found.items()))


def _read(name: str, path: Path, is_package: bool) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: dict[str, tuple[str, str]] = {}
    methods: set[str] = set()
    listed: list[str] | None = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = ("class" if isinstance(node, ast.ClassDef) else "function", "")
            if isinstance(node, ast.ClassDef):
                methods |= {
                    f"{node.name}.{method.name}"
                    for method in node.body
                    if isinstance(method, ast.FunctionDef)
                    and ast.get_docstring(method)
                    and (method.name == "__call__" or not method.name.startswith("_"))
                }
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id == "__all__":
                    listed = ast.literal_eval(node.value)
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple):
                    values = node.value.elts if isinstance(node.value, ast.Tuple) else []
                    pairs = [*zip(target.elts, values, strict=False)]
                for one, value in pairs:
                    # a lower-case name is a working part of the module, such as a command-line application
                    if isinstance(one, ast.Name) and one.id[0].isupper():
                        names[one.id] = ("data", ast.unparse(value))
    public = {
        key: kind
        for key, kind in names.items()
        if (not key.startswith("_") if listed is None else key in listed)
    }
    methods = {method for method in methods if method.partition(".")[0] in public}
    return Module(name=name, path=path, names=public, methods=frozenset(methods), is_package=is_package)


@functools.cache
def symbols() -> frozenset[str]:
    """Dotted names of everything on the API pages."""
    return frozenset(
        f"{module.name}.{name}"
        for module in modules().values()
        if not module.name.startswith(f"{PACKAGE}.cli")
        for name in (*module.names, *module.methods)
    )


def concepts_of(symbol: str) -> list[Concept]:
    """The concepts whose implementation `symbol` is, in the book's order."""
    return [concept for concept in load_concepts().values() if concept.symbol == symbol]


# ---- generators


def markdown(page: str) -> str:
    """The modules of one page, as MyST with autodoc's directives."""
    parts = []
    for package in PAGES[page].packages:
        prefix = f"{PACKAGE}.{package}"
        for name, module in modules().items():
            if name == prefix or name.startswith(f"{prefix}."):
                parts.append(_section(module))
    if page == "cli":
        parts += [_help(["llm-atlas"]), *(_help(["llm-atlas", name]) for name in _commands())]
    return "\n\n".join(parts)


def _section(module: Module) -> str:
    lines = [f".. automodule:: {module.name}", ""]
    for name, (kind, value) in module.names.items():
        if module.name == f"{PACKAGE}.cli":  # the commands' own help says it better
            break
        if kind == "data":
            lines += [f".. py:data:: {name}"]
            lines += [f"   :value: {value}"] * (len(value) <= _SHOWN)
        else:
            lines.append(f".. auto{kind}:: {name}")
            if kind == "class":
                lines.append("   :members:")
                lines += ["   :special-members: __call__"] * (f"{name}.__call__" in module.methods)
        lines.append("")
    body = "\n".join(lines)
    file = module.path.relative_to(_ROOT.parent).as_posix()
    title = module.name.removeprefix(f"{PACKAGE}.")
    return f"## {title}\n\nFile `src/{file}`.\n\n```{{eval-rst}}\n{body}```"


def _app() -> Any:
    """The command line: documented like any module, and not depended on."""
    return importlib.import_module(f"{PACKAGE}.cli").app


def _commands() -> list[str]:
    import typer.main

    return list(getattr(typer.main.get_command(_app()), "commands", {}))


def _help(command: list[str]) -> str:
    from typer.testing import CliRunner

    shown = CliRunner().invoke(
        _app(), [*command[1:], "--help"], prog_name=command[0], env={"COLUMNS": "80"}, terminal_width=80
    )
    title = " ".join(command)
    text = shown.output.strip()
    return f"### {title}\n\n```text\n$ {title} --help\n\n{text}\n```"


def index() -> str:
    """The table of the layers and the package's own docstring."""
    rows = []
    for name, page in PAGES.items():
        there = [package for package in page.packages if f"{PACKAGE}.{package}" in modules()]
        planned = [package for package in page.packages if package not in there]
        packages = ", ".join(f"[`{package}`](api-{name})" for package in there)
        later = f"planned: {', '.join(planned)}" if planned else ""
        rows.append(f"| {page.layer} | {'; '.join(filter(None, (packages, later)))} | {page.about} |")
    table = "\n".join(["| Layer | Packages | What is there |", "|---|---|---|", *rows])
    return f"{table}\n\n```{{eval-rst}}\n.. automodule:: {PACKAGE}\n```"


# One generator a page: `% atlas: api-core`.
core = functools.partial(markdown, "core")
parts = functools.partial(markdown, "parts")
models = functools.partial(markdown, "models")
methods = functools.partial(markdown, "methods")
systems = functools.partial(markdown, "systems")
recipes = functools.partial(markdown, "recipes")
book = functools.partial(markdown, "book")
cli = functools.partial(markdown, "cli")

# ---- docstrings and signatures


def _resolver(name: str, module: Module, own: frozenset[str]) -> Any:
    """What a code span in the docstring of `name` links to: what Python would find there, by the same name."""
    imported = importlib.import_module(module.name)
    known = symbols()
    inside = name.removeprefix(f"{module.name}.").split(".")[0] if name != module.name else ""

    def find(text: str) -> str | None:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", text) or text in own:
            return None
        candidates = [f"{module.name}.{inside}.{text}"] * bool(inside)
        candidates += [f"{module.name}.{text}", f"{PACKAGE}.{text}", text]
        there = getattr(imported, text, None)
        if isinstance(there, type) or callable(there):
            candidates.append(f"{getattr(there, '__module__', '')}.{getattr(there, '__name__', '')}")
        if "_" in text or text != text.lower():  # a word that is no ordinary one
            candidates += [unique] if (unique := _unique(text)) else []
        for candidate in candidates:
            if candidate == name:
                return None
            if candidate in known:
                return candidate
        return None

    return find


def _unique(text: str) -> str | None:
    found = [
        symbol
        for symbol in symbols()
        if symbol.endswith(f".{text}") and symbol.removesuffix(f".{text}") in modules()
    ]
    return found[0] if len(found) == 1 else None


def _module_of(name: str) -> Module | None:
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return modules().get(name)


def _arguments(thing: object) -> frozenset[str]:
    """The names a docstring may describe: arguments, and the fields of a class."""
    found = set(getattr(thing, "__annotations__", {}))
    for function in (thing, getattr(thing, "__init__", None)):
        function = getattr(function, "__wrapped__", function)
        code = getattr(function, "__code__", None)
        if code is not None:
            found |= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    return frozenset(found - {"self", "return"})


def _process_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    module = _module_of(name)
    if module is None:
        return
    own = frozenset() if what == "module" else _arguments(thing)
    try:
        lines[:] = markdown_to_rst("\n".join(lines), names=own, link=_resolver(name, module, own))
    except ValueError as error:
        raise ValueError(f"docstring of {name}: {error}") from None
    found = concepts_of(name)
    if found:
        links = ", ".join(f":ref:`{escape(concept.name)} <{concept.id}>`" for concept in found)
        title = "Concepts" if len(found) > 1 else "Concept"
        lines += ["", ".. container:: atlas-concept", "", f"   {title}: {links}", ""]


def _process_signature(
    app: Sphinx, what: str, name: str, thing: object, options: object, signature: str | None, result: str
) -> tuple[str, str] | None:
    # A protocol is not called, and what takes anything takes nothing of its own: say no more than is known.
    if what == "class" and signature and re.fullmatch(r"\(\*args(: \S+)?, \*\*kwargs(: \S+)?\)", signature):
        return "", ""
    return None


# ---- from a concept's section to its symbol


def _reference(
    app: Sphinx, page: str, target: tuple[str, str] | None, label: nodes.Node
) -> nodes.Node | None:
    if target is None:
        return None
    return make_refnode(app.builder, page, target[0], target[1], label)


def _symbol_target(env: BuildEnvironment, symbol: str) -> tuple[str, str] | None:
    entry = env.domains["py"].data["objects"].get(symbol)
    return (entry.docname, entry.node_id) if entry else None


def _sources(env: BuildEnvironment, concept: Concept) -> Iterator[tuple[str, tuple[str, str]]]:
    """Label and place of each of the concept's sources in the bibliography."""
    citations = {citation.key: citation for citation in env.domains["cite"].data["citations"]}
    for key in concept.sources:
        if key in citations:
            citation = citations[key]
            yield citation.formatted_entry.label, (citation.bibliography_key.docname, citation.citation_id)


def _link_sections(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Under the heading of each written concept: its symbol, its row in the tables, its sources."""
    labels = app.env.domains["std"].data["anonlabels"]
    for concept in load_concepts().values():
        if page != f"chapters/{concept.chapter}" or not concept.is_written:
            continue
        place = labels.get(concept.id)
        section = next(
            (node for node in doctree.findall(nodes.section) if place and place[1] in node["ids"]), None
        )
        if section is None:
            continue
        line = _line(app, page, concept, labels)
        if line is not None:
            title = next(iter(section.findall(nodes.title)))
            section.insert(section.index(title) + 1, line)


def _line(
    app: Sphinx, page: str, concept: Concept, labels: Mapping[str, tuple[str, str]]
) -> nodes.Node | None:
    parts: list[list[nodes.Node]] = []
    short = concept.symbol.rpartition(".")[2]
    symbol = _reference(app, page, _symbol_target(app.env, concept.symbol), nodes.literal("", short))
    if symbol is not None:
        parts.append([nodes.Text("In code: "), symbol])
    row = _reference(app, page, labels.get(f"table-{concept.id}"), nodes.Text("its row in the tables"))
    if row is not None:
        parts.append([row])
    sources = [_reference(app, page, place, nodes.Text(label)) for label, place in _sources(app.env, concept)]
    if sources:
        spaced: list[nodes.Node] = [nodes.Text("sources: " if len(sources) > 1 else "source: ")]
        for number, source in enumerate(sources):
            spaced += [nodes.Text(", ")] * bool(number) + [source]
        parts.append(spaced)
    if not parts:
        return None
    line = nodes.paragraph(classes=["atlas-incode"])
    for number, part in enumerate(parts):
        line += [nodes.Text(" \N{MIDDLE DOT} ")] * bool(number) + part
    return line


def _name_folds(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Give the theme's arrows beside pages with pages below them, as the package's has, a name to be read
    aloud."""
    draw = context.get("generate_toctree_html")
    if draw is None:
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        tree = draw(*args, **kwargs)
        if hasattr(tree, "select"):
            for summary in tree.select("li > details > summary"):
                link = summary.find_parent("li").find("a")
                summary["aria-label"] = f"Pages of {link.get_text(strip=True)}"
        return tree

    context["generate_toctree_html"] = named


def _mend_signatures(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Sphinx writes the lines of a long signature as a description list without terms, which is no valid one:
    lines of text instead."""

    def as_lines(found: re.Match[str]) -> str:
        return found[1].replace("<dd>", '<span class="atlas-param">').replace("</dd>", "</span>")

    if "body" in context:
        context["body"] = _PARAMETERS.sub(as_lines, context["body"])


def setup(app: Sphinx) -> None:
    """Connect the pages: docstrings, signatures, and the line under a concept's heading."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("doctree-resolved", _link_sections)
    app.connect("html-page-context", _mend_signatures)
    # after the theme, which puts the function there at 500
    app.connect("html-page-context", _name_folds, priority=900)
