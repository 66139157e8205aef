"""Draw the README's picture from a finished demo run: `python scripts/picture.py runs/demo docs/demo.png`."""

import argparse
from pathlib import Path

import numpy as np

from tsopsd_jax.commands.analyses.runs import evaluations_of, shades, trajectory_of
from tsopsd_jax.display.figures import Chart, Curve, Figure, write_png
from tsopsd_jax.metric_names import ENTROPY

LIMITS = {"collapsed: reheat": 0.15, "recovered: go on": 0.19}
"""Labels of the demo's two stop rules, in nats."""


def picture(run_dir: Path) -> Figure:
    """The run's entropy over its steps with its phases shaded, and its accuracy between them."""
    run, evaluated = trajectory_of(run_dir), evaluations_of(run_dir)
    at = np.asarray([each["step"] for each in evaluated])
    accuracy = [
        Curve(name, at, 100 * np.asarray([each[key] for each in evaluated]))
        for name, key in (("avg@8", "avg_at_k"), ("pass@8", "pass_at_k"))
    ]
    phases = shades(run)
    entropy = Curve("", run.step, run.column(ENTROPY))
    charts = [
        Chart("Entropy", "step", "nats per token", [entropy], shaded=phases, lines=LIMITS, whole_x=True),
        Chart("Accuracy", "step", "% of 512 problems", accuracy, shaded=phases, marked=True, whole_x=True),
    ]
    return Figure(charts, "make demo: a model of 0.3 M parameters learns arithmetic on a CPU; seed 0.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write_png(picture(args.run_dir), args.out)
