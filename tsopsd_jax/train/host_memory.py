"""A CPU's device memory is the process's own: what else the process holds is missing there."""

import contextlib
import ctypes


def give_back() -> None:
    """Give memory that was freed back to the system.

    glibc keeps what came in small pieces for later: after the compilation of a large model's programs and after a
    checkpoint some hundreds of megabytes. Other C libraries have no such function, and nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
