"""Dynamic sampling (DAPO): generation batches are drawn until enough groups are informative."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from tsopsd_jax.judge.groups import Groups, RewardRule, join


class ShortageError(RuntimeError):
    """Dynamic sampling did not find enough informative groups; the message says how many and what to do."""


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
            "is too easy or too hard for this policy: raise reward.max_generation_batches or set reward.on_shortage: "
            "fill"
        )
    every = join([*kept, *spare])  # informative ones first, in the order drawn
    rest = every.take(slice(prompts, have)) if rule.surplus == "keep" and have > prompts else None
    return Collected(every.take(slice(0, prompts)), rest, drawn, sampled, found, filled)
