"""The look of the figures: settings, labels, the same bytes twice, colours that stay apart."""

import io
import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from llm_atlas.book import style


@pytest.fixture(autouse=True)
def _own_settings():
    with mpl.rc_context():
        yield
    plt.close("all")


def drawn(kind: str) -> bytes:
    fig, ax = style.figure(5, 3)
    ax.plot([0, 1], [0, 1])
    style.label_line(ax, 1, 1, "up", color=style.BLUE)
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_is_the_same_bytes(kind: str) -> None:
    assert drawn(kind) == drawn(kind)


def test_a_figure_is_small_and_as_wide_as_asked() -> None:
    fig, _ = style.figure(5, 3)
    assert tuple(fig.get_size_inches()) == (5, 3)
    assert len(drawn("png")) < 40_000


def test_text_is_readable_on_a_phone() -> None:
    style.use()
    width = mpl.rcParams["figure.figsize"][0] * 72
    for size in ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"):
        assert mpl.rcParams[size] * 360 / width > 7.5


def test_using_twice_changes_nothing() -> None:
    style.use()
    once = dict(mpl.rcParams)
    style.use()
    assert dict(mpl.rcParams) == once


def test_a_label_stands_beside_its_point() -> None:
    _, ax = style.figure()
    style.label_line(ax, 1, 2, "right")
    style.label_line(ax, 1, 2, "left", dx=-6)
    right, left = ax.texts
    assert (right.get_ha(), left.get_ha()) == ("left", "right")
    assert right.xy == (1, 2)


def test_colours_stay_apart_for_readers_without_red_or_green() -> None:
    """Under Viénot, Brettel and Mollon's (1999) deuteranopia and protanopia, in linear RGB."""
    views = [
        [(0.29275, 0.70725, -0.02234), (0.29275, 0.70725, 0.02234), (-0.02234, 0.02234, 1.0)],
        [(0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)],
    ]
    for view in views:
        seen = [[sum(m * c**2.2 for m, c in zip(row, to_rgb(color), strict=True)) for row in view]
                for color in style.PALETTE]  # fmt: skip
        for a, b in itertools.combinations(seen, 2):
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.04


def test_unknown_colormaps_and_sizes_are_refused() -> None:
    assert style.colormap(style.DIVERGING)(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.01)
    with pytest.raises(ValueError, match="'jet' is none of"):
        style.colormap("jet")
    with pytest.raises(ValueError, match="20 by 3 inches"):
        style.figure(20, 3)
