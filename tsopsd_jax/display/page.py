"""The page of a run: one self-contained `report.html` from its configuration, metrics and evaluations."""

import itertools
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tsopsd_jax.display import responses, run_status
from tsopsd_jax.display.columns import Metrics, read_columns
from tsopsd_jax.display.figure_html import FIGURE_CSS, Section, sections_html
from tsopsd_jax.display.html_parts import details, escape, shorten, table
from tsopsd_jax.display.numbers import DASH, count, duration, finite, fixed
from tsopsd_jax.display.panels import COURSE, course_panels, exact_values, figures, more_metrics
from tsopsd_jax.display.series import Stretch
from tsopsd_jax.metric_names import ACCURACY, ENTROPY, ROLLOUT_S, SKIPPED, TOKENS, TOKENS_PER_S, UPDATES
from tsopsd_jax.rundir import files
from tsopsd_jax.rundir.log import METRICS_FILE, read_evaluations, read_samples
from tsopsd_jax.rundir.status import read_status
from tsopsd_jax.train.cycle import without_round

MAX_ROWS = 200
MAX_CONFIG_CHARACTERS = 60_000


def write_report(run_dir: str | Path, out: Path | None = None, *, sections: Sequence[Section] = ()) -> Path:
    """Write the page of a run to `out` (None: `run_dir/report.html`), replacing it in one go, and return its path.

    `sections` stand at its end: the run's analyses.

    Raises:
        ValueError: if `run_dir` has no metrics.jsonl, or no step in it, or a broken line before its last.
    """
    run_dir = Path(run_dir)
    metrics = read_columns(run_dir)
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text("utf-8", errors="replace") if config_path.is_file() else ""
    config = _parse_config(config_text)
    plan = {str(phase.get("name")): phase for phase in config["phases"]}
    evaluations = read_evaluations(run_dir)
    status = run_status.caught_up(
        read_status(run_dir),
        step=int(metrics.step[-1]),
        phase=metrics.segments[-1].phase,
        time_s=(run_dir / METRICS_FILE).stat().st_mtime,
    )
    colours = _phase_colours(metrics.segments, plan)
    template = resources.files("tsopsd_jax").joinpath("assets", "page.html").read_text("utf-8")
    page = string.Template(template).substitute(
        title=escape(run_dir.resolve().name),
        headline=_headline(config),
        status=run_status.banner(status, skipped=_total(metrics, SKIPPED), updates=_updates(metrics)),
        facts=_facts(metrics),
        phases=_phase_table(metrics, plan, colours, status, evaluations),
        plots=figures(metrics, course_panels(metrics, _thresholds(plan), evaluations), colours, named=True),
        exact=exact_values(metrics, COURSE),
        more=more_metrics(metrics, colours),
        evaluations=_evaluation_table(evaluations),
        examples=responses.compared(evaluations),
        samples=responses.kept(read_samples(run_dir)),
        config=details("config.yaml", f"<pre>{shorten(config_text, MAX_CONFIG_CHARACTERS)}</pre>")
        if config_text
        else '<p class="muted">No config.yaml in this run directory.</p>',
        machine=run_status.machines(status),
        sections=sections_html(sections),
        figure_style=f"<style>{FIGURE_CSS}</style>" if sections else "",
    )
    path = out or run_dir / "report.html"
    files.replace(path, [page.encode("utf-8", "replace")], alone=False)  # the run and a person who looks
    return path


# ---- reading


