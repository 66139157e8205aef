"""Settings are strict, the shipped configurations are valid, and the paper's numbers are in them."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from tsopsd_jax.cli import main
from tsopsd_jax.commands.exit_codes import BAD_INPUT
from tsopsd_jax.config import Config, PhaseSettings, load_config, strict
from tsopsd_jax.config import build as building
from tsopsd_jax.config.build import (
    check_batches,
    check_objectives,
    divide_cpu,
    make_phase,
    make_phases,
    prepare,
)
from tsopsd_jax.config.doubts import doubts
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.model.packaged import ASSETS, PACKAGED_MODEL
from tsopsd_jax.rundir.log import read_metrics
from tsopsd_jax.train.controllers import RateController
from tsopsd_jax.train.cycle import ONCE, Cycle

ROOT = Path(__file__).resolve().parents[1]

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER = [ROOT / "configs" / "paper" / f"qwen3_{size}.yaml" for size in ("4b", "8b")]


def minimal() -> dict:
    """The least that makes a run: everything else has a default."""
    phase = {
        "name": "rl",
        "objective": {"name": "dapo"},
        "optimizer": {"learning_rate": 1e-6},
        "stop": {"steps": 3},
        "prompts_per_step": 4,
        "responses_per_prompt": 2,
        "max_response_tokens": 8,
        "reward": {},
    }
    return {
        "model": {"path": "somewhere"},
        "data": {"name": "countdown", "verifier": "countdown"},
        "phases": [phase],
    }


def build(**overrides) -> Config:
    """`minimal` with `a__0__b=value` set."""
    data = minimal()
    for path, value in overrides.items():
        strict.override(data, f"{path.replace('__', '.')}={json.dumps(value)}")
    return strict.build(Config, data)


# ------------------------------------------------------------------ shipped files


def test_there_are_configurations():
    assert {p.name for p in CONFIGS} >= {"demo.yaml", "qwen3_4b.yaml", "qwen3_8b.yaml", "qwen3_tiny_dapo_math.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configuration_is_valid(path):
    config = load_config(path, [])
    for phase in config.phases:
        make_phase(phase)
    head = re.split(r"\n(?:seed|extends):", path.read_text(encoding="utf-8"))[0]
    assert all(word in head for word in ("Claims:", "Hardware:", "Command:")), (
        "say what the file claims, and how to run it"
    )


RL = {
    "objective.name": "dapo",
    "objective.hyperparameters": {"clip_low": 0.2, "clip_high": 0.28, "clip_ratio_c": 10.0},
    "optimizer.learning_rate": 2e-6,
    "optimizer.warmup_steps": 10,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
    "prompts_per_step": 64,
    "responses_per_prompt": 8,
    "max_response_tokens": 8192,
    "sampling.sampling_temperature": 1.0,
    "sampling.top_p": 1.0,
    "sampling.top_k": 0,
    "reward.overlong_buffer_tokens": 1024,
    "reward.overlong_factor": 1.0,
    "reward.max_generation_batches": 10,
    "reward.surplus": "drop",
    "reward.normalize_std": True,
    "stop.epochs": 2.0,
    "stop.steps": 500,
}
REHEAT = {
    "objective.name": "ts_opsd",
    "objective.hyperparameters": {"direction": "forward", "teacher_temperature": 1.2},
    "optimizer.learning_rate": 1e-6,
    "optimizer.warmup_steps": 0,
    "max_response_tokens": 4096,
    "sampling.sampling_temperature": 1.0,
    "sampling.top_p": 1.0,
    "sampling.top_k": 0,
    "reward": None,
    "stop.recovered_above_nats": 0.12,
    "stop.window_steps": 1,
    "guard.max_start_entropy_nats": 0.12,
    "guard.runaway_entropy_nats": 0.5,
}
RUN = {
    "model.compute_dtype": "bfloat16",
    "data.name": "dapo_math_17k",
    "data.max_prompt_tokens": 2048,
    "evaluation.samples": 8,
    "evaluation.sampling.sampling_temperature": 1.0,
    "evaluation.sampling.top_p": 0.7,
    "evaluation.sampling.top_k": 0,
    "evaluation.max_response_tokens": 8192,
}


def at(tree, path: str):
    for key in path.split("."):
        tree = tree[key]
    return tree


def pinned(tree, expected: dict) -> dict:
    return {path: at(tree, path) for path in expected}


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_paper_numbers(path):
    config = strict.plain(load_config(path, []))
    rl, reheat, again = config["phases"]
    assert pinned(config, RUN) == RUN
    assert pinned(rl, RL) == RL
    assert pinned(again, RL) == RL
    assert pinned(reheat, REHEAT) == REHEAT
    assert rl["stop"]["collapsed_below_nats"] == 0.08
    assert reheat["prompts_per_step"] * reheat["responses_per_prompt"] == 1024  # sequences a step
    # "resumed with identical hyperparameters" (section 4.1): only the name and what ends the phase may differ
    for key in ("name", "outcome", "stop"):
        rl.pop(key)
        again.pop(key)
    assert strict.first_difference(rl, again) is None


def test_the_two_papers_differ_in_the_model_alone():
    small, large = (strict.plain(load_config(p, [])) for p in PAPER)
    assert small["model"].pop("path") == "models/Qwen3-4B-Base"
    assert large["model"].pop("path") == "models/Qwen3-8B-Base"
    assert strict.first_difference(small, large) is None


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_every_setting_of_the_paper_files_names_its_source(path):
    body = path.read_text(encoding="utf-8").split("\nseed:")[1].splitlines()[1:]
    for line in body:
        if re.search(r":\s+[^\s#]", line) and not re.match(r"\s*(- name|outcome):", line):
            assert re.search(r"#.*\[(A\.\d|\d\.\d|table 6|verl|ours)\]", line), line


# ------------------------------------------------------------------ strict settings


def test_the_minimum_and_the_defaults():
    config = build()
    assert config.seed == 0
    assert config.phases[0].micro_batches is None
    assert config.phases[0].guard.max_skipped_in_row == 3
    assert (config.evaluation.sampling.top_p, config.phases[0].sampling.top_p) == (0.7, 1.0)


def test_plain_is_the_reverse_of_build():
    config = load_config(PAPER[0], [])
    assert strict.build(Config, yaml.safe_load(yaml.safe_dump(strict.plain(config)))) == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sead": 1}, ["sead", "unknown key", "did you mean 'seed'"]),
        (
            {"phases__0__optimizer__learning_rat": 1},
            ["phases.0.optimizer.learning_rat", "did you mean 'learning_rate'"],
        ),
        ({"model__zzzzz": 1}, ["model.zzzzz", "known: path"]),
        ({"seed": "one"}, ["seed", "expected int", "'one'", "str"]),
        ({"seed": 1.5}, ["seed", "expected int", "1.5"]),
        ({"seed": True}, ["seed", "expected int", "True"]),
        ({"seed": None}, ["seed", "expected int", "None"]),
        ({"model__remat": "half"}, ["remat", "expected one of none, dots, full"]),
        ({"phases__0__optimizer__learning_rate": "fast"}, ["phases.0.optimizer.learning_rate", "expected float"]),
        ({"phases__0__optimizer__learning_rate": True}, ["phases.0.optimizer.learning_rate", "expected float"]),
        ({"phases": "rl"}, ["phases", "expected a list"]),
        ({"phases": []}, ["phases", "at least one"]),
        ({"model": "path"}, ["model", "expected a mapping"]),
        ({"phases__0__objective__hyperparameters": [1]}, ["hyperparameters", "expected a mapping"]),
        ({"phases__0__stop": {}}, ["phases.0.stop", "at least one of steps, epochs"]),
        ({"phases__0__stop__steps": 0}, ["phases.0.stop", "positive"]),
        (
            {"phases__0__micro_batches": 3},
            ["phases.0", "micro_batches 3 does not divide", "8 rows", "choose a divisor"],
        ),
        (
            {"phases__0__updates_per_rollout": 3},
            [
                "phases.0",
                "updates_per_rollout 3 does not divide prompts_per_step 4",
                "whole groups",
                "choose a divisor",
            ],
        ),
        (
            {"phases__0__updates_per_rollout": 2, "phases__0__micro_batches": 8},
            ["micro_batches 8 does not divide the update's 4 rows", "(2 prompts x 2 responses)"],
        ),
        ({"phases__0__updates_per_rollout": 0}, ["updates_per_rollout must be at least 1"]),
        ({"phases__0__passes_per_rollout": 0}, ["passes_per_rollout must be at least 1"]),
        ({"phases__0__rows_at_once": -1}, ["phases.0", "rows_at_once must be at least 1"]),
        ({"phases__0__prompts_per_step": 0}, ["prompts_per_step must be at least 1"]),
        ({"phases__0__optimizer_state": "forget"}, ["optimizer_state", "reset, keep", "'forget'"]),
        ({"model__compute_dtype": "float16"}, ["compute_dtype", "float32, bfloat16", "'float16'"]),
        ({"data__name": "gsm"}, ["data", "name", "countdown"]),
        ({"data__verifier": "judge"}, ["data", "verifier", "math"]),
        ({"seed": -1}, ["seed must be >= 0 and < 2**32, got -1"]),
        ({"seed": 2**32}, ["seed must be >= 0 and < 2**32, got 4294967296"]),
        ({"keep_checkpoints": 0}, ["keep_checkpoints must be at least 1, got 0"]),
        ({"page_every_s": -1}, ["page_every_s must be at least 0, got -1"]),
        (
            {"phases__0__responses_per_prompt": 1},
            ["phases.0", "responses_per_prompt", "expected at least 2 where there is a reward, got 1"],
        ),
        (
            {"phases__0__stop": {"collapsed_below_nats": 0.2, "recovered_above_nats": 0.2}},
            ["phases.0", "collapsed_below_nats 0.2 must be under recovered_above_nats 0.2"],
        ),
        ({"phases__0__guard__max_skipped_in_row": 0}, ["phases.0.guard", "max_skipped_in_row must be at least 1"]),
        ({"phases__0__guard__runaway_entropy_nats": 0}, ["phases.0.guard", "runaway_entropy_nats must be positive"]),
        ({"phases__0__guard__max_start_entropy_nats": -1}, ["max_start_entropy_nats must be positive, got -1.0"]),
    ],
)
def test_bad_settings_are_one_line_that_names_the_place(overrides, words):
    with pytest.raises(ValueError) as error:
        build(**overrides)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_key_is_named():
    data = minimal()
    del data["phases"][0]["optimizer"]["learning_rate"]
    with pytest.raises(ValueError, match=r"^phases\.0\.optimizer\.learning_rate: expected a value, got none"):
        strict.build(Config, data)


def two_phases(collapsed_below: float, **reheat) -> Config:
    data = minimal()
    data["phases"][0]["stop"] = {"collapsed_below_nats": collapsed_below}
    opsd = {"name": "reheat", "objective": {"name": "ts_opsd"}, "responses_per_prompt": 1, "reward": None}
    data["phases"].append(data["phases"][0] | opsd | {"stop": {"recovered_above_nats": 0.12}} | reheat)
    return strict.build(Config, data)


def test_a_collapsed_policy_is_not_a_recovered_one():
    assert len(two_phases(0.12).phases) == 2  # under it, and at or over it
    with pytest.raises(ValueError) as error:
        two_phases(0.13)
    assert str(error.value) == (
        "phase 'reheat': stop.recovered_above_nats 0.12 must not be under stop.collapsed_below_nats 0.13 of phase "
        "'rl': a collapsed policy would count as recovered"
    )


def test_doubtful_settings_are_named():
    assert doubts(build()) == []
    assert doubts(two_phases(0.08, guard={"max_start_entropy_nats": 0.08, "runaway_entropy_nats": 0.13})) == []
    (line,) = doubts(build(phases__0__optimizer__learning_rate=0.01))
    assert line.startswith("phase 'rl': optimizer.learning_rate 0.01 is large for AdamW and nothing stops the run")
    guarded = {"phases__0__guard__runaway_entropy_nats": 1.0}
    assert doubts(build(phases__0__optimizer__learning_rate=0.01, **guarded)) == []
    assert doubts(build(phases__0__optimizer__learning_rate=0.0099)) == []
    start, runaway = doubts(two_phases(0.08, guard={"max_start_entropy_nats": 0.079, "runaway_entropy_nats": 0.12}))[
        ::-1
    ]
    assert "guard.max_start_entropy_nats 0.079 may refuse the policy" in start
    assert "guard.runaway_entropy_nats 0.12 stops the run before it can recover" in runaway


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_raise_no_doubt(path):
    assert doubts(load_config(path, [])) == []


def test_phase_names_differ():
    data = minimal()
    data["phases"] *= 2
    with pytest.raises(ValueError, match="different names, got \\['rl', 'rl'\\]"):
        strict.build(Config, data)


def test_yaml_reads_1e_6_as_text_and_people_mean_the_number():
    text = "{learning_rate: 1e-6}"
    assert yaml.safe_load(text) == {"learning_rate": "1e-6"}  # YAML 1.1 wants a point before the e
    data = minimal()
    data["phases"][0]["optimizer"] = yaml.safe_load(text)
    data["phases"][0]["objective"] = {"name": "mine.py:f", "hyperparameters": {"coefficient": "1e-3", "kind": "soft"}}
    phase = strict.build(Config, data).phases[0]
    assert phase.optimizer.learning_rate == 1e-6
    assert phase.objective.hyperparameters == {"coefficient": 1e-3, "kind": "soft"}


def test_an_integer_is_a_float_but_not_the_reverse():
    assert type(build(phases__0__optimizer__learning_rate=1).phases[0].optimizer.learning_rate) is float
    with pytest.raises(ValueError, match="expected int, got 2.0"):
        build(phases__0__micro_batches=2.0)


def test_override_sets_and_makes_what_is_missing():
    data = minimal()
    for assignment in ("phases.0.stop.steps=7", "mesh.fsdp=2", "evaluation.sampling={top_p: 0.5}", "cache_dir=null"):
        strict.override(data, assignment)
    config = strict.build(Config, data)
    assert (config.phases[0].stop.steps, config.mesh.fsdp, config.evaluation.sampling.top_p) == (7, 2, 0.5)
    strict.override(data, "data.path=a=b")  # only the first = separates
    assert data["data"]["path"] == "a=b"


def test_an_override_changes_one_phase_where_anchors_share_settings(tmp_path):
    rl = yaml.safe_dump(minimal()["phases"][0], default_flow_style=True, width=10**6).strip()
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: {path: somewhere}\n"
        "data: {name: countdown, verifier: countdown}\n"
        f"phases:\n  - &rl {rl}\n  - {{<<: *rl, name: again}}\n"
        "  - {<<: *rl, name: third, stop: &stop {steps: 5}}\n  - {<<: *rl, name: fourth, stop: *stop}\n"
    )
    changed = ["phases.1.optimizer.learning_rate=0.5", "phases.2.stop.steps=9"]
    phases = load_config(file, changed).phases
    assert [p.optimizer.learning_rate for p in phases] == [1e-6, 0.5, 1e-6, 1e-6]
    assert [p.stop.steps for p in phases] == [3, 3, 9, 5]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("seed", "expects a.b=value"),
        ("=1", "expects a.b=value"),
        ("seed=[1", "is not a YAML value"),
        ("phases.1.name=x", "expected an index 0 to 0, got '1'"),
        ("phases.rll.name=x", "--set phases.rll: expected an index 0 to 0, got 'rll'; or a name: rl"),
        ("data.exclude.x=1", "--set data.exclude.x: expected an index 0 to 0, got 'x'"),
        ("mesh={data: 1, data: 2}", "--set mesh: '{data: 1, data: 2}' is not a YAML value: 'data' is given twice"),
        ("model.path.deeper=1", "model.path is a value"),
    ],
)
def test_override_errors(assignment, words):
    data = minimal()
    data["data"]["exclude"] = ["math_500"]
    with pytest.raises(ValueError) as error:
        strict.override(data, assignment)
    assert words in str(error.value)


def test_phases_are_called_by_their_name_or_their_place():
    data = minimal()
    data["phases"] += [data["phases"][0] | {"name": "1", "stop": {"steps": 3}}, {**data["phases"][0], "name": "7"}]
    data = strict.plain(data)
    for assignment in ("phases.rl.stop.steps=5", "phases.1.stop.steps=6", "phases.7.stop.steps=8"):
        strict.override(data, assignment)
    assert [phase["stop"]["steps"] for phase in data["phases"]] == [5, 6, 8]
    strict.override(data, "phases.rl.name=first")
    strict.override(data, "phases.first.stop={epochs: 2}")
    assert data["phases"][0]["stop"] == {"epochs": 2}


# ------------------------------------------------------------------ YAML 1.2

MEANINGS = {
    "010": 10,
    "08": 8,
    "0o17": 15,
    "0x1F": 31,
    "1:30": "1:30",
    "on": "on",
    "no": "no",
    "y": "y",
    "true": True,
    "False": False,
    "1e-6": 1e-6,
    "1E3": 1000.0,
    "-2.5e+1": -25.0,
    ".5": 0.5,
    "-.inf": float("-inf"),
    "1_000": "1_000",
    "0b11": "0b11",
    "2026-01-31": "2026-01-31",
    "=": "=",
    "~": None,
    "": None,
    "'010'": "010",
    '"1e-6"': "1e-6",
}


@pytest.mark.parametrize(("text", "meaning"), MEANINGS.items())
def test_values_mean_what_yaml_1_2_says(text, meaning):
    (value,) = strict.parse(f"[{text or 'null'}]")
    assert value == meaning
    assert type(value) is type(meaning)
    assert strict.parse(text) == meaning


@pytest.mark.parametrize("text", [*MEANINGS, "null", "<<", "a: b", "- a", "0o8", "1e6", "\ufeffx", ".NaN"])
def test_what_is_written_is_read_alike_by_both_versions_of_yaml(text):
    data = {"text": text, "value": MEANINGS.get(text), "list": [1e-6, 1e16, 10, True, None]}
    assert strict.parse(strict.dump(data)) == data
    assert yaml.safe_load(strict.dump(data)) == data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nmesh: {}\nseed: 2\n", "'seed' is given twice, in lines 1 and 3; remove one"),
        ("seed: 1\n'seed': 1\n", "'seed' is given twice, in lines 1 and 2"),
        ("mesh: {data: 1, fsdp: 2, data: 1}", "'data' is given twice, in lines 1 and 1"),
        ("phases:\n  - name: a\n    stop: {}\n    name: b\n", "'name' is given twice, in lines 2 and 4"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "'<<' is given twice"),
        ("a: &a [*a]", "holds itself"),
        ("a: &a {<<: *a}", "holds itself"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_yaml_that_is_refused(text, words, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^configuration \S+c.yaml: not valid YAML: ") as error:
        load_config(file, [])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_merged_key_may_be_set_anew():
    text = "a: &a {<<: &b {x: 1, yy: 2}, x: 3}\nc: {<<: *a, yy: 4}\nd: {<<: [*a, *b, {yy: 9}], z: 5}"
    assert strict.parse(text) == {"a": {"x": 3, "yy": 2}, "c": {"x": 3, "yy": 4}, "d": {"x": 3, "yy": 2, "z": 5}}
    with pytest.raises(ValueError, match="line 2: expected a mapping or several after <<"):
        strict.parse("a: 1\n<<: 3")


def test_a_number_of_base_eight_is_no_surprise(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(minimal()).replace("1.0e-06", "1e-6"), encoding="utf-8")
    config = load_config(file, ["seed=010", "phases.rl.optimizer.epsilon=1e-9"])
    assert config.seed == 10
    assert config.phases[0].optimizer.learning_rate == 1e-6
    assert config.phases[0].optimizer.epsilon == 1e-9
    with pytest.raises(ValueError, match=r"model.random_init: expected bool, got 'on' \(str\)"):
        load_config(file, ["model.random_init=on"])


def test_first_difference():
    a = {"x": 1, "y": [{"z": 2}, 3]}
    assert strict.first_difference(a, {"x": 1, "y": [{"z": 2}, 3]}) is None
    assert strict.first_difference(a, {"x": 1, "y": [{"z": 5}, 3]}) == "y.0.z: 2 != 5"
    assert strict.first_difference(a, {"x": 1, "y": [{"z": 2}]}) == "y: [{'z': 2}, 3] != [{'z': 2}]"
    assert strict.first_difference(a, {**a, "new": 4}) == "new: None != 4"
    assert strict.first_difference({**a, "old": 4}, a) == "old: 4 != None"


def test_rows_must_split_over_the_mesh():
    mesh = make_mesh()  # fsdp 8 under test
    check_batches(build(), mesh)  # 4 x 2 = 8 rows
    with pytest.raises(ValueError, match=r"phase 'rl': 12 rows of a step do not split over 8 devices"):
        check_batches(build(phases__0__prompts_per_step=6), mesh)
    with pytest.raises(ValueError, match=r"phase 'rl': 4 rows of a micro-batch do not split over 8 devices"):
        check_batches(build(phases__0__micro_batches=2), mesh)
    with pytest.raises(ValueError, match=r"phase 'rl': 4 rows of an update do not split over 8 devices"):
        check_batches(build(phases__0__updates_per_rollout=2), mesh)
    several = {"phases__0__updates_per_rollout": 2, "phases__0__micro_batches": 4}  # 32 rows, 16 an update
    with pytest.raises(ValueError, match=r"phase 'rl': 4 rows of a micro-batch do not split over 8 devices"):
        check_batches(build(phases__0__prompts_per_step=16, **several), mesh)


# ------------------------------------------------------------------ command line


def test_check_reports_bad_input_with_exit_code_2(tmp_path, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(minimal() | {"sead": 3}), encoding="utf-8")
    assert main(["check", "--syntax-only", str(file)]) == BAD_INPUT == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "bad.yaml" in line
    assert "did you mean 'seed'" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), ("a: [1", "not valid YAML"), ("- 1", "expected a mapping"), ("", "expected a mapping")],
)
def test_unreadable_files(tmp_path, capsys, content, words):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert main(["check", "--syntax-only", str(file)]) == BAD_INPUT
    assert words in capsys.readouterr().err


def test_check_names_objectives_and_hyperparameters_that_do_not_exist(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(minimal()), encoding="utf-8")
    assert main(["check", "--syntax-only", str(file), "--set", "phases.0.objective.name=dappo"]) == BAD_INPUT
    assert "phase 'rl': objective 'dappo' is unknown" in capsys.readouterr().err
    wrong = "phases.0.objective.hyperparameters={clip_lo: 0.2}"
    assert main(["check", "--syntax-only", str(file), "--set", wrong]) == BAD_INPUT
    assert "clip_lo" in capsys.readouterr().err


def test_a_missing_model_directory_is_found_before_anything_is_written(tmp_path, capsys):
    file, run_dir = tmp_path / "c.yaml", tmp_path / "run"
    content = minimal() | {"cache_dir": str(tmp_path / "cache")}
    content["model"] = {"path": str(tmp_path / "no-model")}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["check", str(file)]) == BAD_INPUT
    assert "model.path" in capsys.readouterr().err
    assert not run_dir.exists()


def demo_file(folder: Path, rows: int) -> Path:
    """The demo with a file of few problems and no evaluation."""
    problems = folder / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"problem": f"3 7 11 2 -> {i} :", "answer": f"3 7 11 2 -> {i}"}) + "\n" for i in range(rows))
    )
    data = yaml.safe_load(DEMO_CONFIG.read_text())
    data["data"] = {"name": "jsonl", "path": str(problems), "verifier": "countdown", "max_prompt_tokens": 7}
    data["evaluation"] = {}
    data["phases"] = data["phases"][:1]
    data["phases"][0] |= {"prompts_per_step": 4, "responses_per_prompt": 2, "reward": {}, "stop": {"steps": 1}}
    data["mesh"] = {"fsdp": -1}
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


@pytest.mark.slow
def test_more_prompts_than_problems_is_told_by_check_and_at_the_start(tmp_path, capsys):
    file = demo_file(tmp_path, rows=4)
    assert main(["check", str(file)]) == 0
    assert "warning" not in capsys.readouterr().out
    few = ["--set", "data.first=3"]
    told = (
        "warning: phase 'rl': a step draws 4 prompts from 3 problems: some come more than once; lower prompts_per_step"
    )
    assert main(["check", str(file), *few]) == 0
    assert f"c.yaml: {told}" in capsys.readouterr().out
    batches = ["--set", "phases.rl.reward.max_generation_batches=2"]
    assert main(["check", str(file), *batches]) == 0
    assert "a step draws 8 prompts in up to 2 batches from 4 problems" in capsys.readouterr().out
    large = ["--set", "phases.rl.optimizer.learning_rate=2"]
    assert main(["check", "--syntax-only", str(file), *large]) == 0
    assert "c.yaml: warning: phase 'rl': optimizer.learning_rate 2 is large for AdamW" in capsys.readouterr().out
    assert main(["train", str(file), *few, *large, "--run-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert told in said
    assert "warning: phase 'rl': optimizer.learning_rate 2 is large" in said


@pytest.mark.slow
def test_train_does_not_go_on_with_other_problems_unless_told_to(tmp_path, capsys):
    file, run = demo_file(tmp_path, rows=4), tmp_path / "run"
    assert main(["train", str(file), "--run-dir", str(run)]) == 0
    demo_file(tmp_path, rows=5)
    more = ["train", str(file), "--run-dir", str(run)]
    capsys.readouterr()
    assert main(more) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run} holds a run that began with something else (training problems: 4, sha256 " in error
    assert main([*more, "--accept-changed"]) == 0
    assert "goes on with changed settings: training problems: 4, sha256 " in capsys.readouterr().out
    assert main(more) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"first": 9, "sample": 2}, "evaluation.data: expected first or sample, got both"),
        ({"sample": 9}, "evaluation.data: sample: expected at most the 4"),
        ({"path": "absent.jsonl"}, "evaluation.data: data source jsonl: expected a file at absent.jsonl"),
        ({"problem_field": "q"}, "evaluation.data: data source jsonl: "),
    ],
)
def test_errors_of_the_evaluation_say_so(settings, says, tmp_path, capsys):
    file = demo_file(tmp_path, rows=4)
    asked = {"name": "jsonl", "path": str(tmp_path / "problems.jsonl"), "verifier": "countdown", "max_prompt_tokens": 7}
    short = ["--set", "evaluation.max_response_tokens=19"]
    assert main(["check", str(file), *short, "--set", f"evaluation.data={json.dumps(asked | settings)}"]) == BAD_INPUT
    assert says in capsys.readouterr().err
    right = ["--set", f"evaluation.data={json.dumps(asked)}", *short]
    assert main(["check", str(file), *right]) == 0
    assert main(["check", str(file), *right, "--set", "evaluation.max_response_tokens=122"]) == BAD_INPUT
    assert (
        "evaluation: prompt and response may take 7 + 122 tokens, more than the model's 128" in capsys.readouterr().err
    )


# ------------------------------------------------------------------ a CPU's cores as devices


def in_a_process(*arguments: str, devices: str = "") -> tuple[int, int, str]:
    """(exit code, number of devices afterwards, standard error) of a command with one device unless it asks for
    more."""
    code = "import sys; from tsopsd_jax.cli import main; code = main(sys.argv[1:]); "
    code += "import jax; print(jax.device_count(), code)"
    env = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": devices, "PYTHONPATH": str(ROOT)}
    if not devices:
        del env["JAX_NUM_CPU_DEVICES"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    count, exit_code = done.stdout.split()[-2:]
    return int(exit_code), int(count), done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_train_divides_the_cpu_as_it_is_told(joined, tmp_path):
    """Joining other processes starts JAX: the setting must come before."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        place = f"localhost:{s.getsockname()[1]}"
    file = demo_file(tmp_path, rows=4)
    settings = ["--set", "mesh.cpu_devices=2", "--set", "mesh.fsdp=2"]
    others = ["--coordinator", place, "--processes", "1", "--process", "0"] if joined else []
    code, devices, said = in_a_process("train", str(file), "--run-dir", str(tmp_path / "run"), *settings, *others)
    assert code == 0, said
    assert devices == 2
    assert "no effect" not in said
    assert len(read_metrics(tmp_path / "run")) == 1
    if not joined:
        code, devices, said = in_a_process("check", str(file), *settings)
        assert (code, devices) == (0, 2), said
        assert "no effect" not in said
        assert "'fsdp': 2" in said


