"""Comparison of two formulas in worker processes with hard limits of time and memory."""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

_PROGRAM = Path(__file__).with_name("symbolic_worker.py")
_START_S = 120.0
"""Longest start of a worker; it takes about a second where nothing else runs."""
_GRACE_S = 1.0
"""A worker whose parent is gone ends this long after the limit: until then the parent does the killing."""
_ANSWERS_PER_WORKER = 2000
"""mpmath's tables of constants grow with the precision it has seen; a worker is replaced before they matter."""
_REPLIES = {b"-1": -1, b"0": 0, b"1": 1}


class CutOff(Exception):
    """A comparison ended with its worker: out of time, out of memory, or killed."""


class Workers:
    """As many worker processes as threads that call `order` at once, each started when it is first needed.

    A worker has a session of its own (the terminal's Ctrl-C does not reach it), holds no file but its pipes, and ends
    with its parent, however that ends: its input is then at an end.

    Args:
        wall_s: seconds that one comparison may take.
        memory_bytes: address space of a worker; it needs about a tenth of the default to start.
    """

    def __init__(self, *, wall_s: float = 5.0, memory_bytes: int = 2**29):
        self.wall_s, self.memory_bytes = wall_s, memory_bytes
        self.cut_off = 0
        """Comparisons so far that ended with their worker: out of time, out of memory, or killed."""
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._idle.clear)  # a child must not write into its parent's pipes

    def order(self, a: tuple, b: tuple) -> int | None:
        """Order two trees (`trees`): -1, 0 or 1, 0 also for equal formulas; None where they differ and have no order.

        Raises:
            CutOff: it came to no end; `cut_off` counts it.
            RuntimeError: no worker could be started: the installation's fault, whatever the trees say.
        """
        worker, reply = self._take(), None
        try:
            reply = worker.ask(a, b, self.wall_s)
        finally:
            with self._lock:
                if reply is None:
                    self.cut_off += 1
                elif worker.answered < _ANSWERS_PER_WORKER:
                    self._idle.append(worker)
                    worker = None
            if worker is not None:
                worker.end()
        if reply is None:
            raise CutOff
        return _REPLIES.get(reply)

    def close(self) -> None:
        """End the idle workers; `order` starts new ones."""
        while self._idle:
            self._idle.pop().end()

    def _take(self) -> "_Worker":
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return _Worker(self.wall_s + _GRACE_S, self.memory_bytes)
            if worker.process.poll() is None:
                return worker
            worker.end()  # it died while nobody asked


class _Worker:
    """One process, and what it says."""

    def __init__(self, wall_s: float, memory_bytes: int):
        # -P: without the program's folder on the path, whose math.py is not the standard library's. A fixed hash seed,
        # and mpmath on Python's own integers: a verdict must not depend on the machine.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(wall_s), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env=os.environ | {"PYTHONHASHSEED": "0", "MPMATH_NOGMPY": "1"},
        )
        self.answered = 0
        said = self._line(_START_S)
        if said != b"ready":
            self.end()
            raise RuntimeError(
                f"expected the verifier's worker to start within {_START_S:.0f} s, got "
                f"{(said or b'no reply').decode(errors='replace')!r} (exit code {self.process.returncode}); check that "
                "`python -c 'import mpmath'` works here"
            )

    def ask(self, a: tuple, b: tuple, wall_s: float) -> bytes | None:
        """Its reply, or None if there is none in time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([a, b]).encode() + b"\n")
        except BrokenPipeError:
            return None
        self.answered += 1
        return self._line(wall_s)

    def end(self) -> None:
        """Kill it and wait, so that it leaves no zombie."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()

    def _line(self, seconds: float) -> bytes | None:
        """Its next line, or None if that does not come within the time."""
        assert self.process.stdout is not None
        deadline, got = time.monotonic() + seconds, b""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while not got.endswith(b"\n"):
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                return None
            more = os.read(self.process.stdout.fileno(), 4096)
            if not more:
                return None
            got += more
        return got.rstrip(b"\n")
