"""The steps of a schedule's phases; those of phases to come are compiled in a thread while one runs."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.train.cycle import ONCE, Cycle
from tsopsd_jax.train.phase import Phase
from tsopsd_jax.train.phase_step import PhaseStep, Shared


class PhaseSteps:
    """The step of each phase, made when it is asked for or ahead of that.

    Args:
        phases: the schedule.
        shared: see `PhaseStep`.
        cycle: phases that come again: their steps are kept.
    """

    def __init__(self, phases: Sequence[Phase], shared: Shared, cycle: Cycle = ONCE):
        self.phases, self.shared, self.cycle = phases, shared, cycle
        self._kept: dict[int, PhaseStep] = {}
        self._ahead: dict[int, Future[PhaseStep]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def of(self, at: int) -> PhaseStep:
        """The step of the phase at that index: compiled already, or to be compiled when first called."""
        if at in self._kept:
            return self._kept[at]
        step = None
        if at in self._ahead:
            # Whatever it raised happens again below if it matters.
            with contextlib.suppress(Exception), heartbeat.within("compiling"):
                step = self._ahead.pop(at).result()
        step = step or PhaseStep(self.phases[at], self.shared)
        if at in self.cycle:
            self._kept[at] = step
        return step

    def compile_after(self, at: int) -> None:
        """Begin to compile the phases after that index. Not on a GPU, whose compiler measures kernels on the device, in
        the memory that the run needs."""
        if self.shared.mesh.devices.flat[0].platform == "gpu":
            return

        def compiled(phase: Phase) -> PhaseStep:
            step = PhaseStep(phase, self.shared)
            step.compile()
            return step

        for later in range(max(self._ahead, default=at) + 1, len(self.phases)):
            if later not in self._kept:
                self._ahead[later] = self._thread.submit(compiled, self.phases[later])

    def close(self) -> None:
        """Begin to compile nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


COMPILING = "/jax/core/compile/backend_compile_duration"
"""JAX's name of the event of a compilation: a scalar when it begins, a duration when it is over."""


class Compilations:
    """The compilations that the main thread waits for, while `told`.

    Attributes:
        seconds: how long they took so far.
    """

    def __init__(self):
        self.seconds = 0.0
        self._said = contextlib.ExitStack()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Say by `heartbeat.tick` when the thread that calls this compiles, inside the block."""
        ours = threading.get_ident()

        def begins(event: str, value: float, **_facts: str | int) -> None:  # noqa: ARG001 - JAX's signature
            if event == COMPILING and threading.get_ident() == ours:
                self._said.enter_context(heartbeat.within("compiling"))

        def ends(event: str, duration_secs: float, **_facts: str | int) -> None:
            if event == COMPILING and threading.get_ident() == ours:
                self._said.close()
                self.seconds += duration_secs

        jax.monitoring.register_scalar_listener(begins)
        jax.monitoring.register_event_duration_secs_listener(ends)
        try:
            yield
        finally:
            jax.monitoring.unregister_scalar_listener(begins)
            jax.monitoring.unregister_event_duration_listener(ends)
