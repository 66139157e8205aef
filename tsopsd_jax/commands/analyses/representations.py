"""`tsopsd analyse representations`: linear CKA between the layers of two policies (figure 3)."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from tsopsd_jax.analysis.batches import GivenBatch
from tsopsd_jax.analysis.representations import layer_similarity
from tsopsd_jax.commands.analyses.pair import add_pair, open_pair
from tsopsd_jax.display.figures import Chart, Curve, Figure, Matrix
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.rundir.unfinished import Unfinished


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_pair(parser, tokens_at_once=4096)  # the states of all layers are kept for a batch
    parser.add_argument(
        "--memory-gib", type=float, default=8.0, help="of sums on the host; less takes more passes; default 8"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Compare the policies' layers at every response token."""
    if not args.memory_gib > 0:
        raise ValueError(f"--memory-gib: expected more than 0, got {args.memory_gib}")
    with LiveTable(stream=sys.stderr) as table:
        pair = open_pair(args)

        def parts(number: int, passes: int) -> Iterator[GivenBatch]:
            return pair.parts(table, f"comparing layers, pass {number + 1} of {passes}")

        settings = pair.settings | {"memory_gib": args.memory_gib}
        kept = Unfinished(args.out / "representations.unfinished.npz", settings)
        values = layer_similarity(
            pair.before, pair.after, parts, mesh=pair.mesh, memory_bytes=int(args.memory_gib * 2**30), kept=kept
        )
        kept.finish()
    diagonal = np.diagonal(values)
    report = {
        "diagonal_min": float(diagonal.min()),
        "diagonal_mean": float(diagonal.mean()),
        "diagonal_argmin_layer": int(diagonal.argmin()) + 1,
        "diagonal": diagonal.tolist(),
        "matrix": values.tolist(),
        **pair.facts,
    }
    return report, _figure(values, report, pair.responses.note)


def _figure(values: np.ndarray, report: dict[str, Any], note: str) -> Figure:
    diagonal = np.diagonal(values)
    layers = np.arange(1, len(diagonal) + 1)
    panels = [
        Matrix("(a) Linear CKA of layers", "layer, after", "layer, before", "CKA", values, near_one=True),
        Chart(
            "(b) Corresponding layers",
            "layer",
            "1 - CKA",
            [Curve("", layers, np.maximum(1.0 - diagonal, 1e-12))],
            log_y=True,
            marked=True,
            whole_x=True,
        ),
    ]
    caption = (
        f"Linear CKA of the residual stream after each layer of {report['before']} (before) and {report['after']} "
        f"(after), at the tokens of {report['responses']} responses: least {report['diagonal_min']:.6f} (layer "
        f"{report['diagonal_argmin_layer']}), mean {report['diagonal_mean']:.6f} on the diagonal (TS-OPSD, figure 3). "
        f"Colours show -log10(1 - CKA).{note}"
    )
    return Figure(panels, caption)
