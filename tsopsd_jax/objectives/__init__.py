"""What a phase optimises."""

from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.dapo import dapo
from tsopsd_jax.objectives.loading import OBJECTIVES, make_objective
from tsopsd_jax.objectives.ts_opsd import ts_opsd

__all__ = ["OBJECTIVES", "Objective", "dapo", "make_objective", "ts_opsd"]
