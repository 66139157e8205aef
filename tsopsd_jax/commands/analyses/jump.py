"""`tsopsd analyse jump`: the entropy jump of a reheating phase (section 4.4, appendix D)."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tsopsd_jax.analysis.jump import Jump, find_jump
from tsopsd_jax.analysis.trajectories import Trajectory
from tsopsd_jax.commands.analyses.runs import add_runs, chosen_span, trajectory_of
from tsopsd_jax.config.restore import checkpoints_of
from tsopsd_jax.display.figures import Chart, Curve, Figure
from tsopsd_jax.metric_names import ENTROPY


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_runs(parser, several=False)
    parser.add_argument("--phase", metavar="NAME", help="default: the first phase without a reward")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Look for the jump in the entropies that the phase's steps measured."""
    run_dir = Path(args.run_dirs[0])
    whole = trajectory_of(run_dir)
    span = chosen_span(whole, run_dir, args.phase)
    part = whole.within(span)
    known = np.isfinite(part.column(ENTROPY))
    step, entropy = part.step[known], part.column(ENTROPY)[known]
    jump = find_jump(entropy)
    before, after = step[jump.place - 1], step[jump.place]
    report = {
        "found": jump.found,
        "phase": span.phase,
        "step_before": before,
        "step_after": after,
        "entropy_before_nats": entropy[jump.place - 1],
        "entropy_after_nats": entropy[jump.place],
        "height_nats": jump.height,
        "sharpness": jump.sharpness,
        "increment_nats": jump.increment,
        "increment_ratio": jump.increment_ratio,
        "noise_nats": jump.noise,
        "information_gain": jump.information_gain,
        **_checkpoints(run_dir, int(before) - 1, int(after) - 1),
    }
    return report, _figure(part, step, entropy, jump, report)


def _checkpoints(run_dir: Path, before: int, after: int) -> dict[str, int | None]:
    """The checkpoints nearest to the jump on either side. The entropy of step s is that of the policy
    after step s - 1."""
    try:
        with checkpoints_of(run_dir) as checkpoints:
            steps = checkpoints.steps()
    except ValueError:  # the log alone was kept
        steps = []
    return {
        "checkpoint_before": max((s for s in steps if s <= before), default=None),
        "checkpoint_after": min((s for s in steps if s >= after), default=None),
    }


def _figure(part: Trajectory, step: np.ndarray, entropy: np.ndarray, jump: Jump, report: dict[str, Any]) -> Figure:
    curves = [
        Curve("measured", step, entropy),
        Curve("smooth fit", step, jump.smooth),
        Curve("smooth fit with a step", step, jump.stepped),
    ]
    left = [
        Curve("smooth fit", step, entropy - jump.smooth),
        Curve("smooth fit with a step", step, entropy - jump.stepped),
    ]
    at = [("jump" if jump.found else "likeliest place", float(report["step_before"]), float(report["step_after"]))]
    panels = [
        Chart(f"(a) Entropy, {part.name}", "step", "nats", curves, shaded=at, whole_x=True),
        Chart("(b) What the fits leave", "step", "nats", left, shaded=at, whole_x=True),
    ]
    verdict = "A jump" if jump.found else "No jump; the likeliest place is"
    where = [report["checkpoint_before"], report["checkpoint_after"]]
    caption = (
        f"{verdict} between steps {report['step_before']} and {report['step_after']} of phase {report['phase']}: "
        f"height {jump.height:.4f} nats, {jump.increment_ratio:.1f} times the neighbouring increments; one step "
        f"explains {100 * jump.sharpness:.0f} % of what a cubic leaves (information gain {jump.information_gain:.1f}, "
        f"at least 10 wanted). Nearest checkpoints: "
        f"{' and '.join('none' if s is None else str(s) for s in where)} (TS-OPSD, section 4.4)."
    )
    return Figure(panels, caption)
