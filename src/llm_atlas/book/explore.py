"""Interactive drawings that work in a kernel and on the static site, from one call in one cell.

    explore(
        lambda temperature: Bars(tokens, softmax(logits / temperature), y_label="probability"),
        title="Temperature",
        caption="A low temperature sharpens the distribution.",
        alt="Bar chart of next-token probabilities.",
        temperature=(0.2, 2.0, 0.2),
    )

Every combination of the ranges is computed when the cell runs. The output holds the numbers as JSON (drawn on
the site by assets/site/explore.js), a still of the default choice as png (for GitHub and print), and in a
live notebook ipywidgets over the same numbers. There is no encoded image in the JSON and no kernel behind the
page.
"""

import inspect
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["MIME", "Bars", "Drawing", "Explorable", "Heatmap", "Lines", "Tokens", "explore"]

MIME = "application/vnd.llm-atlas.explore+json"
# beartype takes float at its word: 1 is none
Number = int | float
MAX_FRAMES = 400
MAX_BYTES = 300_000
_VIEW = "application/vnd.jupyter.widget-view+json"


def _array(values: Any, name: str, ndim: int = 1) -> np.ndarray:
    """Numbers from lists, NumPy arrays or torch tensors, as float64."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        values = values.numpy()
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be numbers, not {type(values).__name__}") from None
    if found.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, not shape {found.shape}")
    if found.size == 0:
        raise ValueError(f"{name} is empty")
    return found


def _limits(limits: Any, name: str) -> tuple[float, float] | None:
    if limits is None:
        return None
    low, high = (float(v) for v in limits)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name} must be two finite numbers, the lower first, not {limits!r}")
    return low, high


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a frame shows. `note` is one line of text under it, read aloud when it changes."""

    note: str = ""


@dataclass(frozen=True)
class Lines(Drawing):
    """Curves over a common x: `lines` maps a label to its y values. NaN leaves a gap.

    `y_range` fixes the y axis; without it the axis spans all frames, so that it stands still while a slider
    moves.
    """

    x: Any
    lines: Mapping[str, Any]
    x_label: str = ""
    y_label: str = ""
    y_range: tuple[Number, Number] | None = None
    x_log: bool = False
    y_log: bool = False

    def frame(self) -> dict[str, Any]:
        x = _array(self.x, "x")
        lines = {str(label): _array(y, f"line {label!r}") for label, y in self.lines.items()}
        if not lines:
            raise ValueError("lines is empty")
        for label, y in lines.items():
            if len(y) != len(x):
                raise ValueError(f"line {label!r} has {len(y)} values for {len(x)} of x")
        for name, log, values in [("x", self.x_log, [x]), ("y", self.y_log, list(lines.values()))]:
            if log and any((v <= 0).any() for v in values):
                raise ValueError(f"a logarithmic {name} axis needs positive values")
        limits = _limits(self.y_range, "y_range")
        if self.y_log and limits and limits[0] <= 0:
            raise ValueError(f"y_range {limits} must be positive on a logarithmic axis")
        return {
            "x": x,
            "lines": [{"label": label, "y": y} for label, y in lines.items()],
            "xLabel": self.x_label,
            "yLabel": self.y_label,
            "range": limits,
            "xLog": self.x_log,
            "yLog": self.y_log,
        }


@dataclass(frozen=True)
class Bars(Drawing):
    """One bar a label. `value_range` fixes the axis; without it the axis spans zero and all frames."""

    labels: Sequence[str]
    values: Any
    x_label: str = ""
    y_label: str = ""
    value_range: tuple[Number, Number] | None = None

    def frame(self) -> dict[str, Any]:
        values = _array(self.values, "values")
        labels = [str(label) for label in self.labels]
        if len(labels) != len(values):
            raise ValueError(f"{len(values)} values for {len(labels)} labels")
        return {
            "labels": labels,
            "values": values,
            "xLabel": self.x_label,
            "yLabel": self.y_label,
            "range": _limits(self.value_range, "value_range"),
        }


