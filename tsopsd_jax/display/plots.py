"""The report's plots: panels over the same steps, as one SVG in the page's colours."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.display.foreign_text import CONTROLS, TURNS
from tsopsd_jax.display.numbers import count
from tsopsd_jax.display.series import MAX_POINTS, Stretch, smoothed, thinned, with_gaps

COLOURS = {
    "page": "#ffffff",
    "ink": "#1c2024",
    "muted": "#60646c",
    "line": "#e2e4e8",
    "grid": "#eceef1",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "teal": "#009e73",
    "violet": "#cc79a7",
    "sky": "#56b4e9",
    "amber": "#e69f00",
    "slate": "#64748b",
}
"""The names of the page's CSS variables, with their values in the light theme. Lines and areas have the colours of
Okabe and Ito, told apart by people with any kind of colour vision."""

LINE_COLOURS = ("blue", "orange", "teal", "violet", "amber", "sky", "slate")

MAX_DOTS = 150
"""Steps up to which each is a dot; more are a thin line."""

MAX_SHADED = 400
WIDTH_IN = 5.2
"""Half of a desktop's page, or all of a phone's: there its letters still have ten pixels."""
LEFT_PT, RIGHT_PT = 38.0, 6.0
HEIGHT_PT, FIRST_HEIGHT_PT = 92.0, 112.0
"""Height of a panel's axes, and of the first one's."""
BETWEEN_PT, BELOW_PT = 30.0, 28.0
ROW_PT = 12.0
MAX_PHASE = 28
LINE_LABEL_PT = 10.0  # height of a line's label
LABEL_POINT_PT = 4.9  # width of a character of a phase's label

STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, searchable, small
    "svg.hashsalt": "tsopsd_jax",  # with no date in it, equal runs give equal pages
    "font.family": "DejaVu Sans",  # comes with matplotlib, so measures do not depend on the machine
    "font.size": 8.5,
    "text.parse_math": False,  # a phase may be called "$x_"
    "axes.edgecolor": COLOURS["line"],
    "axes.linewidth": 0.8,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.formatter.useoffset": False,
}


class Series(NamedTuple):
    """One line: its name (empty: the panel says it), a value per step (NaN: none), a name in COLOURS.

    With `at` the values are those of these steps alone, each a mark; `dashed` lines tell two of one colour apart.
    """

    name: str
    values: np.ndarray
    colour: str
    at: np.ndarray | None = None
    dashed: bool = False


class Panel(NamedTuple):
    """One plot: its title, the unit, its lines, dashed horizontal lines (label -> value), the scale.

    `stacked`: the lines are parts of a whole, drawn as areas one on the other.
    """

    title: str
    unit: str
    series: Sequence[Series]
    lines: Mapping[str, float] = {}
    logarithmic: bool = False
    stacked: bool = False


def draw_panels(
    step: np.ndarray,
    panels: Sequence[Panel],
    segments: Sequence[Stretch],
    phase_colours: Mapping[str, str],
    *,
    named: bool = True,
) -> str:
    """Draw the panels over `step`, phases shaded and (`named`) named, as an `<svg>` element to be put into a page."""
    # Lazy: matplotlib takes a second, which only a report should cost.
    import matplotlib.style
    from matplotlib.figure import Figure

    with (
        matplotlib.style.context(["default", STYLE], after_reset=True),
        # Such as a phase's name with characters that the measuring font lacks; the page's font has its own.
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        names = _placed_names(step, segments) if named else []
        rows = [_legend_rows(panel) for panel in panels]
        raised_pt = 11.0 * len({row for _, _, row in names})
        above_pt = [BETWEEN_PT + ROW_PT * count for count in rows]
        heights_pt = [FIRST_HEIGHT_PT if named else HEIGHT_PT] + [HEIGHT_PT] * (len(panels) - 1)
        total_pt = sum(above_pt) + sum(heights_pt) + raised_pt + BELOW_PT
        width_pt = WIDTH_IN * 72
        figure = Figure(figsize=(WIDTH_IN, total_pt / 72), facecolor="none")
        top_pt = total_pt - raised_pt
        axes: list[Any] = []
        for above, height in zip(above_pt, heights_pt, strict=True):
            top_pt -= above + height
            box = (LEFT_PT / width_pt, top_pt / total_pt, 1 - (LEFT_PT + RIGHT_PT) / width_pt, height / total_pt)
            axes.append(figure.add_axes(box, sharex=axes[0] if axes else None))
        for at, (panel, axis) in enumerate(zip(panels, axes, strict=True)):
            _draw_panel(axis, panel, step, segments, title_pt=8 + ROW_PT * rows[at] + (raised_pt if at == 0 else 0))
            _shade(axis, step, segments, phase_colours)
            axis.tick_params(labelbottom=at == len(panels) - 1)
        _write_names(axes[0], names, phase_colours)
        # Half a step at both ends, so that the first and the last phase are as wide as they are long.
        first = min([step[0], *(s.at.min() for p in panels for s in p.series if s.at is not None and s.at.size)])
        axes[0].set_xlim(first - 0.5, step[-1] + 0.5)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes[-1].set_xlabel("step", color=COLOURS["muted"], labelpad=1)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return for_page(buffer.getvalue().decode("utf-8", "replace"), COLOURS)


def _draw_panel(axis: Any, panel: Panel, step: np.ndarray, segments: Sequence[Stretch], *, title_pt: float) -> None:
    for text, x, where, look in (
        (
            drawable(panel.title, 44),
            0,
            "figure fraction",
            {"fontsize": 10, "fontweight": "bold", "color": COLOURS["ink"]},
        ),
        (panel.unit, 1, "axes fraction", {"ha": "right", "color": COLOURS["muted"]}),
    ):
        axis.annotate(
            text, (x, 1), (0, title_pt), xycoords=(where, "axes fraction"), textcoords="offset points", **look
        )
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="x", length=3)
    axis.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    axis.set_axisbelow(True)
    if panel.stacked:
        drawn = _draw_stack(axis, panel.series, step, segments)
    else:
        drawn = [series for series in panel.series if _draw_series(axis, series, step, segments, panel.logarithmic)]
    if not drawn:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=COLOURS["muted"])
        axis.set_yticks([])
        return
    if panel.logarithmic:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        # Over less than two decades the powers of ten alone would be one tick, or none.
        axis.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,))
        axis.yaxis.set_minor_formatter(lambda _value, _position: "")
    else:
        axis.yaxis.get_major_locator().set_params(nbins=5)
    axis.yaxis.set_major_formatter(lambda value, _: tick_label(value))
    lines = dict(sorted(panel.lines.items(), key=lambda item: item[1])[:4])
    for value in lines.values():
        axis.axhline(value, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.65)
    lowest, highest = axis.dataLim.intervaly
    if not panel.logarithmic and lowest >= 0:
        axis.set_ylim(0, 1.07 * highest or 1.0)
    _label_lines(axis, lines)
    for row, series in enumerate(drawn[:MAX_LEGEND]):
        column, line = row % 2, row // 2
        axis.annotate(
            f"{DASHED_KEY if series.dashed else KEY} {drawable(series.name, 26)}" if series.name else "",
            (column / 2, 1),
            (0, title_pt - ROW_PT * (line + 1)),
            xycoords="axes fraction",
            textcoords="offset points",
            color=COLOURS[series.colour],
            fontweight="bold",
            fontsize=8,
        )


KEY, DASHED_KEY = "━", "╍"
MAX_LEGEND = 8
"""Series that are named: two in a row above the axes."""


def _legend_rows(panel: Panel) -> int:
    return -(-len([series for series in panel.series if series.name][:MAX_LEGEND]) // 2)


def tick_label(value: float) -> str:
    """Write a number of an axis in at most about six characters."""
    if value and (abs(value) >= 1e4 or abs(value) < 1e-3):
        return count(value) if 1e4 <= abs(value) < 1e12 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:.4g}"


def _draw_series(axis: Any, series: Series, step: np.ndarray, segments: Sequence[Stretch], logarithmic: bool) -> bool:
    """Draw single steps faintly and their moving mean strongly; false if there is nothing to draw."""
    values = np.where(series.values > 0, series.values, np.nan) if logarithmic else series.values
    if not np.isfinite(values).any():
        return False
    colour, dash = COLOURS[series.colour], (0, (4, 2)) if series.dashed else "-"
    if series.at is not None:
        axis.plot(series.at, values, linestyle=dash, marker="o", markersize=3.5, color=colour, linewidth=1.4)
        return True
    raw = thinned(values)
    look = ({"linewidth": 0.6} if raw.size > MAX_DOTS else
            {"linestyle": "", "marker": ".", "markersize": 3, "markeredgewidth": 0})  # fmt: skip
    axis.plot(*with_gaps(step[raw], values[raw], np.cumsum(~np.isfinite(values))[raw]), color=colour, alpha=0.4, **look)
    smooth = smoothed(np.log(values) if logarithmic else values, segments)
    smooth = np.exp(smooth) if logarithmic else smooth
    kept = np.unique(np.linspace(0, len(step) - 1, MAX_POINTS).round().astype(int))
    # A line of one point shows nothing.
    marker = "o" if np.isfinite(smooth[kept]).sum() < 3 else ""
    axis.plot(step[kept], smooth[kept], linestyle=dash, color=colour, linewidth=1.6, marker=marker, markersize=4)
    return True


def _draw_stack(axis: Any, parts: Sequence[Series], step: np.ndarray, segments: Sequence[Stretch]) -> list[Series]:
    """Draw the moving means of the parts as areas, the first at the bottom; returns the parts that have a value."""
    drawn = [series for series in parts if np.isfinite(series.values).any()]
    kept = np.unique(np.linspace(0, len(step) - 1, MAX_POINTS).round().astype(int))
    below = np.zeros(len(kept))
    for series in drawn:
        above = below + np.nan_to_num(smoothed(series.values, segments)[kept])
        look = {"color": COLOURS[series.colour], "alpha": 0.75, "linewidth": 0}
        if len(kept) == 1:
            axis.bar(step[kept], above - below, bottom=below, width=1.0, **look)
        else:
            axis.fill_between(step[kept], below, above, **look)
        below = above
    return drawn


def _label_lines(axis: Any, lines: Mapping[str, float]) -> None:
    """Name horizontal lines at their right ends, above each, or below it where the next one or the top is close."""
    low, high = axis.get_ylim()
    ordered = sorted(lines.items(), key=lambda item: item[1])
    for at, (label, value) in enumerate(ordered):
        after = ordered[at + 1][1] if at + 1 < len(ordered) else high
        under = (after - value) / (high - low) * HEIGHT_PT < LINE_LABEL_PT
        axis.annotate(
            label,
            (1, value),
            (-2, -2 if under else 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top" if under else "bottom",
            color=COLOURS["ink"],
            fontsize=7.5,
            bbox={"facecolor": COLOURS["page"], "alpha": 0.75, "edgecolor": "none", "pad": 0.5},
        )


def _spans(step: np.ndarray, segments: Sequence[Stretch]) -> list[tuple[float, float]]:
    """Begin and end of each segment; neighbours meet half way between their steps."""
    ends = [(step[segment.end - 1] + step[segment.end]) / 2 for segment in segments[:-1]]
    edges = [step[0] - 0.5, *ends, step[-1] + 0.5]
    return list(itertools.pairwise(edges))


def _shade(axis: Any, step: np.ndarray, segments: Sequence[Stretch], phase_colours: Mapping[str, str]) -> None:
    if len(segments) > MAX_SHADED:
        return
    for phase, colour in phase_colours.items():
        spans = zip(segments, _spans(step, segments), strict=True)
        ranges = [(begin, end - begin) for segment, (begin, end) in spans if segment.phase == phase]
        if ranges:
            alpha = 0.15 if colour == "orange" else 0.055
            axis.broken_barh(
                ranges, (0, 1), transform=axis.get_xaxis_transform(), color=COLOURS[colour], alpha=alpha, lw=0
            )


def _placed_names(step: np.ndarray, segments: Sequence[Stretch]) -> list[tuple[Stretch, float, int]]:
    """Choose a place for each phase's name: its centre over its span, as a share of the width, and one of two rows. A
    name without room is left out."""
    width_pt = WIDTH_IN * 72 - LEFT_PT - RIGHT_PT
    per_step_pt = width_pt / (step[-1] - step[0] + 1)
    taken_pt = [-math.inf, -math.inf]
    placed = []
    for segment, (begin, end) in zip(segments, _spans(step, segments), strict=True):
        half_pt = len(drawable(segment.phase, MAX_PHASE)) * LABEL_POINT_PT / 2 + 3
        centre_pt = ((begin + end) / 2 - step[0] + 0.5) * per_step_pt
        centre_pt = min(max(centre_pt, half_pt), width_pt - half_pt)
        row = next((row for row in (0, 1) if taken_pt[row] <= centre_pt - half_pt), None)
        if row is not None:
            taken_pt[row] = centre_pt + half_pt
            placed.append((segment, centre_pt / width_pt, row))
    return placed


def drawable(text: str, most: int) -> str:
    """Cut a text to so many characters, all of which a font can be asked for."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= most else text[: most - 1] + "…"


