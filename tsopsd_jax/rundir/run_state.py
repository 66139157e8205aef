"""A run as it stands between two steps: what lives while it trains, and what a checkpoint of it holds."""

import dataclasses
from typing import Any, NamedTuple

from tsopsd_jax.judge.groups import Groups
from tsopsd_jax.types import PyTree, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunProgress:
    """Where a run stands, apart from the train state. All of it is plain JSON."""

    phase: int = 0
    """Index of the current phase; the number of phases when the run is done."""
    phase_step: int = 0
    """Steps taken in the current phase."""
    position: int = 0
    """Prompts consumed since the run began: the data cursor."""
    phase_position: int = 0
    """`position` when the current phase began."""
    entropies_nats: tuple[float, ...] = ()
    """Mean token entropy of the last steps of the phase, for the stop rules."""
    skipped_in_row: int = 0
    """Consecutive updates skipped because they were not finite."""
    knobs: dict[str, float] = dataclasses.field(default_factory=dict)
    """Numbers that the phase's objective turns between updates; empty where it turns none, or has not begun."""
    elapsed_s: float = 0.0
    """Wall time of the run, interruptions left out."""

    def after_step(self, *, entropy_nats: float, skipped: bool, window_steps: int) -> "RunProgress":
        """The progress one step on; `window_steps` entropies are kept."""
        return dataclasses.replace(
            self,
            phase_step=self.phase_step + 1,
            entropies_nats=(*self.entropies_nats, entropy_nats)[-window_steps:],
            skipped_in_row=self.skipped_in_row + 1 if skipped else 0,
        )

    def next_phase(self) -> "RunProgress":
        """The progress at the beginning of the phase after this one."""
        return RunProgress(phase=self.phase + 1, position=self.position, phase_position=self.position)


class RunState(NamedTuple):
    """All that a run goes on from. No random key is part of it: keys follow from the seed and the step."""

    state: TrainState
    progress: RunProgress
    leftover: Groups | None = None
    """Groups that dynamic sampling left for the next step."""
    start: PyTree | None = None
    """The copy of the policy that is the phase's reference: as it was at the phase's start, or when it was last renewed."""

    @property
    def step(self) -> int:
        """Updates taken since the run began."""
        return int(self.state.step)

    def at(self, **changes: Any) -> "RunState":
        """A copy of the state with a changed progress."""
        return self._replace(progress=dataclasses.replace(self.progress, **changes))
