"""The page of a run that goes on, written every few minutes."""

import time
from collections.abc import Callable
from pathlib import Path

from tsopsd_jax.display.page import write_report
from tsopsd_jax.distributed import heartbeat

COST = 0.01
"""Largest share of the time that writing may take."""


class LivePage:
    """Writes the page of a run, when called and that is due. It never ends the run: what goes wrong is said once.

    Args:
        run_dir: of the run.
        every_s: seconds between two writings, or more where writing takes over `COST` of them; 0: it is never due.
        say: shows a text.
        clock: seconds that rise.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        every_s: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run_dir, self.every_s, self._say, self._clock = run_dir, every_s, say, clock
        self._due_s = clock() + every_s if every_s else None
        self._failed = False

    def __call__(self) -> None:
        """Write the page if that is due; called by the process that writes the log, after it logged a step."""
        began = self._clock()
        if self._due_s is None or began < self._due_s:
            return
        heartbeat.tick("writing the page")
        try:
            write_report(self._run_dir)
        except Exception as error:  # the page is never worth the run
            if not self._failed:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                self._say(f"warning: the page was not written ({text}); the run goes on")
            self._failed = True
        ended = self._clock()
        self._due_s = ended + max(self.every_s, (ended - began) / COST)
