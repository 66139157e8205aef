"""An objective of one's own: DAPO's surrogate minus coefficient x exact vocabulary entropy.

In a configuration:

    objective: {name: examples/entropy_bonus.py:dapo_with_entropy, hyperparameters: {coefficient: 0.003}}
    reward: {max_generation_batches: 10}
"""

from tsopsd_jax import losses
from tsopsd_jax.objectives import Objective
from tsopsd_jax.types import LossOutput, Mean


def dapo_with_entropy(*, coefficient: float = 0.001, clip_low: float = 0.2, clip_high: float = 0.28) -> Objective:
    """Clipped surrogate - coefficient x H(p), token-mean (nats); a positive coefficient holds the entropy up."""

    def stats(logits, tokens):
        return {"logp": losses.token_logp(logits, tokens), "entropy": losses.entropy(logits)}

    def loss(stats, batch):
        surrogate = losses.clipped_surrogate(
            stats["logp"], batch.old_logp, batch.advantage, clip_low=clip_low, clip_high=clip_high
        )
        return LossOutput(
            loss=Mean.of(surrogate - coefficient * stats["entropy"], batch.mask),
            metrics={"policy/entropy_nats": Mean.of(stats["entropy"], batch.mask)},
        )

    return Objective(stats, loss, tokenwise=True)
