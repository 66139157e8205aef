"""`tsopsd train`: run a configuration, or resume it."""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.config import Config, claim, load_config, strict
from tsopsd_jax.config.build import Parts, divide_cpu, prepare
from tsopsd_jax.config.places import cache_folder, digests_file, model_folder, use_compilation_cache
from tsopsd_jax.config.references import reference_folders
from tsopsd_jax.display.live_page import LivePage
from tsopsd_jax.display.live_table import LiveTable, results_table
from tsopsd_jax.display.page import write_report
from tsopsd_jax.distributed import heartbeat, processes
from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.model.fingerprint import fingerprint
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.log import read_evaluations, read_metrics
from tsopsd_jax.rundir.status import STALL_FILE
from tsopsd_jax.train.phase import GuardError
from tsopsd_jax.train.phase_step import Shared
from tsopsd_jax.train.signals import Interrupted
from tsopsd_jax.train.trainer import Trainer

MESSAGES_FILE = "messages.log"
"""What libraries had to say while a live table was shown."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("config", metavar="CONFIG")
    options.add_run(parser)
    parser.add_argument(
        "--profile-steps", type=_steps, metavar="A:B", help="trace steps A to B for xprof into RUN_DIR/profile"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; TPUs, SLURM, Open MPI need no flags")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes run this command")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    parser.add_argument(
        "--heartbeat-s", type=int, default=100, help="silence after which a process is taken for dead; default 100"
    )
    parser.add_argument(
        "--stall-s",
        type=float,
        default=1800,
        help="time in one step, one compilation or one read after which a process is taken to hang; default 1800, 0: "
        "never",
    )


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not first.isdigit() or not (last or first).isdigit() or not 1 <= int(first) <= int(last or first):
        raise argparse.ArgumentTypeError(f"expected A:B, the first and the last step, such as 3:5, got {text!r}")
    return int(first), int(last or first)


def run(args: argparse.Namespace) -> int:
    """Join the other processes of the run, if there are any, and run."""
    with contextlib.suppress(ValueError):  # said below, where the other processes hear of it
        divide_cpu(load_config(args.config, args.set).mesh.cpu_devices)  # joining starts JAX
    with processes.joined(
        coordinator=args.coordinator,
        processes=args.processes,
        process=args.process,
        heartbeat_s=args.heartbeat_s,
        stall_s=args.stall_s,
        explain=functools.partial(exit_codes.explain, "train"),
    ):
        place = args.run_dir or f"runs/{Path(args.config).stem}"
        return run_file(
            Path(args.config),
            place,
            args.set,
            "train",
            accept_changed=args.accept_changed,
            profile_steps=args.profile_steps,
        )


def run_file(
    path: Path,
    place: str,
    overrides: list[str],
    command: str,
    *,
    accept_changed: bool = False,
    profile_steps: tuple[int, int] | None = None,
) -> int:
    """Run a configuration's file at `place` until it is done or stopped; returns the exit code."""
    config = load_config(path, overrides)
    return run_config(config, place, command=command, accept_changed=accept_changed, profile_steps=profile_steps)


def run_config(
    config: Config,
    run_dir: str | Path,
    *,
    command: str = "train",
    accept_changed: bool = False,
    profile_steps: tuple[int, int] | None = None,
) -> int:
    """Run a configuration until it is done or stopped, then print results and write the page. The same call resumes.

    Args:
        config: from `config.load_config`.
        run_dir: a folder, or `gs://...`.
        command: what messages call the run.
        accept_changed: go on though problems or files of functions are not as they were.
        profile_steps: first and last step of a trace; None: no trace.

    Returns:
        The exit code (`commands.exit_codes`): done, a guard stopped the run, or a signal did.

    Raises:
        ValueError: bad input; the message says what was expected.
        SaveError: a checkpoint could not be written.
    """
    divide_cpu(config.mesh.cpu_devices)
    folder = object_store.folder_of(str(run_dir), cache_folder(config))
    code = exit_codes.DONE
    try:
        table = LiveTable(stream=processes.console())
        opened = open_trainer(config, folder, table, accept_changed=accept_changed, profile_steps=profile_steps)
        with opened as trainer:
            _tell_resumed(trainer, folder, table)
            trainer.run()
    except Interrupted as reason:
        print(f"{reason}; the same command goes on", file=sys.stderr)
        code = exit_codes.INTERRUPTED
    except GuardError as reason:
        print(f"tsopsd {command}: {reason}", file=sys.stderr)
        code = exit_codes.GUARD
    if processes.is_first():
        _tell(folder)
    return code


def _tell(run_dir: Path) -> None:
    """Print the results of a run, and write its page."""
    if evaluations := read_evaluations(run_dir):
        print(results_table(evaluations))
        for line in transitions(evaluations, read_metrics(run_dir)):
            print(line)
    if read_metrics(run_dir):
        try:
            print(f"report: {write_report(run_dir)}")
        except OSError as error:  # the page is never worth the run
            print(f"warning: {error} (or tsopsd report {run_dir})", file=sys.stderr)
    object_store.push(run_dir)


