"""The comparison at small size: its arms, what it keeps, its claims and tables; a slow test runs the whole chain."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from project_scripts import ROOT, run_script, script

from tsopsd_jax import cli
from tsopsd_jax.config import load_config, strict
from tsopsd_jax.config.build import make_phase
from tsopsd_jax.rewards import verify_countdown
from tsopsd_jax.rundir.log import read_metrics

study, results, claims, page = (script(f"small.{name}") for name in ("study", "results", "claims", "page"))
CONFIGS = ROOT / "configs" / "small"
STUDY = study.Study(Path("work"), CONFIGS, [1_000_000])
ARMS = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"schedule", "collapse"})

# ------------------------------------------------------------------ arms


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_goes_on_from_the_collapse_or_is_a_run_of_its_own(arm):
    config, collapse = (STUDY.load_arm(name, 3) for name in (arm, "collapse"))
    for phase in config.phases:
        make_phase(phase)
    assert config.seed == 3
    assert study.from_the_start(config, collapse) == (arm == "held")
    rest = [strict.plain(each) | {"phases": None} for each in (config, collapse)]
    assert rest[0] == rest[1], "model, data and all else is the same, so that the run may go on"


def changes_of(arm: str) -> set[str]:
    """The settings in which an arm's phases differ from those of the same names in the schedule."""
    phases = [{p["name"]: p for p in strict.plain(load_config(CONFIGS / f"{name}.yaml", []))["phases"]}
              for name in ("schedule", arm)]  # fmt: skip
    return {
        f"{name}.{found.key}" for name in phases[1] for found in strict.differences(phases[0][name], phases[1][name])
    }


def test_the_papers_arms_differ_in_what_they_claim_and_in_nothing_else():
    reheating = "reheat.objective.hyperparameters"
    assert changes_of("pr_fkl") == set()
    assert changes_of("pr_rkl") == {f"{reheating}.direction"}
    assert changes_of("pr_fkl_t15") == {f"{reheating}.teacher_temperature"}
    assert changes_of("pr_fkl_frozen") == {
        f"{reheating}.teacher",
        f"{reheating}.teacher_temperature",
        "reheat.reference",
    }
    refreshed = {f"{reheating}.teacher", "reheat.reference", "reheat.reference_every_steps"}
    assert changes_of("pr_fkl_refreshed") == refreshed
    assert changes_of("dapo") == {"rl-again.optimizer_state"}
    assert changes_of("dapo_reset") == set()
    hot = {"rl-again.objective.hyperparameters.policy_temperature", "rl-again.sampling.sampling_temperature"}
    assert changes_of("rr") == {*changes_of("dapo"), *hot}


def test_the_cycle_has_the_schedules_phases_twice():
    once, twice = ({p["name"]: p for p in strict.plain(load_config(CONFIGS / f"{name}.yaml", []))["phases"]}
                   for name in ("schedule", "cycle"))  # fmt: skip
    assert list(twice) == ["rl", "reheat", "rl-again", "reheat-2", "rl-again-2"]
    again = once["rl-again"] | {"stop": twice["rl-again"]["stop"]}
    for name, expected in (("rl", once["rl"]), ("reheat", once["reheat"]), ("rl-again", again)):
        assert twice[name] == expected
    assert twice["reheat-2"] == once["reheat"] | {"name": "reheat-2"}
    assert twice["rl-again-2"] == once["rl-again"] | {"name": "rl-again-2", "outcome": "continued again"}


def test_the_script_knows_every_arm():
    program = script("reproduce_small")
    assert sorted([*program.FIRST_ARMS, *program.OTHER_ARMS]) == ARMS


def test_an_arm_may_have_another_rate():
    def rates(arm):
        return {phase.name: phase.optimizer.learning_rate for phase in STUDY.load_arm(arm, 0).phases}

    assert rates("pr_fkl@1e-4") == rates("pr_fkl") | {"reheat": 1e-4}
    assert rates("dapo@5e-5") == rates("dapo") | {"rl-again": 5e-5}
    assert rates("held@5e-5") == {"rl": 5e-5}


