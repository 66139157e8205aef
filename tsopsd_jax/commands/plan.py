"""`tsopsd plan`: whether a run fits a topology and how long its steps take at best, from any machine."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.config import Config, load_config
from tsopsd_jax.config.places import model_folder
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.plan.compiled import CompiledPrograms
from tsopsd_jax.plan.planner import Means, Plan, make_plan, search
from tsopsd_jax.plan.report import as_json, as_text, ranking
from tsopsd_jax.plan.roofline import LIKELY, Shares
from tsopsd_jax.plan.topologies import topology

SHOWN = 5
"""Plans that are shown while a search goes on."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--topology", required=True, metavar="KIND:SHAPE", help="v5e:16x16, v5p:4x4x4, h100:8, ...")
    options.add_overrides(parser)
    parser.add_argument(
        "--search", action="store_true", help="try meshes, rows_at_once and micro-batches, rank those that fit"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--mean-tokens", type=int, help="of a response, for times; default: its limit")
    parser.add_argument("--mean-prompt-tokens", type=int, help="of a prompt, for times; default: its limit")
    parser.add_argument(
        "--shares",
        type=_shares,
        default=LIKELY,
        metavar="C,M,L",
        help="shares of the peaks of compute, memory, links that estimates assume; default "
        f"{','.join(map(str, LIKELY))}",
    )


def _shares(text: str) -> Shares:
    found = [float(share) for share in text.split(",")]
    if len(found) != len(LIKELY) or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"expected three shares in (0, 1], such as 0.4,0.6,0.7, got {text!r}")
    return Shares(*found)


def _note(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr, flush=True)


def _tell(plans: list[Plan]) -> None:
    """Show what a search has found so far."""
    shown = ranking(plans[:SHOWN])
    _note(f"so far{f', the best {SHOWN} of {len(plans)}' if len(plans) > SHOWN else ''}:\n{shown}")


def shape_folder(config: Config, config_file: Path) -> Path:
    """Where the model's config.json is: the model's directory, or the shape of that name beside the configurations."""
    folder = model_folder(config)
    shapes = [parent / "models" / folder.name for parent in config_file.resolve().parents[:3]]
    shapes.append(Path("configs/models") / folder.name)
    for place in (folder, *shapes):
        if (place / "config.json").is_file():
            return place
    raise ValueError(
        f"model.path: expected config.json in {folder}, or in configs/models/{folder.name}, got neither; "
        "--set model.path=configs/models/NAME takes the shape of another"
    )


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Programs for devices that are not there cannot be read back from the cache."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def run(args: argparse.Namespace) -> int:
    """Plan, and print; 0 whether or not it fits.

    Raises:
        ValueError: bad input; one line says what.
    """
    jax.config.update("jax_platforms", "cpu")  # the devices planned for are the compilers'; none here is touched
    config = load_config(args.config, args.set)
    folder = shape_folder(config, Path(args.config))
    if folder != model_folder(config):
        _note(f"{model_folder(config)} is not here; its shape is taken from {folder}")
    shape, place = read_config(folder / "config.json"), topology(args.topology)
    if place.name != args.topology:
        _note(f"{args.topology} is {place.name}")
    means, programs = Means(args.mean_tokens, args.mean_prompt_tokens), CompiledPrograms(_note)
    with no_compilation_cache():
        if args.search:
            plans = search(config, shape, place, means=means, programs=programs, shares=args.shares, tell=_tell)
        else:
            plans = [make_plan(config, shape, place, means=means, programs=programs, shares=args.shares)]
    best = as_json(plans[0])
    if args.json:
        others = {"ranking": [as_json(plan) for plan in plans]} if args.search else {}
        print(json.dumps({"config": str(args.config), "model": folder.name} | best | others))
        return exit_codes.DONE
    if args.search:
        print(ranking(plans), end="\n\n")
    print(as_text(plans[0]))
    return exit_codes.DONE
