# pyright: strict, reportUnknownMemberType=false
"""Objectives by name: the library's, and those of one's own as `path/to/file.py:function`."""

from collections.abc import Callable
from typing import Any

from tsopsd_jax.loading import check_keywords, is_own, load_function
from tsopsd_jax.objectives.adapo import adapo
from tsopsd_jax.objectives.aent import aent
from tsopsd_jax.objectives.aer import aer
from tsopsd_jax.objectives.bapo import bapo
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.covariance import clip_cov, kl_cov
from tsopsd_jax.objectives.dapo import dapo
from tsopsd_jax.objectives.entropy_advantage import entropy_advantage
from tsopsd_jax.objectives.entropy_bonus import adaptive_entropy_bonus, entropy_bonus
from tsopsd_jax.objectives.jsd import jsd
from tsopsd_jax.objectives.opd import eopd, opd
from tsopsd_jax.objectives.repo_r import repo_r
from tsopsd_jax.objectives.tampo import tampo
from tsopsd_jax.objectives.top_entropy import top_entropy
from tsopsd_jax.objectives.ts_opsd import ts_opsd

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "dapo": dapo,
    "ts_opsd": ts_opsd,
    "jsd": jsd,
    "opd": opd,
    "eopd": eopd,
    "entropy_bonus": entropy_bonus,
    "adaptive_entropy_bonus": adaptive_entropy_bonus,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "top_entropy": top_entropy,
    "entropy_advantage": entropy_advantage,
    "repo_r": repo_r,
    "adapo": adapo,
    "bapo": bapo,
    "aent": aent,
    "aer": aer,
    "tampo": tampo,
}
"""Name in a configuration -> factory."""


def make_objective(name: str, hyperparameters: dict[str, Any]) -> Objective:
    """Make the objective called `name`: an entry of OBJECTIVES, or `path/to/file.py:function` for one of your own.

    Raises:
        ValueError: unknown name; a file or function that is missing or fails; hyperparameters that the factory does not
            take; a factory that returns something else.
    """
    if is_own(name):
        factory = load_function(name, what="objective")
    elif name in OBJECTIVES:
        factory = OBJECTIVES[name]
    else:
        raise ValueError(f"objective {name!r} is unknown; known: {', '.join(OBJECTIVES)}, or path/to/file.py:function")
    check_keywords(factory, hyperparameters, where=f"objective {name!r}")
    try:
        made = factory(**hyperparameters)
    except ValueError:
        raise
    except TypeError as error:
        raise ValueError(f"objective {name!r}: {error}") from error
    except Exception as error:
        raise ValueError(f"objective {name!r}: its function raised {type(error).__name__}: {error}") from error
    if not (isinstance(made, Objective) and callable(made.stats) and callable(made.loss)):
        raise ValueError(
            f"objective {name!r}: expected its function to return an Objective of two functions, got {made!r}; "
            "return tsopsd_jax.objectives.Objective(stats, loss)"
        )
    return made
