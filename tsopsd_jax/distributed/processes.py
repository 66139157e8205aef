"""Many processes that run one program: how they start, what they divide, what they tell one another.

Every process goes through the same loop on the same facts. Responses are gathered to all hosts as they end (the tokens
of 64 x 8 responses of 8,192 are 16 MB), so that schedule, dynamic sampling, advantages and stop rules are worked out
everywhere alike and nobody has to be told. What takes a host's time is divided by row and its results are gathered:
tokenising and verifying (`divided`). A batch is formed from the host's rows, each process placing those of its own
devices (`sharding.put`). What only one process can know (a signal, a file, free memory, a clock) decides nothing before
it was exchanged (`exchange`, `from_first`). Process 0 writes; checkpoints are written by all.

With one process nothing is initialised, and every function here returns at once.
"""

import contextlib
import glob
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsopsd_jax.distributed.heartbeat import GRACE_S, Watch, tick

_T = TypeVar("_T")


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def console() -> TextIO:
    """Standard output in process 0, nowhere in the others."""
    return sys.stdout if is_first() else Path(os.devnull).open("w")


def exchange(value: Any) -> list[Any]:
    """Return every process's `value` (plain JSON), in the order of the processes. All must call it."""
    tick()
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([data.size], np.int32))[:, 0]
    width = max(256, 1 << (int(sizes.max()) - 1).bit_length())  # few sizes: each is a program
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: _T) -> _T:
    """Return process 0's `value` (plain JSON) in every process. All must call it."""
    return exchange(value if is_first() else None)[0]


def is_mine(row: int) -> bool:
    """Whether this process does the host's work for a row."""
    return row % jax.process_count() == jax.process_index()


def divided(function: Callable[[int], _T], count: int) -> list[_T]:
    """Return [function(0), ..., function(count - 1)] (plain JSON), each worked out by one process. All must call it."""
    parts = exchange([function(row) for row in range(count) if is_mine(row)])
    return [parts[row % len(parts)][row // len(parts)] for row in range(count)]


def first_then_others(function: Callable[[], _T]) -> _T:
    """Return function(), called in process 0 first and then in the others: for what leaves files that others find."""
    if not is_first():
        exchange(None)
    result = function()
    if is_first():
        exchange(None)
    return result


@contextlib.contextmanager
def joined(
    *,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    heartbeat_s: int,
    stall_s: float,
    explain: Callable[[BaseException], int],
) -> Iterator[None]:
    """Be one of a run's processes inside the block. Where there is only one, it is only watched for hanging.

    An exception that leaves the block ends this process with the exit code that `explain` returns, and the others with
    `heartbeat.EXIT_OTHERS`; so does the death of any of them, within `heartbeat_s`, and a main thread that hangs. With
    one process an exception is the caller's.

    Args:
        coordinator: HOST:PORT of process 0; None: found in the environment (TPU metadata, SLURM, Open MPI),
            or one process.
        processes, process: how many, and which of them this is; None: found in the environment.
        heartbeat_s: silence after which a process is taken for dead.
        stall_s: time without a `heartbeat.tick` after which this process ends with its stacks; 0: never.
        explain: prints what went wrong; returns the exit code.

    Raises:
        ValueError: flags that are incomplete or contradict one another.
    """
    if heartbeat_s < 1:
        raise ValueError(f"--heartbeat-s must be at least 1, got {heartbeat_s}")
    if stall_s and stall_s < 1:
        raise ValueError(f"--stall-s must be 0 (never) or at least 1, got {stall_s:g}")
    if not _initialised(*_place(coordinator, processes, process), heartbeat_s) or jax.process_count() == 1:
        watch = Watch(index=0, count=1, heartbeat_s=heartbeat_s, stall_s=stall_s, exchange=lambda value: [value])
        with contextlib.closing(watch):
            yield
        return
    index, count = jax.process_index(), jax.process_count()
    watch = Watch(index=index, count=count, heartbeat_s=heartbeat_s, stall_s=stall_s, exchange=exchange)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ValueError) and watch.doomed.wait(GRACE_S / 2):
            signal.pause()  # a collective broke because another process died: the watch ends this one
        code = explain(error)
        watch.tell(" ".join(f"{type(error).__name__}: {error}".split()))
        sys.stdout.flush()
        os._exit(code)  # an orderly exit would wait for the others
    watch.close()
    jax.distributed.shutdown()


def _initialised(coordinator: str | None, processes: int | None, process: int | None, heartbeat_s: int) -> bool:
    """Start JAX's service where flags or environment speak of other processes; returns whether it was started."""
    told = coordinator is not None or _launched()
    if not told and not _on_tpu():
        return False
    try:
        # JAX's own heartbeat is the second line of defence: the watch says what happened and what to do.
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=2 * heartbeat_s)
    except (ValueError, OSError, KeyError) as error:  # KeyError: a variable that the launcher should have set
        if not told:  # TPUs of one host, without metadata
            return False
        raise ValueError(
            f"the processes cannot find one another ({error}); give --coordinator HOST:PORT --processes N --process I"
        ) from error
    # JAX took SIGTERM for itself; until the loop answers it, it ends the process as it always does.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return True


def _place(coordinator: str | None, processes: int | None, process: int | None):
    """Complete the flags from what Open MPI and SLURM say: (coordinator, processes, process)."""
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError(
                "--processes and --process expect --coordinator HOST:PORT of process 0 beside them, got none"
            )
        return None, None, None
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
    sizes, places = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    processes = _first_number(sizes) if processes is None else processes
    process = _first_number(places) if process is None else process
    if processes is None or process is None or not 0 <= process < processes:
        raise ValueError(
            f"--coordinator expects --processes N and --process I with 0 <= I < N, got N {processes}, I {process}"
        )
    return coordinator, processes, process


def _first_number(names: tuple[str, ...]) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def _launched() -> bool:
    """Whether Open MPI or SLURM started several processes, so that JAX can find the others by itself.

    Raises:
        ValueError: the environment says that there are others, and not how many.
    """
    # A step of srun has a list of nodes; a batch script by itself is one process.
    for sign, size in (("OMPI_COMM_WORLD_SIZE",) * 2, ("SLURM_STEP_NODELIST", "SLURM_NTASKS")):
        if sign not in os.environ:
            continue
        count = _first_number((size,))
        if count is None:
            raise ValueError(
                f"{size}: expected the number of processes, since {sign} is set, got "
                f"{os.environ.get(size, 'nothing')}; "
                f"start with srun or mpirun, give --coordinator HOST:PORT --processes N --process I, or unset {sign}"
            )
        return count > 1
    return False


def _on_tpu() -> bool:
    """Whether this host has TPUs, whose metadata name the other hosts."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
