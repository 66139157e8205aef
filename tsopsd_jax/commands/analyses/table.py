"""`tsopsd analyse table`: the accuracies of all models in an evaluation's directory (table 1), and pass@k over k."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tsopsd_jax.display.figures import Chart, Curve, Figure
from tsopsd_jax.evaluation.scoreboard import Evaluated, make_table, read_out


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("evaluations", type=Path, metavar="DIR", help="what tsopsd eval --out wrote")
    parser.add_argument("--k", type=int, help="of pass@k in the table; default: all samples")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Read what is finished there."""
    evaluated = read_out(args.evaluations)
    finished = [each for each in evaluated if not each.missing]
    if not finished:
        raise ValueError(f"{args.evaluations}: expected finished evaluations, got none; run tsopsd eval first")
    table = make_table(finished, args.k)
    rows = []
    for model, cells in table.rows:
        named = dict(zip(table.titles, cells, strict=True))
        rows.append({"model": model, "percent": {title: cell for title, cell in named.items() if cell is not None}})
    curves = {f"{each.benchmark}/{each.model}": _pass_curve(each) for each in finished}
    report = {
        "titles": table.titles,
        "rows": rows,
        "pass_at_k": {name: {"k": k, "percent": values} for name, (k, values) in curves.items()},
        "missing": {f"{each.benchmark}/{each.model}": each.missing for each in evaluated if each.missing},
    }
    return report, _figure(finished, curves, [model for model, _ in table.rows])


def _pass_curve(each: Evaluated) -> tuple[np.ndarray, np.ndarray]:
    """(k, pass@k in percent) for every k up to the samples of a problem."""
    k = np.arange(1, each.settings["samples"] + 1)
    return k, np.asarray([100 * each.per_problem(int(n))[:, 1].mean() for n in k])


def _figure(finished: list[Evaluated], curves: dict[str, tuple[np.ndarray, np.ndarray]], models: list[str]) -> Figure:
    panels = []
    for benchmark in dict.fromkeys(each.benchmark for each in finished):
        lines = [Curve(model, *curves[name]) for model in models if (name := f"{benchmark}/{model}") in curves]
        panels.append(Chart(f"pass@k, {benchmark}", "k", "%", lines, marked=True, whole_x=True))
    caption = (
        f"pass@k over k of {', '.join(models)}: the unbiased estimator from all samples of a problem; k = 1 is avg@n "
        "(TS-OPSD, table 1)."
    )
    return Figure(panels, caption, columns=3)
