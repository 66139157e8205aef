"""`tsopsd analyse curves`: what runs logged, side by side or averaged over seeds (figures 1, 2, 7, 9, 10, 11 and
13)."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from tsopsd_jax.analysis.trajectories import Band, Trajectory, band_of
from tsopsd_jax.commands.analyses.runs import add_runs, evaluations_of, reheating_phases, shades, trajectory_of
from tsopsd_jax.display.figures import Chart, Curve, Figure, Strip
from tsopsd_jax.metric_names import ENTROPY, GRAD_NORM, LENGTH, REWARD
from tsopsd_jax.train.cycle import without_round

LOGGED = {
    "reward": (REWARD, "Reward", "mean reward"),
    "entropy": (ENTROPY, "Entropy", "nats per token"),
    "grad_norm": (GRAD_NORM, "Gradient norm", "global norm, before the clip"),
    "length": (LENGTH, "Response length", "tokens"),
}
"""Key of the JSON -> metric, title, unit."""
ACCURACIES = {"avg_at_k": "avg@k", "pass_at_k": "pass@k"}
"""Key of an evaluation -> title."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_runs(parser, several=True)
    parser.add_argument(
        "--mean",
        action="append",
        default=[],
        metavar="NAME=N",
        help="average the next N runs under this name, with a band of a standard deviation; once for each group",
    )
    parser.add_argument("--log", nargs="*", default=["grad_norm"], choices=list(LOGGED), help="on logarithmic axes")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Read the runs and draw them over their steps."""
    runs = [trajectory_of(each) for each in args.run_dirs]
    return over_steps(args.run_dirs, runs, groups_asked(args.mean, [each.name for each in runs]), logarithmic=args.log)


def over_steps(
    run_dirs: Sequence[str],
    runs: Sequence[Trajectory],
    groups: dict[str, list[int]],
    *,
    logarithmic: Sequence[str] = ("grad_norm",),
) -> tuple[dict[str, Any], Figure]:
    """Draw runs over their steps, those of a group as their mean with a band of a standard deviation.

    Args:
        run_dirs, runs: the directories, and what their logs say.
        groups: name of a curve -> places of its runs.
        logarithmic: keys of `LOGGED` on logarithmic axes.
    """
    charts: list[Chart] = []
    report: dict[str, dict[str, Any]] = {
        name: {"runs": [run_dirs[at] for at in members]} for name, members in groups.items()
    }
    alike = len({tuple(each.spans) for each in runs}) == 1
    phases = {"shaded": shades(runs[0])} if alike else {"strips": _strips(run_dirs, runs, groups)}
    for key, (metric, title, unit) in LOGGED.items():
        curves = []
        for name, members in groups.items():
            band = band_of([(runs[at].step, runs[at].column(metric)) for at in members])
            report[name][key] = _json(band)
            curves.append(_curve(name if len(groups) > 1 else "", band, positive=key in logarithmic))
        chart = Chart(title, "step", unit, curves, log_y=key in logarithmic, whole_x=True)
        charts.append(chart._replace(**phases))
    evaluations = [evaluations_of(each) for each in run_dirs]
    for key, title in ACCURACIES.items():
        charts += [chart._replace(**phases) for chart in _evaluated(key, title, evaluations, groups, report)]
    caption = _caption(groups, runs)
    if alike:
        caption += " Shaded: the phases."
    elif phases["strips"]:
        caption += (
            " Bars at the foot: phases that learn without a reward, in the colour of their run; of several "
            "runs the darker the more of them."
        )
    return {"curves": report, "phases": _phases(runs)}, Figure(charts, caption)


def _strips(run_dirs: Sequence[str], runs: Sequence[Trajectory], groups: dict[str, list[int]]) -> list[Strip]:
    """The phases of each run that learn without a reward: they reheat or cool."""
    strips = []
    for curve, members in enumerate(groups.values()):
        for at in members:
            reheating = reheating_phases(run_dirs[at])
            spans = [span for span in runs[at].spans if without_round(span.phase) in reheating]
            strips += [Strip(curve, span.first - 0.5, span.last + 0.5, 1 / len(members)) for span in spans]
    return strips


def groups_asked(asked: Sequence[str], names: Sequence[str]) -> dict[str, list[int]]:
    """Name of a curve -> places of its runs, as `--mean` asks; without it each run is a curve.

    Raises:
        ValueError: no NAME=N, or groups of more or fewer runs than there are.
    """
    if not asked:
        unique = len(set(names)) == len(names)
        return {name if unique else f"{name} ({at + 1})": [at] for at, name in enumerate(names)}
    groups, at = dict[str, list[int]](), 0
    for text in asked:
        name, equals, count = text.rpartition("=")
        if not equals or not name or not count.isdigit() or int(count) < 1 or name in groups:
            raise ValueError(f"--mean: expected NAME=N with a name of its own and N at least 1, got {text!r}")
        groups[name] = list(range(at, at := at + int(count)))
    if at != len(names):
        raise ValueError(f"--mean: expected groups of all {len(names)} runs, got groups of {at}")
    return groups


def _evaluated(
    key: str,
    title: str,
    evaluations: Sequence[Sequence[dict[str, Any]]],
    groups: dict[str, list[int]],
    report: dict[str, Any],
) -> list[Chart]:
    """A chart of a measurement for each benchmark that was evaluated; a group without it leaves its colour unused."""
    benchmarks = dict.fromkeys(str(r.get("benchmark")) for records in evaluations for r in records)
    charts = []
    for benchmark in benchmarks:
        curves = []
        for name, members in groups.items():
            series = [_series(evaluations[at], benchmark, key) for at in members]
            series = [each for each in series if len(each[0])]
            if not series:
                curves.append(Curve("", np.zeros(0), np.zeros(0)))
                continue
            band = band_of(series)
            report[name].setdefault(key, {})[benchmark] = _json(band)
            curves.append(_curve(name if len(groups) > 1 else "", band, scale=100.0))
        if any(len(curve.x) for curve in curves):
            charts.append(Chart(f"{title}, {benchmark}", "step", "%", curves, marked=True, whole_x=True))
    return charts


def _series(records: Sequence[dict[str, Any]], benchmark: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values); of several evaluations at one step the last counts."""
    values = {r["step"]: r[key] for r in records if str(r.get("benchmark")) == benchmark and r.get(key) is not None}
    steps = sorted(values)
    return np.asarray(steps, np.int64), np.asarray([values[s] for s in steps], np.float64)


def _curve(name: str, band: Band, *, positive: bool = False, scale: float = 1.0) -> Curve:
    mean = np.where(band.mean > 0, band.mean, np.nan) if positive else band.mean
    if band.runs.max() < 2:
        return Curve(name, band.step, scale * mean)
    low = mean - band.deviation
    low = np.where(low > 0, low, mean) if positive else low
    return Curve(name, band.step, scale * mean, scale * low, scale * (mean + band.deviation))


def _json(band: Band) -> dict[str, Any]:
    return {"step": band.step, "mean": band.mean, "standard_deviation": band.deviation, "runs": band.runs}


def _phases(runs: Sequence[Trajectory]) -> dict[str, list[dict[str, Any]]]:
    return {each.name: [span._asdict() for span in each.spans] for each in runs}


def _caption(groups: dict[str, list[int]], runs: Sequence[Trajectory]) -> str:
    many = {name: len(members) for name, members in groups.items() if len(members) > 1}
    text = f"{', '.join(groups)} over {max(int(r.step[-1]) for r in runs)} steps."
    if many:
        text += (
            " Mean and standard deviation over runs: " + ", ".join(f"{n} of {name}" for name, n in many.items()) + "."
        )
    return text
