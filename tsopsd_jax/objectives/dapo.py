# pyright: strict, reportUnknownMemberType=false
"""DAPO (arXiv 2503.14476)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tsopsd_jax import losses
from tsopsd_jax.head import Stats
from tsopsd_jax.logit_stats import LibraryStats
from tsopsd_jax.metric_names import ENTROPY, ENTROPY_AT_POLICY_TEMPERATURE
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.types import Batch, LossOutput, Mean

NO_DUAL_CLIP = 1e9
"""Above every ratio there is: log-ratios are clamped at 20 nats."""


class Clip(NamedTuple):
    """The clipped surrogate of an objective called `name`, and what is logged of its ratio. Bounds may be knobs."""

    name: str
    low: float | Array
    high: float | Array
    ratio_c: float = NO_DUAL_CLIP

    def checked(self) -> "Clip":
        """The clip itself.

        Raises:
            ValueError: for ranges outside 0 <= clip_low <= 1, 0 <= clip_high, 1 + clip_high <= clip_ratio_c.
        """
        if not (0 <= self.low <= 1 and self.high >= 0 and self.ratio_c >= 1 + self.high):
            raise ValueError(
                f"{self.name} expects 0 <= clip_low <= 1, clip_high >= 0 and clip_ratio_c >= 1 + clip_high, got "
                f"clip_low={self.low}, clip_high={self.high}, clip_ratio_c={self.ratio_c}"
            )
        return self

    def surrogate(self, stats: dict[str, Array], batch: Batch) -> Float[Array, "B L"]:
        """`losses.clipped_surrogate` of every token; needs the statistic `logp`."""
        return losses.clipped_surrogate(
            stats["logp"],
            batch.old_logp,
            batch.advantage,
            clip_low=self.low,
            clip_high=self.high,
            clip_ratio_c=self.ratio_c,
        )

    def clipped(self, stats: dict[str, Array], batch: Batch) -> Bool[Array, "B L"]:
        """True where the clip takes the gradient away."""
        ratio = jnp.exp(losses.log_ratio(stats["logp"], batch.old_logp))
        return ((batch.advantage > 0) & (ratio > 1 + self.high)) | ((batch.advantage < 0) & (ratio < 1 - self.low))

    def metrics(self, stats: dict[str, Array], batch: Batch) -> dict[str, Mean]:
        """Entropy and ratio of the policy; needs the statistics of `policy_stats`."""
        log_ratio = losses.log_ratio(stats["logp"], batch.old_logp)
        ratio = jnp.exp(log_ratio)
        dual = (batch.advantage < 0) & (ratio > self.ratio_c)
        found = {
            ENTROPY: Mean.of(stats["entropy"], batch.mask),
            "policy/ratio_mean": Mean.of(ratio, batch.mask),
            "policy/ratio_variance": Mean.of(jnp.square(ratio - 1), batch.mask),
            # r - 1 - log r >= 0, whose mean over the sampler's tokens is KL(sampler || policy)
            "policy/sampler_kl_nats": Mean.of(jnp.expm1(log_ratio) - log_ratio, batch.mask),
            "policy/clipped_fraction": Mean.of(self.clipped(stats, batch).astype(jnp.float32), batch.mask),
            "policy/dual_clipped_fraction": Mean.of(dual.astype(jnp.float32), batch.mask),
        }
        if "entropy_at_policy_temperature" in stats:
            at = Mean.of(stats["entropy_at_policy_temperature"], batch.mask)
            found[ENTROPY_AT_POLICY_TEMPERATURE] = at
        return found


def policy_stats(policy_temperature: float = 1.0) -> Stats:
    """Statistics of softmax(z / T): `logp` of the token; `entropy` at temperature 1, and that at T where T is not 1.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if policy_temperature <= 0:
        raise ValueError(f"policy_temperature must be positive, got {policy_temperature}")
    if policy_temperature == 1:
        return LibraryStats(("logp", "entropy"))

    def stats(logits: Array, tokens: Array) -> dict[str, Array]:
        tempered = logits / policy_temperature
        return {
            "logp": losses.token_logp(tempered, tokens),
            "entropy": losses.entropy(logits),
            "entropy_at_policy_temperature": losses.entropy(tempered),
        }

    return stats


def dapo(
    *, clip_low: float = 0.2, clip_high: float = 0.28, clip_ratio_c: float = 10.0, policy_temperature: float = 1.0
) -> Objective:
    """DAPO (arXiv 2503.14476): clip-higher, dual clip, token-mean. No KL term, no entropy bonus.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_ratio_c: dual clip: bound on the ratio where the advantage is negative.
        policy_temperature: T of the policy softmax(z / T) in ratio and gradient; must be the sampling temperature.
            Rollout reheating (TS-OPSD's RR) is both at 1.2, as verl computes it.

    Raises:
        ValueError: for clip ranges outside 0 <= clip_low <= 1, 0 <= clip_high, 1 + clip_high <= clip_ratio_c, or a
            temperature that is not positive.
    """
    clip = Clip("dapo", clip_low, clip_high, clip_ratio_c).checked()

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        return LossOutput(Mean.of(clip.surrogate(stats, batch), batch.mask), clip.metrics(stats, batch))

    return Objective(policy_stats(policy_temperature), loss, tokenwise=True, policy_temperature=policy_temperature)
