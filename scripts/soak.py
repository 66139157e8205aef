"""Watch a long run's memory, files, threads, step time and logs: `python scripts/soak.py [--steps 600] [--json FILE]`.

The demo's three phases with few prompts, evaluated and saved all along. After each step it is noted what the process
holds and what the run directory weighs. What counts is the growth after the first third of the steps, when all
programs are compiled and all buffers made: the slope of a line through the rest, per 1,000 steps. Steps of different
phases cost differently, so step times are compared within each phase: the median of its second third with that of its
last third, in CPU seconds of the whole process, which do not depend on who else uses the machine.

What was seen is written again every minute, so a soak that is ended early leaves what it reached. The exit code is 1
where memory grows by `MOST_BYTES` or more in 1,000 steps, where files or threads grow, where a file that is no log
outgrows `LARGEST_BYTES`, or where a step costs `SLOWER` times as much at a phase's end as in its middle.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import yaml

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.commands.train import run_config
from tsopsd_jax.config import load_config
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.rundir import log

MOST_BYTES = 64 << 20
"""Growth of memory in 1,000 steps that is no leak: allocators keep what they may need again."""
LARGEST_BYTES = 4 << 20
"""Size that a file which is replaced, not appended to, may have."""
SLOWER = 1.5
"""Ratio of a step's cost at the end of a phase to that in its middle from which on steps are getting slower."""
HELD = ("resident_bytes", "files", "threads", "arrays")
"""What must not grow."""
NOTE_S = 60.0
"""Seconds between two writings of what was seen."""
Seen = list[dict[str, Any]]


def configuration(folder: Path, args: argparse.Namespace) -> Path:
    """Write the demo's configuration with phases of so many steps together."""
    config = yaml.safe_load(DEMO_CONFIG.read_text())
    many = len(config["phases"])
    for at, phase in enumerate(config["phases"], start=1):
        group, steps = phase["responses_per_prompt"], args.steps * at // many - args.steps * (at - 1) // many
        phase |= {"prompts_per_step": args.prompts * (1 if group > 1 else 2), "guard": {}}
        phase |= {"stop": {"steps": steps}, "responses_per_prompt": min(group, args.responses)}
    config["evaluation"] |= {"samples": 2, "rows_at_once": 16, "every_steps": args.evaluate_every}
    config["evaluation"]["data"]["first"] = 8
    config |= {"checkpoint_every_steps": args.save_every, "samples": {"every_steps": 5}}
    config |= {"cache_dir": str(folder / "cache"), "page_every_s": 60}
    file = folder / "soak.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def usage() -> dict[str, int]:
    """What this process holds now."""
    own = Path("/proc/self")
    return {
        "resident_bytes": int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list((own / "fd").iterdir())),
        "threads": len(list((own / "task").iterdir())),
        "arrays": len(jax.live_arrays()),
    }


def weight(run_dir: Path) -> dict[str, int]:
    """Bytes of the files of a run directory by their names, of the files of a folder together, and their number."""
    found: dict[str, int] = {"number of files": 0}
    for file in run_dir.rglob("*"):
        name = file.relative_to(run_dir).parts[0]
        with contextlib.suppress(FileNotFoundError):  # an old checkpoint that was just removed
            if file.is_file():
                found[name] = found.get(name, 0) + file.stat().st_size
                found["number of files"] += 1
    return found


@contextlib.contextmanager
def watching(note: Callable[[int, str], None]) -> Iterator[None]:
    """Call `note(step, phase)` after each line of the log."""
    write = log.RunLog.write

    def noting(self: log.RunLog, line: Any) -> None:
        write(self, line)
        note(line["step"], line["phase"])

    log.RunLog.write = noting
    try:
        yield
    finally:
        log.RunLog.write = write


