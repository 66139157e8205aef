"""What the page of a run plots: its course in a few panels, every other metric in a small one, numbers in tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tsopsd_jax.display.columns import MIB, PLACES, Metrics, unit_of
from tsopsd_jax.display.html_parts import details, escape, table
from tsopsd_jax.display.numbers import finite
from tsopsd_jax.display.plots import LINE_COLOURS, Panel, Series, draw_panels
from tsopsd_jax.metric_names import (
    ACCURACY,
    ENTROPY,
    GRAD_NORM,
    JUDGE_S,
    LENGTH,
    REWARD,
    ROLLOUT_S,
    STEP_S,
    UPDATE_S,
)

COURSE = (ENTROPY, REWARD, ACCURACY, LENGTH, GRAD_NORM, ROLLOUT_S, JUDGE_S, UPDATE_S, STEP_S)
"""Metrics that the panels of the run's course show."""
GROUPS = {
    "policy": "Policy",
    "last_update": "Policy at the last update of a rollout",
    "distil": "Distillation",
    "control": "Controls",
    "tampo": "Controls",
    "reward": "Rewards",
    "judge": "Rewards",
    "rollout": "Sampling",
    "loss": "Update",
    "optim": "Update",
    "learner": "Update",
    "perf": "Speed",
    "time": "Speed",
}
"""First part of a metric's name -> the group of its panel; others are the user's own."""
OWN_METRICS = "Your own metrics"
MAX_PANELS = 80
MAX_EXACT_ROWS = 60
LOGARITHMIC_FROM = 1000.0
"""Largest over smallest value from which a small panel is logarithmic."""


def course_panels(
    metrics: Metrics, thresholds: Mapping[str, float], evaluations: Sequence[Mapping[str, Any]]
) -> list[Panel]:
    """The panels of the run's course.

    Args:
        metrics: of its steps.
        thresholds: label -> entropy of the stop rules, in nats.
        evaluations: its records.
    """
    of = metrics.of
    rest = of(STEP_S) - sum(np.nan_to_num(of(name)) for name in (ROLLOUT_S, JUDGE_S, UPDATE_S))
    panels = [
        Panel("Entropy", "nats per token", [Series("", of(ENTROPY), "blue")], lines=thresholds),
        Panel(
            "Reward and accuracy",
            "mean over responses",
            [Series("reward", of(REWARD), "blue"), Series("accuracy", of(ACCURACY), "teal")],
        ),
        Panel("Gradient norm", "logarithmic", [Series("", of(GRAD_NORM), "blue")], logarithmic=True),
        Panel("Response length", "tokens, mean", [Series("", of(LENGTH), "blue")]),
        Panel(
            "Time of a step",
            "s",
            [
                Series("sampling", of(ROLLOUT_S), "sky"),
                Series("verifying", of(JUDGE_S), "amber"),
                Series("update", of(UPDATE_S), "blue"),
                Series("rest", np.maximum(rest, 0.0), "slate"),
            ],
            stacked=True,
        ),
    ]
    measured = evaluation_panel(evaluations)
    return [*panels[:2], measured, *panels[2:]] if measured is not None else panels


def evaluation_panel(evaluations: Sequence[Mapping[str, Any]]) -> Panel | None:
    """avg@k and pass@k over the run, a colour for each benchmark; None where nothing was evaluated."""
    benchmarks = dict.fromkeys(str(each.get("benchmark", "")) for each in evaluations)
    series = []
    for number, benchmark in enumerate(benchmarks):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        ours = [each for each in evaluations if str(each.get("benchmark", "")) == benchmark]
        for key, name in (("avg_at_k", "avg"), ("pass_at_k", "pass")):
            values = {finite(each.get("step")): finite(each.get(key)) for each in ours}
            points = sorted((step, 100 * x) for step, x in values.items() if step is not None and x is not None)
            if points:
                at, percent = np.asarray(points, float).T
                label = f"{name}@{_k(ours)} {benchmark}"
                series.append(Series(label, percent, colour, at=at, dashed=name == "pass"))
    return Panel("Evaluations", "%", series) if series else None


