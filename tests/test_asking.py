"""What `generate` and `eval` ask of a run's policy: its problems, its words around them, its verifier."""

import dataclasses
import json

import pytest

from tsopsd_jax.commands.asking import shown_responses, verifier_label
from tsopsd_jax.commands.benchmarks import load_benchmark
from tsopsd_jax.commands.generate import asked_of_file, asked_of_run
from tsopsd_jax.config import DataSettings, load_config
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.data import Problem, Tokenizer
from tsopsd_jax.data.encode import pad_prompts

MODEL = DEMO_CONFIG.parent / "countdown-tiny"
OWN = DataSettings(
    name="jsonl",
    verifier={"form": "last_number", "right": "countdown"},
    accuracy="right",
    template="Reach it: {problem} :",
    problem_field="puzzle",
    answer_field="target",
    chat="direct",
    system_prompt="Be brief.",
)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_that_evaluates_itself_on_nothing_is_asked_what_it_learns_from(tmp_path):
    """`data.drop_longer` leaves out the same problems as in training, and says so; the first N are of the others."""
    texts = ["3 5 7 9 -> 24", "10 + 20 + 30 + 40 -> 24", "1 2 3 4 -> 10", "2 4 6 8 -> 20"]
    file = write_lines(tmp_path / "p.jsonl", *({"problem": f"{t} :", "answer": t, "id": t[:2]} for t in texts))
    data = f"data={{name: jsonl, path: {file}, verifier: countdown, max_prompt_tokens: 7, drop_longer: true}}"
    config = load_config(DEMO_CONFIG, [data, "evaluation.data=null"])
    notes = []
    asked = asked_of_run(config, Tokenizer.load(MODEL), first=2, notes=notes)
    assert [p.id for p in asked.problems] == ["3 ", "1 "]
    assert notes == ["left out of 4 problems: 1 over 7 tokens"]
    assert asked.verifier == "countdown"
    assert asked.rewards is not None
    assert asked.rewards("24", "3 5 7 9 -> 24", {}).right is False
    assert asked.rewards("3 + 5 = 8 ; 8 + 7 = 15 ; 15 + 9 = 24", "3 5 7 9 -> 24", {}).right is True


def test_prompts_of_a_file_get_the_runs_words_and_verifier(tmp_path):
    text = "3 5 7 9 -> 24"
    rows = [{"id": "a", "prompt": text, "answer": text}, {"id": "b", "prompt": "1", "answer": "1"}]
    file = write_lines(tmp_path / "p.jsonl", *rows)
    asked = asked_of_file(file, first=1, template=None, score=None, own=OWN)
    [problem] = asked.problems
    assert problem.prompt == "Reach it: 3 5 7 9 -> 24 :"
    assert problem.before == (("system", "Be brief."),)
    assert asked.texts == [text]
    assert asked.verifier == "form: last_number, right: countdown"
    assert asked.rewards is not None
    verdict = asked.rewards("no; 24", "24", {})
    assert (verdict.parts["form"], verdict.right) == (1.0, False), "the run's accuracy is the other reward"
    other = asked_of_file(file, first=None, template="plain", score="math", own=OWN)
    assert [p.prompt for p in other.problems] == ["3 5 7 9 -> 24", "1"], "options go before the run"
    assert other.verifier == "math"
    assert "conversations_sha256" in asked.facts()
    plain = asked_of_file(file, first=None, template=None, score=None, own=None)
    assert (plain.rewards, plain.facts()["score"], plain.problems[0].prompt) == (None, None, "3 5 7 9 -> 24")
    assert "conversations_sha256" not in plain.facts()


def test_prompts_without_answers_are_not_scored(tmp_path):
    file = write_lines(tmp_path / "p.jsonl", {"prompt": "1", "answer": "1"}, {"prompt": "2"})
    assert asked_of_file(file, first=None, template=None, score=None, own=OWN).rewards is None
    with pytest.raises(ValueError, match='id 2: --score expects a text "answer" too, got none'):
        asked_of_file(file, first=None, template=None, score="math", own=None)


@pytest.mark.parametrize(
    ("own", "template", "verifier", "prompt"),
    [
        (OWN, "Reach it: {problem} :", "countdown", "Reach it: 2 4 :"),
        (dataclasses.replace(OWN, accuracy=None), "Reach it: {problem} :", "last_number", "Reach it: 2 4 :"),
        (dataclasses.replace(OWN, template=None, accuracy=None, verifier="math"), "dapo_answer", "math", None),
    ],
)
def test_a_benchmark_takes_from_the_run_what_is_not_given(tmp_path, own, template, verifier, prompt):
    file = write_lines(tmp_path / "b.jsonl", {"puzzle": "2 4", "target": "6", "problem": "no", "answer": "no"})
    common = {"directory": tmp_path, "first": None, "own": own}
    found = load_benchmark(str(file), template=None, verifier=None, fields=(None, None), **common)
    assert (found.template, found.verifier) == (template, verifier)
    [problem] = found.problems
    assert (problem.answer, problem.before) == ("6", (("system", "Be brief."),))
    assert prompt is None or problem.prompt == prompt
    given = load_benchmark(str(file), template="plain", verifier="math", fields=("problem", "answer"), **common)
    assert (given.template, given.verifier, given.problems[0].prompt) == ("plain", "math", "no")


def test_responses_are_shown_by_problem_and_sample():
    problems = [Problem("a", "1+1?", "2"), Problem("b", "2+2?", "4"), Problem("c", "3+3?", "6")]
    line = {"tokens": 3, "stopped": True, "correct": True}
    lines = [
        {**line, "id": "b", "sample": 0, "response": "4"},
        {**line, "id": "a", "sample": 1, "response": "\x1b[31m3\n\t", "correct": False, "stopped": False},
        {**line, "id": "a", "sample": 0, "response": "2"},
    ]
    assert shown_responses(problems, lines, 2).split("\n") == [
        *("=== a", "1+1?", "--- right, 3 tokens", "2", "--- wrong, 3 tokens, cut off", "\\x1b[31m3", "\t"),
        *("--- answer: 2", "=== b", "2+2?", "--- right, 3 tokens", "4", "--- answer: 4"),
    ]


def test_a_function_of_ones_own_is_known_by_its_file(tmp_path):
    file = tmp_path / "r.py"
    file.write_text("def f(response, answer): return 1.0\n")
    before = verifier_label({"math": "math", "mine": f"{file}:f"})
    assert before.startswith(f"math: math, mine: {file}:f sha256 ")
    file.write_text("def f(response, answer): return 0.0\n")
    assert verifier_label({"math": "math", "mine": f"{file}:f"}) != before
    assert verifier_label("math") == "math"


def test_a_prompt_that_does_not_fit_says_what_to_do():
    with pytest.raises(ValueError, match="prompt 'b': expected a text, got no token; remove the row"):
        pad_prompts(["a", "b"], [[1], []], max_prompt_tokens=3)
    with pytest.raises(
        ValueError, match="prompt 'a' has 4 tokens, expected 1 to 3; raise max_prompt_tokens of its data"
    ):
        pad_prompts(["a"], [[1, 2, 3, 4]], max_prompt_tokens=3)
