"""Explorables on a page: a MyST-NB renderer for their mime type, and the still for readers without script.

The renderer is declared in pyproject under `myst_nb.mime_renderers`. The drawing itself is made in the
browser by assets/site/explore.js from the JSON in the page; without JavaScript, and on builders other than
html, the png of the same output stands in.
"""

import html
import json
from typing import Any, ClassVar

from docutils import nodes
from myst_nb.core.render import MimeData, MimeRenderPlugin, NbElementRenderer
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

from llm_atlas.book.explore import MIME

__all__ = ["ExploreRenderer", "PlaceStill", "figure_html", "setup"]

_CLASS = "atlas-explore"


def figure_html(spec: dict[str, Any]) -> tuple[str, str]:
    """The markup before and after the still that readers without JavaScript get."""
    # </script> and <!-- inside a string would end the element
    data = json.dumps(spec, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    opening = (
        f'<figure class="{_CLASS}">\n'
        f'<p class="{_CLASS}-title">{html.escape(spec["title"])}</p>\n'
        f'<script type="application/json">{data}</script>\n'
        f'<div class="{_CLASS}-body"></div>\n<noscript>\n'
    )
    return opening, f"</noscript>\n<figcaption>{html.escape(spec['caption'])}</figcaption>\n</figure>\n"


class ExploreRenderer(MimeRenderPlugin):
    """Renders the mime type of `explore` as a figure; every other type is left to the next renderer."""

    mime_priority_overrides: ClassVar = [("html", MIME, 0)]

    @staticmethod
    def handle_mime(renderer: NbElementRenderer, data: MimeData, inline: bool) -> list[nodes.Element] | None:
        if inline or data.mime_type != MIME:
            return None
        spec = {**dict(data.content), **data.output_metadata.get(MIME, {})}
        if "data" not in spec:
            raise ValueError(f"cell {data.cell_index} of {renderer.source}: an explorable without its frames")
        spec |= json.loads(spec.pop("data"))
        before, after = figure_html(spec)
        figure = nodes.container(classes=[f"{_CLASS}-output"], atlas_alt=spec["alt"])
        figure += [nodes.raw("", before, format="html"), nodes.raw("", after, format="html")]
        return [figure]


class PlaceStill(SphinxPostTransform):
    """Put the png of an explorable's output inside its figure, before MyST-NB drops all but the chosen
    type."""

    # SelectMimeType of MyST-NB runs at 4
    default_priority = 3
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for bundle in list(self.document.findall(_is_bundle)):
            outputs = {child["mime_type"]: child for child in bundle.children}
            if MIME not in outputs or "image/png" not in outputs:
                continue
            figure = next(outputs[MIME].findall(lambda node: "atlas_alt" in getattr(node, "attributes", {})))
            still = next(outputs["image/png"].findall(nodes.image)).deepcopy()
            still["alt"] = figure["atlas_alt"]
            figure.insert(1, still)


def _is_bundle(node: nodes.Node) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == "mime_bundle"


def setup(app: Sphinx) -> None:
    app.add_post_transform(PlaceStill)
