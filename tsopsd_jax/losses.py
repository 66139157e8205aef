# pyright: strict, reportUnknownMemberType=false
"""Per-token mathematics on logits and log-probabilities. Pure, differentiable, no means inside.

Every function reduces the vocabulary axis or works elementwise; masks and averages belong to the objective.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before exp (nats), so that one stale token cannot make an update infinite."""

SERIES_BELOW_NATS = 0.1
"""Log-ratios of teacher and student under which a KL term is summed as a series: its error there is 3e-7."""


def log_softmax(logits: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
    """Log-probabilities log softmax(z), accurate where one entry dominates.

    With m = max z at index i:  log sum exp(z - m) = log1p(sum_{j != i} exp(z_j - m)), which keeps the digits of a
    remainder of 1e-6 that adding it to 1 in float32 would drop. That remainder *is* the entropy of a collapsed
    policy. (No argmax: over a large vocabulary it costs more than all the rest on a CPU.) Raises nothing; -inf
    logits are allowed as long as one entry is finite.
    """
    logits = logits.astype(jnp.float32)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    is_top = shifted == 0.0
    # Sum of exp(shifted) less 1. At the top exp(x) - 1 = x exactly (x is 0), which carries the gradient as well.
    terms = jnp.where(is_top, shifted, jnp.exp(shifted))
    ties = jnp.sum(is_top, axis=-1, keepdims=True, dtype=jnp.float32) - 1.0
    return shifted - jnp.log1p(jnp.sum(terms, axis=-1, keepdims=True) + ties)


def token_logp(logits: Float[Array, "*N V"], tokens: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Log-probability of the token, log softmax(z)[token], nats."""
    return jnp.take_along_axis(log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def _entropy_of(logp: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    p = jnp.exp(logp)
    return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)


def kl_terms(logq: Float[Array, "*N V"], logp: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
    """Terms of KL(q || p) = sum q f(d), d = log q - log p, f(d) = d + exp(-d) - 1; each is >= 0.

    The last two parts of f sum to zero over the vocabulary; with them no term cancels another. Near d = 0, where the
    top token of a collapsed self-teacher lies, f is its series: q d + (p - q) would lose all its digits.
    """
    q, p = jnp.exp(logq), jnp.exp(logp)
    d = jnp.where(q > 0, logq, 0.0) - jnp.where(q > 0, logp, 0.0)
    near = (jnp.abs(d) < SERIES_BELOW_NATS) & (q > 0)
    s = jnp.where(near, d, 0.0)
    series = q * (s * s * (1 / 2 - s * (1 / 6 - s * (1 / 24 - s / 120))))
    return jnp.where(near, series, q * d + (p - q))


def _kl_of(logq: Float[Array, "*N V"], logp: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    return jnp.sum(kl_terms(logq, logp), axis=-1)


def entropy(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """Exact vocabulary entropy H(p) = -sum p log p of p = softmax(logits), nats.  [..., V] -> [...]"""
    return _entropy_of(log_softmax(logits))


def forward_kl(teacher_logits: Float[Array, "*N V"], student_logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """Forward KL: KL(q || p), q = softmax(teacher), p = softmax(student), nats.  [..., V] x2 -> [...]

    Gradient p - q with respect to the student's logits, none into the teacher. TS-OPSD, equation 2 (FKL); for the
    self-teacher pass `student_logits / teacher_temperature` as the teacher.
    """
    return _kl_of(log_softmax(jax.lax.stop_gradient(teacher_logits)), log_softmax(student_logits))


def reverse_kl(teacher_logits: Float[Array, "*N V"], student_logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """Reverse KL: KL(p || q), q = softmax(teacher), p = softmax(student), nats.  [..., V] x2 -> [...]

    Gradient p (log p - log q - KL), none into the teacher. With the self-teacher of temperature T this is
    (1 - 1/T) p (z - E_p[z]) = -(1 - 1/T) dH/dz: entropy ascent (TS-OPSD, equation 5).
    """
    return _kl_of(log_softmax(student_logits), log_softmax(jax.lax.stop_gradient(teacher_logits)))


def log_ratio(logp: Float[Array, "*N"], old_logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Log-ratio log(pi / pi_old), clamped to +-20 nats; no gradient into the second."""
    return jnp.clip(logp - jax.lax.stop_gradient(old_logp), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def k3(logp: Float[Array, "*N"], reference_logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Estimate KL(policy || reference) from one token drawn from the policy: exp(d) - d - 1 >= 0, d = reference_logp -
    logp.

    d is clamped to +-20 nats; no gradient into the reference. Unbiased as a value; its gradient, (1 - exp(d)) d(logp),
    is not that of the KL. Source: Schulman 2020, "Approximating KL divergence"; GRPO (arXiv 2402.03300), equation 4.
    """
    d = -log_ratio(logp, reference_logp)
    return jnp.expm1(d) - d


def clipped_surrogate(
    logp: Float[Array, "*N"],
    old_logp: Float[Array, "*N"],
    advantage: Float[Array, "*N"],
    *,
    clip_low: float | Float[Array, ""] = 0.2,
    clip_high: float | Float[Array, ""] = 0.28,
    clip_ratio_c: float = 10.0,
) -> Float[Array, "*N"]:
    """DAPO's per-token policy loss: clip-higher and dual clip.  [...] x3 -> [...]

        r = exp(clamp(logp - old_logp, +-20));   m = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        loss = min(m, -A clip_ratio_c) where A < 0, else m

    The gradient reaches `logp` alone. Source: DAPO (arXiv 2503.14476), equations 8-10; dual clip: arXiv 1912.09729.
    """
    advantage = jax.lax.stop_gradient(advantage)
    ratio = jnp.exp(log_ratio(logp, old_logp))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    return jnp.where(advantage < 0, jnp.minimum(loss, -advantage * clip_ratio_c), loss)