def _parse_config(text: str) -> dict[str, Any]:
    """The configuration as a mapping with a list of mappings under `phases`, whatever the file holds."""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none, lists nested thousands of levels deep
        config = None
    config = config if isinstance(config, dict) else {}
    phases = config.get("phases")
    phases = [phase for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
    return {**config, "phases": phases}


def _section(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _thresholds(plan: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Label -> entropy in nats, of the stop rules."""
    found = {}
    for phase in plan.values():
        stop = _section(phase, "stop")
        for key, words in (("collapsed_below_nats", "collapsed <"), ("recovered_above_nats", "recovered ≥")):
            if (value := finite(stop.get(key))) is not None:
                found[f"{words} {value:g}"] = value
    return found


# ---- the page's parts


def _headline(config: Mapping[str, Any]) -> str:
    objectives = [str(_section(phase, "objective").get("name", "?")) for phase in config["phases"]]
    parts = [" → ".join(objectives[:6]) + (" → …" if len(objectives) > 6 else "")] if objectives else []
    for key in ("model", "data", "seed"):
        value = config.get(key)
        if isinstance(value, dict):
            value = next((value[name] for name in ("name", "path", "preset") if value.get(name)), None)
        if isinstance(value, str | int | float) and len(str(value)) < 60:
            parts.append(f"{key} {value}")
    return " &middot; ".join(escape(part) for part in parts)


def _ends(values: np.ndarray, form: str, scale: float = 1.0) -> str:
    """`first → last` of the finite values, each a mean of up to five; a dash if there is none."""
    values = values[np.isfinite(values)] * scale
    if values.size == 0:
        return "&ndash;"
    width = max(1, min(5, values.size // 4))
    first, last = (format(values[part].mean(), form) for part in (slice(width), slice(-width, None)))
    return f'{first}<span class="arrow">→</span>{last}' if values.size > 1 else last


def _wall_time_s(time_s: np.ndarray) -> float:
    """Seconds of work; `time_s` counts from the start of a process, so it falls where a run was resumed."""
    time_s = time_s[np.isfinite(time_s)]
    rises = np.diff(time_s, prepend=0.0)
    return float(np.where(rises < 0, time_s, rises).sum())


def _facts(metrics: Metrics) -> str:
    derived = metrics.of(TOKENS_PER_S) * metrics.of(ROLLOUT_S)
    tokens = np.nansum(np.where(np.isfinite(metrics.of(TOKENS)), metrics.of(TOKENS), derived))
    wall_s = _wall_time_s(metrics.of("time_s"))
    facts = [
        ("Steps", f"{metrics.step[-1]:,.0f}"),
        ("Wall time", duration(wall_s) if wall_s > 0 else ""),
        ("Tokens sampled", count(tokens) if tokens > 0 else ""),
        ("Entropy, nats", _ends(metrics.of(ENTROPY), ".3f")),
        ("Training accuracy, %", _ends(metrics.of(ACCURACY), ".1f", 100)),
        ("Updates skipped", f"{_total(metrics, SKIPPED)} of {_updates(metrics):,}"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{value or '&ndash;'}</dd></div>" for name, value in facts)


def _until(phase: Mapping[str, Any]) -> str:
    stop = _section(phase, "stop")
    window = f" (mean of {stop['window_steps']} steps)" if stop.get("window_steps") else ""
    words = (
        ("collapsed_below_nats", "entropy < {} nats" + window),
        ("recovered_above_nats", "entropy ≥ {} nats" + window),
        ("collapsed_below_fraction", "entropy < {} of the run's early entropy" + window),
        ("recovered_above_fraction", "entropy ≥ {} of the run's early entropy" + window),
        ("steps", "{} steps"),
        ("epochs", "{} epochs"),
    )
    return " or ".join(text.format(stop[key]) for key, text in words if stop.get(key) is not None)


def _phase_colours(segments: Sequence[Stretch], plan: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Phase -> name of its colour: warm for reheating, cool for the others in the order of their appearance."""
    cool = itertools.cycle(("blue", "violet", "teal", "slate"))
    colours: dict[str, str] = {}
    for phase in dict.fromkeys(segment.phase for segment in segments):
        reheats = _section(plan.get(without_round(phase), {}), "objective").get("name") == "ts_opsd"
        colours[phase] = "orange" if reheats else next(cool)
    return colours


def _total(metrics: Metrics, name: str) -> int:
    return int(np.nansum(metrics.of(name)))


def _updates(metrics: Metrics) -> int:
    """Updates of all steps: one where a step does not say."""
    said = metrics.of(UPDATES)
    return int(np.sum(np.where(np.isfinite(said), said, 1)))


def _change(evaluations: Sequence[Mapping[str, Any]], key: str, first_step: float, last_step: float) -> str:
    """`before → after` in % of a phase's stretch, by the evaluations between phases; a dash where one of them was not
    made."""
    between = {finite(each.get("step")): finite(each.get(key)) for each in evaluations if not each.get("phase_step")}
    before, after = between.get(int(first_step) - 1), between.get(int(last_step))
    if before is None or after is None:
        return "&ndash;"
    return f'{100 * before:.1f}<span class="arrow">→</span>{100 * after:.1f}'


def _phase_table(
    metrics: Metrics,
    plan: Mapping[str, Mapping[str, Any]],
    colours: Mapping[str, str],
    status: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    rows = []
    for segment in metrics.segments[:MAX_ROWS]:
        part = slice(segment.first, segment.end)
        phase, last = plan.get(without_round(segment.phase), {}), int(metrics.step[segment.end - 1])
        how, over = run_status.end_of_phase(status, segment.phase, last)
        dot = f'<span class="dot" style="background: var(--{colours[segment.phase]})"></span>'
        rows.append(
            [
                dot + escape(segment.phase),
                escape(_section(phase, "objective").get("name", "–")),
                "&ndash;".join(dict.fromkeys(f"{metrics.step[at]:.0f}" for at in (segment.first, segment.end - 1))),
                _ends(metrics.of(ENTROPY)[part], ".3f"),
                _ends(metrics.of(ACCURACY)[part], ".1f", 100),
                *(_change(evaluations, key, metrics.step[segment.first], last) for key in ("avg_at_k", "pass_at_k")),
                escape(_until(phase) or "–") + how,
                escape((over and phase.get("outcome")) or "–"),
            ]
        )
    titles = ["phase", "objective", "steps", "entropy, nats", "training accuracy, %", "avg@k, %", "pass@k, %"]
    return table([*titles, "ends at", "outcome"], rows, {2, 3, 4, 5, 6}) + _more(len(metrics.segments), "phases")


def _more(count: int, what: str) -> str:
    return f'<p class="muted">The first {MAX_ROWS} of {count} {what}.</p>' if count > MAX_ROWS else ""


def _evaluation_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return '<p class="muted">This run has no evaluations.</p>'

    rows = []
    for record in evaluations[:MAX_ROWS]:
        error = fixed(record.get("avg_at_k_stderr"), ".1f", 100)
        sampling = _section(record, "sampling")
        rows.append(
            [
                escape(record.get("stage", "–")),
                fixed(record.get("step"), ".0f"),
                escape(record.get("benchmark", "–")),
                fixed(record.get("problems"), ",.0f"),
                fixed(record.get("samples"), ".0f"),
                fixed(record.get("avg_at_k"), ".1f", 100)
                + ("" if error == DASH else f' <span class="muted">± {error}</span>'),
                fixed(record.get("pass_at_k"), ".1f", 100),
                fixed(record.get("length_mean_tokens"), ",.0f"),
                fixed(record.get("truncated_fraction"), ".1f", 100),
                fixed(record.get("entropy_nats"), ".3f"),
                escape(", ".join(f"{name} {value}" for name, value in sampling.items()) or "–"),
            ]
        )
    titles = ["stage", "step", "benchmark", "problems", "k", "avg@k, %", "pass@k, %", "tokens", "cut, %", "nats"]
    return table([*titles, "sampling"], rows, {1, 3, 4, 5, 6, 7, 8, 9}) + _more(len(evaluations), "evaluations")
