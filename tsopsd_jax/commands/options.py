"""Options that several commands share."""

import argparse

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


def add_sampling(parser: argparse.ArgumentParser, *, samples: int, max_tokens: int, top_p: float) -> None:
    """Add how responses are sampled, with these defaults."""
    parser.add_argument("--samples", type=int, default=samples, help=f"responses per prompt; default {samples}")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"of a response; default {max_tokens}")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1")
    parser.add_argument("--top-p", type=float, default=top_p, help=f"1: off; default {top_p:g}")
    parser.add_argument("--top-k", type=int, default=0, help="default 0: off")
    parser.add_argument(
        "--edt-theta", type=float, help="a token's temperature is T x 0.8^(this / its entropy); default: off"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=64, help="responses decoded side by side; default 64")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share one copy of the weights; default 1")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The distribution that the options of `add_sampling` ask for.

    Raises:
        ValueError: a temperature, top_p or top_k out of range.
    """
    return Sampling(sampling_temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, edt_theta=args.edt_theta)
