"""Rewards of one's own: functions by a path in processes; several by name with weights; their contract."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tsopsd_jax.rewards import OwnReward, RewardError, Rewards, Verdict, failure_words, make_rewards
from tsopsd_jax.testing import check_reward
from tsopsd_jax.train.phase import Guard, GuardError

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = """
import os
import sys
import time

import numpy as np

import beside


def by_name(response, answer, row):
    return {"level": row["level"], "length": len(response)}


def odd(response, answer):
    if response == "raise":
        return {}["x"]  # line 16
    if response == "hang":
        while True:
            pass
    if response == "die":
        os._exit(3)
    if response == "exit":
        sys.exit("enough")
    if response == "print":
        print("not a reply")
        sys.stdin.read()
    return {
        "nan": float("nan"), "inf": float("inf"), "text": "1", "none": None, "list": [1.0], "array": np.zeros(2),
        "empty": {}, "named nan": {"a": float("nan")}, "odd name": {"a b": 1.0}, "huge": 10**400,
        "numpy": np.float32(0.25), "bool": True, "numpy bool": np.bool_(True), "array scalar": np.array(0.5),
    }.get(response, beside.HALF)


def one_argument(response):
    return 1.0


def another(response, answer, gold):
    return 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    (place / "mine.py").write_text(FUNCTIONS.lstrip("\n"), encoding="utf-8")
    (place / "beside.py").write_text("HALF = 0.5\n", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def odd(folder):
    reward = OwnReward(f"{folder}/mine.py:odd", wall_s=1.0)
    yield reward
    reward.close()


def test_a_function_may_import_its_neighbours_and_return_scalars(odd):
    assert odd("anything", "", {}) == 0.5
    assert [odd(text, "", {}) for text in ("numpy", "bool", "numpy bool", "array scalar")] == [0.25, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ("raise", r"mine.py:odd, line 16: raised KeyError: 'x'$"),
        ("exit", "raised SystemExit: enough"),
        ("nan", r"expected a finite float or \{name: float\}, got nan \(float\)"),
        ("inf", r"got inf \(float\)"),
        ("text", r"got '1' \(str\)"),
        ("none", r"got None"),
        ("list", r"got \[1.0\] \(list\)"),
        ("array", r"got array\(\[0., 0.\]\)"),
        ("empty", "got an empty dict"),
        ("named nan", r"got nan \(float\) as 'a'"),
        ("odd name", "expected names of letters, digits and _ in its dict, got 'a b'"),
        ("huge", r"got 10000"),
    ],
)
def test_what_a_function_does_wrong_is_named(odd, response, words):
    with pytest.raises(RewardError, match=words):
        odd(response, "", {})
    assert odd("anything", "", {}) == 0.5, "it is asked again"


def test_a_function_that_hangs_is_killed_in_time(odd):
    odd("anything", "", {})
    (worker,) = odd._pool.idle
    began = time.monotonic()
    with pytest.raises(RewardError, match="odd: took more than 1 s"):
        odd("hang", "", {})
    assert time.monotonic() - began < 5
    assert worker.process.poll() is not None
    assert odd("anything", "", {}) == 0.5


def test_a_function_that_ends_its_process_is_named(odd):
    with pytest.raises(RewardError, match="odd: ended its process"):
        odd("die", "", {})


def test_what_a_function_reads_and_prints_is_no_message(odd):
    assert odd("print", "", {}) == 0.5
    assert odd("numpy", "", {}) == 0.25


