"""Locks: one process at a time writes a run directory, or a file of results."""

import contextlib
import errno
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ATTEMPTS, PAUSE_S = 10, 0.05
"""Attempts to take a lock, and the pause between two: who only looks holds it for a moment."""


def is_held(file: Path) -> bool | None:
    """Whether a process on this machine holds the lock `file`; None: it cannot be told (no such file, no locks).

    Who looks needs no right to write there, and is in nobody's way who looks, too.
    """
    try:
        with file.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


@contextlib.contextmanager
def locked(file: Path, *, taken: str, unwritable: str) -> Iterator[None]:
    """Hold the lock `file`, which is made if absent and left behind; a process that dies gives it up.

    Args:
        file: the lock; its folder is made if absent.
        taken: what to say where another process holds it.
        unwritable: what to say, with {reason}, where it cannot be made.

    Raises:
        ValueError: another process holds it, or it cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a")
    except OSError as error:
        raise ValueError(unwritable.format(reason=error.strerror)) from error
    with stream:
        try:
            _take(stream)
        except BlockingIOError:
            raise ValueError(taken) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise
        yield


def _take(stream: TextIO) -> None:
    """Take a lock for oneself; BlockingIOError: another holds it, and did not only look."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(PAUSE_S)
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
