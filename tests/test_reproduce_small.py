"""The comparison at small size: its arms, what it keeps, its claims and tables; a slow test runs the whole chain."""

import json
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


def test_arms_of_another_day_stay_in_the_results_of_a_seed(program, monkeypatch):
    """Arms of one collapsed policy may be run in several WORKs; those of another policy are not mixed with them."""
    module, settings, _, _ = program
    monkeypatch.setattr(module, "course", lambda _study, _seed, arm: {"tokens": arm})

    def measured(arm, right, *, of=settings):
        file = of.file_of(1, arm, "1M" if arm != "collapse" else "collapsed")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"arm": arm, "point": file.stem, "tokens": 1, "step": 1, "right": right}))
        module.collect(of, 1)
        return json.loads((settings.results / "seed-1.json").read_text())

    measured("collapse", 3)
    measured("dapo", 4)
    other = settings._replace(study=settings.study._replace(work=settings.study.work / "other"))
    measured("collapse", 3, of=other)
    both = measured("held", 5, of=other)
    assert {policy["arm"]: policy["right"] for policy in both["policies"]} == {"collapse": 3, "dapo": 4, "held": 5}
    assert both["courses"] == {arm: {"tokens": arm} for arm in ("collapse", "dapo", "held")}
    again = measured("held", 6, of=other)
    assert [policy["right"] for policy in again["policies"] if policy["arm"] == "held"] == [6], "the newer one"
    with pytest.raises(ValueError, match="'dapo'.*another collapsed policy.*--results"):
        measured("collapse", 2, of=other)
    assert json.loads((settings.results / "seed-1.json").read_text()) == again, "nothing is lost"


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
