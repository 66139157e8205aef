"""Reward functions of one's own, `path/to/file.py:function`, in worker processes: they may raise,
hang or die without harm."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsopsd_jax.rewards.own_worker import RewardError
from tsopsd_jax.rewards.workers import CutOff, StartError, WorkerPool

_PROGRAM = Path(__file__).with_name("own_worker.py")
LIMIT_S = 5.0
"""Seconds that a call may take."""
_GRACE_S = 1.0
"""A worker whose parent is gone ends this long after the limit: until then the parent does the killing."""


class OwnReward:
    """The function of a file, called in as many processes as threads call this at once.

    A process imports the file once. Modules beside the file can be imported, JAX there knows the CPU alone, hashes are
    not random, and what the function prints is dropped.

    Args:
        name: `path/to/file.py:function`, relative to the working directory.
        wall_s: seconds that a call may take.

    Raises:
        ValueError: the file is missing, or cannot be imported, or has no such function, or it takes something else.
    """

    def __init__(self, name: str, *, wall_s: float = LIMIT_S):
        file = Path(name.rpartition(":")[0])
        if not file.is_file():
            raise ValueError(f"reward file {file} does not exist (paths are relative to the working directory)")
        self.name, self.wall_s = name, wall_s
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self._pool = WorkerPool(
            [sys.executable, "-P", str(_PROGRAM), name, digest, str(wall_s + _GRACE_S)],
            wall_s=wall_s,
            environment={"PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
        )
        try:
            self._pool.start()
        except StartError as error:
            raise ValueError(error.said) from error

    def __call__(self, response: str, answer: str, row: Mapping[str, Any]) -> float | dict[str, float]:
        """Call the function; finite numbers.

        Raises:
            RewardError: it raised, took too long, ended its process, or returned something else.
        """
        try:
            reply = json.loads(self._pool.ask(json.dumps([response, answer, dict(row)], default=str).encode()))
        except CutOff as error:
            raise RewardError(f"{self.name}: {error}") from None
        except StartError as error:
            raise RewardError(f"{self.name}: {error.said}") from None
        if "failed" in reply:
            raise RewardError(reply["failed"])
        return reply["rewards"]

    def close(self) -> None:
        """End the processes; a call starts new ones."""
        self._pool.close()
