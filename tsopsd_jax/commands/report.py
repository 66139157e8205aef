"""`tsopsd report`: write the page of a run directory."""

import argparse

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.display.page import write_report
from tsopsd_jax.rundir import object_store


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_dir", metavar="RUN_DIR")


def run(args: argparse.Namespace) -> int:
    """Write report.html into the run directory."""
    with object_store.opened(args.run_dir) as folder:
        report = write_report(folder)
        object_store.push(folder)
    print(f"{args.run_dir}/{report.name}")
    return exit_codes.DONE
