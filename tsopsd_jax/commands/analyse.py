"""`tsopsd analyse NAME`: the figures and tables of the paper, from policies, responses and run directories."""

import argparse
import importlib
import json
from pathlib import Path

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.display.figures import figure_as_json, write_png
from tsopsd_jax.distributed import processes
from tsopsd_jax.rundir import files
from tsopsd_jax.rundir.log import strict_json

ANALYSES = {
    "curves": "reward, entropy, gradient norm, length and accuracy over steps, runs side by side or averaged (figures "
    "1, 2, "
    "7, 9 to 11, 13)",
    "representations": "linear CKA between the layers of two policies (figure 3)",
    "reasoning": "accuracy and entropy over the checkpoints of a reheating phase (figure 4)",
    "distributions": "two policies on the same responses: KL, entropy change, overlap of the likeliest tokens (figure "
    "5)",
    "forks": "stochastic rollouts against greedy ones, checkpoint by checkpoint (figure 6, table 2)",
    "jump": "the entropy jump of a reheating phase and how sharp it is (section 4.4)",
    "temperatures": "where teachers of several temperatures and both directions pull one policy (figure 8)",
    "reversal": "how far cooling undid reheating, whole and per layer (figures 11 and 12)",
    "cost": "time and tokens of a run's phases (table 6)",
    "table": "accuracies of all evaluated models, pass@k over k (table 1)",
}
"""Name -> what it shows."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add each analysis with its options."""
    names = parser.add_subparsers(dest="analysis", required=True, metavar="NAME")
    for name, help in ANALYSES.items():
        one = names.add_parser(name, help=help, description=help)
        one.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"gets {name}.json and {name}.png")
        _module(name).add(one)


def _module(name: str):
    return importlib.import_module(f"tsopsd_jax.commands.analyses.{name}")


def run(args: argparse.Namespace) -> int:
    """Measure, write DIR/NAME.json and DIR/NAME.png, and print where they are and what they say.

    DIR/NAME.figure.json is what the PNG shows, for `tsopsd report` to draw again.
    """
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: expected a directory, got {args.out}, which is a file; name another")
    found, figure = _module(args.analysis).run(args)
    if processes.is_first():
        args.out.mkdir(parents=True, exist_ok=True)
        figure_file = args.out / f"{args.analysis}.figure.json"
        for file, content in ((args.out / f"{args.analysis}.json", found), (figure_file, figure_as_json(figure))):
            text = json.dumps(strict_json(content), indent=1, allow_nan=False) + "\n"
            files.replace(file, [text.encode()])
        write_png(figure, args.out / f"{args.analysis}.png")
        print(figure.caption)
        print(f"{args.out / args.analysis}.json and .png")
    return exit_codes.DONE
