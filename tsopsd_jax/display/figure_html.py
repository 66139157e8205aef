"""Figures as a part of a page: panels in as many columns as there is room for, a caption, the exact values."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tsopsd_jax.display.figures import PALETTE, AnyPanel, Bars, Chart, Curve, Figure, Histogram, Matrix, panel_svg
from tsopsd_jax.display.html_parts import details, escape, table
from tsopsd_jax.display.numbers import fixed

DARK = ("#58aeea", "#f28c50", "#35c79a", "#e3a3c5", "#9bd5f5", "#f2bd4a")
"""The palette on a dark page, colour for colour."""
MAX_VALUES = 200
"""Rows of a table of exact values."""


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--curve-{at}: {colour};" for at, colour in enumerate(colours))


FIGURE_CSS = f"""
:root {{ {_variables(PALETTE[:-1])} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px 28px; }}
.panels svg text {{ fill: var(--ink); }}
figure img {{ display: block; width: 100%; height: auto; background: #ffffff; }}
figcaption {{ color: var(--muted); font-size: 0.88rem; margin: 8px 0 0; max-width: 76ch; overflow-wrap: anywhere; }}
.see {{ max-width: 76ch; }}
section th, section th.n {{ white-space: normal; vertical-align: bottom; }}
section td.name {{ min-width: 7em; overflow-wrap: normal; }}
@media print {{
  .scroll {{ overflow: visible; }}
  .panels {{ grid-template-columns: 1fr 1fr; }} .panel {{ break-inside: avoid; }}
}}
"""
"""What a page with figures needs beside the style of all pages."""


class Section(NamedTuple):
    """A part of the page: its title, what to see in it, and its HTML."""

    title: str
    says: str
    body: str


def sections_html(sections: Sequence[Section]) -> str:
    """The sections, one under the other."""
    return "\n".join(
        f'<section>\n<h2>{escape(each.title)}</h2>\n<p class="see">{escape(each.says)}</p>\n{each.body}\n</section>'
        for each in sections
    )


def figure_html(figure: Figure) -> str:
    """Draw a figure as HTML: its panels as SVG, the caption, and folded the values that they show."""
    panels = "".join(
        f'<div class="panel" role="img" aria-label="{escape(_label(panel))}">{panel_svg(panel)}</div>'
        for panel in figure.panels
    )
    values = "".join(f"<h3>{escape(panel.title)}</h3>{values_table(panel)}" for panel in figure.panels)
    return (
        f'<figure><div class="panels">{panels}</div><figcaption>{escape(figure.caption)}</figcaption></figure>'
        + details("Exact values", values)
    )


def _label(panel: AnyPanel) -> str:
    y_label = panel.y_label if isinstance(panel, Chart | Matrix) else ""
    axes = [f"{name}: {text}" for name, text in (("x", panel.x_label), ("y", y_label)) if text]
    return "; ".join([panel.title, *axes])


def values_table(panel: AnyPanel) -> str:
    """The numbers that a panel shows, as an HTML table; of more than `MAX_VALUES` rows evenly chosen ones."""
    match panel:
        case Chart():
            titles, rows = _of_chart(panel)
        case Histogram():
            bins = zip(itertools.pairwise(panel.edges), panel.counts, strict=True)
            titles = [f"from, {panel.x_label}", "to", "tokens"]
            rows = [[_exact(low), _exact(high), fixed(float(count), ",.0f")] for (low, high), count in bins if count]
            rows = [["mark: " + escape(name), _exact(at), ""] for name, at in panel.marks.items()] + rows
        case Bars():
            titles = ["", *(f"{part}, {panel.x_label}" for part in panel.parts)]
            columns = zip(*panel.parts.values(), strict=True)
            rows = [[escape(name), *map(_exact, row)] for name, row in zip(panel.names, columns, strict=True)]
        case Matrix():
            names = list(panel.names) or [str(at + 1) for at in range(panel.values.shape[1])]
            titles = [f"{panel.y_label} \\ {panel.x_label}" if panel.y_label else "", *names]
            own = list(panel.names) or [str(at + 1) for at in range(panel.values.shape[0])]
            rows = [[escape(name), *map(_exact, row)] for name, row in zip(own, panel.values, strict=True)]
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_VALUES)).round().astype(int)) if rows else []
    left_out = f'<p class="muted">{len(kept)} of {len(rows)} rows.</p>' if len(kept) < len(rows) else ""
    return table([escape(title) for title in titles], [rows[at] for at in kept], {*range(1, len(titles))}) + left_out


def _of_chart(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a chart: x, and each curve's value there, with half the width of its band."""
    titles, columns = [chart.x_label], list[dict[float, str]]()
    for curve in chart.curves:
        if len(curve.x):
            titles.append(curve.name or chart.y_label)
            columns.append(dict(_points(curve)))
    places = sorted({x for column in columns for x in column})
    return titles, [[_exact(x), *(column.get(x, "") for column in columns)] for x in places]


def _points(curve: Curve) -> Iterator[tuple[float, str]]:
    for at, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
        if np.isfinite(y):
            around = "" if curve.high is None else f" ± {_exact(curve.high[at] - y)}"
            yield float(x), _exact(y) + around


def _exact(value: float) -> str:
    return fixed(float(value), ".6g")
