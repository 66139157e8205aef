"""The configuration of a run: the only place that takes one apart."""

from tsopsd_jax.config.read import load_config
from tsopsd_jax.config.schema import (
    DTYPES,
    Config,
    DataSettings,
    EvaluationSettings,
    MeshSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    PhaseSettings,
)

__all__ = [
    "DTYPES",
    "Config",
    "DataSettings",
    "EvaluationSettings",
    "MeshSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "PhaseSettings",
    "load_config",
]
