"""Per-token mathematics on logits and log-probabilities. Pure, differentiable, no means inside.

Every function reduces the vocabulary axis or works elementwise; masks and averages belong to the objective.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before exp (nats), so that one stale token cannot make an update infinite."""


def log_softmax(logits: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
    """log softmax(z), accurate where one entry dominates.

    With m = max z at index i:  log sum exp(z - m) = log1p(sum_{j != i} exp(z_j - m)), which keeps the digits of a
    remainder of 1e-6 that adding it to 1 in float32 would drop. That remainder *is* the entropy of a collapsed
    policy. Raises nothing; -inf logits are allowed as long as one entry is finite.
    """
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.argmax(logits, axis=-1, keepdims=True))
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    is_top = jax.lax.broadcasted_iota(top.dtype, logits.shape, logits.ndim - 1) == top
    top_shifted = jnp.sum(jnp.where(is_top, shifted, 0.0), axis=-1, keepdims=True)  # 0, but carries the gradient
    rest = jnp.sum(jnp.where(is_top, 0.0, jnp.exp(shifted - top_shifted)), axis=-1, keepdims=True)
    return shifted - top_shifted - jnp.log1p(rest)


def token_logp(logits: Float[Array, "*N V"], tokens: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """log softmax(z)[token], nats."""
    return jnp.take_along_axis(log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def _entropy_of(logp: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    p = jnp.exp(logp)
    return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)


def _kl_of(logq: Float[Array, "*N V"], logp: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """KL(q || p) = sum q (log q - log p) + p - q. Every term is >= 0 (the last two sum to zero), so the near-equal
    distributions of a self-teacher do not cancel."""
    q, p = jnp.exp(logq), jnp.exp(logp)
    gap = jnp.where(q > 0, logq, 0.0) - jnp.where(q > 0, logp, 0.0)
    return jnp.sum(q * gap + (p - q), axis=-1)


def entropy(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """Exact vocabulary entropy H(p) = -sum p log p of p = softmax(logits), nats.  [..., V] -> [...]"""
    return _entropy_of(log_softmax(logits))


def forward_kl(
    teacher_logits: Float[Array, "*N V"], student_logits: Float[Array, "*N V"]
) -> Float[Array, "*N"]:
    """KL(q || p), q = softmax(teacher), p = softmax(student), nats.  [..., V] x2 -> [...]

    Gradient p - q with respect to the student's logits, none into the teacher. TS-OPSD, equation 2 (FKL); for the
    self-teacher pass `student_logits / teacher_temperature` as the teacher.
    """
    return _kl_of(log_softmax(jax.lax.stop_gradient(teacher_logits)), log_softmax(student_logits))


def reverse_kl(
    teacher_logits: Float[Array, "*N V"], student_logits: Float[Array, "*N V"]
) -> Float[Array, "*N"]:
    """KL(p || q), q = softmax(teacher), p = softmax(student), nats.  [..., V] x2 -> [...]

    Gradient p (log p - log q - KL), none into the teacher. With the self-teacher of temperature T this is
    (1 - 1/T) p (z - E_p[z]) = -(1 - 1/T) dH/dz: entropy ascent (TS-OPSD, equation 5).
    """
    return _kl_of(log_softmax(student_logits), log_softmax(jax.lax.stop_gradient(teacher_logits)))


def log_ratio(logp: Float[Array, "*N"], old_logp: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """log(pi / pi_old) clamped to +-20 nats."""
    return jnp.clip(logp - jax.lax.stop_gradient(old_logp), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_surrogate(
    logp: Float[Array, "*N"],
    old_logp: Float[Array, "*N"],
    advantage: Float[Array, "*N"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
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
