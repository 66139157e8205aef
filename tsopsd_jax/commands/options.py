"""Options that several commands share."""

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

from tsopsd_jax.rollout import Sampling


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set a.b=VALUE`."""
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override one setting")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add where a run lies and what of its configuration is overridden."""
    parser.add_argument("--run-dir", help="or gs://...; default: runs/NAME of the configuration's file")
    add_overrides(parser)
    parser.add_argument(
        "--accept-changed", action="store_true", help="go on though problems or files of functions are not as they were"
    )


def add_again(parser: argparse.ArgumentParser) -> None:
    """Add `--again`, for commands that resume what stands in their output."""
    parser.add_argument(
        "--again", action="store_true", help="sample anew: what stands there under this name is replaced"
    )


class SamplingDefaults(NamedTuple):
    """How responses are sampled where options do not say."""

    samples: int
    max_tokens: int
    sampling: Sampling
    seed: int = 0


def add_asked(parser: argparse.ArgumentParser, *, required: bool, run: str) -> None:
    """Add `--model`, or `--run` with `--step`, and what of a policy can be chosen.

    Args:
        required: one of the two must be given.
        run: what `--run` takes from the run, for its help.
    """
    policy = parser.add_mutually_exclusive_group(required=required)
    policy.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model directory")
    policy.add_argument("--run", metavar="RUN_DIR[@STEP]", help=f"a run's checkpoint, with {run}")
    parser.add_argument("--step", type=int, help="the run's checkpoint; default: the latest")
    parser.add_argument("--chat", help="the model's chat turn: none, direct, thinking; default: the run's, else none")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: the run's; of a model float32 on a CPU, else bfloat16",
    )


def add_sampling(parser: argparse.ArgumentParser, default: SamplingDefaults, *, samples: str | None = None) -> None:
    """Add how responses are sampled. None stands for what is not given; `default` is told in the help.

    Args:
        samples: the default of `--samples` in words, where `--run` changes it.
    """
    own, top_p = "with --run: the run's", default.sampling.top_p
    parser.add_argument("--samples", type=int, help=f"responses per prompt; default {samples or default.samples}")
    parser.add_argument("--max-tokens", type=int, help=f"of a response; default {default.max_tokens}; {own}")
    parser.add_argument("--temperature", type=float, help=f"default 1; {own}")
    parser.add_argument("--top-p", type=float, help=f"1: off; default {top_p:g}; {own}")
    parser.add_argument("--top-k", type=int, help=f"0: off, the default; {own}")
    parser.add_argument(
        "--edt-theta", type=float, help=f"a token's temperature is T x 0.8^(this / its entropy); default: off; {own}"
    )
    parser.add_argument("--seed", type=int, help=f"default 0; {own}")
    parser.add_argument("--slots", type=int, default=64, help="responses decoded side by side; default 64")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share one copy of the weights; default 1")


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add `--show N` and `--first N`."""
    parser.add_argument("--show", type=int, metavar="N", help="print N prompts with the responses, right or wrong")
    parser.add_argument("--first", type=int, metavar="N", help="the first N prompts or problems only")


def check_show(args: argparse.Namespace) -> None:
    """Check what `add_show` added.

    Raises:
        ValueError: a number below 1.
    """
    for name in ("show", "first"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise ValueError(f"--{name}: expected at least 1, got {vars(args)[name]}; leave it out for all")


def sampling_of(args: argparse.Namespace, default: Sampling) -> Sampling:
    """The distribution that the options of `add_sampling` ask for; `default` for those that are not given.

    Raises:
        ValueError: a temperature, top_p or top_k out of range.
    """
    asked = {
        "sampling_temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "edt_theta": args.edt_theta,
    }
    return dataclasses.replace(default, **{name: value for name, value in asked.items() if value is not None})
