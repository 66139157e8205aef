"""`tsopsd analyse reversal`: parameters before reheating, after it, and after cooling (figures 11 and 12)."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from tsopsd_jax.analysis.reversal import Reversals, add_up, layers_of, moved
from tsopsd_jax.commands.policies import add_policies, add_policy, policy_of, weights_of
from tsopsd_jax.display.figures import Chart, Curve, Figure
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed import processes
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.model.weights import Weights


def add(parser: argparse.ArgumentParser) -> None:
    """Add the three policies."""
    add_policies(parser)
    add_policy(parser, "--recooled", "after cooling")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Read the three policies tensor by tensor and compare them."""
    names = ("before", "after", "recooled")
    policies = [policy_of(vars(args)[name], dtype="float32", chat=None) for name in names]
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(LiveTable(stream=sys.stderr))
        # The mesh is that of checkpoints, which are restored onto it; directories are read where they lie.
        weights = [stack.enter_context(weights_of(policy, make_mesh())) for policy in policies]
        _check_same(names, weights)
        found = add_up(_sums(weights, table))
        dtypes = [str(np.dtype(next(iter(each.values()))().dtype)) for each in weights]
    report = {
        **found.whole._asdict(),
        "per_layer": [{"layer": _number(name), **each._asdict()} for name, each in found.parts.items()],
        "policies": dict(zip(names, (policy.name for policy in policies), strict=True)),
        "dtypes": dict(zip(names, dtypes, strict=True)),
    }
    return report, _figure(found, rounded="bfloat16" in dtypes or "float16" in dtypes)


def _check_same(names: tuple[str, ...], weights: list[Weights]) -> None:
    for name, each in zip(names[1:], weights[1:], strict=True):
        if odd := sorted(each.keys() ^ weights[0].keys()):
            raise ValueError(f"--{name}: expected the tensors of --before, got another architecture ({odd[0]})")


def _sums(weights: list[Weights], table: LiveTable) -> Iterator[tuple[str, np.ndarray]]:
    """The sums of every tensor; with several processes each works out its share."""
    before, after, recooled = weights
    mine = []
    for at, name in enumerate(before):
        table.status(f"comparing {name} ({at + 1} of {len(before)})")
        values = before[name](), after[name](), recooled[name]()
        try:
            mine.append((moved(*values) if processes.is_mine(at) else np.zeros(4)).tolist())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return zip(before, np.sum(processes.exchange(mine), axis=0), strict=True)


def _number(part: str) -> int | str:
    return int(part) if part.isdigit() else part


def _figure(found: Reversals, *, rounded: bool) -> Figure:
    layers = dict(layers_of(found))
    x = np.asarray(list(layers))
    panels = []
    for key, title, says in (
        ("cosine", "Cosine of heating and cooling", "cosine"),
        ("reverse_projection", "Share of the heating that was taken back", "reverse projection"),
        ("norm_ratio", "Length of the cooling", "length relative to the heating"),
        ("residual", "Distance that is left", "distance relative to the heating"),
    ):
        y = np.asarray([np.nan if (v := each._asdict()[key]) is None else v for each in layers.values()])
        whole = found.whole._asdict()[key]
        lines = {} if whole is None else {f"whole model {whole:.3f}": whole}
        panels.append(Chart(title, "layer", says, [Curve("", x, y)], lines=lines, marked=True, whole_x=True))
    w = found.whole
    caption = (
        f"Heating H = after - before, cooling L = recooled - after: cosine {_text(w.cosine)}, reverse projection "
        f"{_text(w.reverse_projection)}, norm ratio {_text(w.norm_ratio)}, residual {_text(w.residual)} (TS-OPSD, "
        "figure 12)."
    )
    if rounded:
        caption += " The weights are stored in 16 bits, which round small updates away: "
        caption += "compare float32 exports or checkpoints."
    return Figure(panels, caption)


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
