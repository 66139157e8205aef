"""Processes that answer lines with lines within a limit of time, as many as threads that ask at once."""

import os
import select
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

_START_S = 120.0
"""Longest start of a worker; it takes about a second where nothing else runs."""


class CutOff(Exception):
    """A question ended with its worker: out of time, out of memory, or killed."""


class WorkerPool:
    """Worker processes, each started when it is first needed. A worker writes `ready` (or what went wrong),
    then a line for a line.

    A worker has a session of its own (the terminal's Ctrl-C does not reach it) and holds no file but its pipes. Its
    input ends with its parent, however that ends. It is started as a program, not forked:
    the parent's threads hold locks.

    Args:
        command: of the program, with its arguments.
        wall_s: seconds that one answer may take.
        environment: variables beside the parent's.
        most_answers: a worker is replaced after so many; None: never.
    """

    def __init__(
        self, command: Sequence[str], *, wall_s: float, environment: Mapping[str, str], most_answers: int | None = None
    ):
        self.command, self.wall_s, self.most_answers = command, wall_s, most_answers
        self.environment = os.environ | dict(environment)
        self.cut_off = 0
        """Questions so far that ended with their worker: out of time, out of memory, or killed."""
        self.idle: list[Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self.idle)  # at exit, too
        os.register_at_fork(after_in_child=self.idle.clear)  # a child must not write into its parent's pipes

    def ask(self, line: bytes) -> bytes:
        """Answer a line.

        Raises:
            CutOff: no answer came; `cut_off` counts it.
            StartError: no worker could be started, whatever the question says.
        """
        worker, reply, began = self._take(), None, time.monotonic()
        try:
            reply = worker.ask(line, self.wall_s)
        finally:
            with self._lock:
                if reply is None:
                    self.cut_off += 1
                elif self.most_answers is None or worker.answered < self.most_answers:
                    self.idle.append(worker)
                    worker = None
            if worker is not None:
                worker.end()
        if reply is None:
            late = time.monotonic() - began >= self.wall_s
            raise CutOff(f"took more than {self.wall_s:g} s" if late else "ended its process")
        return reply

    def start(self) -> None:
        """Start a worker, if none is idle, to see whether it does.

        Raises:
            StartError: it did not.
        """
        worker = self._take()
        with self._lock:
            self.idle.append(worker)

    def close(self) -> None:
        """End the idle workers; `ask` starts new ones."""
        _end_all(self.idle)

    def _take(self) -> "Worker":
        while True:
            with self._lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                return Worker(self.command, self.environment)
            if worker.process.poll() is None:
                return worker
            worker.end()  # it died while nobody asked


class StartError(RuntimeError):
    """A worker did not start; `said` is what it wrote instead of `ready`."""

    def __init__(self, said: str, message: str):
        super().__init__(message)
        self.said = said


class Worker:
    """One process, and what it says."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env=dict(environment),
        )
        self.answered = 0
        said = self._line(_START_S)
        if said != b"ready":
            self.end()
            got = f"no reply (exit code {self.process.returncode})" if said is None else said.decode(errors="replace")
            raise StartError(got, f"expected a worker to start within {_START_S:.0f} s, got {got}")

    def ask(self, line: bytes, wall_s: float) -> bytes | None:
        """Its reply, or None if there is none in time."""
        assert self.process.stdin is not None
        try:
            left = memoryview(line + b"\n")
            while left:  # a signal may cut a long write short
                left = left[self.process.stdin.write(left) :]
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


def _end_all(idle: list[Worker]) -> None:
    while idle:
        idle.pop().end()
