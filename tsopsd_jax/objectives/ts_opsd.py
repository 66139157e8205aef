# pyright: strict, reportUnknownMemberType=false
"""TS-OPSD, the reheater (arXiv 2606.00755)."""

from jaxtyping import Array

from tsopsd_jax.logit_stats import LibraryStats
from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.types import Batch, LossOutput, Mean


def ts_opsd(*, direction: str = "forward", teacher_temperature: float = 1.2) -> Objective:
    """TS-OPSD, the reheater: full-vocabulary KL to the self-teacher softmax(stop_gradient(z) / T), token-mean.

    Args:
        direction: `forward`: KL(teacher || student), gradient p - q; `reverse`: KL(student || teacher), entropy ascent.
        teacher_temperature: T > 1 heats, T < 1 cools, T = 1 is exactly nothing. The student stays at temperature 1
            and there is no T^2 factor.

    Raises:
        ValueError: for another direction, or a temperature that is not positive.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"ts_opsd: direction must be 'forward' or 'reverse', got {direction!r}")
    asked = LibraryStats(("logp", "entropy", f"{direction}_kl"), teacher_temperature)

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        kl = Mean.of(stats[f"{direction}_kl"], batch.mask)
        return LossOutput(
            loss=kl,
            metrics={
                ENTROPY: Mean.of(stats["entropy"], batch.mask),
                f"distil/{direction}_kl_nats": kl,
            },
        )

    return Objective(asked, loss, tokenwise=True, uses_advantage=False, policy_temperature=None)
