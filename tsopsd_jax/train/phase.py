"""What a phase of a schedule is: its settings, what ends it, and what must not happen in it."""

import dataclasses
from collections.abc import Sequence

import optax

from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.objectives import Objective
from tsopsd_jax.rewards import Verdict, failed_fraction, failure_words
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.rundir.run_state import RunProgress
from tsopsd_jax.train.controllers import RateController
from tsopsd_jax.train.stopping import StopRule

START = "start"
"""The reference of a phase that is a copy of the policy it began with."""


class GuardError(RuntimeError):
    """A guard stopped the run to protect the policy; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Limits that stop a run.

    `max_start_entropy_nats`: the phase refuses to start on a policy at or above it (the reheater diverges on a policy
    that is not collapsed: paper, appendix C). `runaway_entropy_nats`: entropy at or above it stops the run (appendix
    D). `max_skipped_in_row`: so many consecutive non-finite updates stop it (of a step's updates, those at its end).
    `max_reward_failed_fraction`: so does a batch of responses of which more have no reward, since a function of one's
    own failed; nothing is learnt from that batch. `max_truncated_fraction`: so does a step of which more responses were
    cut off at their limit.
    """

    max_start_entropy_nats: float | None = None
    runaway_entropy_nats: float | None = None
    max_skipped_in_row: int = 3
    max_reward_failed_fraction: float = 0.5
    max_truncated_fraction: float | None = None

    def __post_init__(self):
        for name in ("max_start_entropy_nats", "runaway_entropy_nats"):
            limit = vars(self)[name]
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} must be positive, got {limit}; null: no limit")
        if self.max_skipped_in_row < 1:
            raise ValueError(f"max_skipped_in_row must be at least 1, got {self.max_skipped_in_row}")
        if not 0 <= self.max_reward_failed_fraction <= 1:
            raise ValueError(f"max_reward_failed_fraction must be in 0..1, got {self.max_reward_failed_fraction}")
        if self.max_truncated_fraction is not None and not 0 <= self.max_truncated_fraction < 1:
            raise ValueError(
                f"max_truncated_fraction must be in [0, 1), got {self.max_truncated_fraction}; null: no limit"
            )

    def check_rewards(self, phase: str, verdicts: Sequence[Verdict]) -> None:
        """Raise GuardError if too many of a batch's responses have a reward that failed."""
        words = failure_words(verdicts)
        if words and failed_fraction(verdicts) > self.max_reward_failed_fraction:
            raise GuardError(
                f"phase {phase!r} stopped: {words}; mend it, and go on with --accept-changed, or raise "
                "guard.max_reward_failed_fraction"
            )

    def broken(
        self, *, phase: str, phase_step: int, entropy_nats: float, skipped_in_row: int, truncated_fraction: float
    ) -> str | None:
        """Say which limit the step just taken broke, and what to do; None: none."""
        start, runaway = self.max_start_entropy_nats, self.runaway_entropy_nats
        if phase_step == 1 and start is not None and entropy_nats >= start:
            return (
                f"phase {phase!r} refuses to start: entropy {entropy_nats:.4f} nats, expected a collapsed policy under "
                f"{start} nats; train until collapse first, or raise guard.max_start_entropy_nats"
            )
        if runaway is not None and entropy_nats >= runaway:
            return (
                f"phase {phase!r} stopped: entropy {entropy_nats:.4f} nats ran over {runaway} nats at its step "
                f"{phase_step}; lower the learning rate or the teacher's temperature and go on from the last checkpoint"
            )
        if self.max_truncated_fraction is not None and truncated_fraction > self.max_truncated_fraction:
            return (
                f"phase {phase!r} stopped: {100 * truncated_fraction:.1f} % of its responses were cut off at its step "
                f"{phase_step}, expected at most {100 * self.max_truncated_fraction:g} %; lower the learning rate and "
                "go on from the last checkpoint, or raise guard.max_truncated_fraction"
            )
        if skipped_in_row >= self.max_skipped_in_row:
            return (
                f"phase {phase!r} stopped: {skipped_in_row} updates in a row were not finite and were skipped; the "
                "rows are in nonfinite/ of the run directory: look at the loss there, or lower the learning rate"
            )
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of the schedule. `reward` None: the objective needs no reward, and the step is one jitted
    function."""

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
    updates_per_rollout: int = 1
    """Updates of each pass over a rollout, each of a mini-batch of whole groups."""
    passes_per_rollout: int = 1
    reference: str | None = None
    """The frozen reference that the objective is compared with: START, or the directory of another model; None: it has
    none."""
    reference_every_steps: int | None = None
    """A copy of the policy is taken anew after so many steps; None: at the phase's start alone."""

    def renews_reference(self, phase_step: int) -> bool:
        """Whether a copy of the policy is taken before the step after `phase_step` steps of the phase."""
        every = self.reference_every_steps
        return self.reference == START and (phase_step == 0 or (every is not None and phase_step % every == 0))

    rate_controller: RateController | None = None
    """Turns the learning rate between updates; None: it is the optimizer's."""

    @property
    def rows(self) -> int:
        """Rows of a step: prompts x responses."""
        return self.prompts_per_step * self.responses_per_prompt

    @property
    def update_rows(self) -> int:
        """Rows of an update's mini-batch."""
        return self.rows // self.updates_per_rollout

    @property
    def updates_per_step(self) -> int:
        """Updates that follow a rollout, in all its passes."""
        return self.updates_per_rollout * self.passes_per_rollout

    @property
    def sampler_selects(self) -> bool:
        """Whether the sampler's log-probabilities are those that the objective's `select` reads, up to rounding: it
        reads no other statistic, one update follows a rollout, all rows are that rollout's (no groups kept from the
        step before), and they are drawn from the policy at its policy temperature (top_p 1, top_k 0)."""
        objective, t, rule = self.objective, self.objective.policy_temperature, self.reward
        keeps = rule is not None and rule.max_generation_batches > 0 and rule.surplus == "keep"
        reads_logp = objective.select is not None and objective.select_reads == ("logp",)
        drawn = t is not None and self.sampling == Sampling(sampling_temperature=t)
        return reads_logp and drawn and self.updates_per_step == 1 and not keeps

    def check_measured(self, entropy: bool) -> None:
        """Raise GuardError if a limit of the phase looks at the entropy and its objective does not report one."""
        guards = {
            "guard.max_start_entropy_nats": self.guard.max_start_entropy_nats,
            "guard.runaway_entropy_nats": self.guard.runaway_entropy_nats,
            "learning_rate_control": self.rate_controller,
        }
        asked = [f"stop.{name}" for name in self.stop.looks_at]
        asked += [name for name, limit in guards.items() if limit is not None]
        if asked and not entropy:
            raise GuardError(
                f"phase {self.name!r} refuses to start: {asked[0]} expects its objective to report "
                "policy/entropy_nats, got no such metric; report it, or set the limit to null and stop by steps or "
                "epochs"
            )

    def turned_rate(self, before: RunProgress, entropy_nats: float) -> float:
        """The factor on the learning rate after a step that measured `entropy_nats`; `before` it the run stood so.

        The entropy of a phase's first step says nothing of its updates, nor does that after an update that was skipped.
        """
        if self.rate_controller is None:
            return 1.0
        if before.phase_step == 0 or before.skipped_in_row:
            return before.learning_rate_factor
        return self.rate_controller.turned(before.learning_rate_factor, entropy_nats - before.entropies_nats[-1])

    def hold_above_nats(
        self, phase_step: int, *, before_nats: float | None = None, baseline_nats: float | None = None
    ) -> float:
        """Entropy from which step `phase_step` (from 1) measures the policy at its first update and changes nothing,
        because the phase will be refused, stopped or complete on it; infinity: never.

        Args:
            before_nats, baseline_nats: of the phase's step before, and the run's early entropy; see `StopRule`.
        """
        limits = [self.guard.runaway_entropy_nats]
        if phase_step == 1:
            limits.append(self.guard.max_start_entropy_nats)
        limits.append(
            self.stop.hold_above_nats(phase_step=phase_step, before_nats=before_nats, baseline_nats=baseline_nats)
        )
        return min((limit for limit in limits if limit is not None), default=float("inf"))
