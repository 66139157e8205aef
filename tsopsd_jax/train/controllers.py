"""Numbers that a phase turns by what it sees of the policy."""

import dataclasses
import math

EXPONENT = 0.25
"""Power of the ratio by which the rate is corrected at each step.

A step's gain is seen one step late. Where it is proportional to the rate, e(t) = log(gain / wanted) follows
e(t+1) = e(t) - k e(t-1), and z^2 - z + k has the double root 1/2 at k = 1/4: the fastest approach that does not swing.
"""
MOST = 2.0
"""Largest change of the rate in a step, up or down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateController:
    """Turns a phase's learning rate towards a wanted gain of entropy a step, in factors of the optimizer's own rate.

    Args:
        gain_nats: wanted gain of the mean token entropy from one step to the next; negative: a loss.
        min_factor, max_factor: limits.
    """

    gain_nats: float
    min_factor: float
    max_factor: float

    def turned(self, factor: float, seen_nats: float) -> float:
        """The factor of the next update: factor * (wanted / seen)^(1/4), by at most `MOST`, within the limits. A gain
        in the wrong direction, or none, is answered by `MOST`.

        Args:
            factor: of the last update.
            seen_nats: entropy now less that of the step before; not finite: nothing is turned.
        """
        if not math.isfinite(seen_nats):
            return factor
        ratio = self.gain_nats / seen_nats if seen_nats * self.gain_nats > 0 else math.inf
        change = min(max(ratio**EXPONENT, 1 / MOST), MOST)
        return min(max(factor * change, self.min_factor), self.max_factor)
