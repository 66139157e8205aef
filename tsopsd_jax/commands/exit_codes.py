"""Exit codes of `tsopsd`, and the words that go with an error.

0: done. 1: our own fault. 2: bad input; one line says what. 3: a guard stopped the run to protect the policy.
4: a signal stopped the run. It was saved, unless the signal came twice, and the same command resumes it.
5: another process of the run died or failed, or this one hung (`distributed.heartbeat`); the same command in all of
them resumes from the last checkpoint. 6: a checkpoint, the log or a result could not be written (a full disk); the same
command resumes after room was made.
"""

import errno
import os
import sys
import traceback
from pathlib import Path

from tsopsd_jax.display.foreign_text import one_line
from tsopsd_jax.writing import WriteError, is_full

_OF_A_FILE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors that say of a file what the person who named it can mend."""
DONE, OUR_FAULT, BAD_INPUT, GUARD, INTERRUPTED, COULD_NOT_WRITE = 0, 1, 2, 3, 4, 6


def no_backend(error: BaseException) -> bool:
    """Whether JAX found no devices of the platform that the environment asks for."""
    frames = traceback.extract_tb(error.__traceback__)
    starting = any(f.name == "backends" and f.filename.endswith("xla_bridge.py") for f in frames)
    return starting and isinstance(error, RuntimeError | AssertionError) and bool(os.environ.get("JAX_PLATFORMS"))


def interrupted(out: Path | None) -> int:
    """Say that a command which resumes what stands in `out` (None: it keeps nothing) was interrupted; returns the exit
    code for it."""
    kept = "" if out is None else f"; {out} keeps what was written, and the same command goes on"
    print(f"interrupted{kept}", file=sys.stderr)
    return INTERRUPTED


def explain(command: str, error: BaseException) -> int:
    """Print what went wrong; returns the exit code for it."""
    if isinstance(error, WriteError | ValueError):
        print(f"tsopsd {command}: {one_line(error)}", file=sys.stderr)
        return COULD_NOT_WRITE if isinstance(error, WriteError) or is_full(error) else BAD_INPUT
    if no_backend(error):
        asked = os.environ.get("JAX_PLATFORMS")
        words = one_line(error) or "no device of that kind was found"
        print(
            f"tsopsd {command}: expected JAX to start with JAX_PLATFORMS={asked}, got: {words}; install its plugin, "
            'such as "jax[cuda12]", or name another platform',
            file=sys.stderr,
        )
        return BAD_INPUT
    if isinstance(error, KeyboardInterrupt):  # a second signal, or one before the first step
        print(f"tsopsd {command}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in _OF_A_FILE and error.filename is not None:
        print(f"tsopsd {command}: {one_line(error)}; mend its place or its rights, or name another", file=sys.stderr)
        return BAD_INPUT
    if is_full(error):
        print(f"tsopsd {command}: {one_line(error)}; make room, and the same command goes on", file=sys.stderr)
        return COULD_NOT_WRITE
    traceback.print_exception(error)
    return OUR_FAULT
