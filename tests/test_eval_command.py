"""`tsopsd eval`: interrupted equals uninterrupted, the table, comparisons, what is refused; evaluation inside a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tsopsd_jax.cli import main
from tsopsd_jax.commands.asking import writing
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.evaluation.scoreboard import read_out
from tsopsd_jax.rewards import verify_countdown
from tsopsd_jax.rundir import resumable_jsonl

MODEL = DEMO_CONFIG.parent / "countdown-tiny"
PROBLEMS = {"a": "3 5 7 9 -> 24", "b": "2 4 6 8 -> 20", "c": "1 2 3 4 -> 10", "d": "1 3 5 6 -> 12"}
COMMON = ["--verifier", "countdown", "--max-tokens", "19", "--samples", "3", "--slots", "4"]


def write_benchmark(path, problems=PROBLEMS):
    lines = [{"id": name, "problem": f"{text} :", "answer": text} for name, text in problems.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def toy(tmp_path):
    return write_benchmark(tmp_path / "toy.jsonl")


def arguments(benchmarks, out, *more):
    names = ",".join(map(str, benchmarks))
    return ["eval", "--model", str(MODEL), "--benchmarks", names, "--out", str(out), *COMMON, *more]


def lines(file):
    return sorted(file.read_bytes().splitlines())


def test_every_response_is_kept_and_scored(toy, tmp_path, capsys):
    out = tmp_path / "out"
    other = write_benchmark(tmp_path / "other.jsonl", {"x": "2 3 4 5 -> 14", "a": "3 5 7 9 -> 24"})
    assert main(arguments([toy, other], out)) == 0
    rows = [json.loads(line) for line in lines(out / "toy" / "countdown-tiny.jsonl")]
    scored = ["benchmark", "id", "sample", "response", "tokens", "stopped", "correct", "entropy_nats"]
    assert list(rows[0]) == [*scored, "prompt_ids", "response_ids"]
    tokenizer = Tokenizer.load(MODEL)
    for r in rows:
        assert len(r["response_ids"]) == r["tokens"]
        assert (r["response_ids"][-1] in tokenizer.stop_ids) == r["stopped"]
        assert tokenizer.decode(r["response_ids"]) == r["response"]
        assert r["prompt_ids"] == tokenizer.encode(f"{PROBLEMS[r['id']]} :")
    assert [(r["id"], r["sample"]) for r in rows] == [(i, s) for i in PROBLEMS for s in range(3)]
    assert all(r["correct"] == (verify_countdown(r["response"], PROBLEMS[r["id"]]) > 0) for r in rows)
    assert 0 < sum(r["correct"] for r in rows) < len(rows), "the case must show both"
    assert all(0.05 < r["entropy_nats"] < 2 for r in rows)
    # The same problem at another place of another benchmark: other random numbers, and a verdict of its own.
    here, there = (
        [r["response"] for r in rows if r["id"] == "a"],
        [json.loads(line)["response"] for line in lines(out / "other" / "countdown-tiny.jsonl")][:3],
    )
    assert here != there
    shown = capsys.readouterr().out
    right = 100 * np.mean([r["correct"] for r in rows])
    assert shown == (out / "table.md").read_text()
    assert f"| countdown-tiny | {right:.2f}/" in shown


def test_killed_and_resumed_equals_uninterrupted(toy, tmp_path):
    """In a process of its own, killed without warning as soon as some of its lines are there."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(arguments([toy], whole, "--samples", "24")) == 0
    file = part / "toy" / "countdown-tiny.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "tsopsd_jax", *arguments([toy], part, "--samples", "24")],
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (file.is_file() and file.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = file.read_bytes()
    assert 0 < written.count(b"\n") < 4 * 24, "killed too late to test anything"
    file.write_bytes(written + b'{"benchmark": "to')  # as if in the middle of a line
    assert main(arguments([toy], part, "--samples", "24")) == 0
    assert lines(file) == lines(whole / "toy" / "countdown-tiny.jsonl")
    for name in ("table.md", "table.csv", "results.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_a_torn_end_is_cut_off_and_a_broken_middle_is_named(tmp_path):
    out = tmp_path / "out.jsonl"
    resumable_jsonl.claim_output(out, {"seed": 0})
    out.write_bytes(b'{"id": "\xc2\x85"}\n{"id": "b"}\n{"id": "c')
    assert [line["id"] for line in resumable_jsonl.lines(out)] == ["\x85", "b"]
    resumable_jsonl.claim_output(out, {"seed": 0})
    assert out.read_bytes() == b'{"id": "\xc2\x85"}\n{"id": "b"}\n'
    with out.open("a") as file:
        file.write('{"id": "c"}')  # whole, but for its newline
    resumable_jsonl.claim_output(out, {"seed": 0})
    assert out.read_bytes().endswith(b'{"id": "c"}\n')
    out.write_bytes(b'{"id": "a"}\n{"id\n{"id": "c"}\n')
    for read in (resumable_jsonl.lines, lambda path: resumable_jsonl.claim_output(path, {"seed": 0})):
        with pytest.raises(ValueError, match=r"out\.jsonl:2: remove that line"):
            read(out)


def write_evaluated(out, model, benchmark, right, *, begun, samples=2, kept=None):
    """Responses with this correctness, [problems][samples]; `kept`: only so many of them."""
    file = out / benchmark / f"{model}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {"model": model, "samples": samples, "problems": len(right), resumable_jsonl.BEGUN: begun}
    resumable_jsonl.settings_file(file).write_text(json.dumps(settings))
    rows = [
        {"benchmark": benchmark, "id": f"p{i}", "sample": s, "response": "x", "tokens": 10, "stopped": s == 0}
        | {"correct": bool(c), "entropy_nats": 0.25}
        for i, each in enumerate(right)
        for s, c in enumerate(each)
    ]
    order = np.random.default_rng(0).permutation(len(rows))[:kept]  # lines stand in the order of ending
    file.write_text("".join(json.dumps(rows[at]) + "\n" for at in order))


def three_models(out):
    # Begun in another order than the alphabet's.
    write_evaluated(out, "reheated", "math", [[1, 1], [1, 0], [0, 1], [0, 0]], begun=30)
    write_evaluated(out, "base", "math", [[1, 0], [0, 1], [0, 0], [0, 0]], begun=10)
    write_evaluated(out, "base", "aime", [[1, 0, 0], [0, 0, 0]], begun=11, samples=3)
    write_evaluated(out, "reheated", "aime", [[1, 1, 0], [0, 0, 1]], begun=31, samples=3)
    write_evaluated(out, "collapsed", "math", [[1, 1], [1, 1], [0, 0], [0, 0]], begun=20)
    write_evaluated(out, "collapsed", "aime", [[1, 1, 1], [1, 1, 1]], begun=21, samples=3, kept=5)


TABLE_MD = """\
| model | math avg@2/pass@2 | aime avg@3/pass@2 | average avg/pass |
| --- | ---: | ---: | ---: |
| base | 25.00/50.00 | 16.67/33.33 | 20.83/41.67 |
| collapsed | 50.00/50.00 | – | – |
| reheated | 50.00/75.00 | 50.00/83.33 | 50.00/79.17 |

| model | benchmark | problems | avg, % ± s.e. | pass, % | cut, % | tokens | entropy, nats |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| base | math | 4 | 25.00 ± 14.43 | 50.00 | 50.00 | 10.0 | 0.2500 |
| base | aime | 2 | 16.67 ± 16.67 | 33.33 | 66.67 | 10.0 | 0.2500 |
| collapsed | math | 4 | 50.00 ± 28.87 | 50.00 | 50.00 | 10.0 | 0.2500 |
| reheated | math | 4 | 50.00 ± 20.41 | 75.00 | 50.00 | 10.0 | 0.2500 |
| reheated | aime | 2 | 50.00 ± 16.67 | 83.33 | 66.67 | 10.0 | 0.2500 |

Not finished: collapsed on aime, 1 responses missing.
"""
TABLE_CSV = """\
model,math avg@2,math pass@2,aime avg@3,aime pass@2,average avg,average pass
base,25.0000,50.0000,16.6667,33.3333,20.8333,41.6667
collapsed,50.0000,50.0000,,,,
reheated,50.0000,75.0000,50.0000,83.3333,50.0000,79.1667
"""


def test_the_table_is_that_of_the_paper(tmp_path, capsys):
    """By hand: base on aime has one of three right, then none: avg (1/3 + 0) / 2; pass@2
    (1 - C(2, 2) / C(3, 2)) / 2."""
    three_models(tmp_path)
    assert main(["eval", "--out", str(tmp_path), "--k", "2"]) == 0
    assert capsys.readouterr().out == TABLE_MD == (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.csv").read_text() == TABLE_CSV
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["model"], r["benchmark"], r["pass_at_k"]) for r in records[:2]] == [
        ("base", "math", 0.5),
        ("base", "aime", pytest.approx(1 / 3)),
    ]


def test_two_models_are_compared_problem_by_problem(tmp_path, capsys):
    # Half of 40 problems gain one of two samples, whatever else is right: +25 points; and pass@2 on those 10
    # of them where none was right: Binomial(40, 1/4) has its 2.5 and 97.5 percentiles at 5 and 16.
    first = [[i % 2, 0] for i in range(40)]
    second = [[i % 2, i < 20] for i in range(40)]
    write_evaluated(tmp_path, "a", "math", first, begun=1)
    write_evaluated(tmp_path, "b", "math", second, begun=2)
    assert main(["eval", "--out", str(tmp_path), "--compare", "a", "b"]) == 0
    shown = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert shown[0] == "| b - a, points | avg@n [95 % interval] | pass@k [95 % interval] |"
    # avg: each problem 0 or 1/2, deviation 1/4 / sqrt 40 = 3.95 points: +25 ± 7.7, in steps of 1.25.
    assert shown[2].startswith("| math | +25.00 [+17.50, +32.50] | +25.00 [+12.50, +40.00] |")
    assert main(["eval", "--out", str(tmp_path), "--compare", "b", "a"]) == 0
    assert "| math | -25.00 [-32.50, -17.50] |" in capsys.readouterr().out
    assert main(["eval", "--out", str(tmp_path), "--compare", "a", "c"]) == 2
    assert "--compare: expected two of a, b, got 'c'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--k", "4"], "--k: expected 1 to --samples 3, got 4"),
        (["--name", "../x"], "--name: expected a name of letters, digits"),
        (["--step", "3"], "--step: expected with --run"),
        (["--benchmarks", "countdown,countdown"], "expected different names, got countdown, countdown"),
        (["--benchmarks", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--benchmarks", "gsm9k"], "did you mean 'gsm8k'?"),
        (["--max-tokens", "100000"], "lower --max-tokens"),
        (["--model", "/nowhere/at-all"], "/nowhere/at-all"),
    ],
)
def test_what_is_refused_leaves_nothing(toy, tmp_path, capsys, more, says):
    out = tmp_path / "out"
    assert main(arguments([toy], out, *more)) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_one_table_compares_like_with_like(toy, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments([toy], out, "--first", "1", "--name", "one")) == 0
    before = (out / "toy" / "one.jsonl").read_bytes()
    capsys.readouterr()
    assert main(arguments([toy], out, "--first", "1", "--name", "one", "--seed", "1")) == 2
    assert "one.jsonl was begun with other settings (seed: 0 != 1)" in capsys.readouterr().err
    for more, says in ((["--samples", "2"], "samples: 3 != 2"), (["--first", "2"], "problems_sha256")):
        assert main(arguments([toy], out, "--first", "1", "--name", "two", *more)) == 2
        assert f"one.jsonl has other settings ({says}" in capsys.readouterr().err
    assert [file.name for file in (out / "toy").iterdir() if "two" in file.name] == []
    assert (out / "toy" / "one.jsonl").read_bytes() == before
    # The same responses, another name and seed: allowed, and side by side.
    assert main(arguments([toy], out, "--first", "1", "--name", "two", "--seed", "1")) == 0
    assert [e.model for e in read_out(out)] == ["one", "two"]