def test_a_division_that_comes_too_late_is_told(tmp_path, capsys):
    there = jax.device_count()
    assert divide_cpu(there) is None
    assert divide_cpu(None) is None
    assert (
        divide_cpu(there + 1) == f"mesh.cpu_devices {there + 1} has no effect: JAX had started with {there} CPU devices"
    )
    file = demo_file(tmp_path, rows=4)
    assert main(["check", str(file), "--set", f"mesh.cpu_devices={there + 1}"]) == 0
    assert f"warning: mesh.cpu_devices {there + 1} has no effect" in capsys.readouterr().out
    other = tmp_path / "other.yaml"
    other.write_text(file.read_text().replace("mesh:", "mesh:\n  cpu_devices: 2"))
    assert main(["check", str(file), str(other)]) == BAD_INPUT
    assert "expected files of one mesh.cpu_devices, got 2, null: " in capsys.readouterr().err
    assert main(["check", "--syntax-only", str(file), str(other)]) == 0


def test_every_phase_setting_reaches_the_trainer():
    """PhaseSettings and the trainer's Phase may not drift apart: every setting is read."""
    ours = {f.name for f in dataclasses.fields(PhaseSettings)}
    theirs = {f.name for f in dataclasses.fields(make_phase(build().phases[0]))}
    assert ours - theirs == {"optimizer_state", "chunk_tokens", "measure_start_kl", "learning_rate_control"}
    assert theirs - ours == {"reset_optimizer", "tile_tokens", "learning_rate", "rate_controller"}  # the rate is logged


