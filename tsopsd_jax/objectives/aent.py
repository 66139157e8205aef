# pyright: strict, reportUnknownMemberType=false
"""AEnt: an entropy bonus among the likelier entries of the vocabulary alone (arXiv 2509.03493)."""

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tsopsd_jax import losses
from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Control, Knobs, Objective
from tsopsd_jax.objectives.dapo import Clip, policy_stats
from tsopsd_jax.types import Batch, LossOutput, Mean

CLAMPED_ENTROPY = "policy/clamped_entropy_nats"


def aent(
    *,
    coefficient: float = 1e-3,
    clamp_fraction: float = 0.2,
    entropy_low_nats: float = 0.1,
    entropy_high_nats: float = 0.5,
    step: float = 1e-3,
    least: float = 1e-5,
    most: float = 0.01,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_ratio_c: float = 10.0,
) -> Objective:
    """DAPO's surrogate - c x the entropy of the policy renormalised to the likelier entries, token-mean.

    The clamped entropy is that of softmax(z) without the `clamp_fraction` of the vocabulary whose logits are lowest, so
    that no bonus is paid for what should never be said. After each update c += step x (how far the
    clamped entropy is below `entropy_low_nats`), or c -= step x (how far it is above `entropy_high_nats`). Source: AEnt
    (arXiv 2509.03493), with the constants of the authors' code; entries of equal logits at the border stay.

    Args:
        coefficient: c at the phase's start.
        clamp_fraction: share of the vocabulary left out.
        entropy_low_nats, entropy_high_nats: between them c stays.
        step: change of c for a nat.
        least, most: limits of c; equal to `coefficient`, they fix it.
        clip_low, clip_high, clip_ratio_c: see `dapo`.

    Raises:
        ValueError: for a fraction outside
            [0, 1), least <= coefficient <= most or low <= high broken, or a negative step.
    """
    if not (
        0 <= clamp_fraction < 1 and least <= coefficient <= most and entropy_low_nats <= entropy_high_nats and step >= 0
    ):
        raise ValueError(
            "aent expects 0 <= clamp_fraction < 1, least <= coefficient <= most, entropy_low_nats <= "
            "entropy_high_nats and "
            f"step >= 0, got clamp_fraction={clamp_fraction}, coefficient={coefficient}, least={least}, most={most}, "
            f"entropy_low_nats={entropy_low_nats}, entropy_high_nats={entropy_high_nats}, step={step}"
        )
    clip = Clip("aent", clip_low, clip_high, clip_ratio_c).checked()
    of_policy = policy_stats()

    def stats(logits: Array, tokens: Array) -> dict[str, Array]:
        return of_policy(logits, tokens) | {"clamped_entropy": clamped_entropy(logits, fraction=clamp_fraction)}

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        entropy = stats.get("clamped_entropy", stats["entropy"])  # of the whole vocabulary, where no other is given
        per_token = clip.surrogate(stats, batch) - batch.knobs["coefficient"] * entropy
        found = {CLAMPED_ENTROPY: Mean.of(entropy, batch.mask)}
        return LossOutput(Mean.of(per_token, batch.mask), clip.metrics(stats, batch) | found)

    def turn(knobs: Knobs, metrics: Mapping[str, float]) -> Knobs:
        entropy = metrics.get(CLAMPED_ENTROPY, metrics[ENTROPY])
        outside = max(entropy_low_nats - entropy, 0.0) - max(entropy - entropy_high_nats, 0.0)
        return {"coefficient": min(max(knobs["coefficient"] + step * outside, least), most)}

    return Objective(stats, loss, tokenwise=True, control=Control({"coefficient": coefficient}, turn))


def clamped_entropy(logits: Float[Array, "*N V"], *, fraction: float) -> Float[Array, "*N"]:
    """Entropy, in nats, of softmax(logits) renormalised to all but the int(fraction x V) entries of the lowest logits.

    Which entries those are carries no gradient.
    """
    edge = order_statistic(jax.lax.stop_gradient(logits), int(logits.shape[-1] * fraction))
    return losses.entropy(jnp.where(logits >= edge[..., None], logits, -jnp.inf))


def order_statistic(x: Float[Array, "*N V"], k: int) -> Float[Array, "*N"]:
    """The k-th smallest entry (from 0) of each row in float32: by bisection over bit patterns, since sorting 151,936
    entries costs more than making them."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # As unsigned numbers these order as the floats do: negative ones have all their bits flipped,
    # others the sign's alone.
    key = jnp.where(bits >= sign, ~bits, bits | sign)

    def narrow(i: Array, found: Array) -> Array:
        larger = found | (sign >> i.astype(jnp.uint32))
        below = jnp.sum(key < larger[..., None], axis=-1, dtype=jnp.int32)
        return jnp.where(below <= k, larger, found)

    found = cast(Array, jax.lax.fori_loop(0, 32, narrow, jnp.zeros(x.shape[:-1], jnp.uint32)))
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)
