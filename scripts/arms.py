"""All arms of the comparison on the demo's task: `python scripts/arms.py [ARM ...] [--minutes 2] [--steps N] [--out
runs/arms]`.

Each `configs/arms/ARM.yaml` is run as `tsopsd train` would run it, for so many minutes of processor time (a busy
machine takes longer and gets as far), or so many steps of each phase, and stopped as a signal stops it. Then a table:
steps, last phase, entropy and accuracy on the rollouts (means of the last steps), avg@8 and pass@8 of the last
evaluation. The same command again goes on where it stopped. `table.md` holds the table.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tsopsd_jax.commands.train import open_trainer
from tsopsd_jax.config import load_config
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.metric_names import ACCURACY, ENTROPY
from tsopsd_jax.rundir.log import read_evaluations, read_metrics
from tsopsd_jax.train.phase import GuardError
from tsopsd_jax.train.signals import Interrupted

ARMS = Path(__file__).resolve().parents[1] / "configs" / "arms"
POLL_S = 0.2
LAST_STEPS = 5
"""Steps over which the table's entropy and accuracy are means: one batch is noise."""


def overrides(config_file: Path, steps: int | None, prompts: int | None = None) -> list[str]:
    """Let every phase of a file take `steps` steps and no more, whatever the entropy that it starts with, on `prompts`
    prompts each; None: no change."""
    settings = [] if steps is None else [f"stop={{steps: {steps}}}", "guard.max_start_entropy_nats=null"]
    settings += [] if prompts is None else [f"prompts_per_step={prompts}"]
    return [f"phases.{phase.name}.{each}" for phase in load_config(config_file, []).phases for each in settings]


@contextlib.contextmanager
def limited(minutes: float | None) -> Iterator[threading.Event]:
    """Ask this process to stop, by a signal, after so many minutes of processor time in the block, and set the event;
    None: never."""
    began, over, left = time.process_time(), threading.Event(), threading.Event()

    def watch(seconds: float) -> None:
        while time.process_time() - began < seconds:
            if left.wait(POLL_S):
                return
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    if minutes is not None:
        threading.Thread(target=watch, args=(60 * minutes,), daemon=True).start()
    try:
        yield over
    finally:
        left.set()


def run_arm(name: str, run_dir: Path, *, minutes: float | None, settings: list[str]) -> str:
    """Run an arm until its schedule is done or the time is over; say how it ended.

    Raises:
        Interrupted: a signal of somebody else.
    """
    config = load_config(ARMS / f"{name}.yaml", settings)
    try:
        with open_trainer(config, run_dir, LiveTable(stream=sys.stderr)) as trainer, limited(minutes) as over:
            try:
                trainer.run()
            except Interrupted:
                if not over.is_set():
                    raise
                return "time is over"
    except GuardError as reason:
        return f"guard: {reason}"
    return "done"


def row(name: str, run_dir: Path, ended: str) -> list[str]:
    """The line of the table of one arm."""
    lines, evaluations = read_metrics(run_dir), read_evaluations(run_dir)
    cells = [name, str(lines[-1]["step"] if lines else 0), str(lines[-1]["phase"] if lines else "-")]
    for key, form in ((ENTROPY, "{:.3f}"), (ACCURACY, "{:.3f}")):
        values = [line[key] for line in lines[-LAST_STEPS:] if line.get(key) is not None]
        cells.append(form.format(sum(values) / len(values)) if values else "-")
    last = evaluations[-1] if evaluations else None
    scores = "-" if last is None else f"{100 * last['avg_at_k']:.1f} / {100 * last['pass_at_k']:.1f}"
    return [*cells, scores, str(last["stage"]) if last is not None else "-", ended.split(":")[0]]


def main(arguments: list[str] | None = None) -> None:
    """Run the arms one after the other and print their table."""
    known = sorted(path.stem for path in ARMS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"default: all ({', '.join(known)})")
    parser.add_argument(
        "--minutes", type=float, help="of processor time for each arm; default: 2, or no limit with --steps"
    )
    parser.add_argument("--steps", type=int, help="steps of each phase, in the place of its stop rules")
    parser.add_argument("--prompts", type=int, help="prompts of each step of each phase, in the place of its own")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", help="override one setting of all")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    args = parser.parse_args(arguments)
    if unknown := set(args.arms) - set(known):
        parser.error(f"expected arms among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    minutes = 2.0 if args.minutes is None and args.steps is None else args.minutes
    titles = ["arm", "steps", "phase", "entropy, nats", "accuracy", "avg@k / pass@k, %", "evaluated", "ended"]
    table = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in args.arms or known:
        settings = [*overrides(ARMS / f"{name}.yaml", args.steps, args.prompts), *args.set]
        try:
            ended = run_arm(name, args.out / name, minutes=minutes, settings=settings)
        except Interrupted as reason:
            sys.exit(f"{reason}; the same command goes on")
        table.append(f"| {' | '.join(row(name, args.out / name, ended))} |")
        (args.out / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
