"""What the benchmarks share: worker processes that take turns, and a word about the machine."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def about() -> dict[str, Any]:
    """Date and machine, for the head of a result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }


class Peer:
    """A worker process that runs when told."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None):
        self.command = " ".join(command[:4])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.ready = self._line()

    def go(self) -> dict[str, Any]:
        """One run: `seconds`, and what else the worker says."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._line()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with code {self.process.wait()}: {self.command}")
        return json.loads(line)


def gemm_gflops(multiply: Callable[[], Any], n: int = 1024) -> float:
    """GFLOP/s of a float32 n x n x n product; `multiply` runs one and waits."""
    multiply()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times) / 1e9


def divide_cpu(asked: dict[str, Any]) -> int:
    """Make the `cpu_devices` of a job (default 1) of this process's cores; JAX must not have started."""
    import jax

    count = asked.get("cpu_devices", 1)
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)
    return count


def in_turns(commands: list[list[str]], rounds: int) -> list[dict[str, Any]]:
    """Start a worker for each command, let them run in turns; one row each: what it said when ready, the median of its
    `seconds` and all of them. A worker that cannot start is left out, with a word."""
    started: list[Peer] = []
    for command in commands:  # one at a time: two that compile at once would wait for each other's cores
        try:
            started.append(Peer(command))
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
    seconds: list[list[float]] = [[] for _ in started]
    for _ in range(rounds):
        for peer, mine in zip(started, seconds, strict=True):
            mine.append(peer.go()["seconds"])
    rows = []
    for peer, mine in zip(started, seconds, strict=True):
        peer.close()
        rows.append(peer.ready | {"seconds": statistics.median(mine), "all": mine})
    return rows


def serve(run: Callable[[], Any], ready: dict[str, Any], *, turn_s: float = 0.0) -> None:
    """A worker's half: say that it is ready; for each line on stdin run, again until `turn_s` have passed, and say how
    long a run took. What takes milliseconds is otherwise measured as it wakes up, not as it runs in a training."""
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        began, runs = time.perf_counter(), 0
        while not runs or time.perf_counter() - began < turn_s:
            run()
            runs += 1
        print(json.dumps({"seconds": (time.perf_counter() - began) / runs}), flush=True)


def memory_of(run: Callable[[], Any]) -> int:
    """Bytes by which the process grew at most while `run` ran; it should be the first run of a fresh process."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
