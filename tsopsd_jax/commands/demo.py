"""`tsopsd demo`: collapse a tiny Qwen3 by RL, reheat it, train on."""

import argparse

from tsopsd_jax.commands import options
from tsopsd_jax.commands.train import run_file
from tsopsd_jax.config.places import DEMO_CONFIG


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_run(parser)


def run(args: argparse.Namespace) -> int:
    """Run the packaged configuration."""
    return run_file(DEMO_CONFIG, args.run_dir or "runs/demo", args.set, "demo", accept_changed=args.accept_changed)
