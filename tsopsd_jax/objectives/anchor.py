# pyright: strict
"""A knob that holds the entropy at what it was when the phase began, or at a fraction of it."""

from collections.abc import Callable, Mapping

from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives.base import Control, Knobs

TARGET = "target_nats"
"""Name of the knob that remembers the target; 0 until it has been measured."""


def anchored(
    knob: str,
    initial: float,
    turn: Callable[[float, bool], float],
    *,
    target_nats: float | None = None,
    fraction: float = 1.0,
) -> Control:
    """Make the control of one knob: after each update `turn(value,
    whether the entropy is below the target)` is its next value.

    Args:
        knob: name of the knob.
        initial: its value at the phase's start.
        turn: see above.
        target_nats: the target; None: `fraction` of the entropy of the phase's first update, which then turns nothing.
        fraction: see `target_nats`.

    Raises:
        ValueError: for a target or a fraction that is not positive.
    """
    if fraction <= 0 or (target_nats is not None and target_nats <= 0):
        raise ValueError(
            f"an anchored {knob} expects fraction > 0 and target_nats > 0 or null, got fraction={fraction}, "
            f"target_nats={target_nats}"
        )

    def update(knobs: Knobs, metrics: Mapping[str, float]) -> Knobs:
        entropy, target = metrics[ENTROPY], knobs[TARGET]
        if target == 0:
            return {knob: knobs[knob], TARGET: fraction * entropy}
        return {knob: turn(knobs[knob], entropy < target), TARGET: target}

    return Control({knob: initial, TARGET: target_nats or 0.0}, update)