def _k(evaluations: Sequence[Mapping[str, Any]]) -> str:
    found = {each.get("samples") for each in evaluations}
    return str(found.pop()) if len(found) == 1 else "k"


def grouped(metrics: Metrics) -> dict[str, list[str]]:
    """The metrics that the course does not show, by group: the library's groups first, then what is the user's own."""
    groups: dict[str, list[str]] = {name: [] for name in [*GROUPS.values(), OWN_METRICS]}
    for key in metrics.columns:
        if key not in (*COURSE, *PLACES, "time_s"):
            groups[GROUPS.get(key.split("/")[0], OWN_METRICS)].append(key)
    return {name: keys for name, keys in groups.items() if keys}


def small_panels(metrics: Metrics, keys: Sequence[str]) -> tuple[list[Panel], dict[str, float]]:
    """A panel for each of the metrics that changes; and the value of each that does not."""
    panels, constant = [], {}
    for key in keys:
        values = metrics.of(key) / (MIB if unit_of(key) == "MiB" else 1)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if low == high and len(metrics.step) > 1:
            constant[key] = low
            continue
        logarithmic = low > 0 and high > LOGARITHMIC_FROM * low
        unit = ", ".join(filter(None, [unit_of(key), "logarithmic" if logarithmic else ""]))
        panels.append(Panel(key, unit, [Series("", values, "blue")], logarithmic=logarithmic))
    return panels, constant


def more_metrics(metrics: Metrics, colours: Mapping[str, str]) -> str:
    """Every group of metrics as HTML: small panels, what stayed the same in words, exact numbers below."""
    parts, drawn = [], 0
    for name, keys in grouped(metrics).items():
        panels, constant = small_panels(metrics, keys)
        shown = panels[: max(0, MAX_PANELS - drawn)]
        drawn += len(shown)
        parts += [f"<h3>{name}</h3>", figures(metrics, shown, colours, named=False)]
        if constant:
            words = ", ".join(f"{escape(key)}&nbsp;{value:.6g}" for key, value in constant.items())
            parts.append(f'<p class="muted">The same in every step: {words}.</p>')
        if len(shown) < len(panels):
            parts.append(f'<p class="muted">{len(panels) - len(shown)} more metrics are in the table only.</p>')
        if panels:
            parts.append(exact_values(metrics, keys))
    return "\n".join(parts)


def figures(metrics: Metrics, panels: Sequence[Panel], colours: Mapping[str, str], *, named: bool) -> str:
    """The panels as figures of their own that stand side by side where there is room; phases are named in the first one
    if at all (`named`)."""
    drawn = "\n".join(
        f'<figure role="img" aria-label="{escape(panel.title)} over steps">'
        f"{draw_panels(metrics.step, [panel], metrics.segments, colours, named=named and at < 2)}</figure>"
        for at, panel in enumerate(panels)
    )
    return f'<div class="figures">{drawn}</div>' if panels else ""


def exact_values(metrics: Metrics, keys: Sequence[str]) -> str:
    """A folded table of the metrics' numbers: of a long run, of steps evenly spread."""
    keys = [key for key in keys if key in metrics.columns]
    count = len(metrics.step)
    at = np.unique(np.linspace(0, count - 1, MAX_EXACT_ROWS).round().astype(int))
    rows = [
        [
            f"{metrics.step[index]:.0f}",
            *("–" if np.isnan(x := metrics.of(key)[index]) else f"{x:.6g}" for key in keys),
        ]
        for index in at
    ]
    titles = ["step", *(escape(key) for key in keys)]
    summary = "Exact values" if count <= len(at) else f"Exact values of {len(at)} of {count:,} steps"
    return details(summary, table(titles, rows, set(range(1, len(titles))))) if keys else ""