def growth(seen: Seen) -> dict[str, float]:
    """The slope of each quantity per 1,000 steps, over the last two thirds of the steps."""
    late = seen[len(seen) // 3 :]
    steps = np.array([each["step"] for each in late], float)
    return {name: 1000 * float(np.polyfit(steps, [each[name] for each in late], 1)[0]) for name in HELD}


def step_cost(seen: Seen) -> dict[str, dict[str, float]]:
    """Phase -> the median step in its second and in its last third: CPU seconds, and seconds of the clock."""
    found = {}
    for phase in dict.fromkeys(each["phase"] for each in seen):
        steps = [each for each in seen if each["phase"] == phase]
        third = len(steps) // 3
        parts = {"second third": steps[third : 2 * third], "last third": steps[2 * third :]}
        found[phase] = {
            f"{unit}, {name}": float(np.median([each[unit] for each in part]))
            for unit in ("cpu_s", "clock_s")
            for name, part in parts.items()
            if part
        }
    return found


def facts_of(seen: Seen, weights: dict[int, dict[str, int]], args: argparse.Namespace, seconds: float) -> dict:
    """What was seen, as plain data."""
    last = seen[-1]["step"]
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": f"python scripts/soak.py {' '.join(sys.argv[1:])}".strip(),
        "steps": last,
        "steps_asked": args.steps,
        "seconds": round(seconds),
        "growth_per_1000_steps": growth(seen) if last > 10 else {},
        "median_step": step_cost(seen),
        "run_directory_bytes": weights,
        "curve": seen[:: max(1, len(seen) // 100)],
    }


def complaints(facts: dict) -> list[str]:
    """What grew that must not, a line each."""
    rises, found = facts["growth_per_1000_steps"], []
    if rises["resident_bytes"] > MOST_BYTES:
        found.append(f"memory grows by {rises['resident_bytes'] / 2**20:.0f} MiB in 1,000 steps")
    found += [f"{name} grow by {rises[name]:.1f} in 1,000 steps" for name in ("files", "threads") if rises[name] > 1]
    logs = {"metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "events", "checkpoints", "number of files"}
    final = list(facts["run_directory_bytes"].values())[-1]
    found += [f"{name} has {size:,} bytes" for name, size in final.items() if name not in logs and size > LARGEST_BYTES]
    for phase, cost in facts["median_step"].items():
        before, after = cost.get("cpu_s, second third", 0.0), cost["cpu_s, last third"]
        if before and after > SLOWER * before:
            found.append(f"a step of {phase} costs {after:.3f} s at its end, {before:.3f} s before")
    return found


def draw(facts: dict, file: Path) -> None:
    """Draw memory, files, threads and step time over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [each["step"] for each in facts["curve"]]
    shown = (("resident_bytes", "memory, MiB", 2**20), ("files", "open files", 1), ("threads", "threads", 1))
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    for axis, (name, title, unit) in zip(axes.flat, (*shown, ("cpu_s", "CPU seconds of a step", 1)), strict=True):
        values = [each[name] / unit for each in facts["curve"]]
        axis.plot(steps, values, ".", markersize=3)
        axis.set(title=title, ylim=(0, 1.1 * float(np.quantile(values, 0.97))))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def soak(args: argparse.Namespace) -> dict:
    """Run the soak; what was seen, up to where it came."""
    began = time.monotonic()
    seen: Seen = []
    weights: dict[int, dict[str, int]] = {}
    clock = {"cpu_s": time.process_time(), "clock_s": began, "noted": began}

    def keep() -> dict:
        facts = facts_of(seen, weights, args, time.monotonic() - began)
        if args.json:
            args.json.write_text(json.dumps(facts, indent=1) + "\n")
        return facts

    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        run_dir = Path(place) / "run"

        def note(step: int, phase: str) -> None:
            cpu_s, clock_s = time.process_time(), time.monotonic()
            took = {"cpu_s": round(cpu_s - clock["cpu_s"], 4), "clock_s": round(clock_s - clock["clock_s"], 4)}
            seen.append({"step": step, "phase": phase, **usage(), **took})
            if step == 10 or step % max(1, args.steps // 10) == 0:
                weights[step] = weight(run_dir)
            if clock_s - clock["noted"] > NOTE_S:
                clock["noted"] = clock_s
                keep()
            clock.update(cpu_s=time.process_time(), clock_s=time.monotonic())  # without what this took

        with watching(note):
            code = run_config(load_config(configuration(Path(place), args), []), run_dir)
        weights[seen[-1]["step"]] = weight(run_dir)
    if code not in (exit_codes.DONE, exit_codes.INTERRUPTED):
        raise SystemExit(f"the run ended with {code}")
    return keep()


def main(arguments: list[str] | None = None) -> int:
    """Run, and say what grew; 0 if nothing did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the run, in three phases; default 600")
    parser.add_argument("--prompts", type=int, default=8, help="a step; the reheater takes twice as many; default 8")
    parser.add_argument("--responses", type=int, default=4, help="to a prompt; default 4")
    parser.add_argument("--evaluate-every", type=int, default=25, metavar="STEPS", help="default 25")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS", help="default 10")
    parser.add_argument("--json", type=Path, help="write what was seen there")
    parser.add_argument("--png", type=Path, help="draw it there")
    args = parser.parse_args(arguments)
    facts = soak(args)
    found = complaints(facts)
    print(json.dumps({name: round(value, 3) for name, value in facts["growth_per_1000_steps"].items()}))
    print(json.dumps(facts["median_step"]))
    print("\n".join(found) or "nothing grows")
    if args.png:
        draw(facts, args.png)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
