"""Our docstrings, which are Markdown, as the reStructuredText that autodoc takes.

A Markdown parser reads them, so that code stays code; what it found is written out again with every character
escaped that reStructuredText would take for its own.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

__all__ = ["escape", "markdown_to_rst"]

# "ids: the text as bytes" or "`rotate`  turns queries": what a line says of one argument, field or method
_ITEM = re.compile(r"(?P<tick>`?)(?P<name>[A-Za-z_]\w*)(?P=tick)(?P<colon>:?)(?P<gap> +)(?=\S)")
_SENTENCE = re.compile(r"(Cost|Errors|Raises|Use)\b[: ]")
_ENVIRONMENT = re.compile(r"\$[A-Z]+(_[A-Z]+)+\b(?!\$)")

_BLOCK = re.compile(r"\(?[A-Za-z0-9#]+[.)](\s|$)|[-+\u2022\u2023\u2043](\s|$)|\.\.|:|>>>|=|~|\"\"")


def escape(text: str) -> str:
    """Plain text for reStructuredText: no character of it is markup."""
    return re.sub(r"([\\*`|_<])", r"\\\1", text).replace("::", r":\:")


def markdown_to_rst(
    text: str, *, names: Collection[str] = (), link: Callable[[str], str | None] = lambda name: None
) -> list[str]:
    """The lines of a docstring in reStructuredText.

    `names` are the arguments or fields that a line such as "ids: the text" may describe; such lines become a
    list. `link` gives the target of a code span that names a public object, or None. ValueError for Markdown
    that our docstrings have no use for (headings, images, raw html).
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["heading", "lheading"])
    parser.use(dollarmath_plugin, allow_space=False, double_inline=False)
    tokens = parser.parse(_ENVIRONMENT.sub(lambda found: f"`{found[0]}`", _itemize(text, names)))
    return _blocks(tokens, link)


def _itemize(text: str, names: Collection[str]) -> str:
    """Lines that describe an argument each, and those that begin with "Errors:", set apart from the text.

    An item goes on in the lines that are indented to its text; where no line of its list has more than one
    space before the text, it goes on to the next item, the next such sentence or the next empty line.
    """
    out: list[str] = []
    column: int | None = None  # where the open item's text begins; 0 where it is not aligned
    for line in text.split("\n"):
        found = _ITEM.match(line)
        aligned = found is not None and (len(found["gap"]) > 1 or found.end() == column)
        is_item = found and (
            found["name"] in names or aligned if found["colon"] else found["tick"] and aligned
        )
        if not line.strip() or line.startswith("    "):
            if column and line.strip():
                out.append("  " + line.strip())
                continue
            column = None
            out.append(line)
        elif found and is_item:
            out += [""] * (column is None)
            column = found.end() if aligned else 0
            out.append(f"- `{found['name']}`: {line[found.end() :]}")
        elif line.startswith(" ") and column is not None:
            out.append("  " + line.strip())
        elif column is not None and (column or _SENTENCE.match(line)):
            column = None
            out += ["", line]
        elif column is not None:
            out.append("  " + line)
        elif _SENTENCE.match(line) and out and out[-1].rstrip().endswith((".", ")", ":")):
            out += ["", line]
        else:
            out.append(line)
    return "\n".join(out)


def _blocks(tokens: Sequence[Token], link: Callable[[str], str | None]) -> list[str]:
    lines: list[str] = []
    indent = ""
    # the text before the first line of a list item, and of those below it
    marker: list[str] = []

    def put(new: Iterable[str]) -> None:
        for line in new:
            start = marker.pop() if marker else indent
            lines.append((start + line).rstrip() if line else "")
        lines.append("")

    tables: list[list[list[str]]] = []
    for token in tokens:
        kind = token.type
        if kind in ("bullet_list_open", "ordered_list_open", "bullet_list_close", "ordered_list_close"):
            lines += [""] * kind.endswith("close")
        elif kind == "list_item_open":
            sign = "- " if token.markup in "-+*" else f"{token.info}. "
            marker[:] = [(marker.pop() if marker else indent) + sign]
            indent += " " * len(sign)
        elif kind == "list_item_close":
            indent = indent[: -2 if token.markup in "-+*" else -len(f"{token.info}. ")]
        elif kind in ("paragraph_open", "paragraph_close", "thead_open", "thead_close"):
            pass
        elif kind == "inline":
            if tables:
                tables[-1][-1].append(_inline(token.children or [], link))
            else:
                text = _inline(token.children or [], link)
                # a sentence that reStructuredText would take for a list or another block
                put([rf"\ {text}" if _BLOCK.match(text) else text])
        elif kind in ("code_block", "fence"):
            language = token.info.split()[0] if token.info else "python"
            body = token.content.rstrip("\n").split("\n")
            put([f".. code-block:: {language}", "", *(f"   {line}" if line else "" for line in body)])
        elif kind == "math_block":
            put([".. math::", "", *(f"   {line}" for line in token.content.strip().split("\n"))])
        elif kind == "table_open":
            tables.append([])
        elif kind == "tr_open":
            tables[-1].append([])
        elif kind == "table_close":
            put(_table(tables.pop()))
        elif kind in ("tbody_open", "tbody_close", "tr_close") or kind[:3] in ("th_", "td_"):
            pass
        else:
            raise ValueError(f"{kind} in a docstring: use paragraphs, lists, tables, code and formulas")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        for place, cell in enumerate(row):
            lines.append(f"   {'* -' if place == 0 else '  -'} {cell}".rstrip())
    return lines


def _inline(tokens: Sequence[Token], link: Callable[[str], str | None]) -> str:
    out: list[str] = []
    href = ""
    start = 0
    for token in tokens:
        kind = token.type
        if kind == "text":
            out.append(escape(token.content))
        elif kind in ("softbreak", "hardbreak"):
            out.append(" ")
        elif kind == "code_inline":
            target = link(token.content)
            shown = token.content
            # a backslash and a space: nothing is shown, and markup may begin or end there
            if target:
                out.append(rf"\ :py:obj:`{escape(shown)} <{target}>`\ ")
            else:
                out.append(rf"\ ``{shown}``\ ")
        elif kind in ("math_inline", "math_inline_double"):
            out.append(rf"\ :math:`{token.content}`\ ")
        elif kind in ("em_open", "strong_open"):
            out.append(r"\ " + "*" * (1 + kind.startswith("strong")))
        elif kind in ("em_close", "strong_close"):
            out.append("*" * (1 + kind.startswith("strong")) + r"\ ")
        elif kind == "link_open":
            href, start = str(token.attrs["href"]), len(out)
        elif kind == "link_close":
            shown = "".join(out[start:])
            out[start:] = [rf"\ `{shown} <{href}>`__\ "]
        else:
            raise ValueError(f"{kind} in a docstring: use text, code, formulas, emphasis and links")
    return "".join(out).strip()
