"""CISPO (arXiv 2506.13585): clipped weights, no clipped token. `objective: {name: examples/cispo.py:cispo}`"""

import jax
import jax.numpy as jnp

from tsopsd_jax import losses
from tsopsd_jax.objectives import Objective, policy_stats
from tsopsd_jax.types import LossOutput, Mean


def cispo(*, ratio_low: float = 0.0, ratio_high: float = 5.0) -> Objective:
    """-stop_gradient(clip(r, ratio_low, ratio_high)) A logp, token-mean: every token keeps its gradient."""

    def loss(stats, batch):
        ratio = jnp.exp(losses.log_ratio(stats["logp"], batch.old_logp))
        weight = jax.lax.stop_gradient(jnp.clip(ratio, ratio_low, ratio_high))
        entropy, surrogate = stats["entropy"], -weight * batch.advantage * stats["logp"]
        return LossOutput(Mean.of(surrogate, batch.mask), {"policy/entropy_nats": Mean.of(entropy, batch.mask)})

    return Objective(policy_stats(), loss, tokenwise=True)
