"""Look at built pages: their links without a browser, their behaviour in one.

Every function returns problems, one line each that names the page; an empty list is a pass.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright, Response
    from playwright.sync_api import Page as Page_

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# Pages that are no part of the book: templates that themes leave beside their scripts.
UNREAD = ("_static", "_sources")
# The relations of a link element that make a browser open a connection.
FETCHED = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch"}
# What a style sheet takes from another origin.
FOREIGN_CSS = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)")

# ---- files


@dataclass
class Page:
    """What the static checks need of one page."""

    title: str = ""
    language: str = ""
    headings: list[str] = field(default_factory=list)  # h1, h2, ... in order
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)  # what a browser fetches by itself
    undescribed: list[str] = field(default_factory=list)  # images without alt


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page, self._in_title = Page(), False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attrs}
        if of.get("id"):
            self.page.ids.append(of["id"])
        if tag == "a":
            self.page.links += [of["href"]] if "href" in of else []
            self.page.ids += [of["name"]] if "name" in of else []
        elif tag == "link":
            if FETCHED & set(of.get("rel", "").split()):
                self.page.loads.append(of.get("href", ""))
        elif of.get("src"):
            self.page.loads.append(of["src"])
        if tag == "html":
            self.page.language = of.get("lang", "")
        # the logo stands beside the book's name, which says the same
        if tag == "img" and not of.get("alt", "").strip() and "logo__image" not in of.get("class", ""):
            self.page.undescribed.append(of.get("src", "")[:80])
        if re.fullmatch("h[1-6]", tag):
            self.page.headings.append(tag)
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.page.title += data.strip()
            self._in_title = False


def read_page(text: str) -> Page:
    reader = _Reader()
    reader.feed(text)
    return reader.page


def pages(folder: Path) -> list[str]:
    """The addresses of the book's pages below `folder`, such as chapters/index.html."""
    names = sorted(file.relative_to(folder) for file in folder.rglob("*.html"))
    return [name.as_posix() for name in names if name.parts[0] not in UNREAD]


def is_foreign(address: str) -> bool:
    return urlsplit(address).scheme in ("http", "https") or address.startswith("//")


def site_problems(folder: Path) -> list[str]:
    """Dead links and anchors, sources at other origins, pages without a title, a language or an h1."""
    problems = []
    read = {name: read_page((folder / name).read_text(encoding="utf-8")) for name in pages(folder)}
    for name, page in read.items():
        if (folder / name).read_text(encoding="utf-8").lstrip().startswith("<meta"):
            continue  # the redirection at the root
        problems += [f"{name}: loads {load} from another origin" for load in page.loads if is_foreign(load)]
        problems += [f"{name}: an image without alternative text: {src}" for src in page.undescribed]
        problems += [f"{name}: no title"] * (not page.title)
        problems += [f"{name}: no language"] * (not page.language)
        problems += [f"{name}: no h1 heading"] * ("h1" not in page.headings)
        for address in [*page.links, *page.loads]:
            if problem := _dead(folder, read, name, address):
                problems.append(f"{name}: {problem}")
    for sheet in sorted(folder.rglob("*.css")):
        found = FOREIGN_CSS.findall(sheet.read_text(encoding="utf-8"))
        problems += [f"{sheet.relative_to(folder)}: loads {load} from another origin" for load in found]
    return problems


def _dead(folder: Path, read: dict[str, Page], name: str, address: str) -> str:
    if is_foreign(address) or urlsplit(address).scheme:  # mailto:, data:, javascript:
        return ""
    path, anchor = urldefrag(urljoin(f"/{name}", address))
    target = unquote(urlsplit(path).path).lstrip("/")
    if target.endswith("/") or not target:
        target += "index.html"
    if not (folder / target).is_file():
        return f"dead link {address}"
    if anchor and target in read and unquote(anchor) not in read[target].ids:
        return f"dead anchor {address}"
    return ""


# ---- browser


def find_browser() -> str | None:
    """The system's Chromium or Chrome, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def launch(playwright: Playwright) -> Browser | None:
    """A headless Chromium, the system's or else playwright's own; None where there is neither."""
    path = find_browser() or playwright.chromium.executable_path
    if not Path(path).exists():
        return None
    return playwright.chromium.launch(executable_path=path, args=ARGUMENTS)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve `folder` on a free port of this machine; the address, with a slash at its end."""
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


