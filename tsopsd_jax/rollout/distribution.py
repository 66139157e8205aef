"""The distribution that is sampled: temperature, then top-k, then top-p; and one exact draw from it per row."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. `sampling_temperature` 1, `top_p` 1, `top_k` 0 (off) is the policy itself."""

    sampling_temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if not 0 < self.sampling_temperature < float("inf"):
            raise ValueError(f"sampling_temperature must be positive, got {self.sampling_temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")


def filtered_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf outside the top-k and the nucleus.

    The nucleus is the shortest prefix of the tokens in order of falling probability (equal ones in order of index)
    whose mass, after top-k, reaches `top_p`; it never is empty.
    """
    logits = logits / sampling.sampling_temperature
    vocab = logits.shape[-1]
    by_rank = sampling.top_p < 1.0 or 0 < sampling.top_k < vocab
    if not by_rank:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if 0 < sampling.top_k < vocab:
        ranked = jnp.where(jnp.arange(vocab)[None, :] < sampling.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    mass_before = jnp.cumsum(probability, axis=-1) - probability
    keep_ranked = (mass_before < sampling.top_p) & (ranked > -jnp.inf)
    keep_ranked = keep_ranked.at[:, 0].set(True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep_ranked, rank, axis=-1), logits, -jnp.inf)


def draw(
    logits: Float[Array, "B V"], uniform: Float[Array, " B"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """One token per row and its log-probability (nats) under the distribution sampled.

    Inverts the cumulative distribution at one uniform number in [0, 1) per row: the token is the first whose cumulative
    weight exceeds uniform x total, so tokens of weight zero are never drawn.
    """
    logits = filtered_logits(logits, sampling)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - top)
    cumulative = jnp.cumsum(weight, axis=-1)
    total = cumulative[:, -1:]
    at = jnp.sum(cumulative <= uniform[:, None] * total, axis=-1, dtype=jnp.int32)
    # Rounding can make uniform x total equal the total: then the last token with any weight is meant.
    last = logits.shape[-1] - 1 - jnp.argmax(jnp.flip(weight > 0, axis=-1), axis=-1).astype(jnp.int32)
    token = jnp.minimum(at, last)
    chosen = jnp.take_along_axis(logits - top, token[:, None], axis=-1)[:, 0]
    return token, chosen - jnp.log(jnp.sum(weight, axis=-1))
