"""`tsopsd check`: read configurations and check all that can be checked without training."""

import argparse

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.config import load_config
from tsopsd_jax.config.build import check_functions, check_objectives, divide_cpu, doubts, make_phases, prepare


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    options.add_overrides(parser)
    parser.add_argument("--syntax-only", action="store_true", help="do not look for the model and the data")


def run(args: argparse.Namespace) -> int:
    """Check each configuration; a line says what it is made of."""
    configs = {path: load_config(path, args.set) for path in args.configs}
    divisions = {config.mesh.cpu_devices for config in configs.values()}
    if len(divisions) > 1 and not args.syntax_only:
        asked = ", ".join(sorted("null" if number is None else str(number) for number in divisions))
        raise ValueError(
            f"expected files of one mesh.cpu_devices, got {asked}: JAX starts once in a process; check them singly"
        )
    divide_cpu(divisions.pop())  # first: an objective's file may use JAX as it is imported
    for path, config in configs.items():
        if args.syntax_only:
            check_functions(config)
            for note in check_objectives(config, make_phases(config)):
                print(f"{path}: {note}")
            for warning in doubts(config):
                print(f"{path}: warning: {warning}")
            print(f"{path}: settings are valid")
            continue
        parts = prepare(config)
        for note in parts.notes:
            print(f"{path}: {note}")
        for warning in parts.warnings:
            print(f"{path}: warning: {warning}")
        problems, phases = len(parts.task.problems), len(config.phases)
        print(f"{path}: valid; {problems} problems, {phases} phases, mesh {dict(parts.mesh.shape)}")
    return exit_codes.DONE