@dataclass(frozen=True)
class Heatmap(Drawing):
    """A matrix of colours, row 0 on top. NaN and infinities are blank (a masked cell).

    `value_range` fixes the colours; without it they span all frames, from zero where no value is negative and
    symmetric about zero otherwise.
    """

    values: Any
    x_ticks: Sequence[str] | None = None
    y_ticks: Sequence[str] | None = None
    x_label: str = ""
    y_label: str = ""
    value_range: tuple[Number, Number] | None = None

    def frame(self) -> dict[str, Any]:
        values = _array(self.values, "values", ndim=2)
        ticks = {}
        for name, given, size in [("x", self.x_ticks, values.shape[1]), ("y", self.y_ticks, values.shape[0])]:
            ticks[name] = [str(t) for t in given] if given is not None else [str(i) for i in range(size)]
            if len(ticks[name]) != size:
                raise ValueError(
                    f"{len(ticks[name])} {name}_ticks for {size} {'columns' if name == 'x' else 'rows'}"
                )
        return {
            "values": values,
            "xTicks": ticks["x"],
            "yTicks": ticks["y"],
            "xLabel": self.x_label,
            "yLabel": self.y_label,
            "range": _limits(self.value_range, "value_range"),
        }


@dataclass(frozen=True)
class Tokens(Drawing):
    """A line of text, each token shaded by its weight. `focus` is the index of a token to outline."""

    tokens: Sequence[str]
    weights: Any
    focus: int | None = None
    value_range: tuple[Number, Number] | None = None

    def frame(self) -> dict[str, Any]:
        weights = _array(self.weights, "weights")
        tokens = [str(token) for token in self.tokens]
        if len(tokens) != len(weights):
            raise ValueError(f"{len(weights)} weights for {len(tokens)} tokens")
        if self.focus is not None and not 0 <= self.focus < len(tokens):
            raise ValueError(f"focus {self.focus} is no index of {len(tokens)} tokens")
        return {
            "tokens": tokens,
            "values": weights,
            "focus": self.focus,
            "range": _limits(self.value_range, "value_range"),
        }


def _control(name: str, given: Any) -> dict[str, Any]:
    """A slider or a dropdown from what the caller gave for one parameter."""
    if isinstance(given, tuple):
        if len(given) != 3 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in given):
            raise ValueError(f"range {name}={given!r} must be (start, stop, step), a range or a list")
        start, stop, step = given
        if not step > 0 or stop < start:
            raise ValueError(f"range {name}={given!r} must rise by a positive step")
        count = math.floor((stop - start) / step + 1e-9) + 1
        # start + i * step in floating point ends in ...0001; the reader chose round numbers
        values = [v if isinstance(v, int) else round(v, 10) for v in (start + i * step for i in range(count))]
    elif isinstance(given, range | list):
        values = list(given)
    else:
        raise TypeError(
            f"range {name} must be (start, stop, step), a range or a list, not {type(given).__name__}"
        )
    if not values:
        raise ValueError(f"range {name} is empty")
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        kind = "slider"
        if any(b <= a for a, b in itertools.pairwise(values)):
            raise ValueError(f"range {name}={values!r} must rise")
    elif all(isinstance(v, bool) for v in values) or all(isinstance(v, str) for v in values):
        kind = "choice"
        if len(set(values)) < len(values):
            raise ValueError(f"range {name}={values!r} repeats a value")
    else:
        raise TypeError(f"range {name}={values!r} must be all numbers, all texts or all booleans")
    return {"name": name, "kind": kind, "values": values}


