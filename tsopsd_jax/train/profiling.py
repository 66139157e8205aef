"""Traces of chosen steps, for xprof (`tensorboard --logdir RUN_DIR/profile` with its profile plugin)."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax


class StepProfile:
    """Traces the steps from `first` to `last` into a folder; what they compute stands there under its named scopes
    (`decoding_steps`, `micro_batches`, `head_tiles`). None: no step is traced."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self.steps, self.folder, self.tracing = steps, folder, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace what is done inside, if step `number` is one of those asked for."""
        if self.steps is None or not self.steps[0] <= number <= self.steps[1]:
            yield
            return
        if not self.tracing:
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number == self.steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is being taken; one that cannot be written (a full disk) is not worth the run."""
        if self.tracing:
            self.tracing = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:
                words = " ".join(str(error).split())
                print(f"warning: the trace was not written ({words}); the run goes on without it", file=sys.stderr)