def test_a_task_of_ones_own_takes_the_place_of_the_packaged_one(tmp_path):
    pretrain = script("pretrain_countdown")
    pretrain.countdown_of(5)._replace(rows={"train": 3, "test": 2}).write(tmp_path)
    made = STUDY._replace(task=tmp_path)
    config = made.load_arm("pr_fkl@1e-4", 7)
    assert (config.model.path, config.data.path) == (f"{tmp_path}/model", f"{tmp_path}/train.jsonl")
    assert config.data.max_prompt_tokens == 8
    assert [phase.max_response_tokens for phase in config.phases] == [25, 25, 25]
    (problem,) = made.test_problems(1)
    assert len(problem.answer.split(" ")) == 7
    assert made.verifier() is STUDY.verifier() is verify_countdown


def test_countdown_with_its_working_shown(tmp_path):
    """By hand, and every document that is learnt from; only the last derivation counts, and its rests must be right."""
    worked, pretrain = script("small.worked"), script("pretrain_countdown")
    tried = "11 - 3 = 8 , 7 2 8 ; 7 * 2 = 14 , 8 14 ; 8 + 14 = 22"
    right = "3 * 7 = 21 , 11 2 21 ; 11 + 2 = 13 , 21 13 ; 21 + 13 = 34"
    gold = "3 7 11 2 -> 34"
    for response in (right, f"{tried} no {right}", f"junk no {right}"):
        assert worked.verify(response, gold) == 1.0
    wrong = (
        tried,
        f"{right} no {tried}",
        right.replace("11 2 21", "2 11 21"),
        right.replace(" , 21 13", ""),
        "",
        right + " no ",
    )
    for response in wrong:
        assert worked.verify(response, gold) == 0.0, response
    assert worked.verify(right, "3 7 11 2") == 0.0
    rng, made = np.random.default_rng(0), pretrain.WORKED
    for _ in range(200):
        prompt, response, answer = made.document(rng)
        assert worked.verify(response, answer) == 1.0
        assert len(prompt.split(" ")) <= made.max_prompt_tokens
        assert len(response.split(" ")) < made.max_response_tokens
    made._replace(rows={"train": 3, "test": 2}).write(tmp_path)
    config = STUDY._replace(task=tmp_path).load_arm("dapo", 1)
    assert [phase.max_response_tokens for phase in config.phases] == [77, 77]
    assert STUDY._replace(task=tmp_path).verifier()(right, gold) == 1.0


def test_the_papers_findings_ask_for_what_there_is(tmp_path):
    """Each figure is an analysis that takes these arguments, and each run a configuration that holds."""
    program = script("small_figures")
    missing = {name: tmp_path / name for name in ("base", "long", "recooled", "scarce", "scarce_dapo")}
    figures = list(program.figures(tmp_path, 1, missing, tmp_path / "responses.jsonl"))
    assert len({figure.name for figure in figures}) == len(figures) == 9
    for figure in figures:
        command = ["analyse", *figure.arguments, "--out", str(tmp_path)]
        assert cli._parser(command).parse_args(command).command == "analyse"
    for settings in (program.LONG, program.COOLING):
        (reheat,) = load_config(CONFIGS / "schedule.yaml", list(settings)).phases
        assert reheat.guard.max_start_entropy_nats is None
    cooling = load_config(CONFIGS / "schedule.yaml", list(program.COOLING)).phases[0]
    paper = load_config(CONFIGS.parent / "paper" / "qwen3_8b_recooled.yaml", []).phases[0]
    assert cooling.objective == paper.objective
    assert cooling.stop.collapsed_below_nats == paper.stop.collapsed_below_nats == 0.08
    assert [p.name for p in load_config(CONFIGS / "schedule.yaml", list(program.SCARCE)).phases] == [
        "reheat",
        "rl-again",
    ]


# ------------------------------------------------------------------ what is kept


