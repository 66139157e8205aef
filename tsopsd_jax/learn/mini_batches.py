"""Several updates of one rollout: its batch cut into mini-batches of whole groups, and what the updates report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from tsopsd_jax.metric_names import (
    ENTROPY,
    ENTROPY_AT_POLICY_TEMPERATURE,
    LOGP_GAP_MAX,
    LOGP_GAP_MEAN,
    RATIO_OUTSIDE,
    SKIPPED,
    START_KL,
    UPDATES,
)
from tsopsd_jax.types import Batch

OF_THE_SAMPLER = (ENTROPY, ENTROPY_AT_POLICY_TEMPERATURE, LOGP_GAP_MEAN, LOGP_GAP_MAX, RATIO_OUTSIDE, START_KL)
"""Metrics of the policy that drew the rollout: the first update alone measures it, those after it have moved on."""
POLICY, LAST = "policy/", "last_update/"
"""Metrics of the first group stand a second time under the other, as the last update of a rollout reports them."""


def mini_batch_rows(
    *, groups: int, responses: int, updates: int, passes: int, seed: int, step: int
) -> Iterator[Int[np.ndarray, " rows"]]:
    """Choose the rows of each update of a rollout, one mini-batch after the other: whole groups, each once in a pass.

    A pass's order of the groups is a permutation that (seed, step, pass) decides, the same in every process. A pass of
    one update takes the rows as they stand.

    Args:
        groups, responses: of the rollout: a group's `responses` rows lie side by side.
        updates: of a pass, a divisor of `groups`.
        passes: over the rollout.
        seed, step: of the run, and the step's number.
    """
    assert groups % updates == 0, f"{groups} groups do not divide into {updates} mini-batches"
    for number in range(1, passes + 1):
        # Numbered from 1: numpy's seeds [a, b] and [a, b, 0] are one, and [seed, epoch] is that of the data's order.
        rng = np.random.default_rng([seed, step, number])
        order = rng.permutation(groups) if updates > 1 else np.arange(groups)
        for part in order.reshape(updates, -1):
            yield (part[:, None] * responses + np.arange(responses)).reshape(-1)


def take_mini_batch(batch: Batch, rows: Int[np.ndarray, " rows"]) -> Batch:
    """Take rows of a batch, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], batch)


class Reported(NamedTuple):
    """What one update reports, on the host: its metrics, and the weights of those that are means (`UpdateOut`)."""

    metrics: Mapping[str, float]
    weights: Mapping[str, float]


def together(updates: Sequence[Reported]) -> dict[str, float]:
    """Sum up the metrics of a rollout's updates as those of one step.

    A metric is the mean over the updates, sum of value x weight / sum of weights: a mean over tokens is then one over
    the tokens of all updates; what is no mean (the gradient's norm, the learning rate) has the weight 1. Updates that
    were not finite are left out of the means, unless all were. Exceptions: `OF_THE_SAMPLER` is the first update's,
    `optim/skipped` a count. Added are the number of updates, and each `policy/NAME` of the last update as
    `last_update/NAME`: there the ratio is furthest from 1. A single update's metrics stay as they are.
    """
    first, last = updates[0].metrics, updates[-1].metrics
    if len(updates) == 1:
        return dict(first)
    finite = [update for update in updates if not update.metrics[SKIPPED]] or updates

    def mean(name: str) -> float:
        weights = [update.weights.get(name, 1.0) for update in finite]
        total = sum(update.metrics[name] * w for update, w in zip(finite, weights, strict=True))
        return total / max(sum(weights), 1.0)

    found = {name: first[name] if name in OF_THE_SAMPLER else mean(name) for name in first}
    found |= {SKIPPED: sum(update.metrics[SKIPPED] for update in updates), UPDATES: len(updates)}
    return found | {LAST + name.removeprefix(POLICY): x for name, x in last.items() if name.startswith(POLICY)}
