"""Figures of the analyses: panels of curves, histograms, bars or matrices with a caption; as PNG, SVG and JSON."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.display.plots import COLOURS, STYLE, for_page
from tsopsd_jax.rundir import files

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1c2024")
"""Okabe and Ito's colours, told apart by people with any kind of colour vision."""
DASHES = ("-", "--", "-.", ":")
"""A second difference between curves, for prints in grey: the next style with each round of the palette."""
PANEL_IN = (4.6, 3.1)
PAGE_COLOURS = {
    **{f"curve-{at}": colour for at, colour in enumerate(PALETTE[:-1])},
    **{name: COLOURS[name] for name in ("ink", "muted", "line", "grid")},
}
"""The names of a page's CSS variables for a panel's colours, with their values in the light theme."""


class Curve(NamedTuple):
    """One line: y over x, with a band from `low` to `high` if there is one. NaN leaves a gap."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


class Strip(NamedTuple):
    """A bar at a chart's foot, in the colour of curve number `curve`; of several runs each adds `share` of its ink."""

    curve: int
    begin: float
    end: float
    share: float = 1.0


class Chart(NamedTuple):
    """Curves over one axis; `shaded` are spans (name, from, to), `lines` labelled heights."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    shaded: Sequence[tuple[str, float, float]] = ()
    lines: Mapping[str, float] = {}
    log_x: bool = False
    log_y: bool = False
    marked: bool = False
    """Whether each point has a marker."""
    whole_x: bool = False
    """Whether x counts something: layers, steps."""
    strips: Sequence[Strip] = ()


class Histogram(NamedTuple):
    """Counts between edges [bins + 1]; `marks` are labelled places on the x axis."""

    title: str
    x_label: str
    edges: np.ndarray
    counts: np.ndarray
    marks: Mapping[str, float] = {}
    log_x: bool = False


class Bars(NamedTuple):
    """Horizontal bars, each divided into the parts: {part: a number for each bar}."""

    title: str
    x_label: str
    names: Sequence[str]
    parts: Mapping[str, Sequence[float]]


class Matrix(NamedTuple):
    """A matrix of similarities. `near_one`: colours show -log10(1 - value), which tells 0.99 from 0.999."""

    title: str
    x_label: str
    y_label: str
    colour_label: str
    values: np.ndarray
    names: Sequence[str] = ()
    near_one: bool = False


AnyPanel = Chart | Histogram | Bars | Matrix


class Figure(NamedTuple):
    """Panels, `columns` in a row, over a caption that says what they show."""

    panels: Sequence[AnyPanel]
    caption: str
    columns: int = 2


@contextlib.contextmanager
def _styled(width_in: float, height_in: float, colour: str) -> Iterator[Any]:
    """An empty matplotlib figure, drawn and saved in the style of all figures, whatever the user's settings are."""
    # Lazy: matplotlib takes a second, which only a figure should cost.
    import matplotlib.style
    from matplotlib.figure import Figure as Canvas

    with matplotlib.style.context(["default", STYLE], after_reset=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may have characters that the measuring font lacks
        yield Canvas(figsize=(width_in, height_in), layout="constrained", facecolor=colour)


def _draw(axis: Any, panel: AnyPanel) -> None:
    axis.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold")
    axis.set_xlabel(panel.x_label)
    _DRAW[type(panel)](axis, panel)


def write_png(figure: Figure, path: Path) -> None:
    """Draw a figure into a PNG file, replacing it in one go."""
    columns = min(figure.columns, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    width_in, height_in = PANEL_IN[0] * columns, PANEL_IN[1] * rows
    caption = textwrap.fill(figure.caption, int(16 * width_in))
    below_in = 0.16 * (caption.count("\n") + 1) + 0.15
    with _styled(width_in, height_in + below_in, "white") as canvas:
        engine: Any = canvas.get_layout_engine()
        share = below_in / (height_in + below_in)
        engine.set(rect=(0, share, 1, 1 - share), w_pad=0.08, h_pad=0.08)
        axes = canvas.subplots(rows, columns, squeeze=False).reshape(-1)
        for panel, axis in zip(figure.panels, axes, strict=False):
            _draw(axis, panel)
        for axis in axes[len(figure.panels) :]:
            axis.set_axis_off()
        canvas.text(0.08 / width_in, 0.06 / (height_in + below_in), caption, fontsize=8, va="bottom", linespacing=1.3)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    files.replace(path, [buffer.getvalue()])


def panel_svg(panel: AnyPanel) -> str:
    """Draw one panel as an `<svg>` element to be put into a page that defines the variables of `PAGE_COLOURS`."""
    with _styled(*PANEL_IN, "none") as canvas:
        _draw(canvas.subplots(), panel)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="svg", transparent=True)
    return for_page(buffer.getvalue().decode("utf-8", "replace"), PAGE_COLOURS)


def figure_as_json(figure: Figure) -> dict[str, Any]:
    """Write a figure as an object that `figure_from_json` reads, once it is strict JSON."""
    panels = [{"kind": type(panel).__name__, **panel._asdict()} for panel in figure.panels]
    return {**figure._asdict(), "panels": panels}


def figure_from_json(found: Mapping[str, Any]) -> Figure:
    """Read a figure back; null becomes NaN.

    Raises:
        ValueError: no figure of this version.
    """
    kinds = {kind.__name__: kind for kind in _DRAW}
    try:
        panels = [kinds[panel["kind"]](**_fields(panel)) for panel in found["panels"]]
        return Figure(panels, str(found["caption"]), int(found["columns"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected a figure of this version, got one that differs ({error}): analyse again") from error


def _fields(panel: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a panel's constructor: lists of numbers become arrays."""
    fields = {name: value for name, value in panel.items() if name != "kind"}
    for name in fields.keys() & {"edges", "counts", "values"}:
        fields[name] = np.asarray(fields[name], np.float64)
    if "curves" in fields:
        fields["curves"] = [
            Curve(name, *(np.asarray(each, np.float64) for each in arrays if each is not None))
            for name, *arrays in fields["curves"]
        ]
        fields["strips"] = [Strip(*strip) for strip in fields["strips"]]
    return fields


def _plain(axis: Any) -> None:
    for side in ("right", "top"):
        axis.spines[side].set_visible(False)
    axis.grid(color="#eceef1", linewidth=0.8)
    axis.set_axisbelow(True)


def _draw_chart(axis: Any, chart: Chart) -> None:
    _plain(axis)
    axis.set_ylabel(chart.y_label)
    shades: dict[str, str] = {}
    for name, begin, end in chart.shaded:
        shades.setdefault(name, PALETTE[::-1][len(shades) % len(PALETTE)])
        axis.axvspan(begin, end, color=shades[name], alpha=0.10, lw=0)
        axis.annotate(name, ((begin + end) / 2, 1), (0, -8), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", fontsize=6.5, color="#60646c")  # fmt: skip
    for at, curve in enumerate(chart.curves):
        colour = PALETTE[at % len(PALETTE)]
        dash = DASHES[at // len(PALETTE) % len(DASHES)]
        marker = "o" if chart.marked or np.isfinite(curve.y).sum() < 3 else ""
        axis.plot(curve.x, curve.y, dash, color=colour, linewidth=1.4, marker=marker, markersize=3, label=curve.name)
        if curve.low is not None and curve.high is not None:
            axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, lw=0)
    for name, height in chart.lines.items():
        axis.axhline(height, color="#1c2024", linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.65)
        axis.annotate(name, (1, height), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=6.5)  # fmt: skip
    if chart.log_x:
        _logarithmic(axis.set_xscale, axis.xaxis)
    elif chart.whole_x:
        axis.xaxis.get_major_locator().set_params(integer=True)
    if chart.log_y:
        _logarithmic(axis.set_yscale, axis.yaxis)
    else:
        _widen(axis)
    _draw_strips(axis, chart.strips)
    if any(curve.name for curve in chart.curves):
        axis.legend(fontsize=7, frameon=False)


def _draw_strips(axis: Any, strips: Sequence[Strip]) -> None:
    """Bars in rows at the foot of the axes, a row for each curve that has some."""
    rows = {curve: row for row, curve in enumerate(dict.fromkeys(strip.curve for strip in strips))}
    for curve, begin, end, share in strips:
        foot = 0.012 + 0.03 * rows[curve]
        axis.axvspan(begin, end, foot, foot + 0.02, color=PALETTE[curve % len(PALETTE)], alpha=0.9 * share, lw=0)


def _logarithmic(set_scale: Any, axis: Any, scale: str = "log") -> None:
    """Make an axis logarithmic, its ticks plain numbers (STYLE parses no mathematics)."""
    set_scale(scale, **({"linthresh": 1} if scale == "symlog" else {}))
    low, high = axis.get_view_interval()
    if low > 0 and high < 100 * low:  # the powers of ten alone would be a tick or none
        subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)
        axis.get_major_locator().set_params(subs=subs)
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda _value, _position: "")


def _widen(axis: Any) -> None:
    """Show at least a hundredth of what is measured: rounding errors alone make no picture."""
    low, high = axis.get_ylim()
    least = 0.01 * max(abs(low), abs(high))
    if high - low < least:
        axis.set_ylim((low + high - least) / 2, (low + high + least) / 2)


def _draw_histogram(axis: Any, histogram: Histogram) -> None:
    _plain(axis)
    axis.stairs(histogram.counts, histogram.edges, fill=True, color=PALETTE[0], alpha=0.75)
    axis.set_ylabel("tokens")
    if histogram.log_x:
        _logarithmic(axis.set_xscale, axis.xaxis)
    _logarithmic(axis.set_yscale, axis.yaxis, "symlog")  # long tails of few tokens are what is looked for
    axis.set_ylim(bottom=0)
    for at, (name, place) in enumerate(histogram.marks.items()):
        axis.axvline(place, color=PALETTE[1 + at], linewidth=1.2, linestyle=DASHES[at % len(DASHES)], label=name)
    if histogram.marks:
        axis.legend(fontsize=7, frameon=False)


def _draw_bars(axis: Any, bars: Bars) -> None:
    _plain(axis)
    places, left = np.arange(len(bars.names))[::-1], np.zeros(len(bars.names))
    for at, (part, values) in enumerate(bars.parts.items()):
        axis.barh(places, values, left=left, height=0.6, color=PALETTE[at % len(PALETTE)], label=part)
        left = left + np.asarray(values)
    axis.set_yticks(places, bars.names)
    axis.legend(fontsize=7, frameon=False)


def _draw_matrix(axis: Any, matrix: Matrix) -> None:
    axis.set_ylabel(matrix.y_label)
    shown = -np.log10(np.clip(1.0 - matrix.values, 1e-6, 1.0)) if matrix.near_one else matrix.values
    limits = (0.0, 6.0) if matrix.near_one else (-1.0, 1.0)
    rows, columns = shown.shape
    extent = (0.5, columns + 0.5, 0.5, rows + 0.5)  # cells are numbered from 1
    image = axis.imshow(
        shown, origin="lower", cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto", extent=extent
    )
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.get_major_locator().set_params(integer=True)
    bar = axis.figure.colorbar(image, ax=axis, label=matrix.colour_label)
    if matrix.near_one:
        bar.set_ticks(range(7), labels=["0", "0.9", "0.99", "0.999", "1 - 1e-4", "1 - 1e-5", "1 - 1e-6"])
    if matrix.names:
        places = range(1, len(matrix.names) + 1)
        axis.set_xticks(places, matrix.names, rotation=45, ha="right")
        axis.set_yticks(places, matrix.names)


_DRAW = {Chart: _draw_chart, Histogram: _draw_histogram, Bars: _draw_bars, Matrix: _draw_matrix}
