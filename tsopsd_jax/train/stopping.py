"""When a phase is over: after steps or epochs, or when the policy's entropy has collapsed or recovered."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopRule:
    """A phase ends when any of these holds; None: never for that reason.

    `collapsed_below_nats` / `recovered_above_nats` look at the mean of the last `window_steps` token entropies.
    `collapsed_below_fraction` / `recovered_above_fraction` are the same in units of the run's own early entropy, the
    mean of its first `baseline_steps` steps. No rule on entropy holds before `min_steps` steps of the phase.
    `look_ahead`: the phase has recovered where one more step would end further from the limit than this one; see
    `recovery_nats`.
    """

    steps: int | None = None
    epochs: float | None = None
    collapsed_below_nats: float | None = None
    recovered_above_nats: float | None = None
    collapsed_below_fraction: float | None = None
    recovered_above_fraction: float | None = None
    window_steps: int = 1
    min_steps: int = 0
    look_ahead: bool = False

    def __post_init__(self):
        collapsed = (self.collapsed_below_nats, self.collapsed_below_fraction)
        recovered = (self.recovered_above_nats, self.recovered_above_fraction)
        rules = (self.steps, self.epochs, *collapsed, *recovered)
        if all(rule is None for rule in rules):
            raise ValueError(
                "stop: a phase needs at least one of steps, epochs, collapsed_below_nats, recovered_above_nats, "
                "collapsed_below_fraction, recovered_above_fraction"
            )
        if any(rule is not None and rule <= 0 for rule in rules) or self.window_steps < 1 or self.min_steps < 0:
            raise ValueError(f"stop: every limit must be positive, got {self}")
        for name, pair in (("collapsed_below", collapsed), ("recovered_above", recovered)):
            if None not in pair:
                raise ValueError(f"stop: expected {name}_nats or {name}_fraction, got both ({pair[0]}, {pair[1]})")
        for unit, low, high in zip(("nats", "fraction"), collapsed, recovered, strict=True):
            if low is not None and high is not None and low >= high:
                raise ValueError(
                    f"stop: collapsed_below_{unit} {low} must be under recovered_above_{unit} {high}: every entropy "
                    "would end the phase"
                )
        if self.look_ahead and (recovered == (None, None) or self.window_steps > 1):
            raise ValueError(
                "stop: look_ahead compares single steps on the way to a recovery; expected recovered_above_nats or "
                f"recovered_above_fraction, and window_steps 1, got {self}"
            )

    @property
    def looks_at(self) -> list[str]:
        """The names of the rules that look at the entropy."""
        return [
            name
            for name, limit in vars(self).items()
            if name.startswith(("collapsed", "recovered")) and limit is not None
        ]

    @property
    def waits_for_collapse(self) -> bool:
        """Whether a collapse ends the phase."""
        return any(name.startswith("collapsed") for name in self.looks_at)

    @property
    def remembered_steps(self) -> int:
        """Entropies of the last steps that the rules need."""
        return max(self.window_steps, 2)

    def collapse_nats(self, baseline_nats: float | None) -> float:
        """The entropy under which the policy has collapsed; -infinity: none yet, or never."""
        if self.collapsed_below_fraction is not None:
            return -math.inf if baseline_nats is None else self.collapsed_below_fraction * baseline_nats
        return -math.inf if self.collapsed_below_nats is None else self.collapsed_below_nats

    def recovery_nats(self, baseline_nats: float | None, before_nats: float | None = None) -> float:
        """The entropy from which the policy has recovered; infinity: none yet, or never.

        With `look_ahead`, H(t-1) under the limit L, and the next gain taken to be the last, g = H(t) - H(t-1): one more
        step ends nearer to L unless L - H(t) <= g / 2, which is H(t) >= (2 L + H(t-1)) / 3. So it ends within half a
        step of L.

        Args:
            baseline_nats: the run's early entropy; None: not known yet.
            before_nats: H(t-1), the entropy of the phase's step before; None: this is its first.
        """
        if self.recovered_above_fraction is not None:
            limit = math.inf if baseline_nats is None else self.recovered_above_fraction * baseline_nats
        else:
            limit = math.inf if self.recovered_above_nats is None else self.recovered_above_nats
        if self.look_ahead and before_nats is not None and before_nats < limit < math.inf:
            return (2 * limit + before_nats) / 3
        return limit

    def hold_above_nats(self, *, phase_step: int, before_nats: float | None, baseline_nats: float | None) -> float:
        """The entropy from which step `phase_step` (from 1) completes the recovery by itself; infinity: none."""
        if self.window_steps > 1 or phase_step < self.min_steps:
            return math.inf
        return self.recovery_nats(baseline_nats, before_nats)

    def entropy_reason(
        self, *, phase_step: int, entropies_nats: Sequence[float], baseline_nats: float | None = None
    ) -> str | None:
        """Why the policy's entropy ends the phase, or None; the arguments are those of `reason`."""
        if phase_step < self.min_steps or len(entropies_nats) < self.window_steps:
            return None
        window = sum(entropies_nats[-self.window_steps :]) / self.window_steps
        before = entropies_nats[-2] if len(entropies_nats) > 1 else None
        low, high = self.collapse_nats(baseline_nats), self.recovery_nats(baseline_nats, before)
        if window < low:
            return f"collapsed: entropy {window:.4f} nats < {low:.4g}"
        if window >= high:
            limit = self.recovery_nats(baseline_nats)
            ahead = f" (one more step would end further from {limit:.4g})" if window < limit else ""
            return f"recovered: entropy {window:.4f} nats >= {high:.4g}{ahead}"
        return None

    def reason(
        self,
        *,
        phase_step: int,
        epochs: float,
        entropies_nats: Sequence[float],
        baseline_nats: float | None = None,
    ) -> str | None:
        """Why the phase is over, or None.

        Args:
            phase_step: steps taken in the phase.
            epochs: passes over the data in the phase.
            entropies_nats: entropies of the phase's last steps, the newest last.
            baseline_nats: the run's early entropy; None: not known yet, and no fraction of it ends the phase.
        """
        entropy = self.entropy_reason(phase_step=phase_step, entropies_nats=entropies_nats, baseline_nats=baseline_nats)
        if entropy is not None:
            return entropy
        if self.steps is not None and phase_step >= self.steps:
            return f"{phase_step} steps"
        if self.epochs is not None and epochs >= self.epochs:
            return f"{epochs:.2f} epochs"
        return None

    def words(self) -> str:
        """The rule for people, such as `entropy < 0.08 nats or 300 steps`."""
        parts = [
            f"entropy {sign} {limit}{unit}"
            for sign, limit, unit in (
                ("<", self.collapsed_below_nats, " nats"),
                ("<", self.collapsed_below_fraction, " of the early entropy"),
                (">=", self.recovered_above_nats, " nats"),
                (">=", self.recovered_above_fraction, " of the early entropy"),
            )
            if limit is not None
        ]
        if self.steps is not None:
            parts.append(f"{self.steps} steps")
        if self.epochs is not None:
            parts.append(f"{self.epochs} epochs")
        return " or ".join(parts)