def test_a_run_is_copied_once_and_whole(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    (run / "file").write_text("old")
    (tmp_path / ".copy-copying").mkdir()  # a process was killed
    study.fork(run, copy)
    (run / "file").write_text("new")
    study.fork(run, copy)
    assert (copy / "file").read_text() == "old"


def test_points_stand_in_the_order_of_their_tokens(tmp_path):
    made = study.Study(tmp_path, CONFIGS, [1_000_000, 10_000_000])
    for point, tokens in (("10M", 10_000_100), ("1M", 1_000_100), ("reheated", 700_000)):
        folder = made.policy_dir(1, "pr_fkl", point)
        folder.mkdir(parents=True)
        facts = study.Point("pr_fkl", point, tokens // 100, tokens, 0.1)
        (folder / "point.json").write_text(json.dumps(facts._asdict()))
    assert [each.point for each in made.points(1, "pr_fkl")] == ["reheated", "1M", "10M"]
    assert made.is_trained(1, "pr_fkl")
    assert not made.is_trained(1, "dapo")
    assert study.named(2_500_000) == "2.5M"


# ------------------------------------------------------------------ many units


class Ended:
    """A process that has ended."""

    def __init__(self, returncode: int):
        self.returncode = returncode

    def poll(self):
        return self.returncode

    def terminate(self):
        raise AssertionError("it has ended")

    wait = terminate


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The script, whose units are not run but noted: program, settings, what was started, and codes to end with."""
    module, started, codes = script("reproduce_small"), [], {}
    made = study.Study(tmp_path, CONFIGS, [1_000_000])
    settings = module.Settings(made, 4, 2, 2, tmp_path / "results")

    def start(unit, _command, _settings):
        started.append(unit)
        if unit[1] != "base" and not codes.get(unit):
            last = "collapsed" if unit[1] == "collapse" else "1M"
            made.policy_dir(*unit, last).mkdir(parents=True)
        return Ended(codes.get(unit, 0))

    monkeypatch.setattr(module, "_start", start)
    return module, settings, started, codes


def test_arms_wait_for_their_seeds_collapse(program):
    module, settings, started, _ = program
    units = module.units_of([1, 2], ["dapo", "rr"])
    assert units == [(1, "collapse"), (1, "base"), (1, "dapo"), (1, "rr"), (2, "collapse"), (2, "dapo"), (2, "rr")]
    assert module.run_all(units, [], settings, 2) == []
    assert sorted(started) == sorted(units)
    for seed in (1, 2):
        places = [at for at, unit in enumerate(started) if unit[0] == seed and unit[1] in ("dapo", "rr")]
        assert started.index((seed, "collapse")) < min(places)


def test_a_seed_without_a_collapse_is_left_and_others_go_on(program):
    module, settings, started, codes = program
    codes[1, "collapse"], codes[2, "rr"] = 3, 1
    failed = module.run_all(module.units_of([1, 2], ["dapo", "rr"]), [], settings, 1)
    assert [words.split(";")[0] for words in failed] == ["seed 1: collapse ended with 3", "seed 2: rr ended with 1"]
    assert {unit for unit in started if unit[0] == 1} == {(1, "collapse"), (1, "base")}
    assert {unit for unit in started if unit[0] == 2} == {(2, "collapse"), (2, "dapo"), (2, "rr")}


def test_what_is_measured_is_not_done_again(program):
    _, settings, started, _ = program
    settings.study.policy_dir(1, "dapo", "1M").mkdir(parents=True)
    point = study.Point("dapo", "1M", 9, 1_000_100, 0.1)
    (settings.study.policy_dir(1, "dapo", "1M") / "point.json").write_text(json.dumps(point._asdict()))
    file = settings.file_of(1, "dapo", "1M")
    file.parent.mkdir(parents=True)
    for facts, done in (({"problems": 4, "samples": 2}, True), ({"problems": 4, "samples": 64}, True),
                        ({"problems": 4, "samples": 1}, False), ({"problems": 8, "samples": 2}, False)):  # fmt: skip
        file.write_text(json.dumps(facts))
        assert settings.is_done(1, "dapo") is done, facts
    file.write_text(json.dumps({"problems": 4, "samples": 2}))
    longer = settings._replace(study=settings.study._replace(token_points=[1_000_000, 2_000_000]))
    assert not longer.is_done(1, "dapo"), "another point asks for more"
    file.unlink()
    assert not settings.is_done(1, "dapo")
    assert started == []


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
        phases = [{"phase": "reheat", "steps": 10, "tokens": 90_000}]
        course = {"phases": phases, "reheating_nats": np.linspace(0.08, 0.12, 10).tolist()}
        course |= {"tokens": [5_000_000, 9_000_000], "entropy_nats": [0.1, 0.05]}
        courses = {"pr_fkl": course, "collapse": {"tokens": [5_000_000], "entropy_nats": [0.1], "reheating_nats": []}}
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


def test_the_page_shows_what_the_results_say():
    """Written by `scripts/reproduce_small.py WORK --results benchmarks/results/small --page docs/small_scale.md`."""
    text = (ROOT / "docs" / "small_scale.md").read_text(encoding="utf-8")
    for name, found in page.sections(*results.read_folder(ROOT / "benchmarks" / "results" / "small")).items():
        assert f"<!-- {name} -->\n{found}<!-- end of {name} -->" in text, name


# ------------------------------------------------------------------ the chain


@pytest.mark.slow
def test_the_whole_chain_at_toy_size_and_again(tmp_path):
    """Two arms of a seed, a few steps, few problems: runs, policies, measures, results; the same command does nothing
    more."""
    configs, work, out = tmp_path / "configs", tmp_path / "work", tmp_path / "results"
    configs.mkdir()
    (configs / "schedule.yaml").write_text(
        f"extends: {CONFIGS / 'schedule.yaml'}\n"
        "phases:\n"
        "  rl: {prompts_per_step: 8, responses_per_prompt: 4,"
        " stop: {collapsed_below_nats: null, window_steps: null, steps: 2}}\n"
        "  reheat: {prompts_per_step: 32, stop: {recovered_above_nats: null, look_ahead: false, steps: 2},"
        " guard: {max_start_entropy_nats: null}}\n"
        "  rl-again: {prompts_per_step: 8, responses_per_prompt: 4}\n"
    )
    for arm in ("collapse", "dapo", "pr_fkl_frozen"):
        (configs / f"{arm}.yaml").write_text((CONFIGS / f"{arm}.yaml").read_text())
    words = [
        str(work),
        "--configs",
        str(configs),
        "--results",
        str(out),
        "--seeds",
        "3",
        "--problems",
        "16",
        "--parallel",
        "2",
    ]
    words += ["--samples", "2", "--end-samples", "2", "--arms", "dapo", "pr_fkl_frozen", "--tokens"]
    run_script("reproduce_small.py", *words, "4000", timeout=1800)
    content = (out / "seed-3.json").read_text()
    found, _ = results.read_folder(out)
    assert {(key.arm, key.point) for key in found.policies} == {
        ("base", "base"),
        ("collapse", "collapsed"),
        ("dapo", "0.004M"),
        ("pr_fkl_frozen", "reheated"),
        ("pr_fkl_frozen", "0.004M"),
    }
    phases = {arm: [each["phase"] for each in course["phases"]] for (_, arm), course in found.courses.items()}
    assert phases == {"collapse": ["rl"], "dapo": ["rl", "rl-again"], "pr_fkl_frozen": ["rl", "reheat", "rl-again"]}
    tokens = {key.point: policy["tokens"] for key, policy in found.policies.items() if key.arm != "dapo"}
    assert 0 < tokens["reheated"] < 4000 <= tokens["0.004M"] < 8000, "sampled since the collapse"
    assert all(10 < policy["response_tokens"] < 20 for policy in found.policies.values())
    reheating = found.policies[results.Key(3, "pr_fkl_frozen", "reheated")]["reheating"]
    assert 0.9 < reheating["top_1_agreement"] <= 1
    assert reheating["temperature"] >= 1
    run_script("reproduce_small.py", *words, "4000", timeout=1800)
    assert (out / "seed-3.json").read_text() == content
    assert script("reproduce_small").main([*words, "4000", "6000", "--unit", "3", "dapo"]) == 0
    kept = [each.point for each in study.Study(work, configs, []).points(3, "dapo")]
    assert kept == ["0.004M", "0.006M"], "another point: the run goes on from where it stopped"
    steps = [line["step"] for line in read_metrics(work / "seed-3" / "runs" / "dapo")]
    assert steps == list(range(1, len(steps) + 1))
    assert (work / "seed-3" / "measures" / "dapo" / "0.006M.json").is_file()
