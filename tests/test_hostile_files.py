"""Files that are damaged or made to harm: read rightly, or refused in one line. Each fault that was found is a test
here, and `scripts/fuzz.py` looks for more."""

import json
import re

import byte_model
import pytest
from project_scripts import run_script

from tsopsd_jax.config import strict
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.display import numbers
from tsopsd_jax.huggingface import read_json
from tsopsd_jax.model.fingerprint import fingerprint
from tsopsd_jax.model.hf import open_tensors
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rundir import files, resumable_jsonl
from tsopsd_jax.rundir.log import RunLog
from tsopsd_jax.rundir.status import read_status
from tsopsd_jax.rundir.trackers import Tracker

DEEP = "[" * 100_000
"""JSON that a recursive reader gives up on."""


def test_changed_files_are_read_or_refused_in_one_line():
    """A short run over all targets; the long one is in benchmarks/results/fuzz_cpu.json."""
    said = run_script("fuzz.py", "--cases", "18", "--seed", "7")
    assert re.search(r"^342 cases, 0 faults$", said, flags=re.MULTILINE), said


def test_json_nested_too_deeply_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(DEEP)
    with pytest.raises(ValueError, match=r"config.json: expected JSON, got maximum recursion depth"):
        read_json(file)
    with pytest.raises(ValueError, match="config.json: expected settings, got no JSON .*; mend it"):
        files.read_object(file, what="settings", remedy="mend it")
    (tmp_path / "metrics.jsonl").write_text(f'{DEEP}\n{{"step": 1}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: remove that line"):
        files.read_objects(tmp_path / "metrics.jsonl")
    (tmp_path / "status.json").write_text(DEEP)
    assert read_status(tmp_path) == {}
    cache = tmp_path / "digests.json"
    cache.write_text(DEEP)
    assert fingerprint(tmp_path, cache=cache)["config"]


@pytest.mark.parametrize("text", ["[1]", '"settings"', "1.5", "null"])
def test_settings_of_an_output_that_are_none_are_named(text, tmp_path):
    out = tmp_path / "out.jsonl"
    out.touch()
    resumable_jsonl.settings_file(out).write_text(text)
    with pytest.raises(
        ValueError, match=r"out.jsonl.settings.json: expected the settings that out.jsonl was begun with"
    ):
        resumable_jsonl.claim_output(out, {"samples": 4})


def test_a_shard_whose_name_no_file_system_takes_is_refused(tmp_path):
    import contextlib

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed": "x" * 5000}}))
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match="cannot open x{80} .File name too long"):
        open_tensors(tmp_path, stack)


@pytest.mark.parametrize("named", [[{}], [[]], [None], ["Qwen3ForCausalLM"] * 2])
def test_an_architecture_that_is_no_name_is_refused(named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": named, "model_type": "qwen3"}))
    with pytest.raises(ValueError, match="expected architectures to be one of Qwen3ForCausalLM"):
        read_config(tmp_path / "config.json")


def test_a_stop_token_of_more_than_32_bits_is_refused(tmp_path):
    folder = byte_model.write(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2**63}))
    with pytest.raises(
        ValueError, match=r"generation_config.json: expected eos_token_id to be ids >= 0 of 32 bits, got"
    ):
        Tokenizer.load(folder)


@pytest.mark.parametrize("step", ["null", '"1"', "[1]", "-1", "1.0", "true", "1" * 30])
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "samples.jsonl"])
def test_a_run_does_not_go_on_from_a_log_without_steps(name, step, tmp_path):
    (tmp_path / name).write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')
    with pytest.raises(ValueError, match=rf"{name}: expected the number of a step in each record, got"):
        RunLog(tmp_path, last_step=1, tracker=Tracker(tensorboard=False))
    assert (tmp_path / name).read_text().count("\n") == 2, "what is refused is left alone"


def test_odd_values_in_a_log_are_not_counted(tmp_path):
    lines = [{"step": 1, "optim/skipped": "many"}, {"step": 2, "optim/skipped": [1]}, {"step": 3, "optim/skipped": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunLog(tmp_path, last_step=3, tracker=Tracker(tensorboard=False)).close()
    assert read_status(tmp_path)["skipped_updates"] == 1


def test_a_number_of_hundreds_of_digits_is_not_shown():
    assert numbers.fixed(10**400) == numbers.DASH
    assert numbers.fixed(float("nan")) == numbers.DASH
    assert numbers.fixed(-(10**300), ".0e") == "-1e+300"


ODD = [
    {"phases": 1.0}, {"phases": [1]}, {"phases": [{}]}, {"phases": [{"step": "1"}]}, {"starts": "x"},
    {"starts": [None]},
    {"starts": [{"versions": []}]}, {"starts": [{"time": 1e300}]}, {"time": "now"}, {"time": -1}, {"state": []},
    {"step": None}, {"phase": {}}, {"reason": 3},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=json.dumps)
def test_a_status_that_was_not_written_so_counts_as_none(odd, tmp_path):
    good = {"state": "running", "reason": None, "phase": "rl", "step": 3, "time": 1e9, "phases": [], "starts": []}
    (tmp_path / "status.json").write_text(json.dumps(good))
    assert read_status(tmp_path) == good
    (tmp_path / "status.json").write_text(json.dumps(good | odd))
    assert read_status(tmp_path) == {}


def levels(item: str) -> str:
    """A YAML document whose last anchor means 9**9 values."""
    names = "abcdefghi"
    below = [
        f"{name}: &{name} " + item.format(",".join([f"*{before}"] * 9))
        for before, name in zip(names, names[1:], strict=False)
    ]
    return "\n".join(["a: &a {k: x}", *below])


@pytest.mark.parametrize("item", ["[{}]", "{{<<: [{}]}}"], ids=["anchors", "merge keys"])
def test_a_few_lines_of_yaml_cannot_mean_a_billion_values(item):
    with pytest.raises(ValueError, match="with its anchors written out it holds more than 1,000,000 values"):
        strict.parse(levels(item))


def test_shared_anchors_are_read_as_copies():
    read = strict.parse("a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 2}")
    assert read == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": {"b": [1, 2], "e": 2}}
    assert read["a"] is not read["c"]
