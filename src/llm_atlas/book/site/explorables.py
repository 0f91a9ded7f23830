"""Explorables on a page: a MyST-NB renderer for their mime type, and the still for readers without script.

The renderer is declared in pyproject under `myst_nb.mime_renderers`. The drawing itself is made in the
browser by assets/site/explore.js from the JSON in the page; without JavaScript, and on builders other than
html, the png of the same output stands in.
"""

import html
import json
import math
from typing import Any, ClassVar

from docutils import nodes
from myst_nb.core.render import MimeData, MimeRenderPlugin, NbElementRenderer
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

from llm_atlas.book.explore import MIME
from llm_atlas.book.site.links import json_script

__all__ = ["ExploreRenderer", "PlaceStill", "figure_html", "setup"]

_CLASS = "atlas-explore"


def figure_html(spec: dict[str, Any]) -> tuple[str, str]:
    """The markup before and after the still that readers without JavaScript get."""
    opening = (
        f'<figure class="{_CLASS}">\n'
        f'<p class="{_CLASS}-title">{html.escape(spec["title"])}</p>\n'
        f"{json_script(spec)}\n"
        f'<div class="{_CLASS}-body" style="{_room(spec)}"></div>\n<noscript>\n'
    )
    return opening, f"</noscript>\n<figcaption>{html.escape(spec['caption'])}</figcaption>\n</figure>\n"


def _room(spec: dict[str, Any]) -> str:
    """The height that explore.js will fill, for explore.css to keep free: nothing below moves when it draws.

    The formulas are the script's own; cqw is the figure's width, which no build knows.
    """
    index = 0  # of the frame that is drawn first
    for control in spec["controls"]:
        index = index * len(control["values"]) + control["default"]
    frame = {**spec.get("common", {}), **spec["frames"][index]}
    kind = spec["kind"]
    if kind == "lines":
        drawing = "clamp(230px, 55cqw, 380px)"
    elif kind == "bars":
        longest = max(len(label) for label in frame["labels"]) * 7 + 8
        across = f"{len(frame['labels']) * 24 + (24 if frame.get('yLabel') else 4) + 22}px"
        # beside the bars where the labels do not fit under them: by far one or the other
        drawing = across if longest * len(frame["labels"]) > 640 else "clamp(220px, 50cqw, 340px)"
    elif kind == "heatmap":
        columns, rows = len(frame["xTicks"]), len(frame["yTicks"])
        widest = max(len(tick) for tick in frame["xTicks"]) * 7
        below = (min(widest, 90) * 0.83 + 16 if widest > 28 else 20) + (20 if frame.get("xLabel") else 0)
        left = max(len(tick) for tick in frame["yTicks"]) * 7 + 8 + (18 if frame.get("yLabel") else 0)
        cell = f"min(46px, (100cqw - {left + 2}px) / {columns}, {max(440 / rows, 6):.4g}px)"
        drawing = f"{cell} * {rows} + {below + 4 + 24:.4g}px"  # and its scale of colours
    else:
        letters = sum(len(token) + 2 for token in frame["tokens"]) * 9
        drawing = f"{math.ceil(letters / 640) * 34 + 24}px"
    return f"--ae-drawing: {drawing}; --ae-controls: {len(spec['controls'])}"


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
