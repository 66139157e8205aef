"""Series of a run's steps as they are drawn: smoothed within each phase, and no more points than can be told apart."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_POINTS = 400
"""Points drawn of a series: more than a panel has pixels to tell apart."""


class Stretch(NamedTuple):
    """Steps `first <= index < end` of the log, taken in one go of one phase."""

    phase: str
    first: int
    end: int


def smoothed(values: np.ndarray, segments: Sequence[Stretch]) -> np.ndarray:
    """Return the centred moving mean of `values`, [N] -> [N], over a 25th of each segment, never across its ends,
    NaN left out."""
    result = np.full(len(values), np.nan)
    for _, first, end in segments:
        part = values[first:end]
        half = (end - first) // 50
        known = np.isfinite(part)
        total = np.concatenate([[0.0], np.cumsum(np.where(known, part, 0.0))])
        counted = np.concatenate([[0], np.cumsum(known)])
        at = np.arange(end - first)
        low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, end - first)
        found = counted[high] - counted[low]
        mean = (total[high] - total[low]) / np.maximum(found, 1)
        result[first:end] = np.where(found > 0, mean, np.nan)
    return result


def thinned(values: np.ndarray) -> np.ndarray:
    """Indices of at most `MAX_POINTS` finite values: the lowest and the highest of each stretch of steps."""
    finite = np.flatnonzero(np.isfinite(values))
    if finite.size <= MAX_POINTS:
        return finite
    stretches = np.array_split(finite, MAX_POINTS // 2)
    extremes = [at[pick(values[at])] for at in stretches for pick in (np.argmin, np.argmax)]
    return np.unique(extremes)


def with_gaps(x: np.ndarray, y: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put NaN between neighbours where values are missing, so that no line bridges it; `missing` counts them so far."""
    gaps = np.flatnonzero(np.diff(missing)) + 1
    return np.insert(x.astype(float), gaps, np.nan), np.insert(y, gaps, np.nan)
