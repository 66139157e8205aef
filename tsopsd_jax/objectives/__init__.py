"""What a phase optimises."""

from tsopsd_jax.objectives.adapo import adapo
from tsopsd_jax.objectives.aent import aent
from tsopsd_jax.objectives.aer import aer
from tsopsd_jax.objectives.bapo import bapo
from tsopsd_jax.objectives.base import Control, Objective
from tsopsd_jax.objectives.covariance import clip_cov, kl_cov
from tsopsd_jax.objectives.dapo import dapo, policy_stats
from tsopsd_jax.objectives.entropy_advantage import entropy_advantage
from tsopsd_jax.objectives.entropy_bonus import adaptive_entropy_bonus, entropy_bonus
from tsopsd_jax.objectives.jsd import jsd
from tsopsd_jax.objectives.loading import OBJECTIVES, make_objective
from tsopsd_jax.objectives.opd import eopd, opd
from tsopsd_jax.objectives.reference import with_start_kl
from tsopsd_jax.objectives.repo_r import repo_r
from tsopsd_jax.objectives.tampo import tampo
from tsopsd_jax.objectives.top_entropy import top_entropy
from tsopsd_jax.objectives.ts_opsd import ts_opsd

__all__ = [
    "OBJECTIVES",
    "Control",
    "Objective",
    "adapo",
    "adaptive_entropy_bonus",
    "aent",
    "aer",
    "bapo",
    "clip_cov",
    "dapo",
    "entropy_advantage",
    "entropy_bonus",
    "eopd",
    "jsd",
    "kl_cov",
    "make_objective",
    "opd",
    "policy_stats",
    "repo_r",
    "tampo",
    "top_entropy",
    "ts_opsd",
    "with_start_kl",
]
