"""A step's line of the log: what sampling, judging and the update say of themselves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.judge.dynamic_sampling import Collected
from tsopsd_jax.judge.groups import Groups
from tsopsd_jax.judge.scoring import Scored
from tsopsd_jax.learn.nonfinite import NonFinite
from tsopsd_jax.metric_names import (
    ACCURACY,
    ENTROPY,
    GROUPS_KEPT,
    JUDGE_S,
    LENGTH,
    REWARD,
    REWARD_FAILED,
    ROLLOUT_S,
    STEP_S,
    TOKENS,
    TOKENS_PER_S,
    TRUNCATED,
    UPDATE_S,
)
from tsopsd_jax.rewards import Verdict, failed_fraction
from tsopsd_jax.rollout import Engine
from tsopsd_jax.rundir.run_state import RunState


class Drawn(NamedTuple):
    """What a step sampled, how it was judged, and what its update took."""

    scored: Sequence[Scored]
    """Every generation batch, kept or not."""
    judged: Sequence[Groups]
    """The generation batches with their rewards; empty where the phase has no reward: then no penalties are part of
    it."""
    collected: Collected | None
    """By dynamic sampling; None: every group is used."""
    engine: Engine | None
    """After its last rollout; None: one program samples and updates, and all its time is the update's."""
    useful_fraction: float | None
    """Share of the positions that the update computed that hold a token; None: not known."""
    update_s: float


class StepFacts(NamedTuple):
    """What was seen in a step."""

    drawn: Drawn
    update: dict[str, float]
    """The updates' own metrics."""
    skipped: Sequence[bool]
    """Whether each update was not finite and changed nothing."""
    verifier_killed: int
    step_s: float
    perf: dict[str, float]
    """From `perf.step_perf`."""
    nonfinite: NonFinite | None = None
    """What was not finite, where an update was skipped."""

    @property
    def entropy_nats(self) -> float:
        """The policy's entropy where it was sampled; NaN if the objective does not report it."""
        return self.update.get(ENTROPY, float("nan"))


def step_line(phase: str, run: RunState, seen: StepFacts, *, time_s: float) -> dict[str, Any]:
    """The line of metrics.jsonl of the step that led to `run` in the phase of that name.

    Args:
        phase: its name.
        run: after the step.
        seen: in the step.
        time_s: since the run began, interruptions left out.
    """
    drawn, got = seen.drawn, seen.drawn.collected
    lengths = np.concatenate([s.rollout.response_length for s in drawn.scored])
    stopped = np.concatenate([s.rollout.stopped for s in drawn.scored])
    # Over everything sampled: over the kept groups alone a mean would be near one half always.
    accuracy = np.concatenate([s.accuracy for s in drawn.scored])
    reward = np.concatenate([g.reward for g in drawn.judged] or [s.reward for s in drawn.scored])
    rollout_s = sum(s.rollout_s for s in drawn.scored) if drawn.engine is not None else None
    line = {"step": run.step, "phase": phase, "phase_step": run.progress.phase_step, "time_s": time_s}
    line |= seen.update | seen.perf
    line |= {
        LENGTH: float(lengths.mean()),
        TRUNCATED: float(1.0 - stopped.mean()),
        TOKENS: int(lengths.sum()),
        # One program samples and updates: these are tokens/s of the whole step.
        TOKENS_PER_S: float(lengths.sum() / max(drawn.update_s if rollout_s is None else rollout_s, 1e-9)),
        REWARD: float(reward.mean()),
        ACCURACY: float(accuracy.mean()),
        GROUPS_KEPT: got.informative_groups / got.sampled_groups if got is not None else 1.0,
    }
    line |= _named_rewards([verdict for s in drawn.scored for verdict in s.verdicts])
    if got is not None:
        line |= {
            "rollout/generation_batches": got.generation_batches,
            "rollout/groups_filled": got.filled_groups,
            "rollout/groups_left_over": 0 if got.leftover is None else len(got.leftover),
        }
    if drawn.engine is not None:
        line |= {
            "rollout/slot_use_fraction": drawn.engine.progress.slot_use,
            "rollout/cache_peak_bytes": drawn.engine.progress.peak_cache_bytes,
            "rollout/programs": drawn.engine.programs,
            "learner/useful_fraction": drawn.useful_fraction,
        }
    return line | {
        ROLLOUT_S: rollout_s,
        JUDGE_S: sum(s.waited_s for s in drawn.scored),
        UPDATE_S: drawn.update_s,
        STEP_S: seen.step_s,
        "judge/verifier_killed": seen.verifier_killed,
    }


def _named_rewards(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Each reward's mean without its weight, where there are several; a response of which it failed counts as 0."""
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    means = {f"reward/{name}_mean": sum(v.parts.get(name, 0.0) for v in verdicts) / len(verdicts) for name in names}
    return {REWARD_FAILED: failed_fraction(verdicts)} | (means if len(names) > 1 else {})
