"""What a phase optimises."""

from tsopsd_jax.objectives.base import Control, Objective
from tsopsd_jax.objectives.covariance import clip_cov, kl_cov
from tsopsd_jax.objectives.dapo import dapo
from tsopsd_jax.objectives.entropy_bonus import adaptive_entropy_bonus, entropy_bonus
from tsopsd_jax.objectives.jsd import jsd
from tsopsd_jax.objectives.loading import OBJECTIVES, make_objective
from tsopsd_jax.objectives.top_entropy import top_entropy
from tsopsd_jax.objectives.ts_opsd import ts_opsd

__all__ = [
    "OBJECTIVES",
    "Control",
    "Objective",
    "adaptive_entropy_bonus",
    "clip_cov",
    "dapo",
    "entropy_bonus",
    "jsd",
    "kl_cov",
    "make_objective",
    "top_entropy",
    "ts_opsd",
]
