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


def to_batch(groups: Groups, *, normalize_std: bool = True) -> Batch:
    """Group-relative advantages, one per response, spread over its tokens."""
    rollout = groups.rollout
    advantage = group_relative(jnp.asarray(groups.reward), normalize_std=normalize_std)
    spread = np.broadcast_to(np.asarray(advantage).reshape(-1, 1), rollout.tokens.shape)
    return Batch.of(tokens=rollout.tokens, mask=rollout.mask, advantage=spread, old_logp=rollout.logp)
