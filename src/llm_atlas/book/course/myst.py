"""The chapters' MyST: its directives, and its text in the Markdown that Jupyter draws."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from llm_atlas.core.assets import bundled

__all__ = ["anchors_of", "directive_body", "directives", "parser", "plain"]

Token = Any  # markdown-it's; students do not have it, so the name is not imported here


@lru_cache(maxsize=1)
def parser() -> Any:
    """The site's own Markdown parser, so that what is a directive there is one here."""
    from markdown_it.renderer import RendererHTML
    from myst_parser.config.main import MdParserConfig
    from myst_parser.parsers.mdit import create_md_parser

    extensions = {"amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"}
    return create_md_parser(MdParserConfig(enable_extensions=extensions | {"substitution"}), RendererHTML)


def directives(text: str, where: str) -> list[tuple[Token, str]]:
    """The directives of a text, outermost only, with their names."""
    found = []
    for token in parser().parse(text):
        if token.type in ("fence", "colon_fence") and (name := _DIRECTIVE.match(token.info)):
            if token.level:
                raise ValueError(f"{where}: directive {name[1]!r} stands inside a list or a quotation")
            found.append((token, name[1]))
    return found


def directive_body(token: Token, name: str) -> tuple[str, dict[str, str], str]:
    """A directive's argument, options and body."""
    from docutils.parsers.rst import Directive
    from myst_parser.parsers.directives import parse_directive_text

    class AnyDirective(Directive):
        optional_arguments = 1
        final_argument_whitespace = True
        has_content = True
        option_spec: ClassVar = {"label": str}  # all options are read; with no list, none would be

    first = token.info.strip()[len(name) + 2 :].strip()
    result = parse_directive_text(AnyDirective, first, token.content, validate_options=False)
    return " ".join(result.arguments), result.options, "\n".join(result.body).strip("\n")


_DIRECTIVE = re.compile(r"\{([\w:-]+)\}")
_BOXES = [
    "admonition",
    "attention",
    "caution",
    "danger",
    "dropdown",
    "hint",
    "important",
    "note",
    "seealso",
    "tip",
    "warning",
]
_TEXT_ROLES = ("ref", "term", "doc", "numref", "eq", "prf:ref")


def anchors_of(pieces: Sequence[Any]) -> dict[str, str]:
    """The targets above headings, and the anchor that Jupyter gives to each of the headings."""
    found = {}
    for piece in pieces:
        tokens = parser().parse(piece.text) if piece.kind == "text" else []
        for target, heading, title in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if target.type == "myst_target" and heading.type == "heading_open":
                found[target.content] = "#" + title.content.replace(" ", "-")
    return found


def plain(text: str, where: str, anchors: Mapping[str, str]) -> str:
    """A text of the book in the Markdown that Jupyter draws: no targets, directives, roles, links to pages."""
    lines = text.split("\n")
    blocks: list[tuple[int, int, list[str]]] = []
    maps: list[list[int]] = []  # the lines of every open block; a table's cells have none of their own
    for token in parser().parse(text):
        if token.nesting == 1:
            maps.append(token.map or maps[-1])
        elif token.nesting == -1:
            maps.pop()
        elif token.type in ("myst_target", "myst_line_comment"):
            blocks.append((*token.map, []))
        elif token.type in ("fence", "colon_fence") and (name := _DIRECTIVE.match(token.info)):
            blocks.append((*token.map, _box(token, name[1], where, anchors).split("\n")))
        elif token.type == "inline":
            begin, end = token.map or maps[-1]
            lines[begin:end] = _inline("\n".join(lines[begin:end]), token, where, anchors).split("\n")
        elif token.type.startswith(("myst_", "substitution")):
            raise ValueError(f"{where}: {token.type} has no form in Jupyter")
    for begin, end, new in reversed(blocks):
        lines[begin:end] = new
    return "\n".join(lines).strip("\n")


def _box(token: Token, name: str, where: str, anchors: Mapping[str, str]) -> str:
    """An admonition as a quotation with a bold title, displayed mathematics between dollar signs."""
    argument, _, body = directive_body(token, name)
    if token.level:
        raise ValueError(f"{where}: directive {name!r} stands inside a list or a quotation")
    if name == "math":
        return f"$$\n{body}\n$$"
    if name not in _BOXES:
        raise ValueError(
            f"{where}: directive {name!r} has no form in Jupyter yet; course/myst.py gives it one"
        )
    text = f"**{argument or name.capitalize()}**\n\n{plain(body, where, anchors)}"
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _inline(block: str, token: Token, where: str, anchors: Mapping[str, str]) -> str:
    """The source of a block with the links and roles of its `token` rewritten; as many lines as before."""

    def swap(pattern: str, new: str | Callable[[re.Match[str]], str]) -> None:
        nonlocal block
        block, count = re.subn(pattern, new, block, count=1)
        if not count:
            raise ValueError(f"{where}: cannot rewrite {pattern!r}")

    for child in token.children or ():
        if child.type == "image" and "://" not in child.attrs["src"]:
            raise ValueError(
                f"{where}: image {child.attrs['src']!r} is a file, which a course does not carry"
            )
        if child.type == "link_open" and "://" not in (target := str(child.attrs["href"])):
            here = re.escape(target.removeprefix("#"))
            anchor = anchors.get(target.removeprefix("#"))
            swap(
                rf"\[([^\]]*)\]\(#?{here}\)",
                lambda m, anchor=anchor: f"[{m[1]}]({anchor})" if anchor else m[1],
            )
        if child.type == "myst_role":
            name, content = child.meta["name"], child.content
            swap(re.escape(f"{{{name}}}`{content}`"), lambda _, n=name, c=content: _role(n, c, where))
        if child.type.startswith("substitution"):
            raise ValueError(f"{where}: {child.type} has no form in Jupyter")
    return block


def _role(name: str, content: str, where: str) -> str:
    if name in ("cite", "cite:t", "cite:p"):
        return ", ".join(_citation(key.strip(), where) for key in content.split(","))
    if name in _TEXT_ROLES or name.startswith("py:"):
        return content.partition("<")[0].strip() or content
    if name == "octicon":
        return ""
    raise ValueError(f"{where}: role {name!r} has no form in Jupyter yet; course/myst.py gives it one")


@lru_cache(maxsize=1)
def _bibliography() -> Any:
    from pybtex.database import parse_file

    return parse_file(str(bundled("references.bib"))).entries


def _citation(key: str, where: str) -> str:
    """Author and year, linked to the paper where it has an address."""
    if key not in _bibliography():
        raise ValueError(f"{where}: {key!r} is not in references.bib")
    entry = _bibliography()[key]
    names = [" ".join(person.last_names) for person in entry.persons.get("author", [])]
    who = names[0] if len(names) == 1 else f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    told = f"{who.replace('and others', 'et al.')} {entry.fields['year']}"
    return f"[{told}]({entry.fields['url']})" if "url" in entry.fields else told
