# pyright: strict, reportUnknownMemberType=false
"""BAPO: bounds of the ratio that balance what positive and negative tokens pull (arXiv 2510.18927)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tsopsd_jax import losses
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def bapo(
    *,
    target: float = 1.0,
    low: float = 0.6,
    low_most: float = 0.8,
    high: float = 1.2,
    high_most: float = 2.0,
    high_step: float = 0.05,
    clip_ratio_c: float = 3.0,
) -> Objective:
    """The dual-clipped surrogate, its ratio within [lo, hi]: bounds that are searched anew for each update.

        positive(hi) = sum over A > 0 of A min(r, hi);   negative(lo) = sum over A < 0 of |A| max(r, lo)

    over all tokens of the update, r the ratio and A the advantage. If positive / negative is under `target` at (`low`,
    `high`), lo is raised to `low_most` and takes gradients from negative tokens; then hi rises, and gives gradients to
    positive ones, until the target is reached or hi is at its most. Does nothing at ratio 1, which lies within any
    bounds: take several updates a rollout.

    Source: arXiv 2510.18927; the order and the constants are those of the authors' code. It raises lo by steps of 0.05,
    but a token's clipped value counts, so that negative(lo) never falls and no step on the way ends the search. The
    paper states the target as the share s of the positive, which is s / (1 - s) here,
    with lo in [0.6, 0.9] and hi in [1.2, 3.0].

    Args:
        target: least positive / negative.
        low, low_most: lo before and after it is raised.
        high, high_most, high_step: hi begins at `high` and rises by `high_step` up to `high_most`.
        clip_ratio_c: bound on the ratio where the advantage is negative.

    Raises:
        ValueError: for 0 <= low <= low_most <= 1 <= high <= high_most <= clip_ratio_c broken, or a target or a step
            that is not positive.
    """
    if not 0 <= low <= low_most <= 1 <= high <= high_most <= clip_ratio_c:
        raise ValueError(
            "bapo expects 0 <= low <= low_most <= 1 <= high <= high_most <= clip_ratio_c, got "
            f"low={low}, low_most={low_most}, high={high}, high_most={high_most}, clip_ratio_c={clip_ratio_c}"
        )
    if target <= 0 or high_step <= 0:
        raise ValueError(f"bapo expects target > 0 and high_step > 0, got target={target}, high_step={high_step}")
    count = math.ceil((high_most - high) / high_step - 1e-9)  # of steps; 1e-9: 0.8 / 0.05 is 16
    highs = [high + i * high_step for i in range(count)] + [high_most]
    widest = Clip("bapo", 1 - low, high_most - 1, clip_ratio_c).checked()

    def select(stats: dict[str, Array], batch: Batch) -> Batch:
        lo, hi = balanced_bounds(stats["logp"], batch, lows=(low, low_most), highs=highs, target=target)
        return dataclasses.replace(batch, knobs=batch.knobs | {"ratio_low": lo, "ratio_high": hi})

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        lo, hi = batch.knobs["ratio_low"], batch.knobs["ratio_high"]
        clip = widest._replace(low=1 - lo, high=hi - 1)
        found = clip.metrics(stats, batch) | {
            "policy/ratio_low_bound": Mean.of(jnp.broadcast_to(lo, batch.mask.shape), batch.mask),
            "policy/ratio_high_bound": Mean.of(jnp.broadcast_to(hi, batch.mask.shape), batch.mask),
        }
        return LossOutput(Mean.of(clip.surrogate(stats, batch), batch.mask), found)

    return Objective(policy_stats(), loss, tokenwise=True, select=select)


def balanced_bounds(
    logp: Float[Array, "B L"], batch: Batch, *, lows: tuple[float, float], highs: list[float], target: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(lo, hi): the first of (lows[0], highs[0]), then (lows[1], highs[0]), (lows[1], highs[1]), ... at which positive
    / negative reaches `target`, else the last."""
    ratio = jnp.exp(losses.log_ratio(logp, batch.old_logp))

    def positive(hi: Array) -> Array:
        return jnp.sum(jnp.where(batch.mask, jnp.maximum(batch.advantage, 0.0) * jnp.minimum(ratio, hi), 0.0))

    def negative(lo: Array) -> Array:
        return jnp.sum(jnp.where(batch.mask, jnp.maximum(-batch.advantage, 0.0) * jnp.maximum(ratio, lo), 0.0))

    lo = jnp.asarray([lows[0]] + [lows[1]] * len(highs), jnp.float32)
    hi = jnp.asarray([highs[0], *highs], jnp.float32)
    reached = jax.vmap(positive)(hi) >= target * jax.vmap(negative)(lo)
    chosen = jnp.where(jnp.any(reached), jnp.argmax(reached), len(highs))
    return lo[chosen], hi[chosen]
