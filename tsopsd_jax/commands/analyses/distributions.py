"""`tsopsd analyse distributions`: two policies' next-token distributions on the same responses (figure 5)."""

import argparse
import itertools
import sys
from typing import Any

import numpy as np

from tsopsd_jax.analysis.distributions import compare_tokens, summarise_tokens
from tsopsd_jax.commands.analyses.pair import Pair, add_pair, open_pair
from tsopsd_jax.display.figures import Figure, Histogram
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.rundir.unfinished import Unfinished


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_pair(parser)
    parser.add_argument("--top-k", type=int, default=10, metavar="K", help="likeliest tokens compared; default 10")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Compare the policies at every response token."""
    with LiveTable(stream=sys.stderr) as table:
        pair = open_pair(args)
        k = args.top_k
        if not 1 <= k <= pair.after.model.vocab_size:
            raise ValueError(f"--top-k: expected 1 to the vocabulary of {pair.after.model.vocab_size}, got {k}")
        tokens = _compare(args, pair, table)
    report = summarise_tokens(tokens, k=args.top_k) | pair.facts
    return report, _figure(report, k, pair.responses.note)


def _compare(args: argparse.Namespace, pair: Pair, table: LiveTable) -> dict[str, np.ndarray]:
    """The measures of all tokens; an interrupted command goes on after the batches that it saved."""
    settings = pair.settings | {"k": args.top_k, "tile_tokens": args.tile_tokens}
    kept = Unfinished(args.out / "distributions.unfinished.npz", settings)
    saved = kept.load()
    done, found = int(saved.pop("batches", 0)), [saved] if saved else []

    def joined() -> dict[str, np.ndarray]:
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    parts = itertools.islice(pair.parts(table), done, None)
    compared = compare_tokens(
        pair.before, pair.after, parts, k=args.top_k, tile_tokens=args.tile_tokens, mesh=pair.mesh
    )
    for batches, part in enumerate(compared, start=done + 1):
        found.append(part)
        kept.save(lambda batches=batches: {"batches": batches, **joined()})
    kept.finish()
    return joined()


def _figure(report: dict[str, Any], k: int, note: str) -> Figure:
    def panel(key: str, title: str, label: str, *, log_x: bool = False) -> Histogram:
        found = report[key]
        edges = np.asarray(found["histogram"]["edges"])
        if log_x:
            edges[0] = edges[1] / 10  # a bin for all below, zero too
        marks = {f"mean {found['mean']:.3g}": found["mean"], f"median {found['quantiles']['0.5']:.3g}": 0.0}
        marks = {name: found["mean"] if name.startswith("mean") else found["quantiles"]["0.5"] for name in marks}
        marks = {name: place for name, place in marks.items() if not log_x or place > edges[0]}
        return Histogram(title, label, edges, np.asarray(found["histogram"]["counts"]), marks, log_x)

    panels = [
        panel("forward_kl_nats", "(a) KL(before || after)", "nats per token", log_x=True),
        panel("reverse_kl_nats", "(b) KL(after || before)", "nats per token", log_x=True),
        panel("entropy_change_nats", "(c) Entropy: after - before", "nats"),
        panel("top_k_overlap", f"(d) Top-{k} tokens in common", "share of k"),
        panel("top_k_mass_before", "(e) Their probability before", "probability"),
        panel("top_k_mass_after", "(f) Their probability after", "probability"),
    ]
    caption = (
        f"{report['before']} (before) and {report['after']} (after) at the {report['tokens']:,} tokens of the same "
        f"responses. Mean KL(before || after) {report['forward_kl_nats']['mean']:.3g} nats, mean entropy "
        f"{report['entropy_before_nats']:.4f} -> {report['entropy_after_nats']:.4f} nats, top-{k} overlap "
        f"{report['top_k_overlap']['mean']:.4f} (TS-OPSD, figure 5). Counts on a logarithmic axis.{note}"
    )
    return Figure(panels, caption, columns=3)
