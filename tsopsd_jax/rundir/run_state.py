"""A run as it stands between two steps: what lives while it trains, and what a checkpoint of it holds."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tsopsd_jax.judge.groups import Groups
from tsopsd_jax.types import PyTree, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunProgress:
    """Where a run stands, apart from the train state. All of it is plain JSON."""

    phase: int = 0
    """Index of the current phase; the number of phases when the run is done."""
    round: int = 1
    """Which time the phase is taken, in a cyclic schedule."""
    stage: str = "base"
    """Name of the policy that the current phase began with."""
    phase_step: int = 0
    """Steps taken in the current phase."""
    position: int = 0
    """Prompts consumed since the run began: the data cursor."""
    phase_position: int = 0
    """`position` when the current phase began."""
    entropies_nats: tuple[float, ...] = ()
    """Mean token entropy of the last steps of the phase, for the stop rules."""
    early_entropies_nats: tuple[float, ...] = ()
    """Mean token entropies of the run's first steps, until they make up its baseline."""
    baseline_nats: float | None = None
    """Their mean: the run's early entropy, to which stop rules may be relative; None: not known yet."""
    learning_rate_factor: float = 1.0
    """Factor on the learning rate of the phase's next step, where a controller turns it."""
    skipped_in_row: int = 0
    """Consecutive updates skipped because they were not finite."""
    knobs: dict[str, float] = dataclasses.field(default_factory=dict)
    """Numbers that the phase's objective turns between updates; empty where it turns none, or has not begun."""
    elapsed_s: float = 0.0
    """Wall time of the run, interruptions left out."""

    def after_step(
        self, *, entropy_nats: float, skipped: Sequence[bool], window_steps: int, baseline_steps: int
    ) -> "RunProgress":
        """The progress one step on, whose updates were skipped or not; `window_steps` entropies are kept, and the first
        `baseline_steps` of the run make the baseline (an objective that reports none adds none)."""
        early, baseline = self.early_entropies_nats, self.baseline_nats
        if baseline is None and math.isfinite(entropy_nats):
            early = (*early, entropy_nats)
            if len(early) >= baseline_steps:
                early, baseline = (), sum(early) / len(early)
        in_row = self.skipped_in_row
        for was_skipped in skipped:
            in_row = in_row + 1 if was_skipped else 0
        return dataclasses.replace(
            self,
            early_entropies_nats=early,
            baseline_nats=baseline,
            phase_step=self.phase_step + 1,
            entropies_nats=(*self.entropies_nats, entropy_nats)[-window_steps:],
            skipped_in_row=in_row,
        )

    def next_phase(self, *, phase: int, round: int, stage: str) -> "RunProgress":
        """The progress at the beginning of another phase; `stage` names the policy that this one leaves."""
        return RunProgress(
            phase=phase,
            round=round,
            stage=stage,
            position=self.position,
            phase_position=self.position,
            early_entropies_nats=self.early_entropies_nats,
            baseline_nats=self.baseline_nats,
        )


class RunState(NamedTuple):
    """All that a run goes on from. No random key is part of it: keys follow from the seed and the step."""

    state: TrainState
    progress: RunProgress
    leftover: Groups | None = None
    """Groups that dynamic sampling left for the next step."""
    start: PyTree | None = None
    """The copy of the policy that is the phase's reference: as it was at the phase's start, or when it was last
    renewed."""

    @property
    def step(self) -> int:
        """Steps taken since the run began: a step is a rollout with all its updates."""
        return int(self.state.step)

    def at(self, **changes: Any) -> "RunState":
        """A copy of the state with a changed progress."""
        return self._replace(progress=dataclasses.replace(self.progress, **changes))
