"""The tables of docs/small_scale.md, from the files of results: numbers are never typed by hand.

The page's sentences are written by people; between `<!-- NAME -->` and `<!-- end of NAME -->` stands what this module
writes.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from small.claims import Claim, own_claims, papers_claims
from small.figure import draw, drawable
from small.results import (
    BASE,
    COLLAPSE,
    COLLAPSED,
    PAPERS,
    REHEATED,
    WHOLE,
    Key,
    Results,
    Score,
    accuracy,
    greedy,
    passes,
    read_folder,
)
from small.statistics import Interval

NOTHING = "–"
CURVE = (1, 2, 4, 8, 16, 32, 64)


def shown(interval: Interval | None, *, digits: int = 2) -> str:
    """Write an interval as `[low, high]`, or a dash."""
    if interval is None or math.isnan(interval.low):
        return NOTHING
    return f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, or a sentence where it has no rows."""
    if not rows:
        return "Not measured yet.\n"
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def claims(found: Sequence[Claim]) -> str:
    """One line a claim: verdict, interval, what it is of, seeds."""
    rows = [
        [
            each.claim,
            f"**{each.verdict}**",
            shown(each.interval),
            NOTHING if each.interval is None else f"{each.interval.mean:.2f}",
            str(each.seeds),
            each.measure,
            each.change,
        ]
        for each in found
    ]
    return table(["claim", "verdict", "interval", "mean", "seeds", "of what", "what would change our mind"], rows)


def _difference(results: Results, arm: str, point: str, score: Score) -> str:
    if arm == "dapo":
        return ""
    found = results.difference([(arm, point)], [("dapo", point)], score)
    if found is None:
        return ""
    return f" ({100 * found.mean:+.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}])"


SCORES: dict[str, Score] = {
    "avg@8, top-p 0.7": accuracy(PAPERS),
    "pass@8, top-p 0.7": passes(8, PAPERS),
    "avg@8, top-p 1": accuracy(WHOLE),
    "pass@8, top-p 1": passes(8, WHOLE),
    "pass@64, top-p 1": passes(64, WHOLE),
}


def _ends(results: Results) -> list[tuple[str, str, list[int]]]:
    """(arm, point, seeds) of the base model, the collapsed policy, and every arm at the last point that it shares with
    plain DAPO."""
    found = [(BASE, BASE, results.seeds((BASE, BASE))), (COLLAPSE, COLLAPSED, results.seeds((COLLAPSE, COLLAPSED)))]
    for arm in results.arms():
        if (point := results.last(arm, "dapo")) is not None:
            found.append((arm, point, results.seeds((arm, point), ("dapo", point))))
    return [each for each in found if each[2]]


def arms(results: Results) -> str:
    """Every arm at its end, with paired differences to plain DAPO; above them what all began with."""
    rows = []
    for arm, point, seeds in _ends(results):
        of = [results.policies[Key(seed, arm, point)] for seed in seeds]
        cells = [arm, point, str(len(seeds))]
        for title, score in SCORES.items():
            if int(re.findall(r"@(\d+)", title)[0]) > min(each["samples"] for each in of):
                cells.append(NOTHING)
                continue
            other = "" if arm in (BASE, COLLAPSE) else _difference(results, arm, point, score)
            cells.append(f"{100 * results.scores(arm, point, score, seeds).mean():.1f}{other}")
        rows.append([*cells, f"{np.mean([each['entropy_nats'] for each in of]):.3f}"])
    return table(["arm", "tokens since the collapse", "seeds", *SCORES, "entropy, nats"], rows)


def courses(results: Results) -> str:
    """Avg@8 (top-p 0.7) and entropy of every arm at every point."""
    points = results.token_points("dapo")
    rows = []
    for arm in results.arms():
        cells = [arm]
        for point in [REHEATED, *points]:
            seeds = results.seeds((arm, point))
            if not seeds:
                cells.append(NOTHING)
                continue
            nats = np.mean([results.policies[Key(seed, arm, point)]["entropy_nats"] for seed in seeds])
            cells.append(f"{100 * results.mean(arm, point, accuracy()):.1f}, {nats:.3f} ({len(seeds)})")
        rows.append(cells)
    return table(["arm", "just reheated", *points], rows)


def pass_curves(results: Results) -> str:
    """Pass@k of every arm at its end, for k from 1 to 64."""
    rows = []
    for top_p in (WHOLE, PAPERS):
        for arm, point, seeds in _ends(results):
            samples = min(results.policies[Key(seed, arm, point)]["samples"] for seed in seeds)
            values = [
                f"{100 * results.scores(arm, point, passes(k, top_p), seeds).mean():.1f}" if k <= samples else NOTHING
                for k in CURVE
            ]
            rows.append([arm, point, str(len(seeds)), top_p, *values])
    return table(["arm", "point", "seeds", "top-p", *(f"@{k}" for k in CURVE)], rows)


