# pyright: strict, reportUnknownMemberType=false
"""Policy gradients at the tokens of highest entropy alone (arXiv 2506.01939)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax.objectives.base import Objective, first, share, token_hash
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def top_entropy(
    *, fraction: float = 0.2, clip_low: float = 0.2, clip_high: float = 0.28, clip_ratio_c: float = 10.0
) -> Objective:
    """DAPO's surrogate at the `fraction` of the update's tokens whose entropy is highest; the others get no gradient.

    All response tokens count in the mean. Source: "Beyond the 80/20 rule" (arXiv 2506.01939).

    Args:
        fraction: share of the update's response tokens.
        clip_low, clip_high, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"top_entropy expects 0 < fraction <= 1, got fraction={fraction}")
    clip = Clip("top_entropy", clip_low, clip_high, clip_ratio_c).checked()

    def select(stats: dict[str, Array], batch: Batch) -> Batch:
        order = jnp.where(batch.mask, -stats["entropy"], jnp.inf)
        chosen = batch.mask & first((order, token_hash(batch)), share(batch, fraction))
        return dataclasses.replace(batch, weight=chosen.astype(jnp.float32))

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        assert batch.weight is not None
        kept = {"policy/top_entropy_fraction": Mean.of(batch.weight, batch.mask)}
        return LossOutput(
            Mean.of(clip.surrogate(stats, batch) * batch.weight, batch.mask), clip.metrics(stats, batch) | kept
        )

    return Objective(policy_stats(), loss, tokenwise=True, select=select)
