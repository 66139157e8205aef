"""Exit codes of `tsopsd`, and the words that go with an error.

0: done. 1: our own fault. 2: bad input; one line says what. 3: a guard stopped the run to protect the policy.
4: a signal stopped the run. It was saved, unless the signal came twice, and the same command resumes it.
5: another process of the run died or failed, or this one hung (`distributed.heartbeat`); the same command in all of
them resumes from the last checkpoint.
"""

import sys
import traceback

DONE, OUR_FAULT, BAD_INPUT, GUARD, INTERRUPTED = 0, 1, 2, 3, 4


def explain(command: str, error: BaseException) -> int:
    """Print what went wrong; returns the exit code for it."""
    if isinstance(error, ValueError):
        print(f"tsopsd {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, KeyboardInterrupt):  # a second signal, or one before the first step
        print(f"tsopsd {command}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    traceback.print_exception(error)
    return OUR_FAULT