# In words of the page: who sticks out to the right, most deeply nested last, for the message.
_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    return [...document.body.querySelectorAll('*')]
        .filter(e => e.getBoundingClientRect().right > width + 1)
        .map(e => e.tagName.toLowerCase() + ' ' + (e.getAttribute('class') || ''));
}"""
# Formulas are drawn after the page has loaded.
_SETTLED = "() => window.MathJax?.startup?.promise?.then(() => true) ?? true"
# How far what was already to be seen moved while the page loaded.
_WATCH_SHIFT = """window.shift = 0; new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
}).observe({type: 'layout-shift', buffered: true});"""
# Images of the text whose place is not kept free until they arrive.
_UNSIZED = """() => [...document.querySelectorAll('article img, main img')]
    .filter(e => !(e.hasAttribute('width') && e.hasAttribute('height')))
    .filter(e => getComputedStyle(e).aspectRatio === 'auto')
    .map(e => e.getAttribute('src').slice(-60))"""
_THEME = "theme => { document.documentElement.dataset.theme = theme; }"
_OPEN = "() => document.querySelectorAll('details').forEach(e => { e.open = true; })"
# A drawing is one image to a reader of the screen, a formula has its MathML: what they are made of is theirs.
_AXE = """() => axe.run(
    {exclude: [['mjx-container > mjx-math'], ['.atlas-explore-drawing > svg']]},
    {preload: false, resultTypes: ['violations'], rules: {'color-contrast': {enabled: false}}},
)"""
# Contrast depends on colour, size, weight and what lies behind. A chapter has thousands of tokens and cells that
# agree in all of these: one of each kind is looked at, which takes a second instead of thirty.
_AXE_COLOURS = """() => {
    const kinds = new Map(), behind = new Map();
    const ground = e => {
        if (!e) return '';
        if (!behind.has(e)) {
            const s = getComputedStyle(e);
            const own = s.backgroundColor === 'rgba(0, 0, 0, 0)' && s.backgroundImage === 'none' && s.opacity === '1'
                ? '' : `${s.backgroundColor} ${s.backgroundImage} ${s.opacity} / `;
            behind.set(e, own + ground(e.parentElement));
        }
        return behind.get(e);
    };
    for (const e of document.body.querySelectorAll('*')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        if (e.closest('script, style, svg, mjx-container') || !e.checkVisibility({visibilityProperty: true})) continue;
        const s = getComputedStyle(e);
        const kind = [s.color, s.fontSize, s.fontWeight, s.textShadow, e.localName === 'a', ground(e)].join();
        if (!kinds.has(kind)) kinds.set(kind, e);
    }
    if (!kinds.size) return {violations: []};
    return axe.run({include: [...kinds.values()]}, {preload: false, runOnly: ['color-contrast']});
}"""
SERIOUS = ("serious", "critical")
SHIFT = 0.1  # the limit of a good page by web.dev's measure, cumulative layout shift
WEIGHT = 1_500_000  # bytes that a page loads, text compressed as every web host sends it


def axe_problems(page: Page_, themes: tuple[str, ...] = ("light", "dark")) -> list[str]:
    """Serious and critical violations that axe-core finds on an open page: theme, rule, element and why.

    Everything folded is opened first. A theme changes colours alone, so the other rules run once.
    """
    from axe_playwright_python.base import AXE_FILE_PATH

    # a colour on its way to the other theme is none
    page.add_style_tag(content="*, ::before, ::after { transition: none !important; }")
    page.evaluate(_OPEN)
    page.wait_for_timeout(400)  # page.js looks at what was opened a moment later
    page.evaluate(Path(AXE_FILE_PATH).read_text(encoding="utf-8"))
    found = []
    for theme in themes:
        page.evaluate(_THEME, theme)
        violations = page.evaluate(_AXE)["violations"] if theme == themes[0] else []
        violations += page.evaluate(_AXE_COLOURS)["violations"]
        for violation in violations:
            if violation["impact"] in SERIOUS:
                for node in violation["nodes"]:
                    why = " ".join(node["failureSummary"].split("\n")[1].split())
                    found.append(f"{theme}: {violation['id']}: {node['html'][:120]!r}: {why}")
    return found


def page_problems(
    browser: Browser, address: str, *, width: int, height: int = 900, themes: tuple[str, ...] = ()
) -> list[str]:
    """Open one page at a width, once, and look at everything: errors, failed and foreign requests, sideways
    scrolling, what moves while it loads, images without a size, its weight, and axe-core's rules in `themes`.

    A request to another origin is reported and blocked, so that the answer does not depend on the network.
    """
    own = urlsplit(address).netloc
    problems: list[str] = []
    responses: list[Response] = []
    with browser.new_context(viewport={"width": width, "height": height}) as context:
        page = context.new_page()

        def gate(route) -> None:
            url = route.request.url
            if urlsplit(url).scheme in ("http", "https", "ws", "wss") and urlsplit(url).netloc != own:
                problems.append(f"request to another origin: {url}")
                route.abort()
            else:
                route.continue_()

        context.route("**/*", gate)
        page.add_init_script(_WATCH_SHIFT)
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("response", lambda response: responses.append(response))
        page.goto(address, wait_until="load")
        page.wait_for_load_state("networkidle")
        page.wait_for_function(_SETTLED)
        page.evaluate("document.fonts.ready.then(() => true)")
        problems += [f"{r.status} for {r.url}" for r in responses if r.status >= 400]
        if wide := page.evaluate(_WIDE):
            problems.append(f"scrolls sideways at {width} px: {', '.join(wide[-3:])}")
        if (shift := page.evaluate("window.shift")) > SHIFT:
            problems.append(f"moves by {shift:.3f} while it loads at {width} px, more than {SHIFT}")
        problems += [f"an image without width and height: {src}" for src in page.evaluate(_UNSIZED)]
        if (weight := sum(map(sent_bytes, responses))) > WEIGHT:
            problems.append(f"loads {weight:,} bytes, more than {WEIGHT:,}")
        if themes:
            problems += axe_problems(page, themes)
    name = urlsplit(address).path.lstrip("/")
    return [f"{name}: {problem}" for problem in problems]


def sent_bytes(response: Response) -> int:
    """The size of a response as a web host sends it: text in gzip, what is compressed already as it is."""
    if response.status >= 300:
        return 0
    from playwright.sync_api import Error

    try:
        body = response.body()
    except Error:  # of a page that led on to another at once
        return 0
    packed = Path(urlsplit(response.url).path).suffix in (".png", ".woff", ".woff2", ".jpg", ".webp")
    return len(body) if packed else len(gzip.compress(body, mtime=0))
