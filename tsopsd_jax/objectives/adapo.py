# pyright: strict
"""ADAPO: the upper clip as a controller of entropy (arXiv 2603.11682)."""

from jaxtyping import Array

from tsopsd_jax.objectives.anchor import anchored
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def adapo(
    *,
    clip_high: float = 0.28,
    least: float = 0.035,
    most: float = 2.24,
    target_nats: float | None = None,
    clip_low: float = 0.2,
    clip_ratio_c: float = 10.0,
) -> Objective:
    """DAPO's surrogate, whose clip_high doubles after an update below the entropy's target
    and halves after one above it.

    A wider upper clip lets rare right tokens rise further. Does nothing at ratio 1: take several updates a rollout.
    Source: arXiv 2603.11682; the limits, three doublings either way, are chosen here.

    Args:
        clip_high: at the phase's start.
        least, most: its limits.
        target_nats: mean token entropy to hold; None: that of the phase's first update.
        clip_low, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: for 0 < least <= clip_high <= most broken, clip ranges as in `dapo`,
            or a target that is not positive.
    """
    if not 0 < least <= clip_high <= most:
        raise ValueError(
            f"adapo expects 0 < least <= clip_high <= most, got clip_high={clip_high}, least={least}, most={most}"
        )
    widest = Clip("adapo", clip_low, most, clip_ratio_c).checked()

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        clip = widest._replace(high=batch.knobs["clip_high"])
        return LossOutput(Mean.of(clip.surrogate(stats, batch), batch.mask), clip.metrics(stats, batch))

    def turn(value: float, below: bool) -> float:
        return min(2 * value, most) if below else max(value / 2, least)

    control = anchored("clip_high", clip_high, turn, target_nats=target_nats)
    return Objective(policy_stats(), loss, tokenwise=True, control=control)
