"""Kill a short run again and again, and compare it with one left alone: `python scripts/crash_test.py [CASE ...]`.

A run of three phases (RL, reheating, RL) is ended by SIGKILL at random moments and at chosen ones: while a checkpoint
is written, a phase changes, an evaluation runs, or half a line of the log stands in the file. It is started again with
the same command each time. In the end its parameters, optimizer state, progress, metrics (without `time/`, `perf/` and
clocks), kept responses and evaluations are compared with those of a run that nobody killed: bit for bit.

    python scripts/crash_test.py --kills 20 --markdown crash_test.md     # all cases: about an hour on two cores
    python scripts/crash_test.py plain --kills 5 --steps 2 1 1           # a short one

The exit code is 0 if nothing was lost. A start is a fork of this process, which has imported everything and started no
devices: what a killed process loses is the same, and a restart costs a second or two.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import yaml
from crash_compare import arrays, differences, records

from tsopsd_jax import cli
from tsopsd_jax.commands import train as train_command
from tsopsd_jax.config import load_config, strict
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.rundir import log
from tsopsd_jax.rundir.checkpoints import Checkpoints
from tsopsd_jax.train import trainer

MOMENTS = ("any time", "checkpoint", "phase change", "evaluation", "half a line")
MAX_STARTS_PER_KILL = 3

RL = ("phases.0", "phases.2")
CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "two updates a rollout": tuple(f"{phase}.updates_per_rollout=2" for phase in RL),
    "left-over groups": tuple(f"{phase}.reward.surplus=keep" for phase in RL),
    "controller and reference": (
        "phases.0.objective={name: adaptive_entropy_bonus}",
        "phases.0.measure_start_kl=true",
        "phases.1.objective={name: opd}",
        "phases.1.reference=start",
        "phases.1.reference_every_steps=2",
        "phases.1.learning_rate_control="
        "{entropy_gain_nats_per_step: 0.01, min_learning_rate: 1.0e-6, max_learning_rate: 1.0e-3}",
    ),
    "two processes": (),
}
"""Case -> settings that it changes."""


class Kill(NamedTuple):
    """A moment at which a process ends itself by SIGKILL, as nobody can hinder."""

    moment: str
    delay_s: float
    """Time from the first step on (any time), or after the save began (checkpoint)."""
    count: int
    """How many times the moment comes before it kills, itself included."""


# ------------------------------------------------------------------------------------------------ the killed process


def die(*_: Any) -> None:
    """End this process as the out-of-memory killer, or a preempted machine, does."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def arm(kill: Kill) -> None:
    """Let this process end at that moment."""
    left = [kill.count]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def before(owner: Any, name: str, act: Callable[..., None]) -> None:
        original = vars(owner)[name]

        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if due():
                act(self, *args)
            return original(self, *args, **kwargs)

        setattr(owner, name, changed)

    if kill.moment == "any time":
        before(trainer.PhaseSteps, "of", lambda *_: threading.Timer(kill.delay_s, die).start())
    elif kill.moment == "checkpoint":
        before(Checkpoints, "save", lambda *_: threading.Timer(kill.delay_s, die).start())
    elif kill.moment == "phase change":
        before(trainer.Trainer, "_next_phase", die)
    elif kill.moment == "evaluation":
        before(log.RunLog, "write_evaluation", die)
    else:
        before(log.RunLog, "write", half_a_line)


