"""The built site without a browser, and what its configuration promises. `make test` builds it first."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import build_site
import check_pages
import pytest
import yaml

from llm_atlas.book.concepts import load_concepts

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"


@pytest.fixture(scope="module")
def site() -> Path:
    if not (ROOT / "_build" / "site.json").exists():
        if os.environ.get("LLM_ATLAS_REQUIRE_SITE"):
            pytest.fail("the site is not built")
        pytest.skip("the site is not built; run make book")
    return SITE


def toc_files() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    entries = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *(entry["file"] for entry in entries if "file" in entry)]


def test_every_chapter_is_listed():
    sources = [path for suffix in ("ipynb", "md") for path in (ROOT / "chapters").glob(f"*.{suffix}")]
    assert sources
    missing = {str(path.relative_to(ROOT).with_suffix("")) for path in sources} - set(toc_files())
    assert not missing, f"not in _toc.yml: {missing}"


def test_site_is_of_these_sources(site: Path):
    assert json.loads((ROOT / "_build" / "site.json").read_text()) == build_site.sources(ROOT)


def test_every_listed_page_is_built(site: Path):
    assert {f"{name}.html" for name in toc_files()} <= set(check_pages.pages(site))


def test_pages(site: Path):
    assert check_pages.site_problems(site) == []


def test_every_concept_of_a_chapter_has_its_place_on_the_page(site: Path):
    from llm_atlas.book.concepts import load_concepts

    ids = {
        page.stem: check_pages.read_page(page.read_text()).ids for page in (site / "chapters").glob("*.html")
    }
    concepts = [concept for concept in load_concepts().values() if concept.state != "planned"]
    assert concepts
    assert [concept.id for concept in concepts if concept.id not in ids[concept.chapter]] == []


def test_a_source_says_where_it_is_used(site: Path):
    text = (site / "chapters/references.html").read_text(encoding="utf-8")
    entry = text[text.index("Attention Is All You Need") :].partition("atlas-cited")[2].partition("</p>")[0]
    assert re.search(r'href="01-core-transformer\.html#[^"]*">1\. Core Transformer Architecture<', entry)
    assert 'href="01-core-transformer.html#causal-mask">Causal masking<' in entry
    # the concepts of a planned chapter stand in the tables
    assert 'href="tables.html#' in text[text.index("Direct Preference Optimization") :]


def test_a_chapter_bears_the_title_of_its_table():
    from llm_atlas.book.concepts import chapters

    for chapter in chapters():
        path = ROOT / "chapters" / f"{chapter.slug}.ipynb"
        if path.is_file():
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
            assert first.partition("\n")[0] == f"# {chapter.title}"


def test_the_front_page_shows_the_numbers_of_the_data(site: Path):
    from llm_atlas.book.site import front

    text = (site / "chapters/index.html").read_text(encoding="utf-8")
    numbers = re.findall(r"<li><strong>.*?</li>", front.numbers())
    assert len(numbers) == 3
    assert [number for number in numbers if number not in text] == []


def test_launch_buttons_only_with_an_address(site: Path):
    address = build_site.repository(ROOT)
    chapters = [page for page in (site / "chapters").glob("[0-9]*.html")]
    for page in chapters:
        assert ("colab.research.google.com" in page.read_text(encoding="utf-8")) == bool(address), page.name


# ---- the configuration


def test_an_address_draws_buttons_and_none_draws_none():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert build_site.configuration(config, "") == config
    options = config["sphinx"]["config"]["html_theme_options"]
    assert not {"repository_url", "launch_buttons"} & set(options)
    changed = build_site.configuration(config, "https://github.com/owner/name")
    with_address = changed["sphinx"]["config"]["html_theme_options"]
    assert with_address["repository_url"] == "https://github.com/owner/name"
    assert with_address["launch_buttons"] == {"colab_url": "https://colab.research.google.com"}
    assert options.items() <= with_address.items()


def test_an_unknown_host_is_refused(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text('[tool.llm-atlas]\nrepository = "git.example.org/x"\n')
    with pytest.raises(ValueError, match=r"'git\.example\.org/x' in pyproject\.toml must start with"):
        build_site.repository(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "incremental"),
    [
        ({"chapters/a.md": "1"}, {"chapters/a.md": "2"}, True),
        ({"chapters/a.md": "1"}, {"chapters/a.md": "1", "chapters/b.md": "1"}, True),
        ({"chapters/a.md": "1", "chapters/b.md": "1"}, {"chapters/a.md": "1"}, False),
        ({"src/x.py": "1"}, {"src/x.py": "2"}, False),
        ({}, {"chapters/a.md": "1", "_config.yml": "1"}, False),
    ],
)
def test_only_chapters_are_built_incrementally(old: dict[str, str], new: dict[str, str], incremental: bool):
    assert build_site.is_incremental(old, new) == incremental


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one page, and a builder that fails where the page says so; builds.txt counts its runs."""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters" / "index.md").write_text("# fine")
    (tmp_path / "pyproject.toml").write_text('[tool.llm-atlas]\nrepository = ""\n')
    for name in ("_config.yml", "_toc.yml", "requirements.txt"):
        (tmp_path / name).write_text("sphinx: {config: {html_theme_options: {}}}\n")

    def run(command: list[str], seconds: float, *, cwd: str) -> int:
        with (tmp_path / "builds.txt").open("a") as log:
            log.write("x")
        (tmp_path / "_build" / "html").mkdir(exist_ok=True)
        (tmp_path / "_build" / ".doctrees").mkdir(exist_ok=True)
        (tmp_path / "_build" / "html" / "index.html").touch()
        return int("warning" in (tmp_path / "chapters" / "index.md").read_text())

    monkeypatch.setattr(build_site.limit, "run", run)
    monkeypatch.setattr(build_site.validate, "problems", lambda root: [])
    monkeypatch.setattr(build_site.check_pages, "site_problems", lambda folder: [])
    return tmp_path


