# pyright: strict, reportUnknownMemberType=false
"""Advantages from rewards."""

import jax.numpy as jnp
from jaxtyping import Array, Float

STD_EPSILON = 1e-6


def group_relative(rewards: Float[Array, "P G"], *, normalize_std: bool = True) -> Float[Array, "P G"]:
    """Group-relative advantages (GRPO / DAPO):  (s - mean) / (std + 1e-6), std with ddof = 1, over each prompt's group.

    Args:
        rewards: [P, G], one row per prompt, one column per response.
        normalize_std: False leaves (s - mean).

    Returns:
        [P, G]. A group of one has nothing to be relative to: its advantage is its reward. Equal rewards: exactly 0.

    Raises:
        ValueError: if `rewards` is not two-dimensional.
    """
    if jnp.ndim(rewards) != 2:
        raise ValueError(f"group_relative expects rewards of shape [P, G], got {jnp.shape(rewards)}")
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.shape[1] == 1:
        return rewards
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    # The mean of equal numbers rounds (eight times -0.7), and the residue over 1e-6 would be an advantage of 0.06.
    equal = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    centred = jnp.where(equal, 0.0, centred)
    if not normalize_std:
        return centred
    return centred / (jnp.std(rewards, axis=1, keepdims=True, ddof=1) + STD_EPSILON)
