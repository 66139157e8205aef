"""`tsopsd check`: read configurations and check all that can be checked without training."""

import argparse

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.config import load_config
from tsopsd_jax.config.build import check_objectives, make_phases, prepare


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    options.add_overrides(parser)
    parser.add_argument("--syntax-only", action="store_true", help="do not look for the model and the data")


def run(args: argparse.Namespace) -> int:
    """Check each configuration; a line says what it is made of."""
    for path in args.configs:
        config = load_config(path, args.set)
        if args.syntax_only:
            for note in check_objectives(config, make_phases(config)):
                print(f"{path}: {note}")
            print(f"{path}: settings are valid")
            continue
        parts = prepare(config)
        for note in parts.notes:
            print(f"{path}: {note}")
        print(
            f"{path}: valid; {len(parts.task.problems)} problems, {len(config.phases)} phases, mesh {dict(parts.mesh.shape)}"
        )
    return exit_codes.DONE
