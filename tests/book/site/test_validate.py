"""Bad input fails the build: every fault is planted once, and named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import build_site
import nbformat
import pytest

from llm_atlas.book.site.validate import cells, place, problems

CONCEPTS = """\
- number: 1
  title: "Core"
  slug: 01-core-transformer
  concepts:
  - id: self-attention
    name: "Self-attention"
    example: "QK"
    facts: ["f"]
    symbol: llm_atlas.nn.attend
    test: tests/test_attend.py::test_it
    sources: [vaswani2017]
    state: done
  - id: residual
    name: "Residual"
    example: "x + f(x)"
    facts: ["f"]
    symbol: llm_atlas.nn.Block.forward
    test: tests/test_attend.py
    sources: [he2016]
    needs: [self-attention]
    state: partial
    missing: "the rest, chapter 7"
"""
CLAIMS = """\
- id: some-claim
  concept: residual
  chapter: 01-core-transformer
  statement: "s"
  figure: "f"
  kind: at_least
  held: 2.0
  source: he2016
  note: "n"
  reasons:
    not here: "r"
  cell: 01-core-transformer#residual
  state: measured
"""
MARKDOWN = "(self-attention)=\n## Attention\n\nSee [the index](index.md) and [residual](residual).\n"
CODE = 'x = 1\nclaim("some-claim", x)'
PRINTED = "some-claim: held\n  claimed   f: s\n  measured  2.5, on a thing\n"
INDEX = "# Book\n\n[chapter](01-core-transformer.ipynb), `[code](is-no-link.md)`, [out](https://example.org/x.md)\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A sound book of one chapter."""
    for name, text in {
        "assets/concepts.yml": CONCEPTS,
        "assets/claims.yml": CLAIMS,
        "assets/references.bib": "@article{vaswani2017,\n}\n@article{he2016,\n}\n",
        "chapters/index.md": INDEX,
        "src/llm_atlas/nn.py": "def attend(): ...\n\n\nclass Block:\n    def forward(self): ...\n",
        "tests/test_attend.py": "def test_it(): ...\n",
        "pyproject.toml": '[tool.llm-atlas]\nrepository = ""\n',
        "requirements.txt": "",
        "_config.yml": "sphinx: {config: {html_theme_options: {}}}\n",
        "_toc.yml": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(MARKDOWN),
            nbformat.v4.new_code_cell(
                CODE, execution_count=1, outputs=[nbformat.v4.new_output("stream", text=PRINTED)]
            ),
            nbformat.v4.new_markdown_cell("(residual)=\n## Residual"),
        ]
    )
    nbformat.write(notebook, tmp_path / "chapters/01-core-transformer.ipynb")
    return tmp_path


def test_a_sound_book_has_no_fault(tree: Path) -> None:
    assert problems(tree) == []