def _write_names(axis: Any, names: Sequence[tuple[Stretch, float, int]], phase_colours: Mapping[str, str]) -> None:
    for segment, centre, row in names:
        axis.annotate(
            drawable(segment.phase, MAX_PHASE),
            (centre, 1),
            (0, 4 + 11 * row),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            color=COLOURS[phase_colours[segment.phase]],
            fontweight="bold",
            fontsize=8,
        )


def for_page(svg: str, colours: Mapping[str, str]) -> str:
    """Strip an SVG file to its bare element, sized by the page, its colours the page's variables.

    So it follows a dark theme.

    Args:
        svg: the file's text.
        colours: name of a CSS variable -> the colour, `#rrggbb`, that becomes it.
    """
    svg = re.sub(f"[{CONTROLS}{TURNS}]", "\ufffd", svg[svg.index("<svg") :])  # a phase's name may hold any
    # The date would make equal runs unequal pages.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", head)
    # Ids that nothing refers to would come again in every figure of the page.
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", rest)
    names = {value: name for name, value in colours.items()}

    def variables(style: re.Match[str]) -> str:
        return re.sub(
            r"#[0-9a-f]{6}",
            lambda colour: f"var(--{names[colour[0]]})" if colour[0] in names else colour[0],
            style[0],
        )

    # Only inside style attributes: a phase may be called "#2563b0".
    return re.sub(r'style="[^"]*"', variables, f"{head}>{rest}")