def cyclic(**cycle) -> Config:
    data = minimal()
    stop = {"recovered_above_fraction": 0.4}
    data["phases"].append(data["phases"][0] | {"name": "reheat", "objective": {"name": "ts_opsd"}, "stop": stop})
    data["phases"][0] = data["phases"][0] | {"stop": {"collapsed_below_fraction": 0.25}}
    return strict.build(Config, data | {"cycle": cycle})


def test_a_cycle_is_a_stretch_of_the_schedule():
    assert cyclic(phases=["rl", "reheat"], times=3).indices_of_cycle() == Cycle(first=0, last=1, times=3)
    assert cyclic(phases=["reheat"], times=2).indices_of_cycle() == Cycle(first=1, last=1, times=2)
    assert build().indices_of_cycle() == ONCE
    for phases in (["reheat", "rl"], ["rl", "again"], ["none"]):
        with pytest.raises(
            ValueError, match=r"cycle.phases: expected phases that follow each other among \['rl', 'reheat'\]"
        ):
            cyclic(phases=phases, times=2)
    for wrong in ({"phases": [], "times": 2}, {"phases": ["rl"], "times": 0}):
        with pytest.raises(ValueError, match="expected the names of phases and times >= 1"):
            cyclic(**wrong)
    with pytest.raises(ValueError, match="without '#'"):
        build(phases__0__name="rl#1")


