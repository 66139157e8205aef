"""What could not be written: one error that names the place, the reason and what to do."""

import contextlib
import errno
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a file that has no room left."""


class WriteError(OSError):
    """Something could not be written; the message says what, why, and what to do."""


@contextlib.contextmanager
def writes_to(place: object) -> Iterator[None]:
    """Turn what the operating system says against writing to `place` into a WriteError, inside the block."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise WriteError(
            f"{place} could not be written: {reason}; make room or mend it, and the same command goes on"
        ) from error


def is_full(error: BaseException | None) -> bool:
    """Whether there was no room: the error says so itself, or one that it was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__
    return False