def test_any_text_arrives(folder):
    reward = OwnReward(f"{folder}/mine.py:by_name")
    for text in ("\ud800", "a\nb\u2028\x00", "x" * 1_000_000, ""):
        assert reward(text, "", {"level": 2}) == {"level": 2.0, "length": float(len(text))}
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda n: reward("x" * n, "", {"level": n}), range(60)))
    assert found == [{"level": float(n), "length": float(n)} for n in range(60)]
    reward.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.py:f", "reward file .*absent.py does not exist"),
        ("mine.py:absent", "has no function 'absent'"),
        ("mine.py:one_argument", r"one_argument: expected a function of \(response, answer\) or .*, got \(response\)"),
        ("mine.py:another", r"expected a function of .*got \(response, answer, gold\)"),
        ("broken.py:f", "importing it raised ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_functions_that_cannot_be_had(folder, name, words):
    (folder / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(ValueError, match=words):
        OwnReward(f"{folder}/{name}")


def test_a_file_is_not_exchanged_while_it_is_used(tmp_path):
    file = tmp_path / "r.py"
    file.write_text("import os\ndef f(response, answer): return 1.0 if response else os._exit(1)\n")
    reward = OwnReward(f"{file}:f")
    file.write_text("def f(response, answer): return 2.0\n")
    assert reward("x", "", {}) == 1.0
    with pytest.raises(RewardError, match="ended its process"):
        reward("", "", {})
    with pytest.raises(RewardError, match="was changed while it is used"):  # the next process would import another
        reward("x", "", {})


# ------------------------------------------------------------------ several by name


def test_the_reward_is_the_weighted_sum_and_the_first_is_the_accuracy(folder):
    rewards = make_rewards(
        {"right": "math", "style": f"{folder}/mine.py:by_name"}, weights={"style": 0.5, "length": -0.01}
    )
    # right: 1 x 1; level: 3 x 0.5, the weight of its function; length: 9 x -0.01, its own. 1 + 1.5 - 0.09 = 2.41
    verdict = rewards("Answer: 4", "4", {"level": 3})
    assert verdict.parts == {"right": 1.0, "level": 3.0, "length": 9.0}
    assert verdict.reward == pytest.approx(2.41)
    assert (verdict.accuracy, verdict.right, list(verdict.failures)) == (1.0, True, [])


def test_another_reward_may_be_the_accuracy():
    both = {"right": lambda *_: 1.0, "style": lambda *_: {"brief": 0.25, "kind": 0.75}}
    assert Rewards(both)("", "", {}).accuracy == 1.0
    assert Rewards(both, accuracy="brief")("", "", {}).accuracy == 0.25
    assert Rewards({"style": both["style"]})("", "", {}).accuracy == 0.25, "the first of those by name"
    # Above one half is right: of 0 and 1, of -1 and 1, and of grades between.
    assert [Verdict(x, x, {}).right for x in (-1.0, 0.0, 0.5, 0.51, 1.0)] == [False, False, False, True, True]


def test_a_failed_reward_counts_as_nothing_and_the_others_stay():
    def fails(*_):
        raise RewardError("mine.py:f, line 3: raised KeyError: 'x'")

    first = Rewards({"right": fails, "style": lambda *_: 0.5})("", "", {})
    assert (first.accuracy, first.reward, first.parts) == (0.0, 0.5, {"style": 0.5}), "style is not the accuracy"
    assert first.failures == ["mine.py:f, line 3: raised KeyError: 'x'"]
    fine = Rewards({"style": lambda *_: 0.5})("", "", {})
    assert failure_words([fine]) is None
    assert failure_words([first, fine, fine, first]) == (
        "rewards of 2 of 4 responses failed and count as 0: mine.py:f, line 3: raised KeyError: 'x'"
    )


def test_a_guard_stops_where_most_rewards_failed():
    good, bad = Verdict(1.0, 1.0, {}), Verdict(0.0, 0.0, {}, ["r.py:f: took more than 5 s"])
    Guard().check_rewards("rl", [good, bad])  # half: not more than half
    with pytest.raises(
        GuardError, match="phase 'rl' stopped: rewards of 2 of 3 .* r.py:f: took more than 5 s; mend it"
    ):
        Guard().check_rewards("rl", [good, bad, bad])
    with pytest.raises(GuardError, match="max_reward_failed_fraction"):
        Guard(max_reward_failed_fraction=0.25).check_rewards("rl", [good, good, bad])
    Guard(max_reward_failed_fraction=0.0).check_rewards("rl", [good])
    with pytest.raises(ValueError, match=r"max_reward_failed_fraction must be in 0..1, got 2"):
        Guard(max_reward_failed_fraction=2)


@pytest.mark.parametrize(
    ("verifier", "more", "words"),
    [
        (
            "vibes",
            {},
            "verifier: expected one of countdown, math, last_number or path/to/file.py:function, got 'vibes'",
        ),
        ({}, {}, "expected at least one reward"),
        ({"a b": "math"}, {}, "expected names of letters, digits and _, got 'a b'"),
        ({"a": 3.0}, {}, "got 3.0"),
        ({"a": "math"}, {"weights": {"b": 1.0}}, "reward_weights: no reward is called 'b'; expected one of a"),
        ({"a": "math"}, {"accuracy": "b"}, "accuracy: no reward is called 'b'; expected one of a"),
    ],
)
def test_settings_that_cannot_be(verifier, more, words):
    with pytest.raises(ValueError, match=words):
        make_rewards(verifier, **more)


# ------------------------------------------------------------------ the contract


def graded(response, _answer):
    return min(len(response), 10) / 10


def test_functions_that_keep_the_contract():
    assert check_reward(graded) is None
    assert check_reward(lambda _response, _answer, row: {"a": row.get("x", 0.0), "b": 1}) is None
    assert check_reward(f"{ROOT}/examples/reward.py:answers_last") is None
    assert check_reward(f"{ROOT}/examples/reward.py:brevity", row={"words": 10}) is None


calls = iter(range(1000))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda _response: 1.0, r"<lambda>: expected a function of \(response, answer\)"),
        (
            lambda _response, _answer: None,
            r"got None \(NoneType\) \(for a right response, with answer '4'",
        ),
        (lambda response, _answer: 1 / len(response), r"line \d+: raised ZeroDivisionError.*\(for an empty response"),
        (lambda response, _answer: len(response.encode()), r"UnicodeEncodeError.*\(for half a character"),
        (lambda _response, _answer: math.nan, "got nan"),
        (lambda _response, _answer: next(calls), "expected the same reward for the same input, got 0.0 and 1.0"),
        (lambda response, _answer: {"a": 1.0} if response else 1.0, "same names for every input, got a, then a number"),
        (lambda response, _answer: {"a": 1.0} if response else {"b": 1.0}, "got a, then b for an empty response"),
        ("no function", "does not exist"),
    ],
)
def test_functions_that_break_the_contract(function, words):
    with pytest.raises(ValueError, match=words):
        check_reward(function)


def test_a_function_that_hangs_breaks_the_contract(monkeypatch):
    monkeypatch.setattr("tsopsd_jax.rewards.contract.LIMIT_S", 0.2)
    with pytest.raises(ValueError, match="took more than 0.2 s"):
        check_reward(lambda _response, _answer: time.sleep(2))
