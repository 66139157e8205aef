"""`tsopsd`: demo, train, plan, check, report, convert, generate, eval, data.

Exit codes: 0 done; 2 bad input (one line says what); 3 a guard stopped the run to protect the policy; 4 a signal stopped
the run (what stood was saved, unless the signal came twice): the same command goes on; 5 another process of
the run died or failed: the same command in all of them goes on from the last checkpoint.
"""

import argparse
import functools
import itertools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_DONE, EXIT_BAD_INPUT, EXIT_GUARD, EXIT_INTERRUPTED = 0, 2, 3, 4
DEMO_CONFIG = Path(__file__).parent / "assets" / "demo.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tsopsd", description="RL of reasoning models with policy reheating, in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    demo = add("demo", "collapse a tiny Qwen3 by RL, reheat it, go on: minutes on a CPU")
    train = add("train", "run a configuration; the same command again resumes")
    train.add_argument("config", metavar="CONFIG")
    for command in (demo, train):
        command.add_argument("--run-dir", help="or gs://...; default: runs/NAME of the configuration's file")
        command.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override one setting")
    train.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; TPUs, SLURM, Open MPI need no flags")
    train.add_argument("--processes", type=int, metavar="N", help="how many processes run this command")
    train.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    train.add_argument(
        "--heartbeat-s", type=int, default=100, help="silence after which a process is taken for dead; default 100"
    )
    plan = add("plan", "memory, traffic and time of a run on a TPU slice or GPUs, from any machine")
    plan.add_argument("config", metavar="CONFIG")
    plan.add_argument("--topology", required=True, metavar="KIND:SHAPE", help="v5e:16x16, v5p:4x4x4, h100:8, ...")
    plan.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override one setting")
    plan.add_argument("--search", action="store_true", help="try meshes and micro-batches, rank those that fit")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    plan.add_argument("--mean-tokens", type=int, help="of a response, for times; default: its limit")
    plan.add_argument("--mean-prompt-tokens", type=int, help="of a prompt, for times; default: its limit")
    check = add("check", "read configurations and check all that can be checked without training")
    check.add_argument("configs", nargs="+", metavar="CONFIG")
    check.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override one setting")
    check.add_argument("--syntax-only", action="store_true", help="do not look for the model and the data")
    report = add("report", "write report.html of a run directory")
    report.add_argument("run_dir", metavar="RUN_DIR")
    convert = add("convert", "export a run's policy as a Hugging Face directory")
    convert.add_argument("run_dir", metavar="RUN_DIR")
    convert.add_argument("--out", type=Path, required=True, help="directory to write; must not hold anything else")
    convert.add_argument("--step", type=int, help="checkpoint to export; default: the latest")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the stored tensors")
    generate = add("generate", "sample responses to a file of prompts; the same command again goes on")
    generate.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face model directory")
    generate.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help='JSON lines with "prompt", maybe "id"'
    )
    generate.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, in the order of ending")
    generate.add_argument("--template", default="plain", help="text around the prompt: plain, boxed, dapo_answer")
    generate.add_argument("--chat", default="none", help="the model's chat turn around that: none, direct, thinking")
    generate.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    _sampling_options(generate, samples=1, max_tokens=1024, top_p=1.0)
    _eval_options(add("eval", "accuracy on benchmarks, all models in one table; the same command again goes on"))
    _add_data(add("data", "prepare published data sets once, to be found by name"))
    return parser


def _sampling_options(command: argparse.ArgumentParser, *, samples: int, max_tokens: int, top_p: float) -> None:
    command.add_argument("--samples", type=int, default=samples, help=f"responses per prompt; default {samples}")
    command.add_argument("--max-tokens", type=int, default=max_tokens, help=f"of a response; default {max_tokens}")
    command.add_argument("--temperature", type=float, default=1.0, help="default 1")
    command.add_argument("--top-p", type=float, default=top_p, help=f"1: off; default {top_p:g}")
    command.add_argument("--top-k", type=int, default=0, help="default 0: off")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--slots", type=int, default=64, help="responses decoded side by side; default 64")
    command.add_argument("--tensor", type=int, default=1, help="devices that share one copy of the weights; default 1")


