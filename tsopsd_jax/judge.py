"""Rollout -> Batch: verify responses, shape rewards, keep the groups that teach something, form advantages."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from tsopsd_jax import hosts
from tsopsd_jax.advantages import group_relative
from tsopsd_jax.rewards import overlong_penalty
from tsopsd_jax.rollout import Finished
from tsopsd_jax.types import Batch, Rollout

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


class ShortageError(RuntimeError):
    """Dynamic sampling did not find enough informative groups; the message says how many and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRule:
    """How a phase turns verified responses into advantages, and what dynamic sampling does.

    `overlong_buffer_tokens` 0: no length penalty. `max_generation_batches` 0: no dynamic sampling. `surplus` says what
    happens to informative groups beyond a full batch (`drop`, or `keep` for the next step), `on_shortage` what happens
    when the limit of generation batches is reached (`error`, or `fill` with uninformative groups: their accuracy gives
    no advantage, though the length penalty may).
    """

    max_response_tokens: int
    overlong_buffer_tokens: int = 0
    overlong_factor: float = 1.0
    normalize_std: bool = True
    max_generation_batches: int = 0
    surplus: str = "drop"
    on_shortage: str = "error"

    def __post_init__(self):
        if self.surplus not in ("drop", "keep"):
            raise ValueError(f"surplus must be 'drop' or 'keep', got {self.surplus!r}")
        if self.on_shortage not in ("error", "fill"):
            raise ValueError(f"on_shortage must be 'error' or 'fill', got {self.on_shortage!r}")
        overlong_penalty(0, max_tokens=self.max_response_tokens, buffer_tokens=self.overlong_buffer_tokens)


class Groups(NamedTuple):
    """Judged groups on the host (numpy): rows of `rollout` are [P * G], the responses of a prompt side by side."""

    rollout: Rollout
    accuracy: Float[np.ndarray, "P G"]
    reward: Float[np.ndarray, "P G"]

    def __len__(self) -> int:
        return len(self.accuracy)

    def take(self, which: np.ndarray | slice) -> "Groups":
        """The chosen groups (indices, mask or slice over P)."""
        p, g = self.accuracy.shape

        def rows(x):
            return x.reshape(p, g, *x.shape[1:])[which].reshape(-1, *x.shape[1:])

        return Groups(jax.tree.map(rows, self.rollout), self.accuracy[which], self.reward[which])


def join(parts: Sequence[Groups]) -> Groups:
    """Groups of several judgements in one, in order."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def accuracies(
    rollout: Rollout, answers: Sequence[str], decode: Callable[[Sequence[int]], str], verify: Verifier
) -> Float[np.ndarray, " B"]:
    """The verifier's score of every response; `answers` holds one gold answer per row. Host side."""

    def score(row: int) -> Future[float]:
        response = rollout.tokens[row, rollout.prompt_length[row] : rollout.length[row]]
        return threads.submit(verify, decode(response.tolist()), answers[row])

    with verifying() as threads:
        scores = {row: score(row) for row in range(len(answers)) if hosts.is_mine(row)}
        return np.asarray(hosts.divided(lambda row: float(scores[row].result()), len(answers)), np.float32)


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
            if hosts.is_mine(done.row):
                scores[done.row] = threads.submit(score, done)

        rollout = sample(finished)
        sampled = time.monotonic()
        accuracy = np.asarray(hosts.divided(lambda row: float(scores[row].result()), len(answers)), np.float32)
    return Scored(rollout, accuracy, sampled - began, time.monotonic() - sampled)


def judge(rollout: Rollout, accuracy: Float[np.ndarray, " B"], *, group: int, rule: RewardRule) -> Groups:
    """Rewards = accuracy + overlong penalty (lengths in tokens), grouped by prompt.

    Args:
        rollout: host arrays, [P * group] rows.
        accuracy: [P * group] verified scores.
        group: responses per prompt.
        rule: the phase's reward rule.
    """
    penalty = overlong_penalty(
        np.asarray(rollout.response_length),
        max_tokens=rule.max_response_tokens,
        buffer_tokens=rule.overlong_buffer_tokens,
        factor=rule.overlong_factor,
    )
    reward = accuracy + np.asarray(penalty, np.float32)
    return Groups(rollout, accuracy.reshape(-1, group), reward.reshape(-1, group))


def informative(groups: Groups) -> Bool[np.ndarray, " P"]:
    """Dynamic sampling's filter (DAPO, equation 11): the group's accuracies, before the penalty, are not all equal."""
    return groups.accuracy.max(axis=1) != groups.accuracy.min(axis=1)


class Collected(NamedTuple):
    """A full batch of groups, what is left for the next step, and what it took."""

    groups: Groups
    leftover: Groups | None
    generation_batches: int
    sampled_groups: int
    informative_groups: int
    filled_groups: int


def collect(draw: Callable[[], Groups], *, prompts: int, leftover: Groups | None, rule: RewardRule) -> Collected:
    """Draw generation batches until `prompts` groups are informative (or take one batch as it is).

    Args:
        draw: samples and judges the next generation batch of prompts.
        prompts: groups of a full batch.
        leftover: informative groups kept from the step before, used first.
        rule: the phase's reward rule.

    Raises:
        ShortageError: when `rule.max_generation_batches` did not suffice and `rule.on_shortage` is `error`.
    """
    if not rule.max_generation_batches:
        groups = draw()
        return Collected(groups, None, 1, len(groups), int(informative(groups).sum()), 0)
    kept = [] if leftover is None else [leftover]
    spare: list[Groups] = []
    have = sum(len(k) for k in kept)
    drawn = sampled = found = 0
    while have < prompts and drawn < rule.max_generation_batches:
        groups = draw()
        keep = informative(groups)
        kept.append(groups.take(keep))
        spare.append(groups.take(~keep))
        drawn, sampled, found = drawn + 1, sampled + len(groups), found + int(keep.sum())
        have += int(keep.sum())
    filled = max(prompts - have, 0)
    if filled and rule.on_shortage == "error":
        raise ShortageError(
            f"dynamic sampling: {have} of {prompts} groups are informative after {drawn} generation batches; the task "
            "is too easy or too hard for this policy: raise reward.max_generation_batches or set reward.on_shortage: fill"
        )
    every = join([*kept, *spare])  # informative ones first, in the order drawn
    rest = every.take(slice(prompts, have)) if rule.surplus == "keep" and have > prompts else None
    return Collected(every.take(slice(0, prompts)), rest, drawn, sampled, found, filled)


def to_batch(groups: Groups, *, normalize_std: bool = True) -> Batch:
    """Group-relative advantages, one per response, spread over its tokens."""
    rollout = groups.rollout
    advantage = group_relative(jnp.asarray(groups.reward), normalize_std=normalize_std)
    spread = np.broadcast_to(np.asarray(advantage).reshape(-1, 1), rollout.tokens.shape)
    return Batch.of(tokens=rollout.tokens, mask=rollout.mask, advantage=spread, old_logp=rollout.logp)
