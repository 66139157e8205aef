"""Sampling: prompts -> Rollout."""

from tsopsd_jax.rollout.distribution import Sampling, draw
from tsopsd_jax.rollout.engine import sample

__all__ = ["Sampling", "draw", "sample"]
