# pyright: strict
"""Advantages with a bonus for uncertain tokens (arXiv 2506.14758)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def entropy_advantage(
    *,
    alpha: float = 0.4,
    kappa: float = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_ratio_c: float = 10.0,
) -> Objective:
    """DAPO's surrogate with the advantage A + min(alpha x H, |A| / kappa), H the token's entropy without a gradient.

    The bonus reinforces tokens of right responses where the policy hesitates, and spares those of wrong ones; with
    kappa > 1 no advantage changes its sign, and none is made of nothing. It acts at ratio 1 too. Source: "Reasoning
    with exploration: an entropy perspective" (arXiv 2506.14758),
    with its constants for GRPO (0.1 instead of 0.4 for PPO).

    Args:
        alpha: bonus for a nat of entropy.
        kappa: the bonus is at most |A| / kappa.
        clip_low, clip_high, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: for a negative alpha, or a kappa of 1 or less.
    """
    if alpha < 0 or kappa <= 1:
        raise ValueError(f"entropy_advantage expects alpha >= 0 and kappa > 1, got alpha={alpha}, kappa={kappa}")
    clip = Clip("entropy_advantage", clip_low, clip_high, clip_ratio_c).checked()

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        entropy = jax.lax.stop_gradient(stats["entropy"])
        bonus = jnp.minimum(alpha * entropy, jnp.abs(batch.advantage) / kappa)
        shaped = dataclasses.replace(batch, advantage=batch.advantage + bonus)
        found = clip.metrics(stats, shaped) | {"policy/entropy_bonus_mean": Mean.of(bonus, batch.mask)}
        return LossOutput(Mean.of(clip.surrogate(stats, shaped), batch.mask), found)

    return Objective(policy_stats(), loss, tokenwise=True)