def _rounder(digits: int) -> Callable[[Any], Any]:
    def rounded(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return [rounded(v) for v in value.tolist()]
        if isinstance(value, list | tuple):
            return [rounded(v) for v in value]
        if isinstance(value, dict):
            return {key: rounded(v) for key, v in value.items()}
        if isinstance(value, float):
            if not math.isfinite(value):
                return None
            short = float(f"{value:.{digits - 1}e}")
            return int(short) if short.is_integer() and abs(short) < 1e15 else short
        return value

    return rounded


def _common_range(kind: str, frames: list[dict[str, Any]]) -> list[float]:
    """One axis for all frames, so that what moves is the data."""
    arrays = (
        [line["y"] for f in frames for line in f["lines"]]
        if kind == "lines"
        else [f["values"] for f in frames]
    )
    finite = np.concatenate([a[np.isfinite(a)].ravel() for a in arrays])
    if finite.size == 0:
        return [0.0, 1.0]
    low, high = float(finite.min()), float(finite.max())
    if kind == "lines":
        if frames[0]["yLog"]:
            return [low / 1.1, high * 1.1]
        pad = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        # a curve that touches zero keeps zero as its floor
        return [0.0 if low == 0 else low - pad, high + pad]
    if kind == "heatmap" and low < 0:
        return [-max(-low, high), max(-low, high)]
    low, high = min(low, 0.0), max(high, 0.0)
    if kind == "bars":
        low, high = low * 1.04, high * 1.04
    return [low, high if high > low else low + 1.0]


@dataclass(frozen=True, repr=False)
class Explorable:
    """What `explore` returns: shown by Jupyter as widgets, by the site as a drawing, by GitHub as a still.

    `spec` holds titles, controls and the shape of the drawing, `data` the numbers: the frames in row-major
    order of the controls, and what they have in common.
    """

    spec: dict[str, Any]
    data: dict[str, Any]
    exact: bool = True
    _views: list[Any] = field(default_factory=list, compare=False)

    def __repr__(self) -> str:
        lines = [f"Explorable: {self.spec['title']}", self.spec["caption"]]
        for control in self.spec["controls"]:
            values = control["values"]
            span = (
                f"{values[0]} to {values[-1]}, {len(values)} values"
                if control["kind"] == "slider"
                else ", ".join(map(str, values))
            )
            lines.append(f"  {control['label']}: {span}")
        return "\n".join(lines)

    def frame(self, **choice: Any) -> dict[str, Any]:
        """The numbers drawn for one choice of values; the defaults for those not given."""
        index = 0
        for control in self.spec["controls"]:
            value = choice.pop(control["name"], control["values"][control["default"]])
            if value not in control["values"]:
                raise ValueError(f"{control['name']}={value!r} is none of {control['values']!r}")
            index = index * len(control["values"]) + control["values"].index(value)
        if choice:
            raise ValueError(f"{min(choice)!r} is no control of {self.spec['title']!r}")
        return {**self.data["common"], **self.data["frames"][index]}

    def png(self, **choice: Any) -> bytes:
        """A still of one choice, drawn by matplotlib."""
        import matplotlib.pyplot as plt

        from llm_atlas.book import style

        style.use()
        drawn = self.frame(**choice)
        tall = len(drawn["yTicks"]) / max(len(drawn["xTicks"]), 1) if self.spec["kind"] == "heatmap" else 0.0
        rows = (
            math.ceil(sum(len(token) + 3 for token in drawn["tokens"]) / 56)
            if self.spec["kind"] == "tokens"
            else 0
        )
        height = {
            "tokens": 0.9 + 0.34 * rows,
            "bars": 3.6 if len(drawn.get("labels", ())) < 14 else 5.2,
            "heatmap": min(max(5.2 * tall, 2.4), 7.0),
        }.get(self.spec["kind"], 3.6)
        fig, ax = plt.subplots(figsize=(6.4, height))
        try:
            _DRAW[self.spec["kind"]](ax, drawn)
            settings = ", ".join(
                f"{c['label']} = {choice.get(c['name'], c['values'][c['default']])}"
                for c in self.spec["controls"]
            )
            ax.set_title(f"{self.spec['title']}\n{settings}", fontsize=11)
            if drawn["note"]:
                fig.supxlabel(drawn["note"], fontsize=10, color=style.MUTED)
            buffer = io.BytesIO()
            # no version in the file: the same figure stays the same bytes
            fig.savefig(buffer, format="png", metadata={"Software": None})
        finally:
            plt.close(fig)
        return buffer.getvalue()

    def widget(self) -> Any:
        """Controls and picture as ipywidgets. No Output widget and no print: the picture is replaced."""
        import ipywidgets as widgets

        style = {"description_width": "initial"}
        controls: dict[str, Any] = {}
        for spec in self.spec["controls"]:
            make = widgets.SelectionSlider if spec["kind"] == "slider" else widgets.Dropdown
            controls[spec["name"]] = make(
                options=[(str(v), v) for v in spec["values"]],
                index=spec["default"],
                description=spec["label"],
                style=style,
                layout=widgets.Layout(width="min(100%, 30rem)"),
            )
        picture = widgets.Image(value=self.png(), format="png", layout=widgets.Layout(max_width="100%"))

        def redraw(_: Any) -> None:
            picture.value = self.png(**{name: control.value for name, control in controls.items()})

        for control in controls.values():
            control.observe(redraw, names="value")
        return widgets.VBox([*controls.values(), picture, widgets.Label(self.spec["caption"])])

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "image/png": self.png()}
        metadata: dict[str, Any] = {}
        # As one string: a notebook file gives every number of a list its own line, three times the size.
        numbers = {"data": json.dumps(self.data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)}
        if self.exact:
            bundle[MIME] = {**self.spec, **numbers}
        else:
            # nbval compares a bundle to the last digit and leaves metadata alone
            bundle[MIME] = self.spec
            metadata[MIME] = numbers
        if _reader_is_there():
            view = self.widget()
            self._views.append(view)
            bundle |= {k: v for k, v in view._repr_mimebundle_().items() if k == _VIEW}
        return bundle, metadata


