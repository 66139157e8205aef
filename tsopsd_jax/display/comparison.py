"""The page of several runs: what they came to, their courses side by side, the paper's table, their analyses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.display.figure_html import FIGURE_CSS, Section, sections_html
from tsopsd_jax.display.html_parts import escape, table
from tsopsd_jax.display.numbers import DASH, finite, finite_or_nan
from tsopsd_jax.metric_names import ACCURACY, ENTROPY, REWARD, STEP_S, TOKENS

LAST_STEPS = 5
"""A final value is the mean of a metric's last values, this many."""


class ComparedRun(NamedTuple):
    """What a run wrote: the lines of metrics.jsonl and of evaluations.jsonl."""

    lines: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]


def final_values(run: ComparedRun) -> dict[str, float]:
    """The values that a run ended with, by the titles of their columns; NaN where it has none."""
    found = {
        "steps": float(len(run.lines)),
        "entropy, nats": _last(run.lines, ENTROPY),
        "reward": _last(run.lines, REWARD),
        "accuracy, %": 100 * _last(run.lines, ACCURACY),
    }
    latest = {str(each.get("benchmark")): each for each in run.evaluations}
    for benchmark, each in latest.items():
        for key, letters in (("avg_at_k", "avg"), ("pass_at_k", "pass")):
            found[f"{benchmark} {letters}@{each.get('samples', 'k')}, %"] = 100 * finite_or_nan(each.get(key))
    return found | {"tokens, M": _total(run.lines, TOKENS) / 1e6, "hours": _total(run.lines, STEP_S) / 3600}


def _known(lines: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [value for line in lines if (value := finite(line.get(key))) is not None]


def _last(lines: Iterable[Mapping[str, Any]], key: str) -> float:
    values = _known(lines, key)[-LAST_STEPS:]
    return float(np.mean(values)) if values else math.nan


def _total(lines: Iterable[Mapping[str, Any]], key: str) -> float:
    values = _known(lines, key)
    return float(np.sum(values)) if values else math.nan


def final_table(groups: Mapping[str, Sequence[ComparedRun]]) -> str:
    """A row of final values for each group: of one run its own, of several the mean and the standard deviation."""
    found = {name: [final_values(run) for run in runs] for name, runs in groups.items()}
    titles = list(dict.fromkeys(title for runs in found.values() for values in runs for title in values))
    # Benchmarks that only a later run has must not come after what every run ends with.
    titles.sort(key=lambda title: title in ("tokens, M", "hours"))
    forms = {"steps": ",.0f", "entropy, nats": ".4f", "reward": ".3f", "tokens, M": ".2f", "hours": ".3f"}
    rows = []
    for name, runs in found.items():
        cells = [_mean([values.get(title, math.nan) for values in runs], forms.get(title, ".1f")) for title in titles]
        count = f' <span class="muted">{len(runs)} runs</span>' if len(runs) > 1 else ""
        rows.append([escape(name) + count, *cells])
    return table(["run", *map(escape, titles)], rows, {*range(1, len(titles) + 1)})


def _mean(values: Sequence[float], form: str) -> str:
    """`mean ± standard deviation` of the known values (n - 1 in the denominator); of one the value; a dash for none."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return DASH
    mean = format(float(np.mean(known)), form)
    if len(known) == 1:
        return mean
    return f'{mean} <span class="muted">± {format(float(np.std(known, ddof=1)), form)}</span>'


def accuracy_table(groups: Mapping[str, Sequence[ComparedRun]]) -> str:
    """The layout of the paper's table 1: rows are groups and stages, cells avg@k/pass@k of benchmarks in %.

    Stages are the evaluations between phases. Of several runs the numbers are means. Empty if nothing was evaluated.
    """
    between = {
        name: [[each for each in run.evaluations if not each.get("phase_step")] for run in runs]
        for name, runs in groups.items()
    }
    everything = [each for runs in between.values() for evaluations in runs for each in evaluations]
    benchmarks = {str(e.get("benchmark")): e.get("samples", "k") for e in everything}
    if not benchmarks:
        return ""
    rows = []
    for name, runs in between.items():
        for stage in dict.fromkeys(str(each.get("stage")) for evaluations in runs for each in evaluations):
            cells = [_accuracies(runs, stage, benchmark) for benchmark in benchmarks]
            cells.append(np.mean(cells, axis=0))
            texts = [DASH if np.isnan(cell).any() else f"{cell[0]:.2f}/{cell[1]:.2f}" for cell in cells]
            rows.append([f'{escape(name)} <span class="muted">{escape(stage)}</span>', *texts])
    titles = [f"{escape(name)} avg@{k}/pass@{k}" for name, k in benchmarks.items()]
    return table(["run, stage", *titles, "average avg/pass"], rows, {*range(1, len(titles) + 2)})


def _accuracies(runs: Sequence[Sequence[Mapping[str, Any]]], stage: str, benchmark: str) -> np.ndarray:
    """(avg@k, pass@k) in % at a stage, the mean over the runs that were evaluated there; NaN if none was."""
    found = []
    for evaluations in runs:
        mine = [e for e in evaluations if (str(e.get("stage")), str(e.get("benchmark"))) == (stage, benchmark)]
        if mine:
            found.append([100 * finite_or_nan(mine[-1].get(key)) for key in ("avg_at_k", "pass_at_k")])
    return np.mean(found, axis=0) if found else np.full(2, math.nan)


def _template() -> str:
    """The page of a run before it is filled in: all pages share its style."""
    return resources.files("tsopsd_jax").joinpath("assets", "page.html").read_text("utf-8")


def comparison_page(title: str, headline: str, sections: Sequence[Section]) -> str:
    """One self-contained page of several runs."""
    style = _template().split("<style>")[1].split("</style>")[0]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{style}{FIGURE_CSS}</style>
</head>
<body>
<header>
<p class="kicker">tsopsd_jax &middot; runs compared</p>
<h1>{escape(title)}</h1>
<p class="headline">{escape(headline)}</p>
</header>
<main>
{sections_html(sections)}
</main>
</body>
</html>
"""
