"""Dr.GRPO (arXiv 2503.20783). `objective: {name: examples/dr_grpo.py:dr_grpo}, reward: {normalize_std: false}`"""

import jax.numpy as jnp

from tsopsd_jax import losses
from tsopsd_jax.objectives import Objective, policy_stats
from tsopsd_jax.types import LossOutput, Mean


def dr_grpo(*, max_tokens: int = 8192, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """The clipped surrogate, summed over a response, over `max_tokens` (the phase's limit), averaged over responses."""

    def loss(stats, batch):
        clip = {"clip_low": clip_low, "clip_high": clip_high, "clip_ratio_c": 1e9}
        per_token = losses.clipped_surrogate(stats["logp"], batch.old_logp, batch.advantage, **clip)
        per_row = jnp.sum(per_token, axis=1, where=batch.mask) / max_tokens
        metrics = {"policy/entropy_nats": Mean.of(stats["entropy"], batch.mask)}
        return LossOutput(Mean.of(per_row, jnp.any(batch.mask, axis=1)), metrics)

    return Objective(policy_stats(), loss)
