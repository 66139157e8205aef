# pyright: strict
"""REPO-R: advantages that rare tokens gain from (arXiv 2603.11682)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tsopsd_jax.objectives.anchor import anchored
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean


def rescaled(
    advantage: Float[Array, "B L"], logp: Float[Array, "B L"], zeta: Float[Array, ""] | float
) -> Float[Array, "B L"]:
    """A max(1 - zeta logp, 0) where A > 0, and A max(1 + zeta logp, 0) where A < 0: no token changes sides."""
    return advantage * jnp.maximum(1.0 - jnp.sign(advantage) * zeta * logp, 0.0)


def next_zeta(zeta: float, below: bool, *, least: float, most: float) -> float:
    """Double a positive zeta and halve a negative one where the entropy is below its target, and the reverse above it.

    |zeta| stays in [least, most]; what would be halved below `least` changes its sign instead.
    """
    towards = 1.0 if below else -1.0
    if zeta * towards > 0:
        return towards * min(2 * abs(zeta), most)
    return -towards * abs(zeta) / 2 if abs(zeta) / 2 >= least else towards * least


def repo_r(
    *,
    zeta: float = 1e-3,
    least: float = 1e-4,
    most: float = 0.05,
    target_nats: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float = 10.0,
) -> Objective:
    """The clipped surrogate with A (1 - zeta logp) where A > 0 and A (1 + zeta logp) where A < 0, token-mean.

    logp is the policy's own, without a gradient, in float32. A positive zeta raises the entropy: rare right tokens gain
    more, rare wrong ones lose less. After each update zeta doubles while the entropy is below its target, else it
    halves; past `least` it changes its sign, and then lowers the entropy. It acts at ratio 1 too. Source: arXiv
    2603.11682, appendix D.2; the limits of |zeta| are the paper's, and the change of sign, and of no token's, follows
    its public implementation (SkyRL, pull request 1896). The clip and the first zeta are chosen here.

    Args:
        zeta: at the phase's start.
        least, most: limits of |zeta|.
        target_nats: mean token entropy to hold; None: that of the phase's first update.
        clip_low, clip_high, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: for 0 < least <= |zeta| <= most broken, or a target that is not positive.
    """
    if not 0 < least <= abs(zeta) <= most:
        raise ValueError(f"repo_r expects 0 < least <= |zeta| <= most, got zeta={zeta}, least={least}, most={most}")
    clip = Clip("repo_r", clip_low, clip_high, clip_ratio_c).checked()

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        logp = jax.lax.stop_gradient(stats["logp"])
        shaped = dataclasses.replace(batch, advantage=rescaled(batch.advantage, logp, batch.knobs["zeta"]))
        return LossOutput(Mean.of(clip.surrogate(stats, shaped), batch.mask), clip.metrics(stats, shaped))

    def turn(value: float, below: bool) -> float:
        return next_zeta(value, below, least=least, most=most)

    control = anchored("zeta", zeta, turn, target_nats=target_nats)
    return Objective(policy_stats(), loss, tokenwise=True, control=control)
