"""What the phases of a run cost (TS-OPSD, table 6): time per step by part, tokens, the share of reheating."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tsopsd_jax.analysis.trajectories import Trajectory
from tsopsd_jax.metric_names import JUDGE_S, ROLLOUT_S, STEP_S, TOKENS, UPDATE_S

STEP_PARTS = {"sampling": ROLLOUT_S, "judging": JUDGE_S, "update": UPDATE_S}
"""GivenBatch of a step -> its metric; what is left of the step is `other`."""


class PhaseCost(NamedTuple):
    """The cost of all steps of a phase."""

    phase: str
    reheats: bool
    steps: int
    batch_sequences: int
    """Responses that an update takes."""
    step_s: float
    """Mean seconds of a step."""
    part_s: dict[str, float]
    """The mean of each part; a part that no step measured is 0 (one program samples and updates: all is the update)."""
    total_h: float
    tokens: int
    """Sampled."""
    ms_per_sequence: float
    us_per_token: float


def cost_of(run: Trajectory, *, batch_sequences: dict[str, int], reheats: Sequence[str]) -> list[PhaseCost]:
    """Add up each phase of a run, in the order in which they were first taken.

    Args:
        run: its log.
        batch_sequences: responses of a step, by phase.
        reheats: names of the phases that reheat.

    Raises:
        ValueError: a phase of the log that `batch_sequences` lacks.
    """
    phases = [str(line.get("phase")) for line in run.lines]
    found = []
    for phase in dict.fromkeys(phases):
        if phase not in batch_sequences:
            raise ValueError(
                f"cost: expected the phases {', '.join(batch_sequences)} of the configuration, got {phase!r}"
            )
        mine = np.asarray([name == phase for name in phases])
        step_s = run.column(STEP_S)[mine]
        parts = {name: np.nan_to_num(run.column(key)[mine]) for name, key in STEP_PARTS.items()}
        parts["other"] = np.maximum(step_s - sum(parts.values()), 0.0)
        tokens, steps = int(np.nansum(run.column(TOKENS)[mine])), int(mine.sum())
        total_s = float(np.nansum(step_s))
        found.append(
            PhaseCost(
                phase=phase,
                reheats=phase in reheats,
                steps=steps,
                batch_sequences=batch_sequences[phase],
                step_s=total_s / steps,
                part_s={name: float(np.nanmean(each)) for name, each in parts.items()},
                total_h=total_s / 3600,
                tokens=tokens,
                ms_per_sequence=1e3 * total_s / (steps * batch_sequences[phase]),
                us_per_token=1e6 * total_s / max(tokens, 1),
            )
        )
    return found


def reheating_share(phases: Sequence[PhaseCost]) -> float | None:
    """Hours of the phases that reheat / hours of the others (table 6: OPSD / RL total time); None without either."""
    reheating = sum(each.total_h for each in phases if each.reheats)
    rest = sum(each.total_h for each in phases if not each.reheats)
    return reheating / rest if reheating and rest else None
