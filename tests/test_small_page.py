"""What the results of the comparison at small size say: claims, verdicts, tables, curves and the page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from project_scripts import ROOT, script

results, claims, page = (script(f"small.{name}") for name in ("results", "claims", "page"))

# ------------------------------------------------------------------ results and claims

PROBLEMS, SAMPLES = 60, 64


def measured(arm: str, point: str, share, rng, *, tokens: int = 0, nats: float = 0.1) -> dict:
    """A policy that solves each problem with a probability of its own."""
    right = rng.binomial(SAMPLES, np.clip(share, 0, 1))
    found = {"arm": arm, "point": point, "step": 1, "tokens": tokens, "entropy_nats": nats, "uncertain_fraction": 0.1}
    found |= {
        "response_tokens": 18.0,
        "problems": PROBLEMS,
        "samples": SAMPLES,
        "greedy": [int(p > 0.5) for p in share],
    }
    return found | {"right": {"1": right.tolist(), "0.7": right.tolist()}}


def planted(folder: Path, seeds: int, gains: dict[str, float]) -> None:
    """Files of results in which each arm solves so much more than plain DAPO."""
    rng = np.random.default_rng(0)
    ease = np.linspace(0.1, 0.8, PROBLEMS)
    for seed in range(1, seeds + 1):
        shift = 0.01 * rng.normal()
        base = measured("base", "base", ease, rng)
        collapsed = measured("collapse", "collapsed", ease + shift, rng)
        arms = [
            measured(arm, point, ease + shift + gain, rng, tokens=4_000_000)
            for arm, gain in gains.items()
            for point in ("1M", "4M")
        ]
        reheated = measured("pr_fkl", "reheated", ease + shift - 0.1, rng, nats=0.12)
        ideal = {key: collapsed[key] for key in ("samples", "right", "greedy")}
        reheated["reheating"] = {"temperature": 1.5, "ideal": ideal, "forward_kl_nats": 0.01, "top_10_mass": 0.999}
        reheated["reheating"] |= {"top_1_agreement": 0.95, "top_10_overlap": 0.97 + 0.001 * seed}
        rl = {"phase": "rl", "steps": 500, "tokens": 5_000_000}
        phases = [rl, {"phase": "reheat", "steps": 10, "tokens": 90_000}]
        course = {"phases": phases, "reheating_nats": np.linspace(0.08, 0.12, 10).tolist()}
        course |= {"tokens": [5_000_000, 9_000_000], "entropy_nats": [0.1, 0.05]}
        courses = {"pr_fkl": course, "collapse": {"tokens": [5_000_000], "entropy_nats": [0.1]}}
        courses["collapse"] |= {"reheating_nats": [], "phases": [rl]}
        content = {"seed": seed, "policies": [base, collapsed, *arms, reheated], "courses": courses}
        (folder / f"seed-{seed}.json").write_text(json.dumps(content))


GAINS = {"dapo": 0.0, "pr_fkl": 0.1, "pr_rkl": -0.1, "rr": 0.1}


def test_planted_effects_become_verdicts(tmp_path):
    planted(tmp_path, 4, GAINS)
    found = {each.claim: each for each in claims.papers_claims(results.read_folder(tmp_path)[0])}
    words = {claim: each.verdict for claim, each in found.items()}
    assert words["PR-FKL beats plain continuation"] == "supported"
    assert words["PR-RKL beats plain continuation"] == "contradicted"
    assert words["all reheating arms beat plain continuation"] == "contradicted", "the least decides"
    assert words["FKL beats RKL"] == "supported"
    assert words["policy reheating beats rollout reheating"] == "contradicted"
    assert words["hard problems gain most"] == "not seen", "every problem gained alike"
    assert words["support kept"] == "supported"
    assert words["accuracy holds while entropy rises"] == "contradicted"
    assert words["entropy jumps"] == "contradicted", "a straight line has none"
    assert words["robust to T"] == words["reversible"] == "not measured yet"
    gain = found["PR-FKL beats plain continuation"]
    assert gain.seeds == 4
    assert 7 < gain.interval.low < 10 < gain.interval.high < 13, "points"


def test_two_seeds_are_no_verdict(tmp_path):
    planted(tmp_path, 2, GAINS)
    found = claims.papers_claims(results.read_folder(tmp_path)[0])
    assert {each.verdict for each in found} == {"not measured yet"}
    assert found[1].interval.seeds == 2


def test_the_contrast_of_hard_problems():
    """x is 3 on the hardest third, 1 elsewhere: 3 - 1."""
    ease = np.array([0.9, 0.1, 0.5, 0.2, 0.6, 0.7])
    x = np.where(ease <= 0.2, 3.0, 1.0)
    assert np.mean(x * results.contrast(ease)) == pytest.approx(2.0)


def test_seeds_for_trying_settings_are_kept_apart(tmp_path):
    planted(tmp_path, 2, GAINS)
    (tmp_path / "seed-2.json").rename(tmp_path / "seed-90.json")
    reported, tuning = results.read_folder(tmp_path)
    assert {key.seed for key in reported.policies} == {1}
    assert {key.seed for key in tuning.policies} == {2}


def test_results_on_other_problems_are_refused(tmp_path):
    planted(tmp_path, 2, GAINS)
    content = json.loads((tmp_path / "seed-2.json").read_text())
    content["policies"][0]["problems"] = 30
    (tmp_path / "seed-2.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results on the same problems, got \[30, 60\]"):
        results.read_folder(tmp_path)


# ------------------------------------------------------------------ the page


def test_an_interval_is_written_as_plain_numbers():
    assert page.shown(script("small.statistics").Interval(1.0, -0.5, 2.25, 3)) == "[-0.50, 2.25]"
    assert page.shown(None) == page.shown(script("small.statistics").Interval(1.0, math.nan, math.nan, 1)) == "–"


def test_tables_are_put_into_their_places_and_nothing_else_is_touched(tmp_path):
    planted(tmp_path, 3, GAINS)
    names = page.sections(*results.read_folder(tmp_path))
    text = "Words.\n" + "".join(f"<!-- {name} -->\nSTALE\n<!-- end of {name} -->\nBetween.\n" for name in names)
    file = tmp_path / "page.md"
    file.write_text(text)
    written = page.write(tmp_path, file)
    assert file.read_text() == written
    assert "STALE" not in written
    assert written.count("Between.") == len(names)
    assert page.write(tmp_path, file) == written
    assert "(page.png)" in written
    assert (tmp_path / "page.png").stat().st_size > 10_000
    row = next(line for line in written.splitlines() if line.startswith("| PR-FKL beats"))
    assert "**supported** | [" in row
    file.write_text("Words.\n")
    with pytest.raises(ValueError, match="has no place for 'seeds'"):
        page.write(tmp_path, file)


def test_curves_begin_at_the_collapse():
    """Two seeds of different collapses: the tokens of both are counted from there, and averaged on one grid."""
    courses = {}
    for seed, collapsed in ((1, 5e6), (2, 7e6)):
        courses[seed, "collapse"] = {"tokens": [collapsed], "entropy_nats": [0.08]}
        tokens = [collapsed, collapsed + 2e6]
        courses[seed, "dapo"] = {"tokens": tokens, "entropy_nats": [0.08, 0.04 if seed == 1 else 0.02]}
    grid, nats = script("small.figure").entropy_course(results.Results({}, courses), "dapo")
    assert (grid[0], grid[-1]) == (0.0, 2.0)
    assert (nats[0], nats[-1]) == pytest.approx((0.08, 0.03))
    assert script("small.figure").drawable(results.Results({}, courses)) == [], "no collapsed policy was measured"


def test_an_arm_from_the_start_has_no_curve_from_the_collapsed_policy(tmp_path):
    planted(tmp_path, 2, GAINS | {"held": 0.0})
    found, _ = results.read_folder(tmp_path)
    for seed in (1, 2):
        found.courses[seed, "held"] = found.courses[seed, "pr_fkl"] | {"phases": [{"phase": "rl", "tokens": 9_000_000}]}
    figure = script("small.figure")
    assert len(figure.accuracy_course(found, "held")[0]) + 1 == len(figure.accuracy_course(found, "dapo")[0])
    assert figure.accuracy_course(found, "pr_fkl")[0][0] == 0.0 < figure.accuracy_course(found, "held")[0][0]


def test_the_page_shows_what_the_results_say():
    """Written by `scripts/reproduce_small.py WORK --results benchmarks/results/small --page docs/small_scale.md`."""
    text = (ROOT / "docs" / "small_scale.md").read_text(encoding="utf-8")
    for name, found in page.sections(*results.read_folder(ROOT / "benchmarks" / "results" / "small")).items():
        assert f"<!-- {name} -->\n{found}<!-- end of {name} -->" in text, name
