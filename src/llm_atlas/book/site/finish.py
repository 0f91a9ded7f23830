"""The last hand on the built pages: less to load, nothing that jumps, nothing without a place in the outline.

The theme sends every reader the whole of Font Awesome, as a script and as fonts (1.9 MB), and MathJax with its
menu; a page needs a dozen icons and no menu. What the theme draws is left as it is: the pages get a small style
sheet with the icons that the site has, made from the same fonts. Images get their width and height from their
files, so that the text below them stands still while they load.

Everything here may run twice on one page: Sphinx rewrites only the pages whose sources changed.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import imagesize
from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.application import Sphinx
from sphinx.config import Config

from llm_atlas.core.assets import bundled

__all__ = ["finish_page", "setup", "write_icons"]

# The parts of MathJax that tex-chtml.js bundles, without the menu: it made each formula a stop of the Tab key.
MATHJAX = ["core", "input/tex", "output/chtml", "a11y/assistive-mml"]
_MATHJAX_UNUSED = ("*-full*.js", "*-svg*.js", "*mml-chtml.js", "tex-chtml.js", "node-main.js", "latest.js")
_MATHJAX_FOLDERS = ("sre", "ui", "adaptors", "output/svg", "input/mml")

_FONT_AWESOME = re.compile(
    r"\s*<(?:link|script)\b[^>]*?(?:href|src)=\"([^\"]*?)vendor/fontawesome/[^>]*>(</script>)?"
)
_ICON_NAME = re.compile(r"\bfa-[a-z0-9-]+")
_ICON_RULE = re.compile(r"((?:\.fa-[\w-]+:(?::)?before,?)+)\{content:\"(\\[0-9a-f]+|[^\"])\"\}")
_ICON_CODE = re.compile(r"\\(f[0-9a-f]{3})\b")
_IMAGE = re.compile(r"<img\b[^>]*>")
_SOURCE = re.compile(r'\bsrc="([^"]+)"')
_MATHJAX = re.compile(
    r"\s*<script[^>]*>window\.MathJax = .*?</script>|\s*<script[^>]*/mathjax/startup\.js\"></script>"
)
_CODE = re.compile(r'<div class="highlight"><pre>.*?</pre>', re.DOTALL)
_TOKEN = re.compile(r'<span class="(\w+)">([^<]*)</span>')
_TOKEN_RULE = re.compile(r"^(.*)\.highlight( \.\w+)? +\{ (?:background: [^;]*; )?(.*?);? *\}", re.MULTILINE)
_SIDEBAR = re.compile(r'<div class="(bd-sidebar-primary[^"]*)">')
# Font file, family, weight.
_FONTS = (
    ("fa-solid-900", ("Font Awesome 6 Free", "Font Awesome 5 Free"), 900),
    ("fa-regular-400", ("Font Awesome 6 Free",), 400),
    ("fa-brands-400", ("Font Awesome 6 Brands",), 400),
)


def finish_page(text: str, page: Path, coloured: set[str] | None = None) -> str:
    """The html of `page`, a file of the built site, in its last form.

    `coloured` are the classes of code tokens that the style sheet gives a colour; the others lose their
    element, which is a tenth of a chapter.
    """
    text = _with_small_icons(text)
    if 'class="math' not in text:
        text = _MATHJAX.sub("", text)
    if coloured:

        def token(found: re.Match[str]) -> str:
            return found[0] if found[1] in coloured else found[2]

        text = _CODE.sub(lambda block: _TOKEN.sub(token, block[0]), text)
    text = _SIDEBAR.sub(r'<div class="\1" role="navigation" aria-label="The book">', text)
    return _IMAGE.sub(lambda found: _with_size(found[0], page.parent), text)


def coloured_tokens(sheet: str) -> set[str]:
    """The classes of tokens that a Pygments style sheet shows otherwise than code as such, in any theme."""
    rules = _TOKEN_RULE.findall(sheet)
    plain = {(theme, style) for theme, token, style in rules if not token}
    return {token.strip(" .") for theme, token, style in rules if token and (theme, style) not in plain}


def _with_small_icons(text: str) -> str:
    first = _FONT_AWESOME.search(text)
    if not first:
        return text
    text = (
        text[: first.start()]
        + f'\n<link href="{first[1]}icons.css" rel="stylesheet" />'
        + text[first.end() :]
    )
    return _FONT_AWESOME.sub("", text)


def _with_size(image: str, folder: Path) -> str:
    source = _SOURCE.search(image)
    if not source or re.search(r"\s(width|height)=", image) or urlsplit(source[1]).scheme:
        return image
    file = folder / unquote(urlsplit(source[1]).path)
    width, height = imagesize.get(file) if file.is_file() else (-1, -1)
    if width <= 0 or height <= 0:
        return image
    return f'<img width="{width:.0f}" height="{height:.0f}"{image.removeprefix("<img")}'


def write_icons(static: Path, texts: list[str]) -> None:
    """`icons.css` and its fonts below `static`, with the icons that `texts` and the theme's own files name.

    The fonts are cut from the ones that the theme has left in `static`, which are removed.
    """
    found = sorted(static.glob("vendor/fontawesome/*"))
    if not found:
        return
    awesome = found[-1]
    sheet = (awesome / "css" / "all.min.css").read_text(encoding="utf-8")
    files = [
        file for file in static.rglob("*.*") if file.suffix in (".js", ".css") and awesome not in file.parents
    ]
    files = [file for file in files if static / "mathjax" not in file.parents]
    texts = [*texts, *(file.read_text(encoding="utf-8") for file in files)]
    names = {name for text in texts for name in _ICON_NAME.findall(text)}
    codes = {code for text in texts for code in _ICON_CODE.findall(text)}

    def kept(rule: re.Match[str]) -> str:
        used = [name for name in _ICON_NAME.findall(rule[1]) if name in names]
        if not used:
            return ""
        codes.add(rule[2].lstrip("\\"))
        return ",".join(f".{name}:before" for name in used) + f'{{content:"{rule[2]}"}}'

    sheet = _ICON_RULE.sub(kept, sheet)
    sheet = re.sub(r"@font-face\{.*?\}|@(?:-webkit-)?keyframes [\w-]+\{(?:[^{}]*\{[^{}]*\})*\}", "", sheet)
    points = {int(code, 16) if len(code) > 1 else ord(code) for code in codes}
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every glyph
    (static / "icons").mkdir(exist_ok=True)
    for file, families, weight in _FONTS:
        font = TTFont(awesome / "webfonts" / f"{file}.ttf")
        here = points & set(font.getBestCmap())
        if not here:
            continue
        cutter = subset.Subsetter(subset.Options(layout_features=[], notdef_outline=False))
        cutter.populate(unicodes=here)
        cutter.subset(font)
        font.flavor = "woff"  # not woff2, which needs another package
        font.save(static / "icons" / f"{file}.woff")
        for family in families:
            sheet += (
                f'@font-face{{font-family:"{family}";font-weight:{weight};font-style:normal;font-display:block;'
                f'src:url(icons/{file}.woff) format("woff")}}'
            )
    (static / "icons.css").write_text(sheet, encoding="utf-8")
    shutil.rmtree(static / "vendor" / "fontawesome")


def _drop_unused_mathjax(folder: Path) -> None:
    for pattern in _MATHJAX_UNUSED:
        for file in folder.glob(pattern):
            file.unlink()
    for name in _MATHJAX_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _configure(app: Sphinx, config: Config) -> None:
    # MathJax as an extension has set it, from the page's own origin
    if config.mathjax_path == "mathjax/tex-chtml.js":
        config.mathjax_path = "mathjax/startup.js"
        config.mathjax3_config = {**(config.mathjax3_config or {}), "loader": {"load": MATHJAX}}


def _finish(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    pages = [file for file in Path(app.outdir).rglob("*.html") if static not in file.parents]
    sheet = static / "pygments.css"
    coloured = coloured_tokens(sheet.read_text(encoding="utf-8")) if sheet.exists() else set()
    texts = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        texts.append(finish_page(text, page, coloured))
        if texts[-1] != text:
            page.write_text(texts[-1], encoding="utf-8")
    write_icons(static, texts)
    if app.config.mathjax_path == "mathjax/startup.js":
        _drop_unused_mathjax(static / "mathjax")


def _add_files(app: Sphinx) -> None:
    if app.builder.format == "html":
        app.config.html_static_path.extend(str(bundled(f"site/{name}")) for name in ("page.js", "print.css"))


def setup(app: Sphinx) -> dict[str, Any]:
    """The Sphinx extension `llm_atlas.book.site.finish`, which `llm_atlas.book.site` loads."""
    app.connect("config-inited", _configure, priority=900)
    app.connect("builder-inited", _add_files)
    app.connect("build-finished", _finish, priority=900)
    app.add_js_file("page.js", loading_method="defer")
    app.add_css_file("print.css", media="print")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