def half_a_line(self: log.RunLog, line: Mapping[str, Any]) -> None:
    """Write the first half of a line of metrics.jsonl, and end."""
    text = json.dumps({key: log.strict_json(value) for key, value in line.items()}).encode()
    self._file.write(text[: len(text) // 2])
    self._file.flush()
    die()


def child(file: Path, run: Path, flags: list[str], kill: Kill | None) -> int:
    """Fork a process that trains; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    with (run.parent / f"{run.name}.out").open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if kill is not None:
        arm(kill)
    assert train_command  # imported before the fork
    code = 1
    try:
        code = cli.main(["train", str(file), "--run-dir", str(run), *flags])
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(file: Path, run: Path, processes: int, kill: Kill | None, victim: int = 0) -> list[int]:
    """Train until the end or until a kill; returns the exit codes, -9 for SIGKILL."""
    run.parent.mkdir(parents=True, exist_ok=True)
    flags = [[]] if processes == 1 else meeting(processes)
    pids = [child(file, run, each, kill if at == victim else None) for at, each in enumerate(flags)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def meeting(processes: int) -> list[list[str]]:
    """The flags by which processes on this machine find one another."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    common = ["--coordinator", place, "--processes", str(processes), "--heartbeat-s", "60"]
    return [[*common, "--process", str(i)] for i in range(processes)]


# ------------------------------------------------------------------------------------------------ the runs


def configuration(case: str, folder: Path, steps: Sequence[int]) -> Path:
    """Write the configuration of a case: the demo's, with short phases and few prompts."""
    config = yaml.safe_load(DEMO_CONFIG.read_text())
    for phase, count in zip(config["phases"], steps, strict=True):
        group = phase["responses_per_prompt"]
        phase |= {"prompts_per_step": 8 if group > 1 else 16, "stop": {"steps": count}, "guard": {}}
        phase["responses_per_prompt"] = min(group, 4)
    config["evaluation"] |= {"samples": 2, "rows_at_once": 16, "every_steps": 2}
    config["evaluation"]["data"]["first"] = 8
    config |= {"checkpoint_every_steps": 1, "samples": {"every_steps": 1, "groups": 2}, "keep_checkpoints": 3}
    config |= {"cache_dir": str(folder / "cache"), "tracker": {"tensorboard": True}}
    if case == "two processes":
        config["mesh"] = {"fsdp": 2}
    file = folder / f"{case.replace(' ', '_')}.yaml"
    file.write_text(yaml.safe_dump(config))
    changed = load_config(file, list(CASES[case]))  # refuses what makes no sense before anything runs
    file.write_text(strict.dump(strict.plain(changed)))
    return file


def next_kill(number: int, dice: random.Random, step_s: float) -> Kill:
    """The kill of that number: each kind of moment in turn, so that few kills meet them all; the rest is drawn."""
    moment = MOMENTS[number % len(MOMENTS)]
    delay_s = dice.uniform(0.0, 4 * step_s) if moment == "any time" else dice.uniform(0.0, 0.05)
    count = {"checkpoint": 3, "half a line": 2, "evaluation": 2}.get(moment, 1)
    return Kill(moment, delay_s, dice.randint(1, count))


class Killed(NamedTuple):
    """What became of the runs that were killed."""

    kills: collections.Counter[str]
    starts: int
    runs: list[Path]


def torture(case: str, file: Path, folder: Path, kills: int, dice: random.Random, step_s: float) -> Killed:
    """Kill runs of a case so many times, and let each end; a new run begins where one ended too early."""
    processes = 2 if case == "two processes" else 1
    died: collections.Counter[str] = collections.Counter()
    starts, runs, number = 0, [], 0
    while died.total() < kills:
        run = folder / f"{file.stem}-killed-{len(runs)}"
        runs.append(run)
        done = False
        while not done:
            kill = next_kill(number, dice, step_s) if died.total() < kills else None
            number += 1
            alone_writes = kill is not None and kill.moment in ("evaluation", "half a line")
            codes = start(file, run, processes, kill, victim=0 if alone_writes else dice.randrange(processes))
            starts += 1
            if -signal.SIGKILL in codes:
                assert kill is not None
                died[kill.moment] += 1
                check_others(codes, run)
            elif codes == [0] * processes:
                done = True
            else:
                raise SystemExit(f"{case}: exit codes {codes} after {kill}: see {run}.out\n{tail(run)}")
            if starts > MAX_STARTS_PER_KILL * kills + 10:
                raise SystemExit(f"{case}: {starts} starts and {died.total()} kills: the run makes no progress")
    return Killed(died, starts, runs)


def check_others(codes: list[int], run: Path) -> None:
    """A process whose neighbour was killed ends with 5, and says so."""
    others = [code for code in codes if code != -signal.SIGKILL]
    if any(code != 5 for code in others):
        raise SystemExit(f"exit codes {codes}: expected 5 of the process that was left; see {run}.out\n{tail(run)}")


def tail(run: Path) -> str:
    """The last lines that a run printed."""
    return (run.parent / f"{run.name}.out").read_text(errors="replace")[-3000:]


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns, as JSON, worked out in a fork: this process never starts JAX's devices."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "w") as out:
                json.dump(function(), out)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text)


class Row(NamedTuple):
    """A line of the table."""

    case: str
    kills: dict[str, int]
    starts: int
    runs: int
    compared_arrays: int
    differences: list[str]
    seconds: float


def try_case(case: str, folder: Path, *, steps: Sequence[int], kills: int, seed: int) -> Row:
    """One case from its configuration to its line of the table."""
    began = time.monotonic()
    file, alone = configuration(case, folder, steps), folder / f"{case.replace(' ', '_')}-alone"
    codes = start(file, alone, 2 if case == "two processes" else 1, None)
    if any(codes):
        raise SystemExit(f"{case}: the run that was left alone ended with {codes}\n{tail(alone)}")
    step_s = float(np.median([line["time/step_s"] for line in log.read_metrics(alone)]))
    dice = random.Random(f"{seed} {case}")
    killed = torture(case, file, folder, kills, dice, step_s)

    def compare() -> list[Any]:
        expected = arrays(file, alone), records(alone)
        odd = [each for run in killed.runs for each in differences(expected, (arrays(file, run), records(run)))]
        return [len(expected[0]), odd]

    count, odd = in_child(compare)
    seconds = time.monotonic() - began
    return Row(case, dict(killed.kills), killed.starts, len(killed.runs), count, odd, seconds)


def before(file: Path | None) -> dict[str, Row]:
    """The lines of the table that a file holds already: cases may be tried one after the other."""
    return {each["case"]: Row(**each) for each in json.loads(file.read_text())} if file and file.is_file() else {}


def table(rows: list[Row]) -> str:
    """The table as Markdown."""
    lines = ["| case | " + " | ".join(MOMENTS) + " | kills | starts | runs | differences |"]
    lines.append("|---" * (len(MOMENTS) + 5) + "|")
    for row in rows:
        counts = [str(row.kills.get(moment, 0)) for moment in MOMENTS]
        total, odd = sum(row.kills.values()), len(row.differences)
        lines.append(f"| {row.case} | {' | '.join(counts)} | {total} | {row.starts} | {row.runs} | {odd} |")
    return "\n".join(lines)


def page(rows: list[Row], command: str) -> str:
    """A page with the table, how it was made, and on what."""
    versions = f"jax {jax.__version__}, Python {sys.version.split()[0]}, CPU"
    return (
        f"# Runs that were killed\n\n{time.strftime('%Y-%m-%d', time.gmtime())}, {versions}. Written by\n\n"
        f"    {command}\n\nwhich says what is killed and what is compared. A column counts SIGKILLs at that moment;\n"
        "`starts` are all starts of the runs of a case; `differences` are entries of parameters, optimizer state,\n"
        "progress, metrics, kept responses and evaluations that are not bit for bit those of the run left alone.\n\n"
        f"{table(rows)}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Try the cases, show and write the table; 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all ({', '.join(CASES)})")
    parser.add_argument("--kills", type=int, default=20, help="of each case; default 20")
    parser.add_argument("--steps", type=int, nargs=3, default=(5, 3, 5), help="of each phase; default 5 3 5")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the table as JSON, beside other cases there")
    parser.add_argument("--markdown", type=Path, help="also write it as a page")
    args = parser.parse_args(arguments)
    for unknown in [case for case in args.cases if case not in CASES]:
        parser.error(f"expected a case among {', '.join(CASES)}, got {unknown!r}")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="crash_test-"))
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python scripts/crash_test.py", *(sys.argv[1:] if arguments is None else arguments)])
    rows, asked = before(args.json), args.cases or list(CASES)
    for case in asked:
        row = rows[case] = try_case(case, folder, steps=args.steps, kills=args.kills, seed=args.seed)
        print(f"{case}: {sum(row.kills.values())} kills, {row.starts} starts, {row.seconds:.0f} s", flush=True)
        for odd in row.differences[:20]:
            print(f"  differs: {odd}", flush=True)
        if args.json:
            args.json.write_text(json.dumps([each._asdict() for each in rows.values()], indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text(page(list(rows.values()), command))
    print(table(list(rows.values())))
    odd = any(rows[case].differences for case in asked)
    if args.folder is None and not odd:
        shutil.rmtree(folder)
    return int(odd)


if __name__ == "__main__":
    sys.exit(main())
