"""SAPO (arXiv 2511.20347): a soft gate instead of a clip. `objective: {name: examples/sapo.py:sapo}`"""

import jax
import jax.numpy as jnp

from tsopsd_jax import losses
from tsopsd_jax.objectives import Objective, policy_stats
from tsopsd_jax.types import LossOutput, Mean


def sapo(*, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Objective:
    """-A (4 / tau) sigmoid(tau (r - 1)), averaged over each response, then over all; tau follows A's sign."""

    def loss(stats, batch):
        tau = jnp.where(batch.advantage > 0, tau_positive, tau_negative)
        ratio = jnp.exp(losses.log_ratio(stats["logp"], batch.old_logp))
        gate = 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))
        n = jnp.sum(batch.mask, axis=1, dtype=jnp.float32)
        per_row = jnp.sum(-batch.advantage * gate, axis=1, where=batch.mask) / jnp.maximum(n, 1)
        return LossOutput(Mean.of(per_row, n > 0), {"policy/entropy_nats": Mean.of(stats["entropy"], batch.mask)})

    return Objective(policy_stats(), loss)