def _check_same(mine: Any, what: str) -> None:
    """All processes of a run were started with one configuration, and read the same problems and functions."""
    odd = strict.first_difference(processes.from_first(mine), mine)
    if odd is not None:
        raise ValueError(
            f"process {jax.process_index()} has another {what} than process 0 ({odd}); start all with the same one"
        )


def _inputs(config: Config, parts: Parts) -> dict[str, str]:
    """Digests of what the run begins with, learns from and is measured on, beside its settings."""
    problems = {"training problems": parts.task.problems}
    if parts.evaluation is not None:
        problems["evaluation problems"] = parts.evaluation.problems
    found = claim.inputs_of(config, problems)
    _check_same(found, "input")
    model = fingerprint(model_folder(config), cache=digests_file(config.cache_dir)) if processes.is_first() else {}
    found |= {f"model's {part}": sha for part, sha in processes.from_first(model).items() if sha}
    for name, folder in reference_folders(config).items():
        other = fingerprint(folder, cache=digests_file(config.cache_dir)) if processes.is_first() else {}
        found |= {f"reference {name}: {part}": sha for part, sha in processes.from_first(other).items() if sha}
    return found


@contextlib.contextmanager
def _claimed(config: Config, run_dir: Path, inputs: dict[str, str], accept_changed: bool) -> Iterator[list[str]]:
    """The run directory held and claimed by process 0, for all; what changed in its settings and inputs."""
    with contextlib.ExitStack() as stack:
        heartbeat.tick("reading the run directory")
        changed = []
        if processes.is_first():
            stack.enter_context(claim.held(run_dir))
            object_store.fetch(run_dir)
            changed = claim.claim(run_dir, config, inputs, accept_changed=accept_changed)
            for stall in run_dir.glob(STALL_FILE.format("*")):  # of earlier processes, which may have been more
                stall.unlink(missing_ok=True)
        changed = processes.from_first(changed)
        if object_store.address(run_dir) is None and not (run_dir / claim.CONFIG_FILE).is_file():
            raise ValueError(
                f"process {jax.process_index()} expected the {claim.CONFIG_FILE} that process 0 wrote to {run_dir}, "
                "got no such file; choose a --run-dir that all hosts share (a network file system, gs://...)"
            )
        yield changed


@contextlib.contextmanager
def open_trainer(
    config: Config,
    run_dir: Path,
    table: LiveTable,
    *,
    accept_changed: bool = False,
    profile_steps: tuple[int, int] | None = None,
) -> Iterator[Trainer]:
    """A trainer in `run_dir`, resuming what stands there; no other process may run there meanwhile."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(table)
        use_compilation_cache(cache_folder(config))
        _check_same(strict.plain(config), "configuration")
        heartbeat.tick("reading the model's files and the data")
        parts = prepare(config)
        inputs = _inputs(config, parts)
        changed = stack.enter_context(_claimed(config, run_dir, inputs, accept_changed))
        heartbeat.report_stalls(run_dir / STALL_FILE.format(jax.process_index()))
        stack.enter_context(table.without_messages(run_dir / MESSAGES_FILE))
        trainer = Trainer(
            Shared.of(parts.model, parts.mesh, parts.task, seed=config.seed, references=parts.references),
            parts.phases,
            load_params=parts.load_params,
            evaluation=parts.evaluation,
            run_dir=run_dir,
            checkpoint_every_steps=config.checkpoint_every_steps,
            keep_checkpoints=config.keep_checkpoints,
            tracker=config.tracker,
            table=table,
            profile_steps=profile_steps,
            samples=config.samples,
            cycle=config.indices_of_cycle(),
            baseline_steps=config.baseline_steps,
            after_step=LivePage(run_dir, every_s=config.page_every_s if processes.is_first() else 0, say=table.note),
        )
        stack.enter_context(trainer.told())
        for note in parts.notes:
            table.note(note)
        for warning in parts.warnings:
            table.note(f"warning: {warning}")
        if changed:
            table.note(f"goes on with changed settings: {'; '.join(changed)}")
        yield trainer


def _tell_resumed(trainer: Trainer, run_dir: Path, table: LiveTable) -> None:
    """Say where a run goes on, with the rows and the trend of the steps that it took, or that it is done."""
    steps, phase = trainer.run_state.step, trainer.phase_name
    if phase is None:
        table.note(f"{run_dir} is done: {steps} steps")
    elif steps:
        table.restore(read_metrics(run_dir) if processes.is_first() else [])
        table.note(f"resumed at step {steps} of {phase}")


def transitions(evaluations: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> list[str]:
    """What each phase took and what it did to accuracy, from one evaluation between phases to the next."""
    lines = []
    for before, after in itertools.pairwise(e for e in evaluations if not e.get("phase_step")):
        steps = [m for m in metrics if before["step"] < m["step"] <= after["step"]]
        nats = [m[ENTROPY] for m in steps if m.get(ENTROPY) is not None]
        entropy = f", entropy {nats[0]:.3f} -> {nats[-1]:.3f} nats" if nats else ""
        gains = (100 * (after[key] - before[key]) for key in ("avg_at_k", "pass_at_k"))
        points = ", ".join(f"{name}@k {gain:+.1f}" for name, gain in zip(("avg", "pass"), gains, strict=True))
        lines.append(f"{before['stage']} -> {after['stage']}: {len(steps)} steps{entropy}, {points} points")
    return lines
