"""Where stochastic rollouts leave the greedy one of the same policy, and how likely their tokens are.

TS-OPSD, figure 6 and table 2.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


def fork_position(stochastic: Sequence[int], greedy: Sequence[int]) -> int:
    """The index of the first token that differs, counted from 0.

    Where one rollout is the beginning of the other: its length.
    """
    length = min(len(stochastic), len(greedy))
    apart = np.flatnonzero(np.asarray(stochastic[:length]) != np.asarray(greedy[:length]))
    return int(apart[0]) if apart.size else length


def edit_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """The least number of tokens to insert, delete or replace (Levenshtein), divided by the longer length.

    0 for two empty rollouts.
    """
    if not a or not b:
        return float(len(a) != len(b))
    first, second = np.asarray(a), np.asarray(b)
    at = np.arange(len(second) + 1)
    row = at
    for number, token in enumerate(first, start=1):
        # Without insertions, then with them: row[j] = min over i <= j of new[i] + (j - i).
        new = np.minimum(row[1:] + 1, row[:-1] + (second != token))
        new = np.concatenate([[number], new])
        row = np.minimum.accumulate(new - at) + at
    return float(row[-1]) / max(len(a), len(b))


class Stochastic(NamedTuple):
    """A stochastic rollout, the log-probability (nats) of each of its tokens, and the greedy rollout of the same
    prompt."""

    tokens: Sequence[int]
    logp: Sequence[float]
    greedy: Sequence[int]


class Forks(NamedTuple):
    """A row of table 2, and the curve of figure 6."""

    edit_distance: float
    fork_position: float
    logp_abs_mean_nats: float
    """Over all tokens."""
    identical_fraction: float
    """Share of rollouts that are the greedy one; their fork position is their length."""
    rollouts: int
    logp_by_position_nats: np.ndarray
    """Mean over the rollouts that reach a position, [longest]."""
    rollouts_by_position: np.ndarray


def measure_forks(rollouts: Iterable[Stochastic]) -> Forks:
    """Measure the rollouts of one policy.

    Raises:
        ValueError: if there are none.
    """
    distances, places, same = [], [], []
    total, count = np.zeros(0), np.zeros(0, np.int64)
    for one in rollouts:
        distances.append(edit_distance(one.tokens, one.greedy))
        places.append(fork_position(one.tokens, one.greedy))
        same.append(list(one.tokens) == list(one.greedy))
        more = max(0, len(one.logp) - len(total))
        total, count = np.pad(total, (0, more)), np.pad(count, (0, more))
        total[: len(one.logp)] += one.logp
        count[: len(one.logp)] += 1
    if not distances or not count.sum():
        raise ValueError("forks: expected at least one rollout, got none")
    return Forks(
        float(np.mean(distances)),
        float(np.mean(places)),
        float(-total.sum() / count.sum()),
        float(np.mean(same)),
        len(distances),
        total / count,
        count,
    )
