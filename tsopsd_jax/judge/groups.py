"""Judged groups: rewards from verified responses, and advantages from rewards."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tsopsd_jax.advantages import group_relative
from tsopsd_jax.rewards import overlong_penalty
from tsopsd_jax.types import Batch, Rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRule:
    """How a phase turns verified responses into advantages, and what dynamic sampling does. Sources:
    `config.schema`."""

    overlong_buffer_tokens: int = 0
    """Width of the penalty's ramp, which ends at the longest response [P: 1024]; 0: no penalty"""
    overlong_factor: float = 1.0
    """Penalty of a response that is cut, in units of reward [V: 1.0]"""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation."""
    max_generation_batches: int = 0
    """Dynamic sampling draws at most this many batches a step [V: 10]; 0: no dynamic sampling."""
    surplus: str = "drop"
    """Informative groups beyond a full batch: drop [V], or keep for the next step."""
    on_shortage: str = "error"
    """When the limit is reached: error [V], or fill with uninformative groups: their accuracy gives no advantage,
    though the length penalty may."""

    def __post_init__(self):
        if self.surplus not in ("drop", "keep"):
            raise ValueError(f"surplus must be 'drop' or 'keep', got {self.surplus!r}")
        if self.on_shortage not in ("error", "fill"):
            raise ValueError(f"on_shortage must be 'error' or 'fill', got {self.on_shortage!r}")
        for name in ("overlong_buffer_tokens", "overlong_factor", "max_generation_batches"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must be at least 0, got {vars(self)[name]}")


class Groups(NamedTuple):
    """Judged groups on the host (numpy): rows of `rollout` are [P * G], the responses of a prompt side by side."""

    rollout: Rollout
    accuracy: Float[np.ndarray, "P G"]
    reward: Float[np.ndarray, "P G"]

    def __len__(self) -> int:
        return len(self.accuracy)

    def take(self, which: np.ndarray | slice) -> "Groups":
        """Take some groups (indices, mask or slice over P)."""
        p, g = self.accuracy.shape

        def rows(x):
            return x.reshape(p, g, *x.shape[1:])[which].reshape(-1, *x.shape[1:])

        return Groups(jax.tree.map(rows, self.rollout), self.accuracy[which], self.reward[which])


def join(parts: Sequence[Groups]) -> Groups:
    """Join the groups of several judgements, in order."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def judge(
    rollout: Rollout,
    accuracy: Float[np.ndarray, " B"],
    *,
    group: int,
    rule: RewardRule,
    max_response_tokens: int,
    reward: Float[np.ndarray, " B"] | None = None,
) -> Groups:
    """Judge responses: reward + overlong penalty (lengths in tokens), grouped by prompt.

    Args:
        rollout: host arrays, [P * group] rows.
        accuracy: [P * group] verified scores.
        group: responses per prompt.
        rule: the phase's reward rule.
        max_response_tokens: the longest response that was allowed, where the penalty is largest.
        reward: [P * group] rewards before the penalty; None: the accuracy.

    Raises:
        ValueError: if the penalty's ramp is longer than that.
    """
    penalty = overlong_penalty(
        np.asarray(rollout.response_length),
        max_tokens=max_response_tokens,
        buffer_tokens=rule.overlong_buffer_tokens,
        factor=rule.overlong_factor,
    )
    reward = (accuracy if reward is None else reward) + np.asarray(penalty, np.float32)
    return Groups(rollout, accuracy.reshape(-1, group), reward.reshape(-1, group))


def to_batch(groups: Groups, *, normalize_std: bool = True) -> Batch:
    """Make a batch of judged groups: group-relative advantages, one per response, spread over its tokens."""
    rollout = groups.rollout
    advantage = group_relative(jnp.asarray(groups.reward), normalize_std=normalize_std)
    spread = np.broadcast_to(np.asarray(advantage).reshape(-1, 1), rollout.tokens.shape)
    return Batch.of(tokens=rollout.tokens, mask=rollout.mask, advantage=spread, old_logp=rollout.logp)
