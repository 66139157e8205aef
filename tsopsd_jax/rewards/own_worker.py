"""A reward function of one's own, called once and its result looked at; as a program,
a process that does so line by line.

`python -P own_worker.py FILE.py:FUNCTION SHA256 WALL_S`, started by `own.py`. It writes a line `ready` (or what went
wrong), then for each JSON line [response, answer, row] on stdin a JSON line: {"rewards": ...} or {"failed": ...}. It
ends at the end of its input, and when an answer takes longer than WALL_S (SIGALRM).
"""

import contextlib
import hashlib
import inspect
import json
import math
import numbers
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REWARD_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
"""Names that a reward may have: each names a metric."""


class RewardError(Exception):
    """A reward function gave no reward; the message names it, says why and, where it raised, the line."""


def takes_row(function: Callable[..., Any], place: str) -> bool:
    """Whether a function takes (response, answer, row) rather than (response, answer).

    Raises:
        ValueError: it takes neither; `place` names it.
    """
    signature = inspect.signature(function)
    named = "row" in signature.parameters
    try:
        signature.bind("", "", **({"row": {}} if named else {}))
    except TypeError as error:
        raise ValueError(
            f"{place}: expected a function of (response, answer) or (response, answer, row), got {signature}"
        ) from error
    return named


def call_reward(
    function: Callable[..., Any], place: str, response: str, answer: str, row: Mapping[str, Any] | None
) -> Any:
    """Call a reward function: a finite float, or finite floats by name.

    Args:
        function: see `takes_row`.
        place: its file and name, for errors.
        response, answer: its arguments.
        row: the third one; None: it takes two.

    Raises:
        RewardError: it raised, or returned something else.
    """
    try:
        value = function(response, answer) if row is None else function(response, answer, row=row)
    except BaseException as error:  # SystemExit and the like are no way out of a run
        code = inspect.unwrap(function)
        file = code.__code__.co_filename if inspect.isfunction(code) else None
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {lines[-1]}" if lines else ""
        words = " ".join(str(error).split())[:300]
        raise RewardError(f"{place}{line}: raised {type(error).__name__}{': ' if words else ''}{words}") from None
    if not isinstance(value, Mapping):
        return _finite(value, place, "")
    for name in value:
        if not isinstance(name, str) or not REWARD_NAME.fullmatch(name):
            raise RewardError(f"{place}: expected names of letters, digits and _ in its dict, got {_short(name)}")
    if not value:
        raise RewardError(f"{place}: expected a float or {{name: float}}, got an empty dict")
    return {name: _finite(x, place, f" as {name!r}") for name, x in value.items()}


def _finite(value: Any, place: str, name: str) -> float:
    """A number (also a scalar of NumPy, JAX or torch) as a float."""
    if hasattr(value, "item") and hasattr(value, "shape") and value.shape == ():
        value = value.item()
    with contextlib.suppress(OverflowError):
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
    raise RewardError(f"{place}: expected a finite float or {{name: float}}, got {_short(value)}{name}")


def _short(value: Any) -> str:
    return " ".join(f"{value!r} ({type(value).__name__})".split())[:100]


def serve_calls(name: str, sha256: str, wall_s: float) -> None:
    """Serve until stdin ends."""
    questions, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    # What a function reads must not be a question, nor what it prints a reply.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):  # of all processes, an out-of-memory killer should end this one
        Path("/proc/self/oom_score_adj").write_text("1000")
    file = Path(name.rpartition(":")[0])
    sys.path.insert(0, str(file.resolve().parent))  # modules beside the file
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from tsopsd_jax.loading import load_function

    try:
        if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"reward file {file} was changed while it is used; restore it, or start again")
        function = load_function(name, what="reward")
        named = takes_row(function, name)
    except (ValueError, OSError) as error:
        replies.write(" ".join(str(error).split()) + "\n")
        return
    replies.write("ready\n")
    for line in questions:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a function may use it, too
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        response, answer, row = json.loads(line)
        try:
            reply = {"rewards": call_reward(function, name, response, answer, row if named else None)}
        except RewardError as error:
            reply = {"failed": str(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    serve_calls(sys.argv[1], sys.argv[2], float(sys.argv[3]))
