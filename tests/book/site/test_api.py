"""The API pages: nothing public is left out, docstrings become sound reStructuredText, links go both ways."""

import dataclasses
import importlib
import inspect
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import docutils.core
import pytest

from llm_atlas.book.concepts import load_concepts
from llm_atlas.book.site import GENERATORS, api, generate
from llm_atlas.book.site.docstrings import escape, markdown_to_rst

ROOT = Path(__file__).resolve().parents[3]
PAGES = ROOT / "chapters" / "api"


def listed() -> Counter:
    """How often each module stands on the API pages that exist, as the site is built from them."""
    found: Counter = Counter()
    for page in PAGES.glob("*.md"):
        for name in re.findall(r"^% atlas: (\S+)$", page.read_text(), re.MULTILINE):
            found.update(re.findall(r"^\.\. automodule:: (\S+)$", generate(name), re.MULTILINE))
    return found


def test_every_module_is_on_one_page() -> None:
    assert listed() == Counter(api.modules().keys())


def test_a_module_of_an_unlisted_package_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    nn = api.modules()["llm_atlas.nn.norm"]
    planted = {**api.modules(), "llm_atlas.odd": dataclasses.replace(nn, name="llm_atlas.odd")}
    monkeypatch.setattr(api, "modules", lambda: planted)
    assert set(planted) - set(listed()) == {"llm_atlas.odd"}


def test_every_page_is_in_the_contents_and_has_its_generator() -> None:
    contents = (ROOT / "_toc.yml").read_text()
    for page in PAGES.glob("*.md"):
        assert f"file: chapters/api/{page.stem}\n" in contents
        name = "api" if page.stem == "index" else f"api-{page.stem}"
        assert f"% atlas: {name}\n" in page.read_text()
    assert {f"api-{page}" for page in api.PAGES} == {name for name in GENERATORS if name.startswith("api-")}
    for name, page in api.PAGES.items():
        if any(f"llm_atlas.{package}" in api.modules() for package in page.packages):
            assert (PAGES / f"{name}.md").exists(), f"add chapters/api/{name}.md"


def test_modules_have_their_public_names_in_order() -> None:
    names = list(api.modules()["llm_atlas.nn.attention"].names)
    assert names[:4] == [
        "AttendFunction",
        "attention_weights",
        "scaled_dot_product_attention",
        "fused_attention",
    ]
    assert not any(name.startswith("_") for name in names)
    assert list(api.modules()["llm_atlas.book.concepts"].names) == [
        "STATES",
        "Concept",
        "Chapter",
        "load_concepts",
        "chapters",
    ]  # __all__ says which; read_yaml is public only inside
    assert api.modules()["llm_atlas.nn.masks"].names["PAD"] == ("data", "-1")


def test_every_symbol_of_a_concept_that_exists_is_documented() -> None:
    documented = {f"{module.name}.{name}" for module in api.modules().values() for name in module.names}
    there = 0
    for concept in load_concepts().values():
        module, _, name = concept.symbol.rpartition(".")
        if module not in api.modules() or not hasattr(importlib.import_module(module), name):
            assert concept.state == "planned"
            continue
        there += 1
        assert concept.symbol in documented
    assert there >= 9


def html(lines: list[str]) -> str:
    """The body that docutils makes of it; any warning is an error."""
    text = "\n".join(lines).replace(":py:obj:", ":literal:")
    settings = {"halt_level": 2, "report_level": 2, "math_output": "LaTeX"}
    return docutils.core.publish_parts(text, writer_name="html5", settings_overrides=settings)["body"]


def shown(body: str) -> str:
    class Text(HTMLParser):
        text = ""

        def handle_data(self, data: str) -> None:
            self.text += data

    reader = Text()
    reader.feed(body)
    return reader.text.strip()


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("`x` is code", "x is code"),
        ("a`b`c", "abc"),
        (r"`\n` and `a*b`", r"\n and a*b"),
        ("star *args, **kwargs and name_ and |bar|", "star *args, **kwargs and name_ and |bar|"),
        (r"a back\slash", r"a back\slash"),
        ("ends in::", "ends in::"),
        ("A. Einstein wrote", "A. Einstein wrote"),
        ("(a) first", "(a) first"),
        ("- 1 is less", "1 is less"),
        ("...and on", "...and on"),
        ("in [0, 2**63).", "in [0, 2**63)."),
        ("kept in: $LLM_ATLAS_CACHE, or", "kept in: $LLM_ATLAS_CACHE, or"),
        ("see [the page](https://example.org/a_b)", "see the page"),
        ("**bold** and *thin*", "bold and thin"),
    ],
)
def test_text_comes_out_as_it_reads(markdown: str, wanted: str) -> None:
    assert shown(html(markdown_to_rst(markdown))) == wanted


def test_formulas_are_formulas() -> None:
    body = html(markdown_to_rst(r"$PE(p, 2i)$ is $\sin(p / b^{2i/d})$, in turn." + "\n\n$$\nx_1 \\\\ y\n$$"))
    assert '<tt class="math">PE(p, 2i)</tt>' in body
    assert r'<tt class="math">\sin(p / b^{2i/d})</tt>' in body
    assert '<pre class="math">\nx_1 ' in body
    assert "$" not in body


def test_code_blocks_and_lists_and_tables_stay() -> None:
    body = html(
        markdown_to_rst(
            "Use:\n\n    f(`a`, $b)\n\n- one `x`\n  two\n- three\n\n| a | b |\n|---|---|\n| `c` | d_ |"
        )
    )
    assert "f(`a`, $b)" in shown(body)
    assert body.count("<li>") == 2
    assert body.count("<td>") == 2
    assert "d_" in shown(body)


def test_lines_on_arguments_become_a_list() -> None:
    text = (
        "Fetch it.\n\nsource:   a wheel, or a folder; without one\n          the folder is looked into.\n"
        "progress: bars on or off.\nAn asset in the cache is returned.\nErrors: ValueError."
    )
    body = html(markdown_to_rst(text, names={"source", "progress"}))
    assert body.count("<li>") == 2
    assert "without one the folder" in shown(body)
    assert "<p>An asset in the cache is returned.</p>" in body
    assert "<p>Errors: ValueError.</p>" in body
    plain = html(markdown_to_rst("`number` and `chapter` are\nnumber: three", names={"chapter"}))
    assert "<li>" not in plain


def test_what_no_docstring_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="image in a docstring"):
        markdown_to_rst("![x](y.png)")


def test_a_fault_in_escaping_would_be_seen() -> None:
    assert shown(html(["|bar| *thin*".replace("|", r"\|")])) != "|bar| *thin*"
    assert shown(html([escape("|bar| *thin*")])) == "|bar| *thin*"


def test_every_docstring_is_sound() -> None:
    seen = 0
    for module in api.modules().values():
        there = importlib.import_module(module.name)
        for name in ("", *module.names):
            thing = getattr(there, name, None) if name else there
            doc = getattr(thing, "__doc__", None)
            if not doc or (name and module.names[name][0] == "data"):
                continue
            html(markdown_to_rst(inspect.cleandoc(doc)))
            seen += 1
    assert seen > 150
