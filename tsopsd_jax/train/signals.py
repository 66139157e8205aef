"""SIGTERM and SIGINT as a question that the loop asks between steps, in all processes of a run alike."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from tsopsd_jax.distributed import processes


class Interrupted(Exception):
    """A signal asked the run to stop: after a step, or in a rollout or an evaluation, which are left.
    The state is saved."""


class StopRequest:
    """What this process was asked by a signal while `heard`."""

    def __init__(self):
        self.number: int | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Keep signals for the loop inside the block. A second one does not wait for the loop: KeyboardInterrupt."""
        previous = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def asked(self) -> int:
        """The signal that reached any of the processes, 0 for none: the same answer in all, which must all ask."""
        return max(processes.exchange(self.number or 0))


def leave(asked: int, what: str) -> None:
    """Raise Interrupted for the signal `asked`, 0 for none; `what` says what was done before: `saved step 3`."""
    if asked:
        raise Interrupted(f"{signal.Signals(asked).name}: {what}")
