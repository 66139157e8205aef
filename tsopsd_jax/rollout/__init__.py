"""The sampler: prompts -> Rollout."""

from tsopsd_jax.rollout.distribution import Sampling, draw
from tsopsd_jax.rollout.engine import Engine, Finished, Progress
from tsopsd_jax.rollout.segment import sample

__all__ = ["Engine", "Finished", "Progress", "Sampling", "draw", "sample"]
