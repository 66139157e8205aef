"""The paper's claims at small size: what each is measured by, fixed before results are looked at, and its verdict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from small.results import COLLAPSE, COLLAPSED, PAPERS, REHEATED, Results, Score, accuracy, passes
from small.statistics import Interval, seed_interval, verdict, verdict_within
from tsopsd_jax.analysis.jump import find_jump

POINTS = 100.0
"""Results are shares; differences of accuracy are shown in points."""
SAME_POINTS = 2.0
"""Differences within this are called none."""
LEAST_OVERLAP, LEAST_FOUND, COST_POINTS = 0.95, 0.5, 1.0


class Claim(NamedTuple):
    """A claim, what measures it, its interval in that unit, its verdict, and what would change our mind."""

    claim: str
    measure: str
    interval: Interval | None
    verdict: str
    change: str

    @property
    def seeds(self) -> int:
        return 0 if self.interval is None else self.interval.seeds


def _points(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    return interval._replace(mean=POINTS * interval.mean, low=POINTS * interval.low, high=POINTS * interval.high)


MORE = "more seeds, or a larger budget, with an interval on the other side of 0"


def _last(
    results: Results, first: Sequence[str], second: Sequence[str], *, score: Score | None = None, hard: bool = False
) -> Interval | None:
    """First arms less second arms, in points of avg@8 (or another score) at the last point that they have in common."""
    point = results.last(*first, *second)
    if point is None:
        return None
    ones, others = ([(arm, point) for arm in side] for side in (first, second))
    return _points(results.difference(ones, others, score or accuracy(), hard=hard))


def _against_plain(results: Results, arm: str, words: str) -> Claim:
    found = _last(results, [arm], ["dapo"])
    return Claim(words, f"avg@8: {arm} - dapo, points", found, verdict(found), MORE)


def all_beat(results: Results) -> Claim:
    """Every reheating arm against plain continuation: the least of the three differences decides."""
    found = [_last(results, [arm], ["dapo"]) for arm in ("rr", "pr_rkl", "pr_fkl")]
    there = [each for each in found if each is not None]
    least = min(there, key=lambda each: each.mean) if len(there) == len(found) else None
    words = "all reheating arms beat plain continuation"
    return Claim(words, "avg@8: the least of rr, pr_rkl, pr_fkl - dapo, points", least, verdict(least), MORE)


def jump(results: Results) -> Claim:
    """Share of the reheatings in which `analyse jump` finds one step that the entropy leaves a smooth curve at."""
    found = []
    for (_, arm), course in results.courses.items():
        entropies = course["reheating_nats"]
        if arm == "pr_fkl" and len(entropies) >= 8:
            found.append(float(find_jump(np.asarray(entropies)).found))
    interval = seed_interval(np.asarray(found)) if found else None
    change = "a jump in most seeds, at the same step whatever the batch"
    measure = "share of pr_fkl's reheatings with a jump"
    return Claim("entropy jumps", measure, interval, verdict(interval, above=LEAST_FOUND), change)


def kept(results: Results, arm: str, words: str) -> Claim:
    """What a reheating costs at the paper's sampling."""
    found = _points(results.difference([(arm, REHEATED)], [(COLLAPSE, COLLAPSED)], accuracy()))
    measure = f"avg@8: {arm} just reheated - collapsed, points; supported above -{COST_POINTS:g}"
    return Claim(words, measure, found, verdict(found, above=-COST_POINTS), "a gentler reheating, a larger model")


def papers_claims(results: Results) -> list[Claim]:
    """Judge the claims of the paper."""
    steady = _last(results, ["pr_fkl_t15"], ["pr_fkl"])
    overlap = results.per_seed("pr_fkl", REHEATED, lambda measured: measured["reheating"]["top_10_overlap"])
    hard, rollout = _last(results, ["pr_fkl"], ["dapo"], hard=True), ["pr_fkl", "pr_rkl"]
    enough = results.least_samples() >= 8
    wide = _last(results, ["pr_fkl"], ["dapo"], score=passes(8, PAPERS)) if enough else None
    policy, direction = _last(results, rollout, ["rr"]), _last(results, ["pr_fkl"], ["pr_rkl"])
    return [
        all_beat(results),
        _against_plain(results, "pr_fkl", "PR-FKL beats plain continuation"),
        Claim("PR-FKL beats it in pass@8 too", "pass@8 at top-p 0.7: pr_fkl - dapo, points", wide, verdict(wide), MORE),
        _against_plain(results, "pr_rkl", "PR-RKL beats plain continuation"),
        _against_plain(results, "rr", "RR beats plain continuation"),
        Claim("policy reheating beats rollout reheating", "avg@8: mean of pr_fkl, pr_rkl - rr, points", policy,
              verdict(policy), MORE),
        Claim("FKL beats RKL", "avg@8: pr_fkl - pr_rkl, points", direction, verdict(direction), MORE),
        Claim("hard problems gain most", "pr_fkl - dapo on the hardest third less that on the others, points", hard,
              verdict(hard), MORE),
        Claim("robust to T", f"avg@8: pr_fkl at T 1.5 - at T 1.2, points; supported within {SAME_POINTS:g}", steady,
              verdict_within(steady, limit=SAME_POINTS), "a difference of more points at another T"),
        jump(results),
        Claim("support kept", f"top-10 overlap with the collapsed policy; supported above {LEAST_OVERLAP:g}", overlap,
              verdict(overlap, above=LEAST_OVERLAP), "an overlap near 1 in a larger model"),
        kept(results, "pr_fkl", "accuracy holds while entropy rises"),
        Claim("reversible", "reverse projection of cooling on heating", None, verdict(None), "runs that cool"),
    ]  # fmt: skip


def own_claims(results: Results) -> list[Claim]:
    """Judge what is not the paper's: the premise, the control, the frozen teacher."""
    held, reset = _last(results, ["held"], ["dapo"]), _last(results, ["dapo_reset"], ["dapo"])
    right_after = _points(results.difference([("pr_fkl_frozen", REHEATED)], [("pr_fkl", REHEATED)], accuracy()))
    teachers, renewed = _last(results, ["pr_fkl_frozen"], ["pr_fkl"]), _last(results, ["pr_fkl"], ["dapo_reset"])
    return [
        Claim("exploration limits plain RL here (the premise)", "avg@8: held (from the start, equal tokens) - dapo, "
              "points", held, verdict(held), "a task on which it does"),
        Claim("a new optimizer alone changes little", f"avg@8: dapo_reset - dapo, points; supported within "
              f"{SAME_POINTS:g}", reset, verdict_within(reset, limit=SAME_POINTS), MORE),
        Claim("PR-FKL beats plain continuation with a new optimizer", "avg@8: pr_fkl - dapo_reset, points", renewed,
              verdict(renewed), MORE),
        Claim("a frozen teacher keeps more than the live one", "avg@8: pr_fkl_frozen - pr_fkl, both just reheated, "
              "points", right_after, verdict(right_after), MORE),
        kept(results, "pr_fkl_frozen", "accuracy holds under a frozen teacher"),
        Claim("and ends higher", "avg@8: pr_fkl_frozen - pr_fkl, points", teachers, verdict(teachers), MORE),
        _against_plain(results, "pr_fkl_frozen", "reheating by a frozen teacher beats plain continuation"),
    ]  # fmt: skip
