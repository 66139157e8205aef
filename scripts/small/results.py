"""Results of the comparison at small size, as they are read from their files: which policies were measured, and paired
differences between arms."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from small.statistics import Interval, crossed_interval, pass_at_k, seed_interval

TUNING = 90
"""Seeds from here on are for trying settings, and are not reported."""
COLLAPSE, COLLAPSED, REHEATED, BASE = "collapse", "collapsed", "reheated", "base"
PAPERS, WHOLE = "0.7", "1"
"""Top-p of the paper's evaluations, and of the policy itself."""

Score = Callable[[dict[str, Any]], np.ndarray]
"""A measured policy -> a number for each problem."""


def accuracy(top_p: str = PAPERS) -> Score:
    """Score a policy by the share of right responses: what avg@8 is the mean of, whatever the number of samples."""
    return lambda measured: np.asarray(measured["right"][top_p]) / measured["samples"]


def passes(k: int, top_p: str = WHOLE) -> Score:
    """Score a policy by pass@k."""
    return lambda measured: pass_at_k(np.asarray(measured["right"][top_p]), measured["samples"], k)


def greedy(measured: dict[str, Any]) -> np.ndarray:
    """Score a policy by its greedy responses."""
    return np.asarray(measured["greedy"], np.float64)


class Key(NamedTuple):
    """A policy that was measured."""

    seed: int
    arm: str
    point: str


class Results(NamedTuple):
    """What was measured of some seeds."""

    policies: dict[Key, dict[str, Any]]
    courses: dict[tuple[int, str], dict[str, Any]]

    def seeds(self, *wanted: tuple[str, str]) -> list[int]:
        """Return the seeds that have all these (arm, point)."""
        all_seeds = sorted({key.seed for key in self.policies})
        return [seed for seed in all_seeds if all(Key(seed, *each) in self.policies for each in wanted)]

    def token_points(self, *arms: str) -> list[str]:
        """Return the points by tokens that all these arms have, in a seed at least, the last one last."""
        points = {key.point for key in self.policies if key.point.endswith("M")}
        common = [point for point in points if self.seeds(*((arm, point) for arm in arms))]
        return sorted(common, key=lambda point: float(point[:-1]))

    def last(self, *arms: str) -> str | None:
        """Return the last point that all these arms have; None: they have none in common."""
        points = self.token_points(*arms)
        return points[-1] if points else None

    def arms(self) -> list[str]:
        """Return the arms that go on from a collapse, in the order of their names, plain DAPO first."""
        found = {key.arm for key in self.policies} - {COLLAPSE, BASE}
        return sorted(found, key=lambda arm: (arm != "dapo", arm))

    def scores(self, arm: str, point: str, score: Score, seeds: Sequence[int]) -> np.ndarray:
        """Return a score of each seed and problem, [S, P]."""
        return np.stack([score(self.policies[Key(seed, arm, point)]) for seed in seeds])

    def least_samples(self) -> int:
        """Return the least number of responses that a policy gave to a problem; 0 where none was measured."""
        return min((measured["samples"] for measured in self.policies.values()), default=0)

    def mean(self, arm: str, point: str, score: Score) -> float:
        """Return the mean of a score over the seeds that have it."""
        return float(self.scores(arm, point, score, self.seeds((arm, point))).mean())

    def difference(
        self, first: Sequence[tuple[str, str]], second: Sequence[tuple[str, str]], score: Score, *, hard: bool = False
    ) -> Interval | None:
        """Give the mean of some (arm, point) less the mean of others, seed by seed and problem by problem; None where
        no seed has all.

        Args:
            hard: how much larger the difference is on the third of the problems that the base model solves least than
                on the others.
        """
        seeds = self.seeds(*first, *second, *([(BASE, BASE)] if hard else []))
        if not seeds:
            return None
        sides = [np.mean([self.scores(*each, score, seeds) for each in side], axis=0) for side in (first, second)]
        found = sides[0] - sides[1]
        if hard:
            found = found * contrast(self.scores(BASE, BASE, accuracy(WHOLE), seeds[:1])[0])
        return crossed_interval(found)

    def per_seed(self, arm: str, point: str, number: Callable[[dict[str, Any]], float]) -> Interval | None:
        """Give the mean over seeds of one number of a measured policy; None where there is none."""
        seeds = self.seeds((arm, point))
        if not seeds:
            return None
        return seed_interval(np.asarray([number(self.policies[Key(seed, arm, point)]) for seed in seeds]))


def contrast(ease: np.ndarray) -> np.ndarray:
    """Make weights [P] with which the mean of x is mean(x of the hardest third) - mean(x of the others); of equally
    easy problems the first are the harder ones."""
    problems, third = len(ease), len(ease) // 3
    weights = np.full(problems, -problems / (problems - third))
    weights[np.argsort(ease, kind="stable")[:third]] = problems / third
    return weights


def read(files: Iterable[Path]) -> Results:
    """Read files of results.

    Raises:
        ValueError: two files of one seed, or policies that were asked different numbers of problems.
    """
    policies, courses = {}, {}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        for measured in content["policies"]:
            key = Key(content["seed"], measured["arm"], measured["point"])
            if key in policies:
                raise ValueError(f"{file}: expected one result of {key}, got two")
            policies[key] = measured
        courses |= {(content["seed"], arm): course for arm, course in content["courses"].items()}
    if len(sizes := {measured["problems"] for measured in policies.values()}) > 1:
        raise ValueError(f"expected results on the same problems, got {sorted(sizes)} of them")
    return Results(policies, courses)


def read_folder(folder: Path) -> tuple[Results, Results]:
    """Read the results of a folder: of the seeds that are reported, and of those for trying settings."""
    files = sorted(folder.glob("seed-*.json"))
    tuning = [file for file in files if int(file.stem.partition("-")[2]) >= TUNING]
    return read(file for file in files if file not in tuning), read(tuning)
