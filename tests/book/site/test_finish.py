"""The last hand on built pages: icons, formulas' script, code and images, each once on a page that needs it."""

from pathlib import Path

import pytest

from llm_atlas.book.site.finish import coloured_tokens, finish_page

HEAD = """<link href="../_static/vendor/fontawesome/6/css/all.min.css?digest=1" rel="stylesheet" />
<link rel="preload" as="font" crossorigin href="../_static/vendor/fontawesome/6/webfonts/a.woff2" />
<script src="../_static/vendor/fontawesome/6/js/all.min.js?digest=1"></script>
<script>window.MathJax = {"loader": {}}</script>
<script defer="defer" src="../_static/mathjax/startup.js"></script>
<p>text</p>"""
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000070000000508060000")


def test_the_icons_are_one_style_sheet_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    text = finish_page(HEAD, page)
    assert "fontawesome" not in text
    assert text.count('<link href="../_static/icons.css" rel="stylesheet" />') == 1
    assert finish_page(text, page) == text


def test_only_a_page_with_formulas_loads_their_script(tmp_path: Path) -> None:
    assert "athJax" not in finish_page(HEAD, tmp_path / "p.html")
    formula = finish_page(HEAD + '<span class="math">x</span>', tmp_path / "p.html")
    assert "window.MathJax" in formula
    assert "mathjax/startup.js" in formula


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ('<img alt="a" src="a%20b.png"/>', '<img width="7" height="5" alt="a" src="a%20b.png"/>'),
        ('<img src="a%20b.png" width="3">', '<img src="a%20b.png" width="3">'),
        ('<img src="none.png">', '<img src="none.png">'),
        ('<img src="data:image/png;base64,AA">', '<img src="data:image/png;base64,AA">'),
    ],
)
def test_an_image_gets_the_size_of_its_file(tmp_path: Path, image: str, wanted: str) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    assert finish_page(image, tmp_path / "p.html") == wanted


SHEET = """\
html[data-theme="light"] .highlight { background: #fff; color: #111 }
html[data-theme="light"] .highlight .n { color: #111 } /* Name */
html[data-theme="light"] .highlight .p { color: #111 } /* Punctuation */
html[data-theme="light"] .highlight .k { color: #700; font-weight: bold } /* Keyword */
html[data-theme="dark"] .highlight { background: #222; color: #eee }
html[data-theme="dark"] .highlight .n { color: #eee } /* Name */
html[data-theme="dark"] .highlight .p { color: #aaa } /* Punctuation */
"""


def test_a_token_keeps_its_element_only_where_a_theme_shows_it_otherwise(tmp_path: Path) -> None:
    assert coloured_tokens(SHEET) == {"k", "p"}
    code = '<div class="highlight"><pre><span></span><span class="k">def</span> <span class="n">f</span></pre></div>'
    text = finish_page(code + '<span class="n">out</span>', tmp_path / "p.html", {"k", "p"})
    assert text == code.replace('<span class="n">f</span>', "f") + '<span class="n">out</span>'
