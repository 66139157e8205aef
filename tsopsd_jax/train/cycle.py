"""A cyclic schedule: some phases again and again, round by round, as long as the policy collapses and as often as
allowed."""

import dataclasses
import re
from typing import NamedTuple


class Place(NamedTuple):
    """A place in a schedule: the index of a phase (their number: the end) and the round, from 1; outside of the cycle
    1."""

    phase: int
    round: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycle:
    """Phases `first` to `last` of a schedule, both included, at most `times` times."""

    first: int
    last: int
    times: int

    def __contains__(self, phase: int) -> bool:
        return self.first <= phase <= self.last

    def after(self, place: Place, *, missed_collapse: bool) -> Place:
        """What follows a phase that is over.

        Args:
            place: of that phase.
            missed_collapse: it waits for a collapse and ended without one: there is nothing to reheat, and the cycle is
                left.
        """
        if place.phase in self:
            if missed_collapse:
                return Place(self.last + 1, 1)
            if place.phase == self.last:
                return Place(self.first, place.round + 1) if place.round < self.times else Place(self.last + 1, 1)
            return Place(place.phase + 1, place.round)
        return Place(place.phase + 1, 1)

    def named(self, name: str, place: Place) -> str:
        """The name of a phase or its outcome in the log: in the cycle with its round, such as `rl#2`."""
        return f"{name}#{place.round}" if place.phase in self else name


ONCE = Cycle(first=0, last=-1, times=1)
"""No cycle: every phase once."""


def without_round(name: str) -> str:
    """The name of a phase as the configuration has it."""
    return re.sub(r"#\d+$", "", name)
