"""Statistics of the comparison at small size: pass@k from counts, and intervals over seeds and problems.

A difference between two arms is measured on S seeds and P problems, d[s, p] = mean + seed + problem + rest: seeds and
problems are both samples of what the claim is about. Few seeds are the trouble: resampling two or three of them with
replacement knows too little of how seeds differ. So seeds enter by Student's t, and problems, of which there are many,
by the bootstrap.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES, PARTS = 10_000, 10
COVERAGE = 0.95


class Interval(NamedTuple):
    """A mean, the bounds of its 95 % interval, and the number of seeds behind it. One seed: the interval is over
    problems alone, and says nothing of other seeds. No interval: the bounds are NaN."""

    mean: float
    low: float
    high: float
    seeds: int


def pass_at_k(right: Int[np.ndarray, "*N"], samples: int, k: int) -> Float[np.ndarray, "*N"]:
    """Estimate pass@k of each problem without bias, 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

    Args:
        right: c, how many of a problem's responses are right.
        samples: n.
        k: at most n; k = 1 is the mean accuracy.

    Raises:
        ValueError: if k is not in 1..n, or a count not in 0..n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k expects 1 <= k <= {samples} samples, got {k}")
    if right.size and not 0 <= right.min() <= right.max() <= samples:
        raise ValueError(f"expected counts in 0..{samples}, got {right.min()}..{right.max()}")
    values = [1.0 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return np.asarray(values)[right]


def crossed_interval(differences: Float[np.ndarray, "S P"], *, seed: int = 0) -> Interval:
    """Give the mean of paired differences, with an interval over seeds and problems.

    A draw of the mean is the mean over P problems drawn with replacement (the same for all seeds), plus t(S - 1) x
    the standard error of the seeds. The bounds are the draws' 2.5 % and 97.5 % points. That error's square is the
    variance of the seeds' means / S, less the share of it that the problems' draws hold already: the variance of the
    rest / (S P), at least 0.

    Args:
        differences: of each seed and problem; all seeds have the same problems.
        seed: of the draws.
    """
    seeds, problems = differences.shape
    rng = np.random.default_rng(seed)
    per_problem, per_seed = differences.mean(axis=0), differences.mean(axis=1)
    parts = (rng.integers(problems, size=(RESAMPLES // PARTS, problems)) for _ in range(PARTS))  # little memory
    draws = np.concatenate([per_problem[part].mean(axis=1) for part in parts])
    if seeds > 1:
        rest = differences - per_problem - per_seed[:, None] + per_problem.mean()
        shared = (rest**2).sum() / ((seeds - 1) * max(problems - 1, 1)) / (seeds * problems)
        error = math.sqrt(max(per_seed.var(ddof=1) / seeds - shared, 0.0))
        draws = draws + error * rng.standard_t(seeds - 1, size=len(draws))
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(per_problem.mean()), float(low), float(high), seeds)


def seed_interval(values: Float[np.ndarray, " S"], *, seed: int = 0) -> Interval:
    """Give the mean of one number a seed, with Student's interval; the bounds of a single number are NaN."""
    if len(values) < 2:
        return Interval(float(values.mean()), math.nan, math.nan, len(values))
    return crossed_interval(np.asarray(values, np.float64)[:, None], seed=seed)


SUPPORTED, NOT_SEEN, CONTRADICTED, UNMEASURED = "supported", "not seen", "contradicted", "not measured yet"
LEAST_SEEDS = 3


def verdict(interval: Interval | None, *, above: float = 0.0, least_seeds: int = LEAST_SEEDS) -> str:
    """Name what an interval says of the claim that the mean is above a limit.

    supported: the whole interval is above it; contradicted: the whole interval is below; not seen: it holds the limit;
    not measured yet: there is none, or of too few seeds.
    """
    if interval is None or interval.seeds < least_seeds or math.isnan(interval.low):
        return UNMEASURED
    if interval.low > above:
        return SUPPORTED
    return CONTRADICTED if interval.high < above else NOT_SEEN


def verdict_within(interval: Interval | None, *, limit: float, least_seeds: int = LEAST_SEEDS) -> str:
    """Name what an interval says of the claim that the mean lies within +-limit: supported if the whole interval does,
    contradicted if none of it does, not seen otherwise."""
    if interval is None or interval.seeds < least_seeds or math.isnan(interval.low):
        return UNMEASURED
    if -limit < interval.low and interval.high < limit:
        return SUPPORTED
    return CONTRADICTED if interval.low > limit or interval.high < -limit else NOT_SEEN
