"""`tsopsd data`: prepare a published data set once, so that it is found by its name afterwards."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.config.places import datasets_folder
from tsopsd_jax.data.layouts import LAYOUTS, prepared_folder
from tsopsd_jax.data.prepare import prepare_dataset
from tsopsd_jax.data.sources import SOURCES


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    help = "read the published files of a data set, and write it to the cache"
    preparing = commands.add_parser("prepare", help=help, description=help)
    preparing.add_argument("name", metavar="NAME", help="such as dapo_math_17k, math_500; `tsopsd data list` names all")
    preparing.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="a file or folder; default: the Hugging Face hub"
    )
    preparing.add_argument("--skip-malformed", action="store_true", help="leave malformed rows out instead of stopping")
    help = "all data sets, and which are prepared"
    listing = commands.add_parser("list", help=help, description=help)
    for command in (preparing, listing):
        command.add_argument("--cache-dir", metavar="DIR", help="default: $TSOPSD_CACHE_DIR, else ~/.cache/tsopsd_jax")


def run(args: argparse.Namespace) -> int:
    """Prepare one data set, or list all."""
    directory = datasets_folder(args.cache_dir)
    if args.data_command == "list":
        _list(directory)
    else:
        _prepare(args, directory)
    return exit_codes.DONE


def _prepare(args: Any, directory: Path) -> None:
    """Prepare one data set and say what was read."""
    from rich.console import Console
    from rich.progress import track

    def watch(rows: Iterable[Any], what: str, total: int | None) -> Iterable[Any]:
        return track(rows, what, total=total, console=Console(stderr=True), transient=True)

    prepared = prepare_dataset(
        args.name, directory, source=args.source, skip_malformed=args.skip_malformed, watch=watch
    )
    for split, files in prepared.files.items():
        for file in files:
            print(f"{args.name} {split}: read {file}")
    for split, tally in prepared.tallies.items():
        if tally.known is not None and tally.kept < tally.known:
            print(f"warning: {args.name} {split}: {tally.kept:,} problems of {tally.known:,}", file=sys.stderr)
        wrong = tally.complaint() if tally.malformed else "0 malformed rows"
        print(f"{args.name} {split}: {tally.kept:,} problems; {tally.duplicates:,} repetitions left out; {wrong}")
    print(prepared.folder)


def _list(directory: Path) -> None:
    """Print every data set, whether it is prepared, and where it comes from."""
    for name in SOURCES:
        if name == "jsonl":
            continue
        state = "not prepared"
        if prepared_folder(name, directory).exists():
            from tsopsd_jax.data import builders

            state = ", ".join(f"{split} {size:,}" for split, size in builders.sizes(name, directory).items())
        origin = f"hub: {LAYOUTS[name].hub or 'none known'}" if name in LAYOUTS else "generated"
        print(f"{name:14}  {state:24}  {origin}")
