# pyright: strict, reportUnknownMemberType=false
"""On-policy distillation from another model of the same vocabulary: plain, and aware of the teacher's entropy."""

import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.reference import teacher_metrics, teacher_stats
from tsopsd_jax.objectives.ts_opsd import ts_opsd
from tsopsd_jax.types import Batch, LossOutput, Mean


def opd(*, direction: str = "reverse", teacher_temperature: float = 1.0) -> Objective:
    """On-policy distillation: full-vocabulary KL between the policy and softmax(z_reference / T), on the policy's
    responses.

    The same as `ts_opsd` with a frozen teacher; the reference is another model (GKD, arXiv 2306.13649).

    Args:
        direction: `reverse`: KL(policy || teacher); `forward`: KL(teacher || policy).
        teacher_temperature: T of the teacher.

    Raises:
        ValueError: for another direction, or a temperature that is not positive.
    """
    return ts_opsd(direction=direction, teacher_temperature=teacher_temperature, teacher="frozen")


def eopd(*, threshold_nats: float = 0.8, coefficient: float = 1.0, teacher_temperature: float = 1.0) -> Objective:
    """Entropy-aware on-policy distillation (arXiv 2603.07079), over the whole vocabulary, token-mean.

        KL(p || q) + coefficient 1[H(q) > threshold] KL(q || p),   p the policy, q = softmax(z_reference / T)

    The reverse KL alone makes the policy choose one of the teacher's ways; where the teacher itself is undecided the
    forward KL keeps them all.

    Args:
        threshold_nats: entropy of the teacher above which the forward KL is added.
        coefficient: of the forward KL.
        teacher_temperature: T of the teacher.

    Raises:
        ValueError: for a negative threshold or coefficient, or a temperature that is not positive.
    """
    if threshold_nats < 0 or coefficient < 0:
        raise ValueError(
            f"eopd expects threshold_nats >= 0 and coefficient >= 0, got threshold_nats={threshold_nats}, "
            f"coefficient={coefficient}"
        )

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        undecided = (stats["teacher_entropy"] > threshold_nats).astype(jnp.float32)
        distance = stats["reverse_kl"] + coefficient * undecided * stats["forward_kl"]
        found = {
            ENTROPY: stats["entropy"],
            "distil/reverse_kl_nats": stats["reverse_kl"],
            "distil/forward_kl_nats": stats["forward_kl"],
            "distil/undecided_fraction": undecided,
        }
        metrics = {name: Mean.of(x, batch.mask) for name, x in found.items()}
        return LossOutput(Mean.of(distance, batch.mask), metrics | teacher_metrics(stats, batch))

    return Objective(
        teacher_stats(teacher_temperature, "reverse_kl", "forward_kl"),
        loss,
        tokenwise=True,
        uses_advantage=False,
        policy_temperature=None,
        reference=True,
    )