def test_fields_of_a_benchmark_of_ones_own(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "3 5 7 9 -> 24 :", "gold": "3 5 7 9 -> 24", "answer": "no"}\n')
    fields = ["--problem-field", "question", "--answer-field", "gold"]
    assert main(arguments([file], tmp_path / "out", *fields)) == 0
    [line] = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["avg_at_k"] > 0, "the packaged model solves it"
    assert main(arguments([file], tmp_path / "other")) == 2
    assert "malformed" in capsys.readouterr().err


def test_results_belong_to_weights(toy, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODEL, model)
    command = ["eval", "--model", str(model), "--benchmarks", str(toy), "--out", str(out), *COMMON]
    assert main(command) == 0
    before = (out / "table.md").read_bytes()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "(model_config: " in error
    assert "--again" in error
    assert (out / "table.md").read_bytes() == before
    assert main([*command, "--again"]) == 0
    with writing(out):
        assert main(command) == 2
    assert "another process writes" in capsys.readouterr().err


def test_a_function_of_ones_own_scores(toy, tmp_path, capsys):
    """Responses with an odd number of sums fail: they count as wrong, and say why."""
    out, rewards = tmp_path / "out", tmp_path / "r.py"
    rewards.write_text(
        "def f(response, answer): return 1.0 if '=' not in response else [0.75][response.count('+') % 2]\n"
    )
    assert main(arguments([toy], out, "--verifier", f"{rewards}:f")) == 0
    assert "the verifier failed at" in capsys.readouterr().err
    rows = [json.loads(line) for line in lines(out / "toy" / "countdown-tiny.jsonl")]
    for row in rows:
        odd = row["response"].count("+") % 2 == 1
        assert row["correct"] == (not odd)
        assert row["rewards"] == ({} if odd else {"accuracy": 0.75})
        assert row.get("failed") == (
            [f"{rewards}:f, line 1: raised IndexError: list index out of range"] if odd else None
        )
    assert 0 < sum(row["correct"] for row in rows) < len(rows), "the case must show both"
    rewards.write_text("def f(response, answer): return 1.0\n")
    assert main(arguments([toy], out, "--verifier", f"{rewards}:f")) == 2
    assert "sha256" in capsys.readouterr().err
    rewards.write_text("def f(response, answer): return 1 / len(response)\n")
    assert main(arguments([toy], tmp_path / "other", "--verifier", f"{rewards}:f")) == 2
    assert (
        "r.py:f, line 1: raised ZeroDivisionError: division by zero (for an empty response" in capsys.readouterr().err
    )
