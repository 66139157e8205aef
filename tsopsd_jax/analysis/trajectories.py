"""What a run logged, as arrays over its steps: the form in which analyses of runs read it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Span(NamedTuple):
    """Steps `first` to `last` of the run, taken in one go of one phase."""

    phase: str
    first: int
    last: int


class Trajectory(NamedTuple):
    """The lines of a run's log in order of their steps."""

    name: str
    step: np.ndarray
    spans: Sequence[Span]
    lines: Sequence[Mapping[str, Any]]

    def column(self, key: str) -> np.ndarray:
        """The values of a metric, NaN where a step has none."""
        return np.asarray([_number(line.get(key)) for line in self.lines])

    def within(self, span: Span) -> "Trajectory":
        """The steps of one span alone."""
        kept = [line for line in self.lines if span.first <= line["step"] <= span.last]
        return read_trajectory(self.name, kept)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def read_trajectory(name: str, lines: Sequence[Mapping[str, Any]]) -> Trajectory:
    """Arrange the lines of metrics.jsonl.

    Raises:
        ValueError: if there are none.
    """
    if not lines:
        raise ValueError(f"{name}: expected at least one step, got none: analyse a run after its first step")
    spans: list[Span] = []
    for at, line in enumerate(lines):
        # A cyclic schedule may come back to the same phase at once: then its own count starts again.
        again = at > 0 and _number(line.get("phase_step")) <= _number(lines[at - 1].get("phase_step"))
        if spans and spans[-1].phase == line.get("phase") and not again:
            spans[-1] = spans[-1]._replace(last=line["step"])
        else:
            spans.append(Span(str(line.get("phase")), line["step"], line["step"]))
    return Trajectory(name, np.asarray([line["step"] for line in lines]), spans, lines)


class Band(NamedTuple):
    """The mean of several runs at each step that any of them has, the standard deviation, and how many there are."""

    step: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    """With n - 1 in the denominator; 0 of a single run."""
    runs: np.ndarray


def band_of(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band:
    """Average several runs step by step; NaN and steps that a run lacks are left out.

    Args:
        series: (steps [N], values [N]) of each run.
    """
    step = np.unique(np.concatenate([steps for steps, _ in series]))
    values = np.full((len(series), len(step)), np.nan)
    for row, (steps, each) in enumerate(series):
        values[row, np.searchsorted(step, steps)] = each
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    squares = np.where(known, np.square(values - mean[None, :]), 0.0).sum(axis=0)
    return Band(step, mean, np.sqrt(squares / np.maximum(count - 1, 1)), count)
