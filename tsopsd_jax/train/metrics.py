"""A step's line of the log: what sampling and judging say of themselves. The update's own metrics come from the learner."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tsopsd_jax.judge.dynamic_sampling import Collected
from tsopsd_jax.judge.groups import Groups
from tsopsd_jax.metric_names import ACCURACY, GROUPS_KEPT, LENGTH, REWARD, TOKENS, TOKENS_PER_S, TRUNCATED
from tsopsd_jax.rollout import Engine
from tsopsd_jax.types import Rollout


def rollout_metrics(rollouts: Sequence[Rollout], seconds: float) -> dict[str, Any]:
    """Facts of everything sampled in a step, kept or not."""
    lengths = np.concatenate([r.response_length for r in rollouts])
    stopped = np.concatenate([r.stopped for r in rollouts])
    return {
        LENGTH: float(lengths.mean()),
        TRUNCATED: float(1.0 - stopped.mean()),
        TOKENS: int(lengths.sum()),
        TOKENS_PER_S: float(lengths.sum() / max(seconds, 1e-9)),
    }


def engine_metrics(engine: Engine) -> dict[str, Any]:
    """How well the last rollout used its slots and memory, and what was compiled so far."""
    return {
        "rollout/slot_use_fraction": engine.progress.slot_use,
        "rollout/cache_peak_bytes": engine.progress.peak_cache_bytes,
        "rollout/programs": engine.programs,
    }


def reward_metrics(got: Collected, judged: Sequence[Groups]) -> dict[str, Any]:
    """Rewards over everything sampled in a step (a mean over the kept groups alone would be near one half always)."""
    return {
        REWARD: float(np.concatenate([g.reward for g in judged]).mean()),
        ACCURACY: float(np.concatenate([g.accuracy for g in judged]).mean()),
        GROUPS_KEPT: got.informative_groups / got.sampled_groups,
        "rollout/generation_batches": got.generation_batches,
        "rollout/groups_filled": got.filled_groups,
        "rollout/groups_left_over": 0 if got.leftover is None else len(got.leftover),
    }
