"""The entropy jump in a trajectory: one step at which a curve leaves what is smooth (TS-OPSD, section 4.4, appendix D).

Two curves are fitted to n values: a cubic, and a cubic with a step of height h at one place, the place that fits best.
The jump is found where three things hold:

- the step is worth its two parameters: n log(RSS_smooth / RSS_jump) - 2 log n, the gain in Bayes' information
  criterion, is at least 10;
- the single increment there is at least three times the larger of the two beside it, in absolute value, so that a ramp
  of several steps is none;
- the step is at least three times the noise that is left.

Its sharpness is the share of what the smooth curve leaves unexplained that the one step explains, 1 - RSS_jump /
RSS_smooth.
"""

from typing import NamedTuple

import numpy as np

DEGREE = 3
LEAST_GAIN, LEAST_RATIO = 10.0, 3.0
LEAST_VALUES = 8


class Jump(NamedTuple):
    """The likeliest jump of a trajectory, whether it is one, and the fits [n] without it and with it."""

    found: bool
    place: int
    """Index of the first value after it."""
    height: float
    increment: float
    """From the value before the place to the one at it."""
    increment_ratio: float
    """|increment| / the larger of the neighbouring ones."""
    noise: float
    """Root mean square of what the curve with a step leaves, by its degrees of freedom."""
    information_gain: float
    sharpness: float
    smooth: np.ndarray
    stepped: np.ndarray


def find_jump(values: np.ndarray) -> Jump:
    """Look for the step that explains most; at least two values stand on either side of it.

    Args:
        values: [n] at equal distances.

    Raises:
        ValueError: fewer than 8 values, or one that is not finite.
    """
    y = np.asarray(values, np.float64)
    if len(y) < LEAST_VALUES or not np.isfinite(y).all():
        raise ValueError(
            f"jump: expected at least {LEAST_VALUES} finite values, got {np.isfinite(y).sum()} of {len(y)}"
        )
    n, x = len(y), np.linspace(-1.0, 1.0, len(y))
    basis = np.polynomial.legendre.legvander(x, DEGREE)
    smooth = _fit(basis, y)
    fits = {}
    for place in range(2, n - 1):
        step = (np.arange(n) >= place).astype(np.float64)
        fits[place] = _fit(np.column_stack([basis, step]), y)
    place = min(fits, key=lambda at: _rss(fits[at], y))
    stepped = fits[place]
    rss_smooth, rss_jump = _rss(smooth, y), _rss(stepped, y)
    # What rounding leaves of an exact fit says nothing.
    least = n * np.square(1e-12 * np.abs(y).max()) + 1e-300
    gain = n * np.log(max(rss_smooth, least) / max(rss_jump, least)) - 2 * np.log(n)
    noise = float(np.sqrt(rss_jump / max(n - DEGREE - 3, 1)))
    increments = np.diff(y)
    increment = float(increments[place - 1])
    beside = np.abs(increments[[at for at in (place - 2, place) if 0 <= at < n - 1]]).max()
    ratio = abs(increment) / max(float(beside), 1e-12 * float(np.abs(y).max()), 1e-300)
    height = _height(basis, y, place)
    found = gain >= LEAST_GAIN and ratio >= LEAST_RATIO and abs(height) >= LEAST_RATIO * noise
    sharpness = 1.0 - rss_jump / rss_smooth if rss_smooth > least else 0.0
    return Jump(bool(found), place, height, increment, ratio, noise, float(gain), sharpness, smooth, stepped)


def _fit(basis: np.ndarray, y: np.ndarray) -> np.ndarray:
    return basis @ np.linalg.lstsq(basis, y, rcond=None)[0]


def _height(basis: np.ndarray, y: np.ndarray, place: int) -> float:
    step = (np.arange(len(y)) >= place).astype(np.float64)
    return float(np.linalg.lstsq(np.column_stack([basis, step]), y, rcond=None)[0][-1])


def _rss(fit: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(np.square(y - fit)))
