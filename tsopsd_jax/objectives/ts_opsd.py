# pyright: strict, reportUnknownMemberType=false
"""TS-OPSD, the reheater (arXiv 2606.00755)."""

from jaxtyping import Array

from tsopsd_jax.logit_stats import LibraryStats
from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.reference import check_direction, check_teacher, teacher_metrics, teacher_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def ts_opsd(*, direction: str = "forward", teacher_temperature: float = 1.2, teacher: str = "live") -> Objective:
    """TS-OPSD, the reheater: full-vocabulary KL to a teacher of temperature T, token-mean.

    Args:
        direction: `forward`: KL(teacher || student), gradient p - q; `reverse`: KL(student || teacher), entropy ascent.
        teacher_temperature: T > 1 heats, T < 1 cools, T = 1 is exactly nothing (of a live teacher). The student stays
            at temperature 1 and there is no T^2 factor.
        teacher: `live`: softmax(stop_gradient(z) / T) of the policy's own logits, the paper's; `frozen`:
            softmax(z_reference / T) of its phase's reference, whose ranking of tokens cannot drift.

    Raises:
        ValueError: for another direction or teacher, or a temperature that is not positive.
    """
    kl = f"{check_direction('ts_opsd', direction)}_kl"
    frozen = check_teacher("ts_opsd", teacher)
    live = LibraryStats(("logp", "entropy", kl), teacher_temperature)

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        distance = Mean.of(stats[kl], batch.mask)
        metrics = {ENTROPY: Mean.of(stats["entropy"], batch.mask), f"distil/{kl}_nats": distance}
        return LossOutput(distance, metrics | (teacher_metrics(stats, batch) if frozen else {}))

    return Objective(
        teacher_stats(teacher_temperature, kl) if frozen else live,
        loss,
        tokenwise=True,
        uses_advantage=False,
        policy_temperature=None,
        reference=frozen,
    )
