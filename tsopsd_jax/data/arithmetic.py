"""Arithmetic in words, for small pretrained models: one operation on two numbers of one or two digits.

    problem   Tom has 17 apples and eats 5. How many apples are left?
    answer    12

Three numbers of four have one digit: a model of 135 million parameters gets some of the problems right, and not all.
"""

import zlib

import numpy as np

WORDINGS = {
    "+": (
        "What is {a} plus {b}?",
        "Tom has {a} apples and gets {b} more. How many apples does he have?",
        "There are {a} red cars and {b} blue cars. How many cars are there?",
    ),
    "-": (
        "What is {a} minus {b}?",
        "Tom has {a} apples and eats {b}. How many apples are left?",
        "A bus carries {a} people and {b} get off. How many people stay?",
    ),
    "*": (
        "What is {a} times {b}?",
        "Each of {a} boxes holds {b} pens. How many pens are there?",
    ),
}
SPLITS = {"train": (512, 19), "test": (128, 20)}
"""Name -> number of problems, seed."""

_HELD_OUT_ONE_IN = 4


def random_problem(rng: np.random.Generator) -> tuple[str, str, bool]:
    """Draw a random problem, its answer, and whether it belongs to the test set."""
    a, b = (int(rng.integers(2, 10) if rng.random() < 0.75 else rng.integers(10, 100)) for _ in range(2))
    # Products of two numbers of two digits are beyond a model that does them in its head.
    operation = "+-*"[int(rng.integers(3 if min(a, b) < 10 else 2))]
    if operation == "-":
        a, b = max(a, b), min(a, b)
    answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
    wordings = WORDINGS[operation]
    wording = wordings[int(rng.integers(len(wordings)))]
    return wording.format(a=a, b=b), str(answer), is_held_out_sum(operation, a, b)


def is_held_out_sum(operation: str, a: int, b: int) -> bool:
    """Whether a problem belongs to the test set: one in 4, by a checksum that knows neither order nor wording."""
    return zlib.crc32(f"{operation} {sorted((a, b))}".encode()) % _HELD_OUT_ONE_IN == 0


def rows(split: str) -> list[tuple[str, str, str]]:
    """List a split's different problems as (id, problem, answer); they are alike on every machine."""
    count, seed = SPLITS[split]
    rng = np.random.default_rng(seed)
    problems: dict[str, str] = {}
    while len(problems) < count:
        problem, answer, held_out = random_problem(rng)
        if held_out == (split == "test"):
            problems[problem] = answer
    return [(f"arithmetic-{split}-{at}", problem, answer) for at, (problem, answer) in enumerate(problems.items())]
