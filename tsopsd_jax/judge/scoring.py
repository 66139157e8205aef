"""Verification of responses on the host, while others are still decoded."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tsopsd_jax.data import Problem
from tsopsd_jax.distributed import processes
from tsopsd_jax.rewards import Verdict
from tsopsd_jax.rollout import Finished
from tsopsd_jax.types import Rollout

Score = Callable[[str, str, Mapping[str, Any]], Verdict]
"""(response, answer, the data row's other columns) -> its rewards; called from several threads at once"""
Decode = Callable[[Sequence[int]], str]
"""token ids -> text"""
VERIFY_THREADS = min(8, os.cpu_count() or 1)
"""Responses verified side by side. The verifier of mathematics keeps a process busy for each; others share the host."""


@contextlib.contextmanager
def verifying() -> Iterator[ThreadPoolExecutor]:
    """Threads for the verifier; a block that is left by an exception does not wait for
    responses that no thread took up."""
    threads = ThreadPoolExecutor(VERIFY_THREADS, thread_name_prefix="verify")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


class Scored(NamedTuple):
    """A rollout and the rewards of every response; seconds of sampling, and then of waiting for scores."""

    rollout: Rollout
    asked: Sequence[Problem]
    """The problem of each row."""
    verdicts: Sequence[Verdict]
    rollout_s: float
    waited_s: float

    @property
    def accuracy(self) -> Float[np.ndarray, " B"]:
        """The accuracy of every response."""
        return np.asarray([verdict.accuracy for verdict in self.verdicts], np.float32)

    @property
    def reward(self) -> Float[np.ndarray, " B"]:
        """The weighted sum of every response's rewards, without penalties."""
        return np.asarray([verdict.reward for verdict in self.verdicts], np.float32)


def accuracies(
    rollout: Rollout, answers: Sequence[str], decode: Decode, verify: Callable[[str, str], float]
) -> Float[np.ndarray, " B"]:
    """A single verifier's score of every response; `answers` holds one gold answer per row. Host side."""

    def score(response: str, answer: str, _row: Mapping[str, Any]) -> Verdict:
        accuracy = float(verify(response, answer))
        return Verdict(accuracy, accuracy, {})

    asked = [Problem("", "", answer) for answer in answers]
    return score_after(rollout, asked, decode, score).accuracy


def score_after(rollout: Rollout, asked: Sequence[Problem], decode: Decode, score: Score) -> Scored:
    """Score the responses of a rollout that is over (host arrays); each process scores its rows."""

    def begin(row: int) -> Future[Verdict]:
        response = rollout.tokens[row, rollout.prompt_length[row] : rollout.length[row]]
        return threads.submit(score, decode(response.tolist()), asked[row].answer, asked[row].row)

    began = time.monotonic()
    with verifying() as threads:
        scores = {row: begin(row) for row in range(len(asked)) if processes.is_mine(row)}
        verdicts = _gathered(scores, len(asked))
    return Scored(rollout, asked, verdicts, 0.0, time.monotonic() - began)


def score_while(
    sample: Callable[[Callable[[Finished], None]], Rollout], asked: Sequence[Problem], decode: Decode, score: Score
) -> Scored:
    """Sample, and score each response in one of a few threads as soon as it ended, while others are still decoded.

    Each process scores its rows.

    Args:
        sample: on_finished -> Rollout (host arrays); calls `on_finished` once for each row.
        asked: the problem of each row.
        decode: token ids -> text.
        score: what it raises is raised here.
    """

    def one(done: Finished) -> Verdict:
        return score(decode(done.tokens.tolist()), asked[done.row].answer, asked[done.row].row)

    began = time.monotonic()
    with verifying() as threads:
        scores: dict[int, Future[Verdict]] = {}

        def finished(done: Finished) -> None:
            if processes.is_mine(done.row):
                scores[done.row] = threads.submit(one, done)

        rollout = sample(finished)
        sampled = time.monotonic()
        verdicts = _gathered(scores, len(asked))
    return Scored(rollout, asked, verdicts, sampled - began, time.monotonic() - sampled)


def _gathered(scores: Mapping[int, Future[Verdict]], count: int) -> list[Verdict]:
    """The verdicts on all rows, from the processes that work them out."""
    return [Verdict(**said) for said in processes.divided(lambda row: scores[row].result()._asdict(), count)]
