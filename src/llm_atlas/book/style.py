"""One look for every figure: `use()` once a notebook, `figure()` for the axes, `label_line()` in place of
legends.

The palette is Okabe and Ito's, which stays apart under the common kinds of colour blindness (Okabe & Ito
2008, "Color Universal Design"). Sizes are chosen so that text is readable when a phone shows the figure 360
px wide.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "DIVERGING",
    "INK",
    "MUTED",
    "PALETTE",
    "SEQUENTIAL",
    "colormap",
    "figure",
    "label_line",
    "use",
]

INK, MUTED = "#222222", "#6b6b6b"
BLUE = "#0072B2"
# Okabe-Ito, darkest contrast first; its yellow is left out, since thin lines of it vanish on white.
PALETTE = (BLUE, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SEQUENTIAL, DIVERGING = "atlas", "atlas-diverging"


def colormap(name: str) -> "Colormap":
    """White to blue (`SEQUENTIAL`), or vermilion through white to blue (`DIVERGING`), for heatmaps."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = {SEQUENTIAL: ["#ffffff", BLUE], DIVERGING: [PALETTE[1], "#ffffff", BLUE]}
    if name not in stops:
        raise ValueError(f"colormap {name!r} is none of {', '.join(stops)}")
    return LinearSegmentedColormap.from_list(name, stops[name])


def use() -> None:
    """Set matplotlib for the rest of the session. Calling it again changes nothing."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 120,
            "savefig.dpi": 120,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.labelsize": 11,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.8,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "lines.linewidth": 2.0,
            "font.size": 11,
            # the font that matplotlib carries: the same on every machine
            "font.family": "DejaVu Sans",
            "legend.frameon": False,
            "image.cmap": "cividis",
            "svg.hashsalt": "llm-atlas",
        }
    )


def figure(width: int | float = 6.4, height: int | float = 3.6, **grid: Any) -> "tuple[Figure, Any]":
    """A figure of `width` by `height` inches and its axes; `grid` goes to `plt.subplots` (nrows, ncols,
    sharey...)."""
    import matplotlib.pyplot as plt

    if not (0 < width <= 12 and 0 < height <= 16):
        raise ValueError(
            f"figure of {width} by {height} inches: width up to 12 and height up to 16 fit a page"
        )
    use()
    return plt.subplots(figsize=(width, height), **grid)


def label_line(
    ax: "Axes",
    x: int | float,
    y: int | float,
    text: str,
    *,
    color: str = INK,
    dx: int | float = 6,
    dy: int | float = 0,
) -> None:
    """Write `text` beside the point (x, y) in data units, moved by (dx, dy) points: a direct label, not a
    legend."""
    ax.annotate(
        text,
        (x, y),
        xytext=(dx, dy),
        textcoords="offset points",
        color=color,
        ha="left" if dx >= 0 else "right",
        va="center",
        annotation_clip=False,
    )
