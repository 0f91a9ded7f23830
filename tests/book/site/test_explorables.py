"""The explorable's way onto a page: MyST-NB's renderer, the still behind it, script and style."""

import json
import re

import nbformat
import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

from llm_atlas.book.explore import MIME, Lines, explore
from llm_atlas.book.site.explorables import figure_html

CONF = 'extensions = ["myst_nb", "llm_atlas.book.site"]\nnb_execution_mode = "off"\n'


def shown(*, exact: bool = True):
    return explore(
        lambda k: Lines([0, 1], {"y": [0, k]}),
        title="A <b>title</b>",
        caption="C & </script>.",
        alt="A rising line",
        k=(1, 3, 1),
        exact=exact,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A built site: one page with two explorables, one without."""
    source = tmp_path_factory.mktemp("site")
    (source / "conf.py").write_text(CONF)
    (source / "index.md").write_text("# Book\n\n```{toctree}\nchapter\n```\n")
    outputs = []
    for exact in (True, False):
        data, metadata = shown(exact=exact)._repr_mimebundle_()
        import base64

        data["image/png"] = base64.b64encode(data["image/png"]).decode()
        outputs.append(nbformat.v4.new_output("execute_result", data, metadata=metadata))
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Chapter"),
            *(nbformat.v4.new_code_cell("explore(...)", outputs=[o], execution_count=1) for o in outputs),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python"},
        },
    )
    nbformat.write(nb, source / "chapter.ipynb")
    out = source / "out"
    with patch_docutils(), docutils_namespace():
        app = Sphinx(source, source, out, source / "trees", "html", status=None, warningiserror=True)
        app.build()
    return out


def test_the_page_has_both_figures_with_data_still_and_caption(site) -> None:
    page = (site / "chapter.html").read_text()
    figures = re.findall(r'<figure class="atlas-explore">.*?</figure>', page, re.DOTALL)
    assert len(figures) == 2
    whole = {**shown().spec, **shown().data}
    for figure in figures:
        script = re.search(r'<script type="application/json">(.*?)</script>', figure, re.DOTALL).group(1)
        assert json.loads(script) == whole
        assert "A &lt;b&gt;title&lt;/b&gt;" in figure
        still = re.search(r"<noscript>(.*)</noscript>", figure, re.DOTALL).group(1)
        assert 'alt="A rising line"' in still
        assert (site / re.search(r'src="([^"]+\.png)"', still).group(1)).is_file()
        assert "<figcaption>C &amp; &lt;/script&gt;.</figcaption>" in figure


def test_only_pages_with_an_explorable_load_the_script(site) -> None:
    chapter, index = ((site / name).read_text() for name in ("chapter.html", "index.html"))
    for name in ("explore.js", "explore.css"):
        assert (site / "_static" / name).is_file()
        assert chapter.count(f"_static/{name}") == 1
        assert f"_static/{name}" not in index


def test_nothing_else_of_the_bundle_is_on_the_page(site) -> None:
    page = (site / "chapter.html").read_text()
    assert "Explorable:" not in page
    assert page.count(".png") == 2


def test_data_cannot_end_the_script() -> None:
    before, _ = figure_html({**shown().spec, **shown().data})
    assert before.count("</script>") == 1
    assert MIME not in before
