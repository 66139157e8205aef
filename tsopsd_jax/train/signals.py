"""SIGTERM and SIGINT as a question that the loop asks between steps, in all processes of a run alike."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tsopsd_jax.distributed import processes

EXIT_INTERRUPTED = 4
"""Exit code of a process that a signal stopped (`commands.exit_codes`)."""
LEAVING_S = 10.0
"""Time that a second signal leaves the main thread to end by itself."""


class Interrupted(Exception):
    """A signal asked the run to stop: after a step, or in a rollout or an evaluation, which are left.
    The state is saved."""


class StopRequest:
    """What this process was asked by a signal while `heard`.

    Python handles a signal between two of the main thread's instructions, and a compilation or an update is one. So a
    thread is woken by the signal itself: it answers at once, and ends the process if after a second signal the main
    thread does not.

    Args:
        answer: shows a text to the person who sent the signal; called in that thread.
        abandon: leaves the screen as it is to be left, before the process is ended.
    """

    def __init__(self, answer: Callable[[str], None] = print, abandon: Callable[[], None] = lambda: None):
        self.number: int | None = None
        self._answer, self._abandon = answer, abandon
        self._left = threading.Event()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Keep signals for the loop inside the block, in the main thread. A second one does not wait for the loop:
        KeyboardInterrupt, or after `LEAVING_S` the end of the process with `EXIT_INTERRUPTED`."""
        previous = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._answer_all, args=(woken,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            self._left.set()
            signal.set_wakeup_fd(before)
            wakes.close()  # which ends the thread
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _answer_all(self, woken: socket.socket) -> None:
        """Answer each signal whose number arrives on `woken`."""
        seen = 0
        with woken:
            while got := woken.recv(1):
                if got[0] not in (signal.SIGTERM, signal.SIGINT):
                    continue
                seen += 1
                if seen == 1:
                    self._answer(f"{signal.Signals(got[0]).name}: finishing the step; again to stop now")
                elif not self._left.wait(LEAVING_S):
                    self._abandon()
                    self._answer("interrupted; the same command goes on from the last checkpoint")
                    os._exit(EXIT_INTERRUPTED)

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
