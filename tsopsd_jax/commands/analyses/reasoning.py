"""`tsopsd analyse reasoning`: accuracy and entropy over the checkpoints of a reheating phase (figure 4)."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.commands.analyses.runs import add_runs, chosen_span, evaluations_of, trajectory_of
from tsopsd_jax.display.figures import Chart, Curve, Figure
from tsopsd_jax.evaluation.scoreboard import read_out
from tsopsd_jax.metric_names import ENTROPY


class Point(NamedTuple):
    """The accuracy of a checkpoint on a benchmark, 0..1, and its standard error over problems (NaN: not known)."""

    step: int
    avg_at_k: float
    stderr: float


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_runs(parser, several=False)
    parser.add_argument("--phase", metavar="NAME", help="default: the first phase without a reward")
    parser.add_argument(
        "--evaluations",
        type=Path,
        metavar="DIR",
        help="what tsopsd eval --run RUN_DIR --step N --out DIR wrote; default: the run's own evaluations",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Collect what was evaluated from the start of the phase to its end."""
    run_dir = Path(args.run_dirs[0])
    log = trajectory_of(run_dir)
    span = chosen_span(log, run_dir, args.phase)
    points = _of_directory(args.evaluations, run_dir) if args.evaluations else _of_run(run_dir)
    # The phase's first policy is that after the step before it.
    points = {
        name: sorted(point for point in each if span.first - 1 <= point.step <= span.last)
        for name, each in points.items()
    }
    points = {name: each for name, each in points.items() if each}
    if not points:
        raise ValueError(
            f"{args.evaluations or run_dir}: expected evaluations of steps {span.first - 1} to {span.last}, got none; "
            "set evaluation.every_steps, or run tsopsd eval on the checkpoints"
        )
    part = log.within(span)
    # The entropy of step s is that of the policy after step s - 1.
    entropy = Curve("", part.step - 1, part.column(ENTROPY))
    report = {
        "phase": span.phase,
        "accuracy": {name: [point._asdict() for point in each] for name, each in points.items()},
        "entropy_nats": {"step": entropy.x, "mean": entropy.y},
    }
    return report, _figure(points, entropy, log.name, span.phase)


def _of_run(run_dir: Path) -> dict[str, list[Point]]:
    found: dict[str, dict[int, Point]] = {}
    for r in evaluations_of(run_dir):
        stderr = np.nan if r.get("avg_at_k_stderr") is None else r["avg_at_k_stderr"]
        point = Point(int(r["step"]), float(r["avg_at_k"]), float(stderr))
        found.setdefault(str(r.get("benchmark")), {})[point.step] = point
    return {name: list(points.values()) for name, points in found.items()}


def _of_directory(folder: Path, run_dir: Path) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for each in read_out(folder):
        ours = each.settings.get("model") == str(run_dir.resolve()) and each.settings.get("step") is not None
        if ours and not each.missing:
            s = each.summary(None)
            stderr = np.nan if s["avg_at_k_stderr"] is None else s["avg_at_k_stderr"]
            found.setdefault(each.benchmark, []).append(Point(each.settings["step"], s["avg_at_k"], stderr))
    return found


def _figure(points: dict[str, list[Point]], entropy: Curve, run: str, phase: str) -> Figure:
    curves = []
    for name, each in points.items():
        step, value, error = (np.asarray(column, np.float64) for column in zip(*each, strict=True))
        error = np.nan_to_num(error)
        curves.append(Curve(name, step, 100 * value, 100 * (value - error), 100 * (value + error)))
    panels = [
        Chart("(a) Accuracy", "step of the checkpoint", "avg@k, %", curves, marked=True, whole_x=True),
        Chart("(b) Mean token entropy", "step of the checkpoint", "nats", [entropy], marked=True, whole_x=True),
    ]
    caption = (
        f"Checkpoints of phase {phase} of {run}, the first being the policy that it began with: accuracy, with a band "
        "of a standard error over problems, and entropy (TS-OPSD, figure 4)."
    )
    return Figure(panels, caption)