def test_a_collapsed_policy_is_no_recovered_one_by_fractions_and_around_the_cycle():
    data = strict.plain(cyclic(phases=["rl", "reheat"], times=2))
    data["phases"][0]["stop"]["collapsed_below_fraction"] = 0.5
    with pytest.raises(ValueError, match="'reheat': stop.recovered_above_fraction 0.4 must not be under"):
        strict.build(Config, data)
    data["phases"].reverse()
    data["cycle"]["phases"].reverse()
    with pytest.raises(ValueError, match="'reheat': stop.recovered_above_fraction 0.4 must not be under"):
        strict.build(Config, data)  # the last phase collapses, and the first one follows it
    strict.build(Config, data | {"cycle": None})


def test_a_controlled_rate_in_factors_of_the_optimizers():
    control = {"entropy_gain_nats_per_step": 0.01, "min_learning_rate": 2.5e-7, "max_learning_rate": 4e-6}
    settings = build(phases__0__learning_rate_control=control).phases[0]
    assert make_phase(settings).rate_controller == RateController(gain_nats=0.01, min_factor=0.25, max_factor=4.0)
    assert make_phase(build().phases[0]).rate_controller is None
    for wrong, message in (
        ({"min_learning_rate": 2e-6}, r"within 2e-06 .. 4e-06, got 1e-06"),
        ({"min_learning_rate": 5e-6}, "min_learning_rate <= max_learning_rate"),
        ({"entropy_gain_nats_per_step": 0.0}, "a gain other than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(phases__0__learning_rate_control=control | wrong)


# ------------------------------------------------------------------ what an objective needs of its phase

OWN = """
import tsopsd_jax.losses as losses
from tsopsd_jax.objectives import Objective
from tsopsd_jax.types import LossOutput, Mean


def mine(*, coefficient=1.0, broken=False, **needs):
    def stats(logits, tokens):
        return {"entropy": losses.entropy(logits)}

    def loss(stats, batch):
        return LossOutput(Mean.of(-coefficient * stats["nothing" if broken else "entropy"], batch.mask), {})

    return Objective(stats, loss, tokenwise=True, **needs)
"""


@pytest.fixture
def own(tmp_path):
    """own(**overrides of the phase) -> a configuration of one phase with an objective of one's own and no reward."""
    (tmp_path / "mine.py").write_text(OWN)
    name = f"{tmp_path / 'mine.py'}:mine"
    return lambda **phase: build(
        **{f"phases__0__{key}": value for key, value in ({"objective__name": name, "reward": None} | phase).items()}
    )


def test_an_objective_that_uses_advantages_needs_a_reward(own):
    with pytest.raises(ValueError, match=r"^phase 'rl': reward: objective '.*mine.py:mine' uses advantages .*=False$"):
        make_phase(own().phases[0])
    with pytest.raises(ValueError, match=r"^phase 'rl': reward: objective 'dapo' uses advantages"):
        make_phase(build(phases__0__reward=None).phases[0])
    assert make_phase(own(objective__hyperparameters__uses_advantage=False).phases[0]).reward is None
    assert make_phase(own(reward={}).phases[0]).reward is not None


@pytest.mark.parametrize(
    ("declared", "sampling", "refused"),
    [
        ({}, {}, False),
        ({}, {"sampling_temperature": 1.2}, True),
        ({}, {"top_p": 0.9}, True),
        ({}, {"top_k": 20}, True),
        ({"policy_temperature": 1.2}, {"sampling_temperature": 1.2}, False),
        ({"policy_temperature": 1.2}, {}, True),
        ({"policy_temperature": None}, {"sampling_temperature": 0.7, "top_p": 0.9}, False),
        ({}, {"edt_theta": 1.0}, True),
        ({"policy_temperature": None}, {"edt_theta": 1.0}, False),
    ],
)
def test_the_policy_in_the_ratio_is_the_one_that_sampled(own, declared, sampling, refused):
    config = own(objective__hyperparameters=declared | {"uses_advantage": False}, sampling=sampling)
    if not refused:
        make_phase(config.phases[0])
        return
    t = f"{declared.get('policy_temperature', 1.0):g}"
    words = rf"^phase 'rl': sampling: objective '.*mine.py:mine' .* at temperature {t} .*; expected "
    words += rf"sampling_temperature {t}, "
    with pytest.raises(ValueError, match=words):
        make_phase(config.phases[0])


def test_a_turned_temperature_begins_where_the_settings_say():
    def made(**changes):
        return make_phase(
            build(phases__0__objective={"name": "tampo", "hyperparameters": {"initial": 1.2}}, **changes).phases[0]
        )

    turned = made(phases__0__sampling={"sampling_temperature": 1.2})
    assert turned.objective.control.init["sampling_temperature"] == turned.sampling.sampling_temperature
    words = r"^phase 'rl': sampling: objective 'tampo' turns .*; expected sampling_temperature 1.2, its first, got 1; "
    with pytest.raises(ValueError, match=words):
        made()
    with pytest.raises(ValueError, match=r"^phase 'rl': reward.surplus: objective 'tampo' .* expected drop, got keep"):
        make_phase(build(phases__0__objective={"name": "tampo"}, phases__0__reward__surplus="keep").phases[0])


def test_a_ramp_of_the_penalty_fits_the_response():
    with pytest.raises(ValueError, match=r"^phase 'rl': .*buffer_tokens=9 > max_tokens=8"):
        make_phase(build(phases__0__reward__overlong_buffer_tokens=9).phases[0])


def test_every_different_objective_is_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(building, "objective_notes", lambda objective: checked.append(objective) or ["odd"])
    data = minimal()
    names = ["a", "b", "c"]
    data["phases"] = [data["phases"][0] | {"name": name} for name in names]
    data["phases"][1] = data["phases"][1] | {"objective": {"name": "dapo", "hyperparameters": {"clip_low": 0.1}}}
    config = strict.build(Config, data)
    phases = make_phases(config)
    notes = check_objectives(config, phases)
    assert checked == [phases[0].objective, phases[1].objective]
    assert notes == [f"warning: phase '{name}': objective 'dapo': odd" for name in "ab"]


def test_what_is_broken_is_named_before_anything_is_sampled(own):
    config = own(objective__hyperparameters={"broken": True, "uses_advantage": False})
    words = r"^phase 'rl': objective '.*mine.py:mine': .*mine.py:12, loss: raised KeyError: 'nothing' "
    words += r"\(stats returns entropy\)$"
    with pytest.raises(ValueError, match=words):
        check_objectives(config, make_phases(config))


# ------------------------------------------------------------------ real vocabulary, real prompts


@pytest.mark.slow
@pytest.mark.shared_data
def test_one_step_of_each_phase_with_the_real_tokenizer_and_prompts(shared_data, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "configs" / "models" / "qwen3-tiny", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / "qwen3_tokenizer" / name, folder)
    run_dir = tmp_path / "run"
    cache = str(tmp_path / "cache")
    assert (
        main(["data", "prepare", "dapo_math_17k", "--from", str(shared_data / "dapo_math_17k"), "--cache-dir", cache])
        == 0
    )
    overrides = {"model.path": folder, "cache_dir": cache}
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    file = ROOT / "configs" / "qwen3_tiny_dapo_math.yaml"
    assert main(["train", str(file), "--run-dir", str(run_dir), *sets]) == 0, capsys.readouterr().err
    rl, reheat = read_metrics(run_dir)
    assert [(line["step"], line["phase"], line["phase_step"]) for line in (rl, reheat)] == [
        (1, "rl", 1),
        (2, "reheat", 1),
    ]
    # Random weights of standard deviation 0.02 are nearly uniform: ln 151,936 = 11.931 nats.
    assert rl["policy/entropy_nats"] == pytest.approx(11.93, abs=0.02)
    assert reheat["policy/entropy_nats"] == pytest.approx(11.93, abs=0.02)
    # No group is informative: two generation batches, then four filled groups, whose accuracy gives no advantage.
    assert rl["rollout/generation_batches"] == 2
    assert rl["rollout/groups_filled"] == 4
    assert rl["optim/skipped"] == reheat["optim/skipped"] == 0
    assert reheat["distil/forward_kl_nats"] > 0
    assert reheat["optim/grad_norm"] > 0
    assert max(rl["rollout/logp_gap_max_nats"], reheat["rollout/logp_gap_max_nats"]) < 1e-3
    assert (run_dir / "report.html").is_file()


# ------------------------------------------------------------------ the reference of a phase

PULLED = {"objective__hyperparameters": {"kl_coefficient": 0.1}}


def of_phase(**settings) -> Config:
    return build(**{f"phases__0__{key}": value for key, value in settings.items()})


def test_a_phase_has_the_reference_that_its_objective_needs():
    assert make_phase(of_phase().phases[0]).reference is None
    made = make_phase(of_phase(**PULLED, reference="start", reference_every_steps=5).phases[0])
    assert (made.reference, made.reference_every_steps, made.objective.reference) == ("start", 5, True)
    assert [made.renews_reference(step) for step in (0, 1, 5, 6, 10)] == [True, False, True, False, True]
    assert make_phase(of_phase(**PULLED, reference="some/model").phases[0]).reference == "some/model"
    for reference in ("none", "start"):
        measured = make_phase(of_phase(measure_start_kl=True, reference=reference).phases[0])
        assert (measured.reference, measured.objective.reference) == ("start", True)
    hot = {"objective__hyperparameters": {"policy_temperature": 1.2}, "sampling": {"sampling_temperature": 1.2}}
    assert make_phase(of_phase(measure_start_kl=True, **hot).phases[0]).reference == "start"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            PULLED,
            r"phase 'rl': reference: objective 'dapo' compares .*; expected reference: start, or a model directory, "
            r"got none",
        ),
        (
            {"reference": "start"},
            r"phase 'rl': reference: objective 'dapo' compares .* no reference; expected .* none, got start",
        ),
        ({"reference": "a/model"}, r"phase 'rl': reference: .* got a/model; leave it out"),
        (
            PULLED | {"reference_every_steps": 3},
            r"reference_every_steps: expected .* beside reference: start, .* got 3",
        ),
        (
            PULLED | {"reference": "start", "reference_every_steps": 0},
            r"reference_every_steps: expected a number of at least 1",
        ),
        ({"measure_start_kl": True, "reference": "a/model"}, r"measure_start_kl: .* got a/model and None"),
        (
            {"measure_start_kl": True, "reference": "start", "reference_every_steps": 2},
            r"measure_start_kl: .* got start and 2",
        ),
    ],
)
def test_a_reference_that_is_missing_or_that_nothing_uses_is_refused(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        make_phase(of_phase(**settings).phases[0])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_reference_has_the_policys_vocabulary(tmp_path):
    """Its other sizes are its own; directory, weights, vocabulary and tokens are looked at before anything is
    written."""
    data = strict.read_yaml(DEMO_CONFIG)
    folder = tmp_path / "teacher"
    data["phases"] = [data["phases"][1] | {"objective": {"name": "opd"}, "reference": str(folder)}]

    def refused(words):
        with pytest.raises(ValueError, match=words) as error:
            prepare(strict.build(Config, data))
        assert "\n" not in str(error.value)

    refused("reference: expected a Hugging Face model directory, got .*teacher: no such directory")
    shutil.copytree(ASSETS / PACKAGED_MODEL, folder)
    (source,) = prepare(strict.build(Config, data)).references.values()
    assert sorted(source.load()) == sorted(source.model.param_shapes())
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 1}))
    assert prepare(strict.build(Config, data)).references[str(folder)].model.config.num_hidden_layers == 1
    (folder / "model.safetensors").rename(folder / "elsewhere")
    refused("^reference: expected weight files in .*teacher, got no model.safetensors .*; fetch them$")
    (folder / "elsewhere").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 16}))
    refused("phase 'reheat': reference: prompt and response may take 26 tokens, more than the 16 positions")
    (folder / "config.json").write_text(json.dumps(shape | {"vocab_size": shape["vocab_size"] + 8}))
    refused(r"reference: expected a model of the policy's \d+ vocabulary entries, got \d+ in .*teacher")
    (folder / "config.json").write_text(json.dumps(shape))
    tokens = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokens.replace('"17":', '"seventeen":'))
    refused("reference: expected the policy's tokenizer in .*teacher, got one of other tokens or ids")
