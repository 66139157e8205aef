"""Arithmetic in words: the problems, and the verifier that reads the last number."""

import re

import numpy as np
import pytest

from tsopsd_jax.data import load_problems
from tsopsd_jax.data.arithmetic import SPLITS, WORDINGS, is_held_out_sum, random_problem, rows
from tsopsd_jax.rewards import verify_last_number


def operation_of(problem: str) -> tuple[str, int, int]:
    """The operation and numbers of a problem, found by its wording."""
    a, b = map(int, re.findall("[0-9]+", problem))
    (operation,) = (op for op, texts in WORDINGS.items() if problem in [text.format(a=a, b=b) for text in texts])
    return operation, a, b


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(split, tmp_path):
    problems = load_problems("arithmetic", split=split, directory=tmp_path)
    assert len(problems) == len({p.prompt for p in problems}) == len({p.id for p in problems}) == SPLITS[split][0]
    for problem in problems:
        operation, a, b = operation_of(problem.prompt)
        assert int(problem.answer) == {"+": a + b, "-": a - b, "*": a * b}[operation]
        assert int(problem.answer) >= 0
        assert 2 <= a <= 99
        assert 2 <= b <= 99
        assert operation != "*" or min(a, b) < 10


def test_the_first_problems(tmp_path):
    """Pinned: the same problems everywhere, and after every change."""
    first = [(p.id, p.prompt, p.answer) for p in load_problems("arithmetic", directory=tmp_path, first=3)]
    assert first == [
        ("arithmetic-train-0", "Tom has 2 apples and gets 74 more. How many apples does he have?", "76"),
        ("arithmetic-train-1", "What is 5 times 92?", "460"),
        ("arithmetic-train-2", "Each of 4 boxes holds 6 pens. How many pens are there?", "24"),
    ]


def test_training_and_test_problems_share_no_calculation():
    splits = [
        {(op, *sorted((a, b))) for op, a, b in (operation_of(problem) for _, problem, _ in rows(split))}
        for split in SPLITS
    ]
    assert not splits[0] & splits[1]
    assert is_held_out_sum("+", 3, 8) == is_held_out_sum("+", 8, 3)


def test_what_is_drawn():
    rng = np.random.default_rng(0)
    drawn = [operation_of(random_problem(rng)[0]) for _ in range(4000)]
    small = np.mean([n < 10 for _, *numbers in drawn for n in numbers])
    # 3 of 4 numbers; the standard error is 0.005.
    assert abs(small - 0.75) < 0.02
    # A third of the pairs, less those of two numbers of two digits: (1 - 1/16) / 3 = 0.3125.
    assert abs(np.mean([op == "*" for op, *_ in drawn]) - 0.3125) < 0.03


@pytest.mark.parametrize(
    ("response", "gold", "score"),
    [
        ("7 + 5 = 12.", "12", 1.0),
        ("The answer is 12", "12", 1.0),
        ("12 is 7 + 5", "12", 0.0),
        ("It is 1,284 pens", "1284", 1.0),
        ("It is 12,84 pens", "1284", 0.0),
        ("about 12.0", "12", 1.0),
        ("about 12.5", "12", 0.0),
        ("7-12", "12", 1.0),
        ("it is -12", "12", 0.0),
        ("it is -12", "-12", 1.0),
        ("012", "12", 1.0),
        ("112", "12", 0.0),
        ("١٢", "12", 0.0),
        ("", "12", 0.0),
        ("no number", "12", 0.0),
        ("12", "", 0.0),
        ("12", "twelve", 0.0),
        ("9" * 1_000_000, "9" * 1_000_000, 0.0),
        ("1,111" * 100_000, "1", 0.0),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_last_number(response, gold, score):
    assert verify_last_number(response, gold) == score
