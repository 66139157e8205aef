# pyright: strict, reportUnknownMemberType=false
"""DAPO (arXiv 2503.14476)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tsopsd_jax import losses
from tsopsd_jax.head import Stats
from tsopsd_jax.logit_stats import LibraryStats
from tsopsd_jax.metric_names import ENTROPY, ENTROPY_AT_POLICY_TEMPERATURE
from tsopsd_jax.objectives.base import Control, Knobs, Objective
from tsopsd_jax.types import SAMPLING_TEMPERATURE, Batch, LossOutput, Mean

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
        return tempered_stats(logits, tokens, sampling_temperature=policy_temperature)

    return stats


def tempered_stats(logits: Array, tokens: Array, *, sampling_temperature: float | Array) -> dict[str, Array]:
    """`policy_stats` at a temperature that may be a knob."""
    tempered = logits / sampling_temperature
    return {
        "logp": losses.token_logp(tempered, tokens),
        "entropy": losses.entropy(logits),
        "entropy_at_policy_temperature": losses.entropy(tempered),
    }


KL_ESTIMATORS = ("k1", "k3", "exact")


def reference_kl_stats(policy_temperature: float, estimator: str) -> Stats:
    """`policy_stats`, and `reference_kl`: an estimate of KL(policy || reference) at each token, both at temperature T.

    With l the token's log-probability under the policy and r under the reference:
        k1     l - r                      unbiased; its gradient is that of l, whose mean over the policy's tokens is 0
        k3     exp(r - l) - (r - l) - 1   unbiased, never negative, of low variance; gradient (1 - exp(r - l)) d(l)
        exact  sum over the vocabulary    no sampling; gradient p (log p - log q - KL) into the logits z / T

    Raises:
        ValueError: for another estimator, or a temperature that is not positive.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: expected one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")
    own = policy_stats(policy_temperature)

    def stats(logits: Array, tokens: Array, reference_logits: Array) -> dict[str, Array]:
        found, reference = own(logits, tokens), jax.lax.stop_gradient(reference_logits) / policy_temperature
        if estimator == "exact":
            return found | {"reference_kl": losses.reverse_kl(reference, logits / policy_temperature)}
        reference_logp = losses.token_logp(reference, tokens)
        apart = found["logp"] - reference_logp if estimator == "k1" else losses.k3(found["logp"], reference_logp)
        return found | {"reference_kl": apart}

    return stats


def dapo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_ratio_c: float = 10.0,
    policy_temperature: float = 1.0,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    final_temperature: float | None = None,
    anneal_updates: int = 100,
) -> Objective:
    """DAPO (arXiv 2503.14476): clip-higher, dual clip, token-mean. No entropy bonus; no KL term unless one is asked
    for.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_ratio_c: dual clip: bound on the ratio where the advantage is negative.
        policy_temperature: T of the policy softmax(z / T) in ratio and gradient; must be the sampling temperature.
            Rollout reheating (TS-OPSD's RR) is both at 1.2, as verl computes it.
        kl_coefficient: of a penalty on KL(policy || reference), added to the loss of each token; 0: none, and no
            reference.
        kl_estimator: `k1`, `k3` or `exact`, see `reference_kl_stats`.
        final_temperature: rollouts are sampled at a temperature that moves in a line from `policy_temperature` to this
            one, and so does T (a schedule that TAMPO, arXiv 2602.11779, compares itself with); None: it stays.
        anneal_updates: updates after which it is there; a rollout and its updates are at the temperature as it began.

    Raises:
        ValueError: for clip ranges outside 0 <= clip_low <= 1, 0 <= clip_high, 1 + clip_high <= clip_ratio_c, for
            temperatures or `anneal_updates` that are not positive, a negative coefficient, another estimator, or a
            `final_temperature` beside a penalty.
    """
    clip = Clip("dapo", clip_low, clip_high, clip_ratio_c).checked()
    if kl_coefficient < 0:
        raise ValueError(f"dapo expects kl_coefficient >= 0, got kl_coefficient={kl_coefficient}")
    plain, pulled = policy_stats(policy_temperature), reference_kl_stats(policy_temperature, kl_estimator)

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        per_token, metrics = clip.surrogate(stats, batch), clip.metrics(stats, batch)
        if kl_coefficient > 0:
            per_token = per_token + kl_coefficient * stats["reference_kl"]
            metrics["policy/reference_kl_nats"] = Mean.of(stats["reference_kl"], batch.mask)
        return LossOutput(Mean.of(per_token, batch.mask), metrics)

    made = Objective(
        pulled if kl_coefficient > 0 else plain,
        loss,
        tokenwise=True,
        policy_temperature=policy_temperature,
        reference=kl_coefficient > 0,
    )
    if final_temperature is None:
        return made
    if not (final_temperature > 0 and anneal_updates >= 1):
        raise ValueError(
            "dapo expects a positive final_temperature and anneal_updates of at least 1, got "
            f"final_temperature={final_temperature}, anneal_updates={anneal_updates}"
        )
    if made.reference:
        raise ValueError(f"dapo expects no final_temperature beside a penalty, got kl_coefficient={kl_coefficient}")
    control = Control(
        {SAMPLING_TEMPERATURE: policy_temperature}, _line(policy_temperature, final_temperature, anneal_updates)
    )
    return made._replace(stats=tempered_stats, control=control)


def _line(first: float, last: float, steps: int) -> Callable[[Knobs, Mapping[str, float]], Knobs]:
    """Make the update of a control that moves the sampling temperature from `first` to `last` in so many equal
    steps."""
    low, high = sorted((first, last))

    def turn(knobs: Knobs, _: Mapping[str, float]) -> Knobs:
        moved = knobs[SAMPLING_TEMPERATURE] + (last - first) / steps
        return {SAMPLING_TEMPERATURE: min(max(moved, low), high)}

    return turn
