"""`tsopsd analyse temperatures`: where teachers of several temperatures and both directions pull one policy (figure
8)."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from tsopsd_jax.analysis.batches import GivenBatch, batches_of
from tsopsd_jax.analysis.temperatures import ASCENT, Pulls, measure_pulls, sweep_of
from tsopsd_jax.commands.analyses.pair import add_computing, check_computing, on_mesh, responses_for
from tsopsd_jax.commands.policies import add_policy, policy_of
from tsopsd_jax.display.figures import Chart, Curve, Figure, Matrix
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh, row_multiple


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_policy(parser, "--before", "the policy before reheating")
    add_computing(parser, tokens_at_once=4096)
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[1.1, 1.2, 1.5, 2.0], metavar="T", help="default 1.1 1.2 1.5 2"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Figure]:
    """Compute the gradient of each teacher on the responses, and their cosines."""
    check_computing(args)
    objectives = sweep_of(dict.fromkeys(args.temperatures))
    policy = policy_of(args.before, dtype=args.dtype, chat=args.chat)
    responses = responses_for(policy, args)
    mesh = make_mesh(tensor=args.tensor)
    with LiveTable(stream=sys.stderr) as table:
        loaded = on_mesh(policy, mesh)
        limit = loaded.model.config.max_position_embeddings

        def parts(name: str) -> Iterator[GivenBatch]:
            table.status(f"gradient of {name}, {list(objectives).index(name) + 1} of {len(objectives)}")
            return batches_of(
                responses.answered, tokens_at_once=args.tokens_at_once, multiple=row_multiple(mesh), limit=limit
            )

        pulls = measure_pulls(loaded, objectives, parts, mesh=mesh, tile_tokens=args.tile_tokens)
    names = list(objectives)
    report = {
        "objectives": names,
        "loss_nats": pulls.loss_nats,
        "gradient_norm": pulls.norm,
        "cosine": pulls.cosine,
        "entropy_nats": -float(pulls.loss_nats[names.index(ASCENT)]),
        "policy": policy.name,
        "responses": len(responses.answered),
        "encoded_again": responses.encoded_again,
    }
    return report, _figure(pulls, names, list(dict.fromkeys(args.temperatures)), report, responses.note)


def _figure(pulls: Pulls, names: list[str], temperatures: list[float], report: dict[str, Any], note: str) -> Figure:
    t, count = np.asarray(temperatures), len(temperatures)
    forward, reverse = slice(1, 1 + count), slice(1 + count, None)
    order = np.argsort(t)

    def both(values: np.ndarray) -> list[Curve]:
        return [
            Curve(n, t[order], values[part][order]) for n, part in (("forward KL", forward), ("reverse KL", reverse))
        ]

    panels = [
        Matrix("(a) Cosines of the gradients", "", "", "cosine", pulls.cosine, names),
        Chart("(b) Cosine with entropy ascent", "teacher temperature", "cosine", both(pulls.cosine[0]), marked=True),
        Chart("(c) Gradient norm", "teacher temperature", "global norm", both(pulls.norm), marked=True),
    ]
    caption = (
        f"Gradients of the KL to self-teachers of {report['policy']} (entropy {report['entropy_nats']:.4f} nats) on "
        f"the tokens of {report['responses']} responses, and of the entropy (TS-OPSD, section 4.5 and figure 8).{note}"
    )
    return Figure(panels, caption, columns=3)
