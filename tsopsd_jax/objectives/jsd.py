# pyright: strict, reportUnknownMemberType=false
"""The reheater with the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax import losses
from tsopsd_jax.logit_stats import check_temperature
from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.types import Batch, LossOutput, Mean


def jsd(*, beta: float = 0.5, teacher_temperature: float = 1.2) -> Objective:
    """Generalised JSD between the self-teacher t = softmax(stop_gradient(z) / T) and the policy s = softmax(z), token-mean.

        m = (1 - beta) s + beta t;   beta KL(t || m) + (1 - beta) KL(s || m)

    beta = 0 is KL(t || s), the forward KL; beta = 1 is KL(s || t), the reverse one. Source: GKD (arXiv 2306.13649), eq. 1.

    Args:
        beta: in [0, 1].
        teacher_temperature: T > 1 heats, T < 1 cools, T = 1 is exactly nothing.

    Raises:
        ValueError: for a beta outside [0, 1], or a temperature that is not positive.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd expects 0 <= beta <= 1, got beta={beta}")
    check_temperature(teacher_temperature)

    def divergence(logits: Array) -> Array:
        teacher = losses.log_softmax(jax.lax.stop_gradient(logits) / teacher_temperature)
        student = losses.log_softmax(logits)
        if beta in (0, 1):
            q, p = (teacher, student) if beta == 0 else (student, teacher)
            return jnp.sum(losses.kl_terms(q, p), axis=-1)
        middle = jnp.logaddexp(student + jnp.log1p(-beta), teacher + jnp.log(beta))
        of_teacher, of_student = (jnp.sum(losses.kl_terms(q, middle), axis=-1) for q in (teacher, student))
        return beta * of_teacher + (1 - beta) * of_student

    def stats(logits: Array, tokens: Array) -> dict[str, Array]:
        return {
            "logp": losses.token_logp(logits, tokens),
            "entropy": losses.entropy(logits),
            "jsd": divergence(logits),
        }

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        found = Mean.of(stats["jsd"], batch.mask)
        entropy = Mean.of(stats["entropy"], batch.mask)
        return LossOutput(found, {ENTROPY: entropy, "distil/jsd_nats": found})

    return Objective(stats, loss, tokenwise=True, uses_advantage=False, policy_temperature=None)
