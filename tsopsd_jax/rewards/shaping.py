"""Reward shaping: what is added to a verifier's score before advantages are taken."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def overlong_penalty(
    length_tokens: Shaped[Array | np.ndarray, "..."] | Sequence[int] | int | float | np.number,
    *,
    max_tokens: int,
    buffer_tokens: int,
    factor: float = 1.0,
) -> Float[Array | np.ndarray, "..."]:
    """Soft penalty of long responses: min(-(length - (max - buffer)) / buffer * factor, 0), the shape of the input.

    Args:
        length_tokens: response lengths in tokens (not characters), the stop token included.
        max_tokens: longest response that the sampler allows; a response of that length gets `-factor`.
        buffer_tokens: width of the ramp that ends at `max_tokens`; 0 switches the penalty off.
        factor: penalty at `max_tokens`, in units of reward.

    Returns:
        float32, <= 0: a jax array for a jax array, otherwise a numpy array (so a host loop stays on the
        host).

    Raises:
        ValueError: if a hyperparameter is negative, or the buffer is longer than the response may be.

    Source: DAPO (arXiv 2503.14476), equation 13.
    """
    if max_tokens < 0 or buffer_tokens < 0 or factor < 0:
        raise ValueError(
            f"overlong_penalty expects max_tokens, buffer_tokens and factor >= 0, got "
            f"max_tokens={max_tokens}, buffer_tokens={buffer_tokens}, factor={factor}: "
            "use buffer_tokens=0 for no penalty"
        )
    if buffer_tokens > max_tokens:
        raise ValueError(
            f"overlong_penalty expects buffer_tokens <= max_tokens, got buffer_tokens={buffer_tokens} > "
            f"max_tokens={max_tokens}: shorten the buffer or allow longer responses"
        )
    xp = jnp if isinstance(length_tokens, jax.Array) else np
    length = xp.asarray(length_tokens, dtype=xp.float32)
    if buffer_tokens == 0:
        return xp.zeros_like(length)
    free_tokens = max_tokens - buffer_tokens
    # 0-dimensional numpy results decay to scalars: asarray gives the array back.
    return xp.asarray(xp.minimum((free_tokens - length) / buffer_tokens * factor, 0.0), dtype=xp.float32)
