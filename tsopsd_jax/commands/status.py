"""`tsopsd status`: how a run stands, from its run directory alone."""

import argparse
import collections
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.config import claim
from tsopsd_jax.display.foreign_text import one_line
from tsopsd_jax.display.numbers import duration, finite
from tsopsd_jax.metric_names import REWARD_FAILED, SKIPPED
from tsopsd_jax.rundir import files, object_store, status
from tsopsd_jax.rundir.lock import is_held
from tsopsd_jax.rundir.log import METRICS_FILE, strict_json
from tsopsd_jax.train.cycle import without_round

KILLED = "killed"
"""State of a run that says that it runs, on this machine, where no process holds its directory."""
RATE_STEPS = 20
"""Steps whose times make the rate."""
SILENT_S = 1800.0
"""Silence of a running process after which that is a warning."""
AHEAD_S = 120.0
"""Time by which a file may have been written later than now before a clock is in doubt."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print how the run stands."""
    with object_store.opened(args.run_dir) as folder:
        facts = facts_of(folder, now=time.time())
    if args.json:
        print(json.dumps(strict_json(facts), indent=1))
    else:
        print("\n".join(lines_of(facts)))
    return exit_codes.DONE


def facts_of(run_dir: Path, *, now: float) -> dict[str, Any]:
    """Describe a run by what stands in its directory.

    Args:
        run_dir: a local folder.
        now: seconds since 1970.

    Returns:
        Plain data: state (running, killed, ended, stopped, guard, failed), reason, phase, step, seconds_per_step,
        time_left_s (of phases that are limited by steps: at most this long), last_checkpoint_step, silent_s, stalls
        (texts with stacks), phases (how each ended), warnings. None where a thing is not known.

    Raises:
        ValueError: no run is there.
    """
    said = status.read_status(run_dir)
    if not said and not (run_dir / METRICS_FILE).is_file():
        raise ValueError(f"{run_dir}: expected a run directory, got no {status.STATUS_FILE} and no {METRICS_FILE}")
    # The last lines alone: a long log does not fit into memory.
    lines = list(collections.deque(files.objects(run_dir / METRICS_FILE), maxlen=RATE_STEPS + 1))
    last = lines[-1] if lines else {}
    state = said.get("state")
    if state == status.RUNNING and is_held(run_dir / claim.LOCK_FILE) is False:
        state = KILLED
    heard, pace_s = _heard(run_dir, said, now), _pace_s(lines)
    try:
        settings, warnings = claim.settings_of(run_dir) or {}, list[str]()
    except ValueError as error:  # of what a run is doing it says least
        settings, warnings = {}, [str(error)]
    if heard > now + AHEAD_S:
        warnings.append(f"files were written {duration(heard - now)} after now: a clock was set back")
    facts = {
        "state": state,
        "reason": said.get("reason"),
        "phase": last.get("phase", said.get("phase")),
        "step": last.get("step", said.get("step")),
        "seconds_per_step": pace_s,
        "time_left_s": _time_left_s(settings, last, pace_s),
        "last_checkpoint_step": max(_checkpoints(run_dir), default=None),
        "silent_s": max(0.0, now - heard),
        "stalls": [
            file.read_text(errors="replace")[:20_000] for file in sorted(run_dir.glob(status.STALL_FILE.format("*")))
        ],
        "phases": said.get("phases", []),
    }
    if saved := said.get("saved_step") if facts["last_checkpoint_step"] is None else None:
        warnings.append(f"the checkpoint of step {saved} is gone, and no other is there")
    return facts | {"warnings": [*_warnings(facts, lines, run_dir), *warnings]}


def _heard(run_dir: Path, said: Mapping[str, Any], now: float) -> float:
    """When the run last wrote: by its files, or of a run on a store, whose files were copied just now, by its word."""
    if object_store.address(run_dir) is not None and said.get("time") is not None:
        return said["time"]
    written = (run_dir / name for name in (METRICS_FILE, status.STATUS_FILE))
    return max((file.stat().st_mtime for file in written if file.is_file()), default=now)


