"""What a phase of a schedule is: its settings, what ends it, and what must not happen in it."""

import dataclasses
from collections.abc import Sequence

import optax

from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.objectives import Objective
from tsopsd_jax.rewards import Verdict, failed_fraction, failure_words
from tsopsd_jax.rollout import Sampling

START = "start"
"""The reference of a phase that is a copy of the policy it began with."""


class GuardError(RuntimeError):
    """A guard stopped the run to protect the policy; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopRule:
    """A phase ends when any of these holds; None: never for that reason.

    `collapsed_below_nats` / `recovered_above_nats` look at the mean of the last `window_steps` token entropies.
    """

    steps: int | None = None
    epochs: float | None = None
    collapsed_below_nats: float | None = None
    recovered_above_nats: float | None = None
    window_steps: int = 1

    def __post_init__(self):
        rules = (self.steps, self.epochs, self.collapsed_below_nats, self.recovered_above_nats)
        if all(rule is None for rule in rules):
            raise ValueError(
                "stop: a phase needs at least one of steps, epochs, collapsed_below_nats, recovered_above_nats"
            )
        if any(rule is not None and rule <= 0 for rule in rules) or self.window_steps < 1:
            raise ValueError(f"stop: every limit must be positive, got {self}")

    def reason(self, *, phase_step: int, epochs: float, entropies_nats: Sequence[float]) -> str | None:
        """Why the phase is over, or None.

        Args:
            phase_step: steps taken in the phase.
            epochs: passes over the data in the phase.
            entropies_nats: entropies of the phase's last steps, the newest last.
        """
        if len(entropies_nats) >= self.window_steps:
            window = sum(entropies_nats[-self.window_steps :]) / self.window_steps
            if self.collapsed_below_nats is not None and window < self.collapsed_below_nats:
                return f"collapsed: entropy {window:.4f} nats < {self.collapsed_below_nats}"
            if self.recovered_above_nats is not None and window >= self.recovered_above_nats:
                return f"recovered: entropy {window:.4f} nats >= {self.recovered_above_nats}"
        if self.steps is not None and phase_step >= self.steps:
            return f"{phase_step} steps"
        if self.epochs is not None and epochs >= self.epochs:
            return f"{epochs:.2f} epochs"
        return None

    def words(self) -> str:
        """The rule for people, such as `entropy < 0.08 nats or 300 steps`."""
        parts = []
        if self.collapsed_below_nats is not None:
            parts.append(f"entropy < {self.collapsed_below_nats} nats")
        if self.recovered_above_nats is not None:
            parts.append(f"entropy >= {self.recovered_above_nats} nats")
        if self.steps is not None:
            parts.append(f"{self.steps} steps")
        if self.epochs is not None:
            parts.append(f"{self.epochs} epochs")
        return " or ".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Limits that stop a run.

    `max_start_entropy_nats`: the phase refuses to start on a policy at or above it (the reheater diverges on a policy
    that is not collapsed: paper, appendix C). `runaway_entropy_nats`: entropy at or above it stops the run (appendix D).
    `max_skipped_in_row`: so many consecutive non-finite updates stop it. `max_reward_failed_fraction`: so does a batch of responses
    of which more have no reward, since a function of one's own failed; nothing is learnt from that batch.
    """

    max_start_entropy_nats: float | None = None
    runaway_entropy_nats: float | None = None
    max_skipped_in_row: int = 3
    max_reward_failed_fraction: float = 0.5

    def __post_init__(self):
        for name in ("max_start_entropy_nats", "runaway_entropy_nats"):
            limit = vars(self)[name]
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} must be positive, got {limit}; null: no limit")
        if self.max_skipped_in_row < 1:
            raise ValueError(f"max_skipped_in_row must be at least 1, got {self.max_skipped_in_row}")
        if not 0 <= self.max_reward_failed_fraction <= 1:
            raise ValueError(f"max_reward_failed_fraction must be in 0..1, got {self.max_reward_failed_fraction}")

    def check_rewards(self, phase: str, verdicts: Sequence[Verdict]) -> None:
        """Raise GuardError if too many of a batch's responses have a reward that failed."""
        words = failure_words(verdicts)
        if words and failed_fraction(verdicts) > self.max_reward_failed_fraction:
            raise GuardError(
                f"phase {phase!r} stopped: {words}; mend it, and go on with --accept-changed, or raise "
                "guard.max_reward_failed_fraction"
            )

    def check(self, *, phase: str, phase_step: int, entropy_nats: float, skipped_in_row: int) -> None:
        """Raise GuardError if the step just taken broke a limit."""
        start, runaway = self.max_start_entropy_nats, self.runaway_entropy_nats
        if phase_step == 1 and start is not None and entropy_nats >= start:
            raise GuardError(
                f"phase {phase!r} refuses to start: entropy {entropy_nats:.4f} nats, expected a collapsed policy under "
                f"{start} nats; train until collapse first, or raise guard.max_start_entropy_nats"
            )
        if runaway is not None and entropy_nats >= runaway:
            raise GuardError(
                f"phase {phase!r} stopped: entropy {entropy_nats:.4f} nats ran over {runaway} nats at its step "
                f"{phase_step}; lower the learning rate or the teacher's temperature and go on from the last checkpoint"
            )
        if skipped_in_row >= self.max_skipped_in_row:
            raise GuardError(
                f"phase {phase!r} stopped: {skipped_in_row} updates in a row were not finite and were skipped; lower the "
                "learning rate, or look at the batch in float32"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of the schedule. `reward` None: the objective needs no reward, and the step is one jitted function."""

    name: str
    outcome: str
    objective: Objective
    optimizer: optax.GradientTransformation
    reset_optimizer: bool
    sampling: Sampling
    max_response_tokens: int
    prompts_per_step: int
    responses_per_prompt: int
    rows_at_once: int | None
    micro_batches: int | None
    tile_tokens: int | None
    """Tokens of a tile of the head; None: what suits the devices."""
    pack: bool
    reward: RewardRule | None
    stop: StopRule
    guard: Guard
    learning_rate: optax.Schedule | None = None
    """The optimizer's, to be logged; None: it is not."""
    reference: str | None = None
    """The frozen reference that the objective is compared with: START, or the directory of another model; None: it has none."""
    reference_every_steps: int | None = None
    """A copy of the policy is taken anew after so many steps; None: at the phase's start alone."""

    def renews_reference(self, phase_step: int) -> bool:
        """Whether a copy of the policy is taken before the step after `phase_step` steps of the phase."""
        every = self.reference_every_steps
        return self.reference == START and (phase_step == 0 or (every is not None and phase_step % every == 0))

    @property
    def rows(self) -> int:
        """Rows of a batch: prompts x responses."""
        return self.prompts_per_step * self.responses_per_prompt

    def check_measured(self, entropy: bool) -> None:
        """Raise GuardError if a limit of the phase looks at the entropy and its objective does not report one."""
        limits = {
            "stop.collapsed_below_nats": self.stop.collapsed_below_nats,
            "stop.recovered_above_nats": self.stop.recovered_above_nats,
            "guard.max_start_entropy_nats": self.guard.max_start_entropy_nats,
            "guard.runaway_entropy_nats": self.guard.runaway_entropy_nats,
        }
        asked = [name for name, limit in limits.items() if limit is not None]
        if asked and not entropy:
            raise GuardError(
                f"phase {self.name!r} refuses to start: {asked[0]} expects its objective to report "
                "policy/entropy_nats, got no such metric; report it, or set the limit to null and stop by steps or epochs"
            )

    def hold_above_nats(self, phase_step: int) -> float:
        """Entropy from which the update of step `phase_step` (from 1) is measured but not applied, because the phase
        will be refused, stopped or complete on it; infinity: never."""
        limits = [self.guard.runaway_entropy_nats]
        if phase_step == 1:
            limits.append(self.guard.max_start_entropy_nats)
        if self.stop.window_steps == 1:
            limits.append(self.stop.recovered_above_nats)
        return min((limit for limit in limits if limit is not None), default=float("inf"))
