"""Sampling: prompts -> Rollout."""

from tsopsd_jax.rollout.distribution import Sampling, draw, filtered_logits
from tsopsd_jax.rollout.engine import sample

__all__ = ["Sampling", "draw", "filtered_logits", "sample"]
