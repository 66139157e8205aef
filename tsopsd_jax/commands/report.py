"""`tsopsd report`: write the page of a run directory."""

import argparse
from pathlib import Path

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.display.page import write_report
from tsopsd_jax.rundir import object_store


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run directory")


def run(args: argparse.Namespace) -> int:
    """Write the page, and print where it is."""
    with object_store.opened(args.run_dir) as folder:
        try:
            report = write_report(folder, args.out)
        except OSError as error:
            place = args.out or args.run_dir
            raise ValueError(
                f"{place}: cannot write the page ({error.strerror}); name another file with --out"
            ) from error
        if args.out is None:
            object_store.push(folder)
    print(args.out or f"{args.run_dir}/{report.name}")
    return exit_codes.DONE
