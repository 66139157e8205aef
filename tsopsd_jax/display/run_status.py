"""A run's status as parts of its page: how it stands and why, how each phase ended, what it ran on."""

import time
from collections.abc import Mapping
from typing import Any

from tsopsd_jax.display.html_parts import details, escape, table
from tsopsd_jax.display.numbers import finite
from tsopsd_jax.rundir.status import ENDED, FAILED, GUARD, RUNNING, STOPPED

WORDS = {
    RUNNING: "Running, or killed: last heard of after step {step}, {time}",
    ENDED: "Ended: the schedule is done",
    STOPPED: "Stopped after step {step}; the same command goes on",
    GUARD: "Stopped by a guard after step {step}",
    FAILED: "Failed after step {step}",
}
GOOD, BAD = (RUNNING, ENDED, STOPPED), (GUARD, FAILED)
MAX_STARTS = 50


def caught_up(status: Mapping[str, Any], *, step: int, phase: str, time_s: float) -> Mapping[str, Any]:
    """Bring the status of a run that goes on up to the step that its log ends with; it is written less often.

    Args:
        status: of the run.
        step, phase: of the log's last line.
        time_s: when that was written, since 1970.
    """
    if status.get("state") != RUNNING or step <= (finite(status.get("step")) or 0):
        return status
    return {**status, "step": step, "phase": phase, "time": time_s}


def banner(status: Mapping[str, Any], *, skipped: int, updates: int) -> str:
    """Say how the run stands, and warn where updates were skipped."""
    state, lines = status.get("state"), []
    if state in WORDS:
        words = WORDS[state].format(step=status.get("step"), time=_date(status.get("time")))
        reason = f": {status['reason']}" if status.get("reason") else ""
        lines.append(f'<p class="status{" bad" if state in BAD else ""}">{escape(words + reason)}</p>')
    if skipped:
        which = "Every update was" if skipped == updates else f"{skipped:,} of {updates:,} updates were"
        text = f"{which} skipped, because the gradient was not finite: the policy did not change there."
        lines.append(f'<p class="status{" bad" if 10 * skipped > updates else ""}">{text}</p>')
    return "\n".join(lines)


def end_of_phase(status: Mapping[str, Any], phase: str, step: int) -> tuple[str, bool]:
    """Say how the stretch of `phase` whose last step is `step` ended, as HTML; and tell whether it reached its end.

    A run without a status says nothing, and counts as having reached it.
    """
    if not status:
        return "", True
    for end in status.get("phases", []):
        if (end.get("phase"), end.get("step")) == (phase, step):
            return f'<div class="muted">{escape(end.get("reason"))}</div>', True
    if (status.get("phase"), status.get("step")) != (phase, step):
        return "", False
    state = status.get("state")
    kind = "bad" if state in BAD else "muted"
    return f'<div class="{kind}">{escape(state)}, not at its end</div>', False


def machines(status: Mapping[str, Any]) -> str:
    """List the starts of the run: when, on which machine, with which versions."""
    starts = status.get("starts", [])
    rows = [
        [
            _date(each.get("time")),
            escape(each.get("step")),
            escape(each.get("host")),
            escape(f"{each.get('devices')}, {_counted(each.get('processes'), 'process', 'processes')}"),
            escape(", ".join(f"{name} {version}" for name, version in each.get("versions", {}).items())),
            escape(each.get("commit") or "–"),
        ]
        for each in starts[-MAX_STARTS:]
    ]
    if not rows:
        return '<p class="muted">No status.json in this run directory.</p>'
    titles = ["started (UTC)", "after step", "host", "devices", "versions", "commit"]
    return details(_counted(len(starts), "start", "starts"), table(titles, rows, {1}))


def _counted(count: Any, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _date(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) if isinstance(seconds, int | float) else "–"
