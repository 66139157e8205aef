"""`tsopsd COMMAND`: each command is a module of `commands`, imported when it is called, so that `--help` is quick.

Exit codes: see `commands.exit_codes`.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import signal
import sys
import threading
from pathlib import Path

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.display.screen import secure
from tsopsd_jax.hardware.chips import GPU_MEMORY_SHARE

COMMANDS = {
    "init": "write a small commented configuration to start from",
    "demo": "collapse a tiny Qwen3 by RL, reheat it, train on: minutes on a CPU",
    "train": "run a configuration; the same command again resumes",
    "plan": "memory, traffic and time of a run on a TPU slice or GPUs, from any machine",
    "check": "read configurations and check all that can be checked without training",
    "report": "write report.html of a run directory",
    "status": "how a run stands: state, step, rate, time left, warnings",
    "convert": "export a run's policy as a Hugging Face directory",
    "generate": "sample responses to a file of prompts; the same command again resumes",
    "eval": "accuracy on benchmarks, all models in one table; the same command again resumes",
    "analyse": "figures and tables of the paper, from policies, responses and runs",
    "data": "prepare published data sets once, to be found by name",
}
"""Name -> what it does."""
LONG = ("demo", "train", "generate", "eval", "analyse")
"""What they make is in files: that it cannot be shown is no reason to end them."""


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of a command line; only the options of the command that it names are read from its module."""
    parser = argparse.ArgumentParser(
        prog="tsopsd",
        description="RL of reasoning models with policy reheating, in JAX.",
        epilog="tsopsd COMMAND --help: its options. To begin: tsopsd demo, or tsopsd init and tsopsd train run.yaml",
    )
    version = f"tsopsd {importlib.metadata.version('tsopsd_jax')}, jax {importlib.metadata.version('jax')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name == next(iter(argv), None):
            _module(name).add(command)
    return parser


def _module(name: str):
    return importlib.import_module(f"tsopsd_jax.commands.{name}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter about machine features
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    argv = sys.argv[1:] if argv is None else argv
    secure(keep_going=next(iter(argv), None) in LONG)
    if not argv:
        _parser(argv).print_help()
        return exit_codes.DONE
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"tsopsd: expected a command, got {argv[0]!r}: {hint}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    args = _parser(argv).parse_args(argv)
    try:
        _check_environment()
        _expand_paths(args)
        return _module(args.command).run(args)
    except KeyboardInterrupt as error:
        return exit_codes.explain(args.command, error)
    except Exception as error:
        known = isinstance(error, ValueError | OSError) or exit_codes.no_backend(error)
        if os.environ.get("TSOPSD_TRACEBACK") or not known:
            raise
        return exit_codes.explain(args.command, error)


def program() -> int:
    """Run the command of this process's arguments; returns its exit code.

    SIGTERM is what Ctrl-C is, also before a run's loop begins to listen and after it ended: exit code 4, with a line.
    Python waits for threads before it ends, and one may compile for minutes the phases to come. After a signal nobody
    waits for it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = main()
    if code == exit_codes.INTERRUPTED and any(t.name.startswith("compile") for t in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _check_environment() -> None:
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        raise ValueError(
            "JAX_ENABLE_X64: expected it unset, got a run in 64 bits, which nothing here is made for; unset it"
        )


def _expand_paths(args: argparse.Namespace) -> None:
    """The user's folder for `~` in every option: a shell expands `--out ~/x` and not `--out=~/x`."""
    from tsopsd_jax.config.strict import at_home

    for name, value in vars(args).items():
        if isinstance(value, str | Path):
            setattr(args, name, type(value)(at_home(str(value))))
        elif isinstance(value, list):
            setattr(args, name, [at_home(each) if isinstance(each, str) else each for each in value])


if __name__ == "__main__":
    sys.exit(program())
