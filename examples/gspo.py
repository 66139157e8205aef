"""GSPO (arXiv 2507.18071): one ratio for a response. `objective: {name: examples/gspo.py:gspo}`"""

import jax.numpy as jnp

from tsopsd_jax import losses
from tsopsd_jax.objectives import Objective, policy_stats
from tsopsd_jax.types import LossOutput, Mean


def gspo(*, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """The clipped surrogate of each response's mean log-probability, averaged over responses; nothing at ratio 1."""

    def loss(stats, batch):
        n = jnp.sum(batch.mask, axis=1, dtype=jnp.float32)
        per_token = (stats["logp"], batch.old_logp, batch.advantage)
        means = (jnp.sum(x, axis=1, where=batch.mask) / jnp.maximum(n, 1) for x in per_token)
        per_row = losses.clipped_surrogate(*means, clip_low=clip_low, clip_high=clip_high, clip_ratio_c=1e9)
        return LossOutput(Mean.of(per_row, n > 0), {"policy/entropy_nats": Mean.of(stats["entropy"], batch.mask)})

    return Objective(policy_stats(), loss)