NOTEBOOK = "chapters/01-core-transformer.ipynb"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (NOTEBOOK, "(self-attention)=", "(self-intention)=", "concepts.yml:5: 'self-attention' is done, but ch"),
        (NOTEBOOK, "(residual)=", "(residue)=", "concepts.yml:13: 'residual' is partial, but chapters/01"),
        ("assets/concepts.yml", "[self-attention]", "[nothing]", "concepts.yml:13: 'residual' needs 'nothing'"),
        ("assets/concepts.yml", "    state: done", "    needs: [residual]\n    state: done", "needs form a cycle"),
        ("assets/concepts.yml", "state: partial", "state: half", "concepts.yml:13: state 'half'"),
        ("assets/concepts.yml", "[he2016]", "[he2061]", "concepts.yml:13: 'residual' has source 'he2061'"),
        ("assets/concepts.yml", "nn.attend", "nn.atend", "concepts.yml:5: 'self-attention' is done, but there"),
        ("assets/concepts.yml", "nn.attend", "mm.attend", "there is no llm_atlas.mm.attend"),
        ("assets/concepts.yml", "::test_it", "::test_that", "concepts.yml:5: 'self-attention' is done, but there"),
        ("tests/test_attend.py", "test_it", "test_x", "no test tests/test_attend.py::test_it"),
        ("assets/claims.yml", "source: he2016", "source: who", "claims.yml:1: claim 'some-claim' has source 'who'"),
        ("assets/claims.yml", "held: 2.0", "held: two", "claims.yml:1: held of 'some-claim'"),
        ("assets/claims.yml", "#residual", "#residue", "claims.yml:1: claim 'some-claim' has cell"),
        ("assets/claims.yml", "transformer#", "transformers#", "claims.yml:1: claim 'some-claim' has cell"),
        (NOTEBOOK, 'claim(\\"some-claim', 'claimed(\\"some-claim', "claims.yml:1: claim 'some-claim' is measured, but"),
        ("assets/claims.yml", "held: 2.0", "held: 3.0", "claims.yml:1: claim 'some-claim': cell 1 of 01-core"),
        ("assets/claims.yml", "state: measured", "state: planned", "claims.yml:1: claim 'some-claim' is planned, and"),
        (NOTEBOOK, 'claim(\\"some-claim', 'claim(\\"a-claim', ":32 (cell 2): claim('a-claim') has no row"),
        (NOTEBOOK, "index.md", "indexes.md", ":11 (cell 1): dead link indexes.md"),
        ("chapters/index.md", "01-core-transformer.ipynb", "02.ipynb", "chapters/index.md:3: dead link 02.ipynb"),
        ("chapters/index.md", "# Book", '# B\n<a href="x/no.html">n</a>', "index.md:2: dead link x/no.html"),
        (NOTEBOOK, '"cells": [', '"cells": [,', "chapters/01-core-transformer.ipynb:2: not a notebook"),
    ],
)  # fmt: skip
def test_a_planted_fault_ends_the_build_with_file_and_line(
    tree: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    old: str,
    new: str,
    said: str,
) -> None:
    monkeypatch.setattr(build_site.limit, "run", lambda *_, **__: pytest.fail("Sphinx was started"))
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))
    assert build_site.build(tree, seconds=1) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if said in line], lines
    assert all(":" in line.split()[0] for line in lines[:-1])


def test_the_named_line_holds_what_is_named(tree: Path) -> None:
    path = tree / NOTEBOOK
    lines = path.read_text().split("\n")
    for cell in cells(path):
        assert json.loads(lines[cell.line - 1].rstrip(",")) == cell.text.split("\n")[0] + "\n" * (
            "\n" in cell.text
        )


def test_a_dead_link_of_a_page_is_led_back_to_its_source(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tree / "chapters/index.md").write_text('# Book\n\n<a href="#nowhere">x</a>\n')
    (tree / "chapters/tables.md").write_text("# Tables\n\n% atlas: tables\n")
    page = '<html lang="en"><title>t</title><h1>t</h1><a href="{}">x</a></html>'

    def run(*_, **__) -> int:
        html = tree / "_build/html/chapters"
        html.mkdir(parents=True)
        for name, link in {
            "index": "#nowhere", "01-core-transformer": "index.html#none", "tables": "gone.html"
        }.items():  # fmt: skip
            (html / f"{name}.html").write_text(page.format(link))
        return 0

    monkeypatch.setattr(build_site.limit, "run", run)
    assert build_site.build(tree, seconds=1) == 1
    said = capsys.readouterr().err
    assert "chapters/index.md:3: chapters/index.html: dead anchor #nowhere" in said
    assert (
        "chapters/01-core-transformer.ipynb:1: chapters/01-core-transformer.html: dead anchor index.html#none"
        in said
    )
    assert (
        "chapters/tables.md:3 (written by the generator 'tables'): chapters/tables.html: dead link gone.html"
        in said
    )
    assert not (tree / "_build/site.json").exists()


def test_a_claim_is_measured_in_its_own_chapter(tree: Path) -> None:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbformat.write(nb, tree / "chapters/02-other.ipynb")
    (said,) = problems(tree)
    assert said.startswith("chapters/02-other.ipynb:")
    assert "(cell 1): claim('some-claim') belongs to 01-core-transformer" in said


def test_the_place_of_a_link_in_a_notebook_names_its_cell(tree: Path) -> None:
    at = place("chapters/01-core-transformer.html", "index.html", tree)
    assert at == f"{NOTEBOOK}:11 (cell 1)"
    assert place("genindex.html", "x.html", tree) == "genindex.html"