def _reader_is_there() -> bool:
    """True in a notebook that somebody runs by hand and that has ipywidgets.

    Front ends with a person before them tell the kernel that they can ask for input; nbclient and nbval,
    which execute the committed notebooks, say they cannot. A committed notebook so holds no widget view,
    whose model would not exist for its readers.
    """
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    request = kernel.get_parent("shell") or {}
    return bool(request.get("content", {}).get("allow_stdin", False))


def explore(
    fn: Callable[..., Drawing],
    *,
    title: str,
    caption: str,
    alt: str,
    default: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    digits: int = 4,
    exact: bool = True,
    **ranges: Any,
) -> Explorable:
    """Draw `fn(**choice)` for every choice of the parameters in `ranges`, with a control for each.

    A range is (start, stop, step) with the stop included, a `range`, or a list: numbers get a slider, texts
    and booleans a dropdown. `fn` returns one of `Lines`, `Bars`, `Heatmap`, `Tokens`, the same kind each
    time. `default` gives the values shown first (else the first of each list, the middle of each slider),
    `labels` the texts beside the controls. `alt` tells a reader who cannot see the drawing what it shows.

    Numbers are rounded to `digits` significant digits. Set `exact=False` where they come out of float32
    arithmetic and so may move in the last digit from CPU to CPU: titles, controls and labels are still
    compared when the notebook is tested, the numbers are not.

    Cost: one call of `fn` a combination. ValueError above 400 combinations or 300 kB, naming the sizes.
    """
    for name, text in [("title", title), ("caption", caption), ("alt", alt)]:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} must be text, not {text!r}")
    if not 1 <= digits <= 12:
        raise ValueError(f"digits {digits} must be 1 to 12")
    if not ranges:
        raise ValueError("explore needs at least one range, such as temperature=(0.1, 2.0, 0.1)")
    _check_parameters(fn, ranges)
    controls = [_control(name, given) for name, given in ranges.items()]
    sizes = [len(control["values"]) for control in controls]
    if math.prod(sizes) > MAX_FRAMES:
        counted = " x ".join(f"{len(c['values'])} {c['name']}" for c in controls)
        raise ValueError(
            f"{counted} are {math.prod(sizes)} frames, at most {MAX_FRAMES} fit a page; use coarser steps"
        )
    for given, what in [(default or {}, "default"), (labels or {}, "labels")]:
        if unknown := set(given) - set(ranges):
            raise ValueError(f"{what} names {min(unknown)!r}, which is no range")
    for control in controls:
        name, values = control["name"], control["values"]
        control["label"] = (labels or {}).get(name, name.replace("_", " "))
        start = len(values) // 2 if control["kind"] == "slider" else 0
        if default and name in default:
            if default[name] not in values:
                raise ValueError(f"default {name}={default[name]!r} is none of {values!r}")
            start = values.index(default[name])
        control["default"] = start

    drawings = []
    for values in itertools.product(*(control["values"] for control in controls)):
        drawing = fn(**dict(zip(ranges, values, strict=True)))
        if type(drawing) not in _KINDS:
            raise TypeError(f"fn must return Lines, Bars, Heatmap or Tokens, not {type(drawing).__name__}")
        drawings.append(drawing)
    if len({type(d) for d in drawings}) > 1:
        raise TypeError("fn must return the same kind of drawing for every choice")
    kind = _KINDS[type(drawings[0])]
    frames = [{**drawing.frame(), "note": drawing.note} for drawing in drawings]
    shared = _common_range(kind, frames)
    for frame in frames:
        frame["range"] = frame["range"] or shared
    frames = [_rounder(digits)(frame) for frame in frames]
    same = [key for key in frames[0] if all(frame[key] == frames[0][key] for frame in frames)]
    common = {key: frames[0][key] for key in same}
    frames = [{key: value for key, value in frame.items() if key not in common} for frame in frames]

    spec = {"version": 1, "title": title, "caption": caption, "alt": alt, "kind": kind, "controls": controls}
    data = {"common": common, "frames": frames}
    size = len(json.dumps([spec, data], separators=(",", ":"), allow_nan=False).encode())
    if size > MAX_BYTES:
        raise ValueError(
            f"{len(frames)} frames take {size / 1000:.0f} kB, at most {MAX_BYTES // 1000} kB fit a page; "
            "use coarser steps, fewer points or fewer digits"
        )
    return Explorable(spec, data, exact)