def _eval_options(command: argparse.ArgumentParser) -> None:
    """The paper's settings (A.3) are the defaults."""
    policy = command.add_mutually_exclusive_group()
    policy.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model directory")
    policy.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run's checkpoint; neither: the tables only")
    command.add_argument("--step", type=int, help="the run's checkpoint; default: the latest")
    command.add_argument(
        "--name", help="of the model in the tables; default: its directory's, or the run's and the step"
    )
    command.add_argument(
        "--benchmarks", metavar="A,B", help="data sets by NAME or NAME:SPLIT, or files of JSON lines (FILE.jsonl)"
    )
    command.add_argument("--first", type=int, metavar="N", help="the first N problems of each benchmark only")
    command.add_argument("--problem-field", default="problem", metavar="KEY", help="of a file's lines; default problem")
    command.add_argument("--answer-field", default="answer", metavar="KEY", help="of a file's lines; default answer")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="responses and tables, of all models")
    command.add_argument("--k", type=int, help="of pass@k; default: all samples")
    command.add_argument("--compare", nargs=2, metavar=("A", "B"), help="B less A of the tables, by paired bootstrap")
    command.add_argument(
        "--template", help="text around the problem; default: dapo_answer for the verifier math, else plain"
    )
    command.add_argument("--chat", help="the model's chat turn: none, direct, thinking; default: the run's, else none")
    command.add_argument(
        "--verifier", choices=("math", "countdown", "last_number"), help="default: math, countdown for countdown"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: the run's; of a model float32 on a CPU, else bfloat16",
    )
    _sampling_options(command, samples=8, max_tokens=8192, top_p=0.7)


def _add_data(data: argparse.ArgumentParser) -> None:
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    help = "read the published files of a data set, and write it to the cache"
    prepare = commands.add_parser("prepare", help=help, description=help)
    prepare.add_argument("name", metavar="NAME", help="such as dapo_math_17k, math_500; `tsopsd data list` names all")
    prepare.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="a file or folder; default: the Hugging Face hub"
    )
    prepare.add_argument("--skip-malformed", action="store_true", help="leave malformed rows out instead of stopping")
    help = "all data sets, and which are prepared"
    listing = commands.add_parser("list", help=help, description=help)
    for command in (prepare, listing):
        command.add_argument("--cache-dir", metavar="DIR", help="default: $TSOPSD_CACHE_DIR, else ~/.cache/tsopsd_jax")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter about machine features
    try:
        return _COMMANDS[args.command](args)
    except (ValueError, KeyboardInterrupt) as error:
        if isinstance(error, ValueError) and os.environ.get("TSOPSD_TRACEBACK"):
            raise
        return _explain(args.command, error)


