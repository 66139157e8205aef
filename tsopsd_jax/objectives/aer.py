# pyright: strict
"""AER: an entropy bonus whose coefficient is anchored to the initial entropy (arXiv 2510.10959)."""

from jaxtyping import Array

from tsopsd_jax.objectives.anchor import anchored
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def aer(
    *,
    target_fraction: float = 0.4,
    step: float = 0.005,
    initial: float = 0.0,
    most: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_ratio_c: float = 10.0,
) -> Objective:
    """DAPO's surrogate - c x H(p), where c rises by `step` after each update below a fraction
    of the initial entropy, else falls.

    The initial entropy is that of the phase's first update. Source: AER (arXiv 2510.10959), whose best fraction is
    about 0.4. Of its three parts two are here, the anchored target and the global coefficient; the third, more bonus
    for harder prompts, needs each group's accuracy, which a batch does not carry. `step` and `most` are those of
    `adaptive_entropy_bonus`, chosen here.

    Args:
        target_fraction: the target as a fraction of the initial entropy.
        step: change of c after an update.
        initial, most: c starts at `initial` and stays in [0, `most`].
        clip_low, clip_high, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: for a fraction or a step that is not positive, or 0 <= initial <= most broken.
    """
    if not (target_fraction > 0 and step > 0 and 0 <= initial <= most):
        raise ValueError(
            "aer expects target_fraction > 0, step > 0 and 0 <= initial <= most, got "
            f"target_fraction={target_fraction}, step={step}, initial={initial}, most={most}"
        )
    clip = Clip("aer", clip_low, clip_high, clip_ratio_c).checked()

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        per_token = clip.surrogate(stats, batch) - batch.knobs["coefficient"] * stats["entropy"]
        return LossOutput(Mean.of(per_token, batch.mask), clip.metrics(stats, batch))

    def turn(value: float, below: bool) -> float:
        return min(value + step, most) if below else max(value - step, 0.0)

    control = anchored("coefficient", initial, turn, fraction=target_fraction)
    return Objective(policy_stats(), loss, tokenwise=True, control=control)