def reheatings(results: Results) -> str:
    """What each reheating did, beside the collapsed policy sampled at the same entropy."""
    rows = []
    for arm in results.arms():
        for seed in results.seeds((arm, REHEATED), (COLLAPSE, COLLAPSED)):
            before, after = (results.policies[Key(seed, *each)] for each in ((COLLAPSE, COLLAPSED), (arm, REHEATED)))
            facts, scores = after["reheating"], (greedy, accuracy(PAPERS), accuracy(WHOLE))
            phase = next(p for p in results.courses[seed, arm]["phases"] if p["phase"] == "reheat")
            values = [
                " -> ".join(f"{100 * score(of).mean():.1f}" for of in (before, after, facts["ideal"]))
                for score in scores
            ]
            rows.append(
                [
                    arm,
                    str(seed),
                    f"{phase['steps']}, {phase['tokens'] / 1e6:.2f}M",
                    f"{before['entropy_nats']:.3f} -> {after['entropy_nats']:.3f}",
                    *values,
                    f"{facts['temperature']:.2f}",
                    f"{facts['top_1_agreement']:.3f}",
                    f"{facts['top_10_overlap']:.3f}, {facts['top_10_mass']:.4f}",
                    f"{facts['forward_kl_nats']:.3f}",
                ]
            )
    titles = ["arm", "seed", "steps, tokens", "entropy, nats", "greedy, %", "avg@8, top-p 0.7", "avg@8, top-p 1",
              "T", "top-1 agreement", "top-10 overlap, mass", "KL, nats"]  # fmt: skip
    return table(titles, rows)


def toy(results: Results) -> str:
    """How the toy differs from the paper, in numbers."""
    rows = []
    for name, arm, point in (
        ("base", BASE, BASE),
        ("collapsed", COLLAPSE, COLLAPSED),
        ("reheated", "pr_fkl", REHEATED),
    ):
        seeds = results.seeds((arm, point))
        if seeds:
            of = [results.policies[Key(seed, arm, point)] for seed in seeds]
            uncertain, nats, tokens = (
                np.mean([m[k] for m in of]) for k in ("uncertain_fraction", "entropy_nats", "response_tokens")
            )
            rows.append([name, str(len(seeds)), f"{nats:.3f}", f"{tokens:.1f}", f"{100 * uncertain:.1f}"])
    return table(["policy", "seeds", "entropy, nats", "tokens a response", "tokens of 0.5 nats or more, %"], rows)


def sections(results: Results, tuning: Results, picture: str = "small_scale.png") -> dict[str, str]:
    """Every generated section of the page by its name; `picture` is the file of its figure."""
    count = len(results.seeds((COLLAPSE, COLLAPSED)))
    with_plain = len(results.seeds(("dapo", results.last("dapo") or "")))
    return {
        "seeds": f"Seeds with a collapsed policy: {count}; with plain continuation to the last point: {with_plain}.\n",
        "claims of the paper": claims(papers_claims(results)),
        "claims beyond the paper": claims(own_claims(results)),
        "arms": arms(results),
        "courses": courses(results),
        "figure": f"![entropy and accuracy of every arm]({picture})\n" if drawable(results) else "Not measured yet.\n",
        "pass curves": pass_curves(results),
        "reheatings": reheatings(results),
        "toy": toy(results),
        "tuning": courses(tuning) + "\n" + reheatings(tuning),
    }


def _filled(page: str, found: dict[str, str]) -> str:
    """Put every section into its place in the page.

    Raises:
        ValueError: a section has no place.
    """
    for name, text in found.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", flags=re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no place for {name!r}: expected <!-- {name} --> and <!-- end of {name} -->")
        page = place.sub(lambda match, text=text: match[1] + text + match[2], page)
    return page


def write(folder: Path, page: Path | None) -> str:
    """Write the generated sections into a page, or return them as text where there is none."""
    reported, tuning = read_folder(folder)
    found = sections(reported, tuning, "small_scale.png" if page is None else page.with_suffix(".png").name)
    if page is None:
        return "\n".join(f"{name}\n\n{text}" for name, text in found.items())
    filled = _filled(page.read_text(encoding="utf-8"), found)
    page.write_text(filled, encoding="utf-8")
    if drawable(reported):
        draw(reported, page.with_suffix(".png"))
    return filled
