"""Verification of responses on the host, while others are still decoded."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tsopsd_jax.distributed import processes
from tsopsd_jax.rollout import Finished
from tsopsd_jax.types import Rollout

Verifier = Callable[[str, str], float]
"""(response, gold answer) -> 1.0 or 0.0; called from several threads at once"""
VERIFY_THREADS = min(8, os.cpu_count() or 1)
"""Responses verified side by side. The verifier of mathematics keeps a process busy for each; others share the host."""


@contextlib.contextmanager
def verifying() -> Iterator[ThreadPoolExecutor]:
    """Threads for the verifier; a block that is left by an exception does not wait for responses that no thread took up."""
    threads = ThreadPoolExecutor(VERIFY_THREADS, thread_name_prefix="verify")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def accuracies(
    rollout: Rollout, answers: Sequence[str], decode: Callable[[Sequence[int]], str], verify: Verifier
) -> Float[np.ndarray, " B"]:
    """The verifier's score of every response; `answers` holds one gold answer per row. Host side."""

    def score(row: int) -> Future[float]:
        response = rollout.tokens[row, rollout.prompt_length[row] : rollout.length[row]]
        return threads.submit(verify, decode(response.tolist()), answers[row])

    with verifying() as threads:
        scores = {row: score(row) for row in range(len(answers)) if processes.is_mine(row)}
        return np.asarray(processes.divided(lambda row: float(scores[row].result()), len(answers)), np.float32)


class Scored(NamedTuple):
    """A rollout and the verifier's score of every response; seconds of sampling, and then of waiting for scores."""

    rollout: Rollout
    accuracy: Float[np.ndarray, " B"]
    rollout_s: float
    waited_s: float


def score_while(
    sample: Callable[[Callable[[Finished], None]], Rollout],
    answers: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    verify: Verifier,
) -> Scored:
    """Sample, and verify each response in one of a few threads as soon as it ended, while others are still decoded.

    Each process verifies its rows.

    Args:
        sample: on_finished -> Rollout (host arrays); calls `on_finished` once for each row.
        answers: a gold answer per row.
        decode: token ids -> text.
        verify: (response, gold) -> score. What it raises is raised here.
    """

    def score(done: Finished) -> float:
        return verify(decode(done.tokens.tolist()), answers[done.row])

    began = time.monotonic()
    with verifying() as threads:
        scores: dict[int, Future[float]] = {}

        def finished(done: Finished) -> None:
            if processes.is_mine(done.row):
                scores[done.row] = threads.submit(score, done)

        rollout = sample(finished)
        sampled = time.monotonic()
        accuracy = np.asarray(processes.divided(lambda row: float(scores[row].result()), len(answers)), np.float32)
    return Scored(rollout, accuracy, sampled - began, time.monotonic() - sampled)