def _saves(run_dir: Path) -> list[str]:
    """Names of what stands among the checkpoints."""
    place = object_store.checkpoints_address(run_dir)
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []


def _checkpoints(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints: Orbax gives a folder its number when all of it is written."""
    return [int(name) for name in _saves(run_dir) if re.fullmatch("[0-9]{1,16}", name)]


def _pace_s(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that a step took, evaluations and saves included: a mean over the last ones of a process's life."""
    times = [t for line in lines[-RATE_STEPS - 1 :] if (t := finite(line.get("time_s"))) is not None]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    return (times[-1] - times[0]) / (len(times) - 1)


def _time_left_s(settings: Mapping[str, Any], last: Mapping[str, Any], pace_s: float | None) -> float | None:
    """The time until all phases have taken as many steps as they may, at this pace; None: a phase has no such limit."""
    phases = settings.get("phases")
    phases = [each for each in phases if isinstance(each, dict)] if isinstance(phases, list) else []
    names = [phase.get("name") for phase in phases]
    here = without_round(str(last.get("phase")))
    if pace_s is None or here not in names or settings.get("cycle"):
        return None
    stops = [phase.get("stop") for phase in phases[names.index(here) :]]
    asked = [stop.get("steps") if isinstance(stop, dict) else None for stop in stops]
    limits, taken = [limit for limit in asked if isinstance(limit, int)], finite(last.get("phase_step"))
    if taken is None or len(limits) < len(asked):
        return None
    return max(0.0, sum(limits) - taken) * pace_s


def _warnings(facts: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], run_dir: Path) -> list[str]:
    """What a person should look at."""
    found = []
    recent = lines[-RATE_STEPS:]
    if facts["state"] == KILLED:
        found.append("no process holds the directory: it was killed; the same command goes on from the last checkpoint")
    if facts["state"] == status.RUNNING and facts["silent_s"] > SILENT_S:
        found.append(f"nothing was written for {duration(facts['silent_s'])}")
    for stall in facts["stalls"]:
        found.append(f"a process makes no progress: {stall.splitlines()[0] if stall else ''}")
    if skipped := sum(1 for line in recent if finite(line.get(SKIPPED))):
        found.append(f"{skipped} of the last {len(recent)} steps had updates that were not finite and were skipped")
    if failed := sum(1 for line in recent if finite(line.get(REWARD_FAILED))):
        found.append(f"rewards failed in {failed} of the last {len(recent)} steps")
    if damaged := [name for name in _saves(run_dir) if ".damaged" in name]:
        found.append(f"damaged checkpoints were set aside: {', '.join(damaged)}")
    return found


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """The facts of a run as lines for a person; texts of the run are escaped."""
    reason = f": {facts['reason']}" if facts["reason"] else ""
    pace, left = facts["seconds_per_step"], facts["time_left_s"]
    rows = [
        ("state", f"{facts['state'] or 'unknown'}{reason}"),
        ("phase", facts["phase"] or "-"),
        ("step", "-" if facts["step"] is None else str(facts["step"])),
        ("rate", "-" if pace is None else f"{pace:.3g} s a step"),
        ("time left", "not known" if left is None else f"at most {duration(left)}"),
        (
            "last checkpoint",
            "none" if facts["last_checkpoint_step"] is None else f"step {facts['last_checkpoint_step']}",
        ),
        ("last written", f"{duration(facts['silent_s'])} ago"),
        *(("ended", f"{end.get('phase')} at step {end.get('step')}: {end.get('reason')}") for end in facts["phases"]),
        *(("warning", text) for text in facts["warnings"]),
    ]
    lines = [f"{name:16} {one_line(text)}" for name, text in rows]
    for stall in facts["stalls"]:
        lines += ["", *(one_line(line) for line in stall.splitlines())]
    return lines