def _explain(command: str, error: BaseException) -> int:
    """Print what went wrong; the exit code for it."""
    if isinstance(error, ValueError):
        print(f"tsopsd {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if isinstance(error, KeyboardInterrupt):  # a second signal, or one before the first step
        print(f"tsopsd {command}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    traceback.print_exception(error)
    return 1


def _train(args: argparse.Namespace) -> int:
    from tsopsd_jax import hosts

    with hosts.joined(
        coordinator=args.coordinator,
        processes=args.processes,
        process=args.process,
        heartbeat_s=args.heartbeat_s,
        explain=functools.partial(_explain, args.command),
    ):
        return _run(Path(args.config), args.run_dir or f"runs/{Path(args.config).stem}", args.set, args.command)


def _demo(args: argparse.Namespace) -> int:
    return _run(DEMO_CONFIG, args.run_dir or "runs/demo", args.set, args.command)


def _run(path: Path, place: str, overrides: list[str], command: str) -> int:
    from tsopsd_jax import hosts, store
    from tsopsd_jax.config import cache_folder, load_config
    from tsopsd_jax.console import LiveTable, results_table
    from tsopsd_jax.phases import GuardError
    from tsopsd_jax.report import write_report
    from tsopsd_jax.run import open_trainer
    from tsopsd_jax.runlog import read_evaluations, read_metrics
    from tsopsd_jax.trainer import Interrupted

    config = load_config(path, overrides)
    run_dir = store.folder_of(place, cache_folder(config))
    code = EXIT_DONE
    try:
        with open_trainer(config, run_dir, LiveTable(stream=hosts.console())) as trainer:
            if trainer.progress.phase == len(config.phases):
                print(f"{place} is done: {int(trainer.state.step)} steps")
            trainer.run()
    except Interrupted as reason:
        print(f"{reason}; the same command goes on", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except GuardError as reason:
        print(f"tsopsd {command}: {reason}", file=sys.stderr)
        code = EXIT_GUARD
    if not hosts.is_first():
        return code
    if evaluations := read_evaluations(run_dir):
        print(results_table(evaluations))
        for line in transitions(evaluations, read_metrics(run_dir)):
            print(line)
    if read_metrics(run_dir):
        print(f"report: {write_report(run_dir)}")
    store.push(run_dir)
    return code


def transitions(evaluations: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> list[str]:
    """What each phase took and what it did to accuracy, from one evaluation between phases to the next."""
    lines = []
    for before, after in itertools.pairwise(e for e in evaluations if not e.get("phase_step")):
        steps = [m for m in metrics if before["step"] < m["step"] <= after["step"]]
        nats = [m["policy/entropy_nats"] for m in steps if m.get("policy/entropy_nats") is not None]
        entropy = f", entropy {nats[0]:.3f} -> {nats[-1]:.3f} nats" if nats else ""
        gains = (100 * (after[key] - before[key]) for key in ("avg_at_k", "pass_at_k"))
        points = ", ".join(f"{name}@k {gain:+.1f}" for name, gain in zip(("avg", "pass"), gains, strict=True))
        lines.append(f"{before['stage']} -> {after['stage']}: {len(steps)} steps{entropy}, {points} points")
    return lines


def _plan(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the devices planned for are the compiler's; none here is touched
    from tsopsd_jax.plan.command import run_command

    return run_command(args)


def _check(args: argparse.Namespace) -> int:
    from tsopsd_jax.config import load_config, make_phase
    from tsopsd_jax.run import prepare

    for path in args.configs:
        config = load_config(path, args.set)
        for phase in config.phases:
            make_phase(phase)
        if args.syntax_only:
            print(f"{path}: settings are valid")
            continue
        parts = prepare(config)
        for note in parts.notes:
            print(f"{path}: {note}")
        print(
            f"{path}: valid; {len(parts.task.problems)} problems, {len(config.phases)} phases, mesh {dict(parts.mesh.shape)}"
        )
    return EXIT_DONE


def _report(args: argparse.Namespace) -> int:
    from tsopsd_jax import store
    from tsopsd_jax.report import write_report

    with store.opened(args.run_dir) as folder:
        report = write_report(folder)
        store.push(folder)
    print(f"{args.run_dir}/{report.name}")
    return EXIT_DONE


def _convert(args: argparse.Namespace) -> int:
    from tsopsd_jax import store
    from tsopsd_jax.run import export

    with store.opened(args.run_dir) as folder:
        print(export(folder, args.out, step=args.step, dtype=args.dtype))
    return EXIT_DONE


def _respond(args: argparse.Namespace) -> int:
    from tsopsd_jax.eval_command import run_command as evaluate
    from tsopsd_jax.generate import run_command as generate

    try:
        return (generate if args.command == "generate" else evaluate)(args)
    except KeyboardInterrupt:
        print(f"interrupted; {args.out} keeps what was written, and the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _data(args: argparse.Namespace) -> int:
    from tsopsd_jax.config import datasets_folder
    from tsopsd_jax.data import prepare

    directory = datasets_folder(args.cache_dir)
    if args.data_command == "list":
        prepare.run_list(directory)
    else:
        prepare.run_prepare(args, directory)
    return EXIT_DONE


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "plan": _plan,
    "check": _check,
    "report": _report,
    "convert": _convert,
    "generate": _respond,
    "eval": _respond,
    "data": _data,
}

if __name__ == "__main__":
    sys.exit(main())
