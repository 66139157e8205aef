"""DAPO (arXiv 2503.14476)."""

import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax import losses
from tsopsd_jax.logit_stats import LibraryStats
from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.types import Batch, LossOutput, Mean


def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28, clip_ratio_c: float = 10.0) -> Objective:
    """DAPO (arXiv 2503.14476): clip-higher, dual clip, token-mean. No KL term, no entropy bonus.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_ratio_c: dual clip: bound on the ratio where the advantage is negative.

    Raises:
        ValueError: for clip ranges outside 0 <= clip_low <= 1, 0 <= clip_high, 1 + clip_high <= clip_ratio_c.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0 and clip_ratio_c >= 1 + clip_high):
        raise ValueError(
            "dapo expects 0 <= clip_low <= 1, clip_high >= 0 and clip_ratio_c >= 1 + clip_high, got "
            f"clip_low={clip_low}, clip_high={clip_high}, clip_ratio_c={clip_ratio_c}"
        )

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        per_token = losses.clipped_surrogate(
            stats["logp"],
            batch.old_logp,
            batch.advantage,
            clip_low=clip_low,
            clip_high=clip_high,
            clip_ratio_c=clip_ratio_c,
        )
        log_ratio = losses.log_ratio(stats["logp"], batch.old_logp)
        ratio = jnp.exp(log_ratio)
        up, down = batch.advantage > 0, batch.advantage < 0
        clipped = (up & (ratio > 1 + clip_high)) | (down & (ratio < 1 - clip_low))
        dual = down & (ratio > clip_ratio_c)
        return LossOutput(
            loss=Mean.of(per_token, batch.mask),
            metrics={
                ENTROPY: Mean.of(stats["entropy"], batch.mask),
                "policy/ratio_mean": Mean.of(ratio, batch.mask),
                "policy/ratio_variance": Mean.of(jnp.square(ratio - 1), batch.mask),
                # r - 1 - log r >= 0, whose mean over the sampler's tokens is KL(sampler || policy)
                "policy/sampler_kl_nats": Mean.of(jnp.expm1(log_ratio) - log_ratio, batch.mask),
                "policy/clipped_fraction": Mean.of(clipped.astype(jnp.float32), batch.mask),
                "policy/dual_clipped_fraction": Mean.of(dual.astype(jnp.float32), batch.mask),
            },
        )

    return Objective(LibraryStats(("logp", "entropy")), loss, tokenwise=True)
