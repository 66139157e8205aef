# pyright: strict, reportUnknownMemberType=false
"""Clip-Cov and KL-Cov (arXiv 2505.22617): few tokens, those where log-probability and advantage go together, lower the
entropy most; their gradient is left out, or a penalty keeps them where they are.

    cov_t = (A_t - mean A) (logp_t - mean logp),  the means over all response tokens of the update
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tsopsd_jax import losses
from tsopsd_jax.objectives.base import Control, Knobs, Objective, first, share, token_hash
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def covariance(logp: Float[Array, "B L"], batch: Batch) -> Float[Array, "B L"]:
    """cov_t of every response token, 0 elsewhere."""
    centred = [x - Mean.of(x, batch.mask).value for x in (batch.advantage, logp)]
    return jnp.where(batch.mask, centred[0] * centred[1], 0.0)


def clip_cov(
    *,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """The clipped surrogate without the gradient of a few tokens of high covariance. No dual clip.

    Of the tokens with cov_low < cov < cov_high that the clip leaves alone, max(1, int(fraction x tokens)) random ones
    get no gradient. They still count in the mean. Source: arXiv 2505.22617, Clip-Cov.

    Args:
        fraction: share of the update's response tokens.
        cov_low, cov_high: the covariances among which they are drawn.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].

    Raises:
        ValueError: for a fraction outside (0, 1], or cov_low above cov_high.
    """
    _check_fraction("clip_cov", fraction)
    if cov_low > cov_high:
        raise ValueError(f"clip_cov expects cov_low <= cov_high, got cov_low={cov_low}, cov_high={cov_high}")
    clip = Clip("clip_cov", clip_low, clip_high).checked()

    def select(stats: dict[str, Array], batch: Batch) -> Batch:
        cov = covariance(stats["logp"], batch)
        candidate = batch.mask & (cov > cov_low) & (cov < cov_high) & ~clip.clipped(stats, batch)
        drawn = candidate & first((~candidate, token_hash(batch)), share(batch, fraction))
        return dataclasses.replace(batch, weight=1.0 - drawn.astype(jnp.float32))

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        assert batch.weight is not None
        dropped = {"policy/covariance_dropped_fraction": Mean.of(1.0 - batch.weight, batch.mask)}
        return LossOutput(
            Mean.of(clip.surrogate(stats, batch) * batch.weight, batch.mask), clip.metrics(stats, batch) | dropped
        )

    return Objective(policy_stats(), loss, tokenwise=True, select=select, select_reads=("logp",))


def kl_cov(*, fraction: float = 2e-4, coefficient: float = 1.0, anneal_updates: int | None = None) -> Objective:
    """The unclipped surrogate -A r, plus coefficient x |logp - old_logp| at the tokens of highest covariance.

    Those are the max(1, int(fraction x tokens)) tokens with the largest cov. Source: arXiv 2505.22617, KL-Cov. With a
    coefficient that ends at 0 the stationary point is unbiased.

    Args:
        fraction: share of the update's response tokens (2e-4 to 2e-3).
        coefficient: of the penalty (0.1 to 1).
        anneal_updates: the coefficient falls linearly to 0 over this many updates of the phase; None: it stays.

    Raises:
        ValueError: for a fraction outside (0, 1], a negative coefficient, or anneal_updates below 1.
    """
    _check_fraction("kl_cov", fraction)
    if coefficient < 0 or (anneal_updates is not None and anneal_updates < 1):
        raise ValueError(
            f"kl_cov expects coefficient >= 0 and anneal_updates >= 1 or null, got coefficient={coefficient}, "
            f"anneal_updates={anneal_updates}"
        )
    clip = Clip("kl_cov", 0.2, 0.2)  # for the metrics: what a clip would have clipped

    def select(stats: dict[str, Array], batch: Batch) -> Batch:
        order = jnp.where(batch.mask, -covariance(stats["logp"], batch), jnp.inf)
        chosen = batch.mask & first((order, token_hash(batch)), share(batch, fraction))
        return dataclasses.replace(batch, weight=chosen.astype(jnp.float32))

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        assert batch.weight is not None
        change = stats["logp"] - batch.old_logp
        apart = jax.lax.stop_gradient(jnp.sign(change)) * change  # |change|; jnp.abs would pull at 0, with gradient 1
        ratio = jnp.exp(losses.log_ratio(stats["logp"], batch.old_logp))
        strength = batch.knobs["coefficient"] if anneal_updates else coefficient
        per_token = -jax.lax.stop_gradient(batch.advantage) * ratio + strength * batch.weight * apart
        penalised = {"policy/covariance_penalised_fraction": Mean.of(batch.weight, batch.mask)}
        return LossOutput(Mean.of(per_token, batch.mask), clip.metrics(stats, batch) | penalised)

    def turn(knobs: Knobs, _: Mapping[str, float]) -> Knobs:
        return {"coefficient": max(knobs["coefficient"] - coefficient / (anneal_updates or 1), 0.0)}

    control = Control({"coefficient": coefficient}, turn) if anneal_updates else None
    return Objective(policy_stats(), loss, tokenwise=True, select=select, select_reads=("logp",), control=control)


def _check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} expects 0 < fraction <= 1, got fraction={fraction}")
