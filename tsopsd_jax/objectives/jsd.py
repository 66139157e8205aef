# pyright: strict, reportUnknownMemberType=false
"""The reheater with the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax import losses
from tsopsd_jax.logit_stats import check_temperature
from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.reference import check_teacher, teacher_metrics, teacher_stats
from tsopsd_jax.types import Batch, LossOutput, Mean

_LEAST = -1e30
"""The log-probability of a token that has none."""


def jsd(*, beta: float = 0.5, teacher_temperature: float = 1.2, teacher: str = "live") -> Objective:
    """Generalised JSD between the teacher t = softmax(stop_gradient(z) / T) and the policy s = softmax(z), token-mean.

        m = (1 - beta) s + beta t;   beta KL(t || m) + (1 - beta) KL(s || m)

    beta = 0 is KL(t || s), the forward KL; beta = 1 is KL(s || t), the reverse one. Source: GKD (arXiv 2306.13649), eq.
    1.

    Args:
        beta: in [0, 1].
        teacher_temperature: T > 1 heats, T < 1 cools, T = 1 is exactly nothing (of a live teacher).
        teacher: `live`: of the policy's own logits z; `frozen`: of its phase's reference.

    Raises:
        ValueError: for a beta outside [0, 1], another teacher, or a temperature that is not positive.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd expects 0 <= beta <= 1, got beta={beta}")
    frozen, t = check_teacher("jsd", teacher), check_temperature(teacher_temperature)
    divergence = _divergence(beta)

    def live(logits: Array, tokens: Array) -> dict[str, Array]:
        return {
            "logp": losses.token_logp(logits, tokens),
            "entropy": losses.entropy(logits),
            "jsd": divergence(logits / t, logits),
        }

    beside = teacher_stats(t)

    def of_reference(logits: Array, tokens: Array, reference_logits: Array) -> dict[str, Array]:
        return beside(logits, tokens, reference_logits) | {"jsd": divergence(reference_logits / t, logits)}

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        found = Mean.of(stats["jsd"], batch.mask)
        metrics = {ENTROPY: Mean.of(stats["entropy"], batch.mask), "distil/jsd_nats": found}
        return LossOutput(found, metrics | (teacher_metrics(stats, batch) if frozen else {}))

    return Objective(
        of_reference if frozen else live,
        loss,
        tokenwise=True,
        uses_advantage=False,
        policy_temperature=None,
        reference=frozen,
    )


def _divergence(beta: float) -> Callable[[Array, Array], Array]:
    """(teacher's logits [..., V], student's) -> generalised JSD [...]; no gradient into the teacher."""

    def of(teacher_logits: Array, student_logits: Array) -> Array:
        # Where both are -inf, so would their logarithm of a sum be, and its gradient no number.
        teacher = jnp.maximum(losses.log_softmax(jax.lax.stop_gradient(teacher_logits)), _LEAST)
        student = jnp.maximum(losses.log_softmax(student_logits), _LEAST)
        if beta in (0, 1):
            q, p = (teacher, student) if beta == 0 else (student, teacher)
            return jnp.sum(losses.kl_terms(q, p), axis=-1)
        middle = jnp.logaddexp(student + jnp.log1p(-beta), teacher + jnp.log(beta))
        of_teacher, of_student = (jnp.sum(losses.kl_terms(q, middle), axis=-1) for q in (teacher, student))
        return beta * of_teacher + (1 - beta) * of_student

    return of