def _check_parameters(fn: Callable[..., Drawing], ranges: Mapping[str, Any]) -> None:
    """The ranges must be what `fn` takes: a misspelt one would otherwise show up as a strange TypeError
    inside."""
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    if unknown := set(ranges) - accepted:
        raise TypeError(
            f"fn has no parameter {min(unknown)!r}; it takes {', '.join(sorted(accepted)) or 'none'}"
        )
    if missing := required - set(ranges):
        raise TypeError(f"no range is given for parameter {min(missing)!r} of fn")


# Stills, drawn from the same rounded frames as the site's own script draws.


def _nan(values: Sequence[Number | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _spread(ends: list[Number], gap: float) -> list[float]:
    """Move label positions apart until neighbours are `gap` from each other, keeping their order."""
    order = sorted(range(len(ends)), key=ends.__getitem__)
    placed = list(ends)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    shift = sum(p - e for p, e in zip(placed, ends, strict=True)) / len(ends)
    return [p - shift for p in placed]


def _draw_lines(ax: Any, frame: dict[str, Any]) -> None:
    from llm_atlas.book import style

    x = _nan(frame["x"])
    ax.set(xlabel=frame["xLabel"], ylabel=frame["yLabel"], ylim=frame["range"])
    if frame["xLog"]:
        ax.set_xscale("log")
    if frame["yLog"]:
        ax.set_yscale("log")
    ends = []
    for line, color in zip(frame["lines"], itertools.cycle(style.PALETTE)):
        y = _nan(line["y"])
        ax.plot(x, y, color=color, marker="o" if len(x) == 1 else None)
        if (seen := np.flatnonzero(np.isfinite(y))).size:
            ends.append((x[seen[-1]], y[seen[-1]], line["label"], color))
    if len(frame["lines"]) == 1 or not ends:
        return
    low, high = (math.log(v) for v in frame["range"]) if frame["yLog"] else frame["range"]
    heights = [math.log(y) if frame["yLog"] else y for _, y, _, _ in ends]
    per_point = (high - low) / 190
    for (at, y, label, color), old, new in zip(ends, heights, _spread(heights, 13 * per_point), strict=True):
        style.label_line(ax, at, y, label, color=color, dy=(new - old) / per_point)


def _draw_bars(ax: Any, frame: dict[str, Any]) -> None:
    from llm_atlas.book import style

    places, values = range(len(frame["labels"])), _nan(frame["values"])
    colors = [style.PALETTE[1] if v < 0 else style.BLUE for v in values]
    if max(map(len, frame["labels"])) * len(frame["labels"]) > 60:
        ax.barh(places, values, color=colors, height=0.72)
        ax.set(xlabel=frame["yLabel"], ylabel=frame["xLabel"], xlim=frame["range"])
        ax.set_yticks(places, frame["labels"])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        return
    ax.bar(places, values, color=colors, width=0.72)
    ax.set(xlabel=frame["xLabel"], ylabel=frame["yLabel"], ylim=frame["range"])
    ax.set_xticks(places, frame["labels"])
    ax.grid(axis="x", visible=False)


def _draw_heatmap(ax: Any, frame: dict[str, Any]) -> None:
    from llm_atlas.book import style

    low, high = frame["range"]
    name = style.DIVERGING if low < 0 < high else style.SEQUENTIAL
    image = ax.imshow(
        np.array([_nan(row) for row in frame["values"]]),
        cmap=style.colormap(name),
        vmin=low,
        vmax=high,
        aspect="auto",
    )
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    ax.set(xlabel=frame["xLabel"], ylabel=frame["yLabel"])
    for axis, ticks in [("x", frame["xTicks"]), ("y", frame["yTicks"])]:
        step = math.ceil(len(ticks) / (24 if axis == "x" else 4.5 * ax.figure.get_figheight()))
        long = axis == "x" and sum(map(len, ticks[::step])) > 40
        getattr(ax, f"set_{axis}ticks")(
            range(0, len(ticks), step), ticks[::step], **({"rotation": 60, "ha": "right"} if long else {})
        )
    ax.grid(visible=False)


def _draw_tokens(ax: Any, frame: dict[str, Any]) -> None:
    from llm_atlas.book import style

    low, high = frame["range"]
    cmap = style.colormap(style.DIVERGING if low < 0 < high else style.SEQUENTIAL)
    ax.axis("off")
    at, row = 0.0, 0
    for index, (token, weight) in enumerate(zip(frame["tokens"], frame["values"], strict=True)):
        width = max(len(token), 1) * 1.02 + 1.0
        if at + width > 64:
            at, row = 0.0, row - 1
        shade = 0.0 if weight is None else min(max((weight - low) / (high - low), 0.0), 1.0)
        red, green, blue, _ = cmap(shade)
        ax.text(
            at + width / 2,
            row,
            token,
            ha="center",
            va="center",
            fontsize=10,
            family="DejaVu Sans Mono",
            color="white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else style.INK,
            bbox={
                "boxstyle": "round,pad=0.25",
                "facecolor": (red, green, blue),
                "edgecolor": style.INK if index == frame["focus"] else "#d0d0d0",
                "linewidth": 1.6 if index == frame["focus"] else 0.6,
            },
        )
        at += width + 0.6
    ax.set(xlim=(0, 64), ylim=(row - 0.6, 0.6))


_KINDS: dict[type, str] = {Lines: "lines", Bars: "bars", Heatmap: "heatmap", Tokens: "tokens"}
_DRAW = {"lines": _draw_lines, "bars": _draw_bars, "heatmap": _draw_heatmap, "tokens": _draw_tokens}
