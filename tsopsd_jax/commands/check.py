"""`tsopsd check`: read configurations and check all that can be checked without training."""

import argparse
import math
from pathlib import Path

import jax

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.config import load_config
from tsopsd_jax.config.build import (
    Parts,
    check_functions,
    check_objectives,
    divide_cpu,
    doubts,
    make_phases,
    prepare,
)
from tsopsd_jax.config.places import model_folder
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.display.numbers import count


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
        if config.data.chat != "none" and same_turn(model_folder(config)):
            print(f"{path}: the model's template makes the same turn for chat: direct and chat: thinking")
        for line in takes(parts):
            print(f"  {line}")
    return exit_codes.DONE


def same_turn(folder: Path) -> bool:
    """Whether a model's chat template does not heed `enable_thinking`: it always thinks, or never."""
    direct, thinking = (Tokenizer.load(folder, chat=chat).encode("x") for chat in ("direct", "thinking"))
    return direct == thinking


def takes(parts: Parts) -> list[str]:
    """Say what a run will take: memory of its state, rows and tokens of each phase's steps. (`tsopsd plan` says
    more.)"""
    model, mesh = parts.model, parts.mesh
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.param_shapes()))
    moments = jax.tree.leaves(jax.eval_shape(parts.phases[0].optimizer.init, model.param_shapes()))
    state = 4 * parameters + sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in moments)
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    lines = [
        f"{count(parameters)} parameters: {count(state / shards)}B a device for weights and optimizer, and more for "
        "gradients, activations and the cache"
    ]
    for phase in parts.phases:
        batches = 1 if phase.reward is None else max(1, phase.reward.max_generation_batches)
        most = f", up to {batches} times" if batches > 1 else ""
        updates = f", {phase.updates_per_step} updates" if phase.updates_per_step > 1 else ""
        lines.append(
            f"{phase.name}: {phase.prompts_per_step} x {phase.responses_per_prompt} responses a step{most}, of at most "
            f"{phase.max_response_tokens} tokens{updates}; until {phase.stop.words()}"
        )
    return lines
