"""`tsopsd generate`: every prompt and sample once, interrupted or not; what it refuses."""

import json
import shutil

import pytest

from tsopsd_jax.cli import main
from tsopsd_jax.commands.asking import writing
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.rewards import verify_countdown

MODEL = DEMO_CONFIG.parent / "countdown-tiny"
PROBLEMS = {"a": "3 5 7 9 -> 24", "2": "2 4 6 8 -> 20", "c": "1 2 3 4 -> 10"}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": name, "prompt": f"{text} :"} for name, text in PROBLEMS.items()]
    del lines[1]["id"]  # the line's number
    # Python takes these for ends of lines; JSON does not. (Written as they are, as the results' file writes them.)
    # Without its colon it is a token shorter than the others.
    lines[2]["prompt"] = lines[2]["prompt"].removesuffix(" :") + "\u2028\x85"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    return path


def run(prompts, out, *more):
    settings = ["--samples", "3", "--max-tokens", "19", "--top-p", "0.9", "--slots", "8"]
    return main(["generate", "--model", str(MODEL), "--prompts", str(prompts), "--out", str(out), *settings, *more])


def rows(path):
    return sorted((json.loads(line) for line in path.read_bytes().splitlines()), key=lambda r: (r["id"], r["sample"]))


def test_an_interrupted_file_is_gone_on_with(prompts, tmp_path, capsys):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert run(prompts, whole) == 0
    assert "9 responses, 9 of them new" in capsys.readouterr().out
    written = rows(whole)
    assert [(r["id"], r["sample"]) for r in written] == [(i, k) for i in sorted(PROBLEMS) for k in range(3)]
    right = [verify_countdown(r["response"], PROBLEMS[r["id"]]) for r in written if r["stopped"]]
    assert sum(right) >= 2, "the packaged model solves some of these"
    tokenizer = Tokenizer.load(MODEL)
    for r in written:
        assert r["prompt_ids"] == tokenizer.encode(r["prompt"])
        assert len(r["response_ids"]) == r["tokens"]
        assert (r["response_ids"][-1] in tokenizer.stop_ids) == r["stopped"]
        assert tokenizer.decode(r["response_ids"]) == r["response"]
    assert len({r["response"] for r in written}) > 4, "samples of a prompt differ"
    # As if killed in the middle of a line.
    run(prompts, part)
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:4]) + lines[4][:25])
    capsys.readouterr()
    assert run(prompts, part) == 0
    assert "9 responses, 5 of them new" in capsys.readouterr().out
    assert rows(part) == written
    assert run(prompts, part) == 0
    assert "9 responses, 0 of them new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--seed", "-1"], "seed must be in 0..2^32-1, got -1"),
        (["--max-tokens", "100000"], "lower --max-tokens"),
        (["--template", "boxedd"], "did you mean 'boxed'?"),
        (["--chat", "on"], "expected one of none, direct, thinking, got 'on'"),
        (["--model", "/nowhere/at-all"], "/nowhere/at-all"),
        (["--prompts", "/nowhere/at-all"], "/nowhere/at-all: no such file"),
    ],
)
def test_what_is_refused_leaves_nothing(prompts, tmp_path, capsys, more, says):
    assert run(prompts, tmp_path / "out.jsonl", *more) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "1"}\n{"prompt": ', "line 2: not JSON"),
        ('{"text": "1"}\n', 'line 1: expected an object with a text "prompt"'),
        ("[1]\n", "line 1: expected an object"),
        ('{"prompt": "1", "id": 7}\n{"prompt": "2", "id": "7"}\n', "id '7' stands in two lines"),
        ("\n", "expected at least one prompt"),
    ],
)
def test_malformed_prompts_are_named(tmp_path, capsys, text, says):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    assert run(path, tmp_path / "out.jsonl") == 2
    assert says in capsys.readouterr().err


def test_a_file_of_other_settings_is_left_alone(prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(prompts, out) == 0
    before = out.read_bytes()
    assert run(prompts, out, "--seed", "1") == 2
    assert "begun with other settings (seed: 0 != 1)" in capsys.readouterr().err
    assert out.read_bytes() == before
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("precious")
    assert run(prompts, foreign) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert foreign.read_text() == "precious"


def test_responses_of_other_weights_are_not_taken_for_this_models(prompts, tmp_path, capsys):
    """A directory that was replaced by another of the same name."""
    model, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(MODEL, model)
    arguments = ["generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out), "--max-tokens", "19"]
    assert main(arguments) == 0
    before = out.read_bytes()
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "begun with other settings (model_weights: " in error
    assert "--again" in error
    assert out.read_bytes() == before
    assert main([*arguments, "--again"]) == 0
    assert "3 responses, 3 of them new" in capsys.readouterr().out
    assert main(arguments) == 0, "what stands there now is this model's"
    precious = tmp_path / "notes.jsonl"
    precious.write_text("precious")
    assert main([*arguments[:5], "--out", str(precious), "--again"]) == 2, "only what this command wrote is replaced"
    assert precious.read_text() == "precious"


def test_two_processes_do_not_write_one_file(prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with writing(out):
        assert run(prompts, out) == 2
    assert "another process writes" in capsys.readouterr().err
    assert not out.exists()
    assert run(prompts, out) == 0


def test_responses_are_scored_by_a_function_of_ones_own(tmp_path, capsys):
    prompts, out, rewards = tmp_path / "p.jsonl", tmp_path / "out.jsonl", tmp_path / "r.py"
    text = "3 5 7 9 -> 24"
    prompts.write_text(json.dumps({"id": "a", "prompt": f"{text} :", "answer": text, "level": 3}))
    rewards.write_text(
        "def f(response, answer, row): return {'good': row['level'] / 4, 'words': len(response.split())}\n"
    )
    assert run(prompts, out, "--score", f"{rewards}:f") == 0
    for row in rows(out):
        assert row["rewards"] == {"good": 0.75, "words": len(row["response"].split())}
        assert (row["answer"], row["correct"]) == (text, True)
    rewards.write_text("def f(response, answer): return 1.0\n")
    assert run(prompts, out, "--score", f"{rewards}:f") == 2  # another function of the same name
    assert "score" in capsys.readouterr().err
    prompts.write_text(json.dumps({"id": "a", "prompt": f"{text} :"}))
    assert run(prompts, out, "--score", "countdown", "--again") == 2
    assert '--score expects a text "answer" too' in capsys.readouterr().err
