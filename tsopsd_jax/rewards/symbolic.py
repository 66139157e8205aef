"""Comparison of two formulas in worker processes with hard limits of time and memory."""

import json
import sys
from pathlib import Path

from tsopsd_jax.rewards.workers import StartError, WorkerPool

_PROGRAM = Path(__file__).with_name("symbolic_worker.py")
_GRACE_S = 1.0
"""A worker whose parent is gone ends this long after the limit: until then the parent does the killing."""
_ANSWERS_PER_WORKER = 2000
"""mpmath's tables of constants grow with the precision it has seen; a worker is replaced before they matter."""
_REPLIES = {b"-1": -1, b"0": 0, b"1": 1}


class Workers:
    """As many worker processes as threads that call `order` at once.

    Args:
        wall_s: seconds that one comparison may take.
        memory_bytes: address space of a worker; it needs about a tenth of the default to start.
    """

    def __init__(self, *, wall_s: float = 5.0, memory_bytes: int = 2**29):
        # -P: without the program's folder on the path, whose math.py is not the standard library's. A fixed hash seed,
        # and mpmath on Python's own integers: a verdict must not depend on the machine.
        self.pool = WorkerPool(
            [sys.executable, "-P", str(_PROGRAM), str(wall_s + _GRACE_S), str(memory_bytes)],
            wall_s=wall_s,
            environment={"PYTHONHASHSEED": "0", "MPMATH_NOGMPY": "1"},
            most_answers=_ANSWERS_PER_WORKER,
        )

    def order(self, a: tuple, b: tuple) -> int | None:
        """Order two trees (`trees`): -1, 0 or 1, 0 also for equal formulas; None where they differ and have no order.

        Raises:
            CutOff: it came to no end; `pool.cut_off` counts it.
            RuntimeError: no worker could be started: the installation's fault, whatever the trees say.
        """
        try:
            return _REPLIES.get(self.pool.ask(json.dumps([a, b]).encode()))
        except StartError as error:
            raise RuntimeError(
                f"verifier of mathematics: {error}; check that `python -c 'import mpmath'` works here"
            ) from error
