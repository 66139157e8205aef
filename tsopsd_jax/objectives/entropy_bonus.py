# pyright: strict, reportUnknownMemberType=false
"""Entropy bonuses: a fixed coefficient, and one that holds the entropy near a target."""

from collections.abc import Mapping

from jaxtyping import Array

from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Control, Knobs, Objective
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def entropy_bonus(
    *, coefficient: float = 1e-3, clip_low: float = 0.2, clip_high: float = 0.28, clip_ratio_c: float = 10.0
) -> Objective:
    """DAPO's surrogate - coefficient x H(p), token-mean: the entropy is exact, over the whole vocabulary.

    Args:
        coefficient: reward for a nat of entropy; negative: a penalty.
        clip_low, clip_high, clip_ratio_c: see `dapo`.
    """
    clip = Clip("entropy_bonus", clip_low, clip_high, clip_ratio_c).checked()

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        per_token = clip.surrogate(stats, batch) - coefficient * stats["entropy"]
        return LossOutput(Mean.of(per_token, batch.mask), clip.metrics(stats, batch))

    return Objective(policy_stats(), loss, tokenwise=True)


def adaptive_entropy_bonus(
    *,
    target_nats: float = 0.2,
    step: float = 0.005,
    initial: float = 0.0,
    most: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_ratio_c: float = 10.0,
) -> Objective:
    """DAPO's surrogate - c x H(p), where c rises by `step` after each update below the target and falls above it.

    Source: Skywork-OR1 (arXiv 2505.22312).

    Args:
        target_nats: mean token entropy to hold.
        step: change of c after an update.
        initial, most: c starts at `initial` and stays in [0, `most`].
        clip_low, clip_high, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: for a target or a step that is not positive, or 0 <= initial <= most broken.
    """
    if not (target_nats > 0 and step > 0 and 0 <= initial <= most):
        raise ValueError(
            "adaptive_entropy_bonus expects target_nats > 0, step > 0 and 0 <= initial <= most, got "
            f"target_nats={target_nats}, step={step}, initial={initial}, most={most}"
        )
    clip = Clip("adaptive_entropy_bonus", clip_low, clip_high, clip_ratio_c).checked()

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        per_token = clip.surrogate(stats, batch) - batch.knobs["coefficient"] * stats["entropy"]
        return LossOutput(Mean.of(per_token, batch.mask), clip.metrics(stats, batch))

    def turn(knobs: Knobs, metrics: Mapping[str, float]) -> Knobs:
        change = step if metrics[ENTROPY] < target_nats else -step
        return {"coefficient": min(max(knobs["coefficient"] + change, 0.0), most)}

    return Objective(policy_stats(), loss, tokenwise=True, control=Control({"coefficient": initial}, turn))