def test_nothing_is_built_twice_and_a_failure_is_not_forgotten(book: Path):
    page = book / "chapters" / "index.md"

    def build() -> tuple[int, int]:
        status = build_site.build(book, seconds=1)
        return status, (book / "builds.txt").stat().st_size

    assert build() == (0, 1)
    assert build() == (0, 1)
    page.write_text("# a warning")
    assert build() == (1, 2)
    assert not (book / "_build" / ".doctrees").exists(), (
        "Sphinx would not warn again of a page that it has read"
    )
    assert build() == (1, 3)
    page.write_text("# fine")
    assert build() == (0, 4)
    (book / "_build" / "html" / "index.html").unlink()
    assert build() == (0, 5)


# ---- the checker itself, on a page with one fault

GOOD = """<!doctype html><html lang="en"><head><title>T</title><link rel="stylesheet" href="a.css"></head>
<body><h1 id="top">T</h1><img src="p.png" alt="a picture"><a href="#top">up</a> <a href="b.html#there">b</a>
<a href="https://example.org/">out</a> <a href="mailto:a@example.org">mail</a></body></html>"""
OTHER = '<html lang="en"><head><title>B</title></head><body><h1 id="there">B</h1></body></html>'


@pytest.fixture
def two_pages(tmp_path: Path) -> Path:
    (tmp_path / "a.html").write_text(GOOD)
    (tmp_path / "b.html").write_text(OTHER)
    (tmp_path / "a.css").write_text("body { background: url(p.png) }")
    (tmp_path / "p.png").touch()
    return tmp_path


