"""The status of a run and the machines that it ran on, in `status.json`: one small file, written aside and renamed.

It is right after a resume too: ends of phases and counts of updates go back to the step that the run resumes with.
"""

import functools
import importlib.metadata
import json
import platform
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import tsopsd_jax
from tsopsd_jax.metric_names import HELD, SKIPPED
from tsopsd_jax.rundir import files

STATUS_FILE = "status.json"
STALL_FILE = "stall-{}.txt"
"""What a process that makes no progress waits for, with its stacks; the number is the process's."""
RUNNING, ENDED, STOPPED, GUARD, FAILED = "running", "ended", "stopped", "guard", "failed"
"""States: a run that was killed still reads `running`, since nobody was left to say so."""
MOST_STARTS = 100
"""Starts of a run that are kept, the first and the latest: one that ends at once may be started without end."""
LONGEST_REASON = 4_000
"""Characters of a reason that are kept: it may quote what a model wrote."""
_YEAR_9999 = 253_370_764_800
"""The latest time that is taken for one, in seconds since 1970."""
PACKAGES = ("tsopsd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


class Status:
    """The status of a run that begins or resumes after `last_step`.

    Args:
        run_dir: the run directory.
        last_step: what an earlier process wrote about later steps is dropped.
        lines: the metrics of the steps up to it.
    """

    def __init__(self, run_dir: Path, *, last_step: int, lines: Iterable[Mapping[str, Any]]):
        self._file = run_dir / STATUS_FILE
        before = read_status(run_dir)
        starts = before.get("starts", [])
        self._said = {
            "state": RUNNING,
            "reason": None,
            "phase": None,
            "step": last_step,
            "phases": [end for end in before.get("phases", []) if end["step"] <= last_step],
            "skipped_updates": 0,
            "held_updates": 0,
            "saved_step": before.get("saved_step"),
            "starts": [
                *starts[:1],
                *starts[1:][2 - MOST_STARTS :],
                {"step": last_step, "time": time.time(), **machine()},
            ],
        }
        for line in lines:
            self.count(line)
        self.write()

    def count(self, line: Mapping[str, Any]) -> None:
        """Count a step's metrics; they are in the file after the next `write`."""
        self._said["step"], self._said["phase"] = line["step"], line.get("phase")
        skipped = line.get(SKIPPED)
        self._said["skipped_updates"] += int(skipped) if isinstance(skipped, int | float) else 0
        self._said["held_updates"] += bool(line.get(HELD))

    def phase_ended(self, phase: str, step: int, reason: str) -> None:
        """Write why a phase ended after `step`."""
        self._said["phases"].append({"phase": phase, "step": step, "reason": reason[:LONGEST_REASON]})
        self.write()

    def saved(self, step: int | None) -> None:
        """Write the step of the newest whole checkpoint, if there is another one than before."""
        if step is not None and step != self._said["saved_step"]:
            self._said["saved_step"] = step
            self.write()

    def state(self, state: str, reason: str | None = None) -> None:
        """Write that the run is in `state` now, and why."""
        self._said |= {"state": state, "reason": reason and reason[:LONGEST_REASON]}
        self.write()

    def write(self) -> None:
        """Replace the file by what is known."""
        self._said["time"] = time.time()
        files.replace(self._file, [json.dumps(self._said, indent=1).encode(), b"\n"])


def read_status(run_dir: Path) -> dict[str, Any]:
    """Read `status.json`; an empty dict if it is absent, or not as `Status` writes it."""
    try:
        found = json.loads((run_dir / STATUS_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and _well_formed(found) else {}


def _well_formed(found: Mapping[str, Any]) -> bool:
    """Whether the parts that are read of a status have the types that `Status` gives them; any may be absent."""
    phases, starts = found.get("phases", []), found.get("starts", [])
    if not all(isinstance(each, list) and all(isinstance(item, dict) for item in each) for each in (phases, starts)):
        return False
    texts = [found.get(name) for name in ("state", "reason", "phase")]
    steps = [
        found.get("step", 0),
        found.get("saved_step") or 0,
        *(end.get("step") for end in phases),
        *(start.get("step", 0) for start in starts),
    ]
    times = [found.get("time"), *(start.get("time") for start in starts)]
    return (
        all(text is None or isinstance(text, str) for text in texts)
        and all(type(step) is int and 0 <= step < 2**53 for step in steps)
        and all(t is None or (isinstance(t, int | float) and 0 <= t < _YEAR_9999) for t in times)
        and all(isinstance(start.get("versions", {}), dict) for start in starts)
    )


@functools.cache
def machine() -> dict[str, Any]:
    """Describe what this process runs on: host, devices, versions, and the package's commit where it lies in a git
    repository."""
    device = jax.devices()[0]
    return {
        "host": socket.gethostname(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package's sources, `-dirty` where they were changed; None where git does not know them."""
    folder = Path(tsopsd_jax.__file__).parent
    try:
        # An environment may lie inside of somebody else's repository: the package must be one of its files.
        subprocess.run(["git", "-C", folder, "ls-files", "--error-unmatch", "__init__.py"], **_QUIET)
        found = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"], **_QUIET
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.decode().strip()


_QUIET: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 10, "stdin": subprocess.DEVNULL}
