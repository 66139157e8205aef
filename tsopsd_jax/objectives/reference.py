# pyright: strict, reportUnknownMemberType=false
"""What objectives share that compare the policy with a frozen reference: its statistics, and the distance to a phase's
start."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tsopsd_jax import losses
from tsopsd_jax.head import Stats, call_stats
from tsopsd_jax.logit_stats import LibraryStats, check_temperature
from tsopsd_jax.metric_names import AGREEMENT, START_KL, TEACHER_ENTROPY
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.types import Batch, LossOutput, Mean

TEACHERS = ("live", "frozen")


def check_teacher(name: str, teacher: str) -> bool:
    """Whether the teacher of the objective called `name` is the frozen one.

    Raises:
        ValueError: for another word than live or frozen.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"{name}: teacher must be 'live' or 'frozen', got {teacher!r}")
    return teacher == "frozen"


def check_direction(name: str, direction: str) -> str:
    """The direction.

    Raises:
        ValueError: for another word than forward or reverse.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"{name}: direction must be 'forward' or 'reverse', got {direction!r}")
    return direction


def top1_agreement(logits: Float[Array, "*N V"], reference_logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """1.0 where an entry is the largest of both, else 0.0: with ties, any of the largest will do.  [..., V] x2 -> [...]

    (Two maxima and no argmax, which costs a CPU more than all the rest.)
    """
    tops = [z == jnp.max(z, axis=-1, keepdims=True) for z in (logits, reference_logits)]
    return jnp.any(tops[0] & tops[1], axis=-1).astype(jnp.float32)


def teacher_stats(teacher_temperature: float, *kls: str) -> Stats:
    """Statistics of the policy p = softmax(z) against the teacher q = softmax(z_reference / T).

    `logp`, `entropy` (of p), `teacher_entropy` (of q), `agreement`, and of `forward_kl` = KL(q || p), `reverse_kl` =
    KL(p || q) those that are named. The KLs are sums of terms that are never negative: exact where both are collapsed.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    t = check_temperature(teacher_temperature)
    own, between = LibraryStats(("logp", "entropy")), {"forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl}

    def stats(logits: Array, tokens: Array, reference_logits: Array) -> dict[str, Array]:
        teacher = jax.lax.stop_gradient(reference_logits) / t
        found = own(logits, tokens) | {name: between[name](teacher, logits) for name in kls}
        return found | {
            "teacher_entropy": losses.entropy(teacher),
            "agreement": top1_agreement(logits, reference_logits),
        }

    return stats


def teacher_metrics(stats: dict[str, Array], batch: Batch) -> dict[str, Mean]:
    """Means of the teacher's entropy and of how often its first choice is the policy's; of `teacher_stats`."""
    return {
        TEACHER_ENTROPY: Mean.of(stats["teacher_entropy"], batch.mask),
        AGREEMENT: Mean.of(stats["agreement"], batch.mask),
    }


def with_start_kl(objective: Objective) -> Objective:
    """The objective with one more metric, `policy/start_kl_nats`: KL(policy || reference) over the whole vocabulary,
    exact, at temperature 1. Its phase's reference is the policy that the phase began with. Nothing is learned from
    it."""

    @functools.wraps(objective.stats)  # errors name the place of the objective's own functions
    def stats(
        logits: Array, tokens: Array, reference_logits: Array, *, sampling_temperature: Array | None = None
    ) -> dict[str, Array]:
        beside = reference_logits if objective.reference else None
        apart = losses.reverse_kl(reference_logits, jax.lax.stop_gradient(logits))
        return call_stats(objective.stats, logits, tokens, beside, sampling_temperature) | {"start_kl": apart}

    @functools.wraps(objective.loss)
    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        out = objective.loss(stats, batch)
        return LossOutput(out.loss, out.metrics | {START_KL: Mean.of(stats["start_kl"], batch.mask)})

    return objective._replace(stats=stats, loss=loss, reference=True)