def test_good_pages_pass(two_pages: Path):
    assert check_pages.pages(two_pages) == ["a.html", "b.html"]
    assert check_pages.site_problems(two_pages) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('href="#top"', 'href="#bottom"', "dead anchor #bottom"),
        ("b.html#there", "b.html#nowhere", "dead anchor b.html#nowhere"),
        ("b.html#there", "c.html", "dead link c.html"),
        ('src="p.png"', 'src="q.png"', "dead link q.png"),
        ('alt="a picture"', "", "without alternative text: p.png"),
        ('src="p.png"', 'src="https://example.org/p.png"', "from another origin"),
        ('href="a.css"', 'href="//example.org/a.css"', "from another origin"),
        ('lang="en"', "", "no language"),
        ("<title>T</title>", "", "no title"),
        ("h1", "h2", "no h1 heading"),
    ],
)
def test_a_planted_fault_is_found(two_pages: Path, old: str, new: str, problem: str):
    assert old in GOOD
    (two_pages / "a.html").write_text(GOOD.replace(old, new))
    found = check_pages.site_problems(two_pages)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    "rule", ['@import "https://example.org/f.css";', "a { src: url('//example.org/f') }"]
)
def test_a_foreign_font_is_found(two_pages: Path, rule: str):
    (two_pages / "a.css").write_text(rule)
    assert len(check_pages.site_problems(two_pages)) == 1


def test_every_fetched_asset_has_its_licence_on_the_page() -> None:
    from llm_atlas.core.assets import ASSETS

    page = (ROOT / "chapters" / "licences.md").read_text(encoding="utf-8")
    assert [asset.name for asset in ASSETS.values() if asset.distribution not in page] == []


# ---- pages made from the package and the references


def shown(page: str) -> str:
    """What is read on it: no tags."""
    return html.unescape(re.sub(r"<[^>]*>", "", page)).strip()


def test_pages_show_no_markup(site: Path) -> None:
    for page in (site / "chapters" / "api").glob("*.html"):
        article = page.read_text().partition("<article")[2].partition("</article>")[0]
        hidden = r'<(span|div) class="math[^>]*>.*?</\1>|<pre.*?</pre>|<code.*?</code>|<dt.*?</dt>'
        prose = re.sub(hidden, "", article, flags=re.DOTALL)
        assert not re.search(r"[`$]|\*\*\w", shown(re.sub(r"<[^>]*>", "", prose)).replace("2**63", "")), (
            page.name
        )


def test_a_symbol_and_its_concept_lead_to_each_other(site: Path) -> None:
    anchor = "llm_atlas.nn.attention.scaled_dot_product_attention"
    page = (site / "chapters" / "api" / "parts.html").read_text()
    at = page.index(f'id="{anchor}"')
    assert 'href="../01-core-transformer.html#self-attention"' in page[at : page.index("fused_attention", at)]
    chapter = (site / "chapters" / "01-core-transformer.html").read_text()
    for concept in load_concepts().values():
        if concept.is_written and concept.chapter == "01-core-transformer":
            at = chapter.index('class="atlas-incode"', chapter.index(f'id="{concept.id}"'))
            line = chapter[at : chapter.index("</p>", at)]
            assert f"#{concept.symbol}" in line
            assert f'href="tables.html#table-{concept.id}"' in line
            assert line.count('href="references.html#') == len(concept.sources)


def test_signatures_read_well(site: Path) -> None:
    page = (site / "chapters" / "api" / "parts.html").read_text()
    text = shown(page)
    assert re.search(r"q: Float\[Tensor, .\*q_batch queries dim.\]", text)
    assert "jaxtyping" not in shown(page.partition("<article")[2])
    assert "&lt;function" not in page
    # a long one has a line each, and no list without terms
    at = page.index('id="llm_atlas.nn.attention.scaled_dot_product_attention"')
    assert page[at : page.index("</dt>", at)].count('<span class="atlas-param">') == 8
    assert "<dl>" not in page[at : page.index("</dt>", at)]


def test_every_source_has_its_entry(site: Path) -> None:
    page = (site / "chapters" / "references.html").read_text()
    keys = {key for concept in load_concepts().values() for key in concept.sources}
    there = set(re.findall(r"^@\w+\{(\S+),$", (ROOT / "assets" / "references.bib").read_text(), re.MULTILINE))
    assert keys <= there
    assert page.count('<div class="citation" ') == len(there)
    assert "and others" not in shown(page)
    labels = re.findall(r'<span class="label">(.*?)</p>', page, re.DOTALL)
    assert len(labels) == len(there)
    for concept in load_concepts().values():
        assert f"#{concept.id}" in page
