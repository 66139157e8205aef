"""The card of an exported policy tells what the run directory holds, up to the exported step."""

import dataclasses
import json

import pytest
import yaml

from tsopsd_jax.commands.model_card import BaseModel, base_licence, model_card
from tsopsd_jax.config import Config, strict


def phase(name: str, objective: str, **changes) -> dict:
    return {
        "name": name,
        "objective": {"name": objective, "hyperparameters": changes.pop("hyperparameters", {})},
        "optimizer": {"learning_rate": 2e-5, "weight_decay": 0.1},
        "stop": {"steps": 3},
        "prompts_per_step": 4,
        "responses_per_prompt": 2,
        "max_response_tokens": 8,
        **changes,
    }


CONFIG = strict.build(
    Config,
    {
        "seed": 5,
        "model": {"path": "models/base"},
        "data": {"name": "jsonl", "path": "/home/me/secret/sums.jsonl", "verifier": "math", "first": 9},
        "phases": [
            phase("rl", "dapo", reward={}),
            phase("reheat", "ts_opsd", hyperparameters={"teacher_temperature": 1.2}),
            phase("rl-again", "dapo", reward={}),
        ],
    },
)
METRICS = [
    {"step": 1, "phase": "rl", "policy/entropy_nats": 0.5, "reward/mean": 0.25},
    {"step": 2, "phase": "rl", "policy/entropy_nats": 0.25, "reward/mean": 0.5},
    {"step": 3, "phase": "reheat", "policy/entropy_nats": 0.75},
    {"step": 4, "phase": "rl-again", "policy/entropy_nats": 0.125, "reward/mean": 1.0},
]
EVALUATIONS = [
    {"stage": "base", "step": 0, "benchmark": "sums", "samples": 8, "avg_at_k": 0.125, "pass_at_k": 0.5},
    {"stage": "continued", "step": 4, "benchmark": "sums", "samples": 8, "avg_at_k": 0.875, "pass_at_k": 1.0},
]


def card(config: Config = CONFIG, **changes) -> str:
    facts = {"base": BaseModel("base"), "licence": {}, "step": 3, "dtype": "bfloat16", "metrics": METRICS}
    return model_card(config, **({**facts, "evaluations": EVALUATIONS} | changes))


def test_front_matter():
    _, front, body = card(licence={"license": "apache-2.0"}).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "base_model": "base",
        "tags": ["tsopsd_jax"],
    }
    assert body.startswith("# base, after 3 steps\n")
    assert "license" not in card()


def test_what_was_done_up_to_the_exported_step():
    text = card()
    rows = [line for line in text.splitlines() if line.startswith("| r")]
    assert rows[0].startswith("| rl | dapo | 2 | 4 prompts x 2 responses of at most 8 tokens | learning_rate 2e-05, ")
    assert rows[1].startswith("| reheat | ts_opsd teacher_temperature 1.2 | 1 |")
    assert "weight_decay 0.1" in rows[1]
    assert "rl-again" not in text  # begins after the exported step
    assert "seed 5" in text
    assert "- Problems: name jsonl, verifier math, path sums.jsonl, first 9\n" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"verifier": "/home/me/secret/reward.py:right"}, "verifier reward.py:right"),
        (
            {"verifier": {"accuracy": "math", "short": "secret/reward.py:short"}},
            "verifier {'accuracy': 'math', 'short': 'reward.py:short'}",
        ),
        ({"template": "../secret/words.py:ask"}, "template words.py:ask"),
        ({"template": "Sum/total: {problem}"}, "template Sum/total: {problem}"),
    ],
)
def test_functions_of_ones_own_are_named_without_their_folder(settings, words):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **settings))
    assert words in card(config)
    assert "secret" not in card(config)


def test_an_objective_of_ones_own_is_named_without_its_folder():
    objective = dataclasses.replace(CONFIG.phases[0].objective, name="/home/me/secret/loss.py:renyi")
    text = card(dataclasses.replace(CONFIG, phases=(dataclasses.replace(CONFIG.phases[0], objective=objective),)))
    assert "| rl | loss.py:renyi | 2 |" in text
    assert "secret" not in text


def test_metrics_and_evaluations_of_the_exported_step():
    text = card()
    assert "## Metrics of step 3" in text
    assert "| policy/entropy_nats | 0.75 |" in text
    assert "reward/mean" not in text  # the reheater has none
    assert "12.5" in text
    assert "continued" not in text
    later = card(step=4)
    assert "| reward/mean | 1 |" in later
    assert "87.5" in later
    nothing = card(step=0, metrics=[], evaluations=[])
    assert "## Metrics" not in nothing
    assert "## Evaluations" not in nothing


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", {"license": "other", "license_name": "llama3"}),
        ("# Model\n---\nlicense: mit\n---\n", {}),  # a rule in the text, no front matter
        ("---\nlicense: mit\n", {}),
        ("---\n- mit\n---\n", {}),
        ("---\na: [\n---\n", {}),
        ("", {}),
        (None, {}),
    ],
    ids=json.dumps,
)
def test_licence_of_the_base(tmp_path, text, licence):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert base_licence(tmp_path) == licence


def test_a_model_of_the_hubs_cache_is_named_with_its_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--Qwen--Qwen3-4B-Base" / "snapshots" / commit
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert BaseModel.of(path) == ("Qwen/Qwen3-4B-Base", commit)
    assert BaseModel.of(tmp_path / "link" / ".." / ".." / "..") == ("hub", None)
    _, front, body = card(base=BaseModel.of(folder)).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "Qwen/Qwen3-4B-Base"
    assert "# Qwen/Qwen3-4B-Base, after 3 steps" in body
    assert f"- Base model: Qwen/Qwen3-4B-Base, commit {commit}\n" in body


def test_a_bar_in_a_name_is_no_cell():
    """Five cells have six bars that are not escaped."""
    config = dataclasses.replace(CONFIG, phases=(dataclasses.replace(CONFIG.phases[0], name="a|b"),))
    found = model_card(
        config,
        base=BaseModel("base"),
        licence={},
        step=1,
        dtype="bfloat16",
        metrics=[METRICS[0] | {"phase": "a|b"}],
        evaluations=[],
    )
    [row] = [line for line in found.splitlines() if line.startswith("| a")]
    assert row.startswith(r"| a\|b | dapo")
    assert row.replace(r"\|", "").count("|") == 6
