"""Countdown with the working shown and with further tries: long responses in which most tokens are certain.

    prompt    3 7 11 2 -> 34 :
    response  11 - 3 = 8 , 7 2 8 ; 7 * 2 = 14 , 8 14 ; 8 + 14 = 22
              no 3 * 7 = 21 , 11 2 21 ; 11 + 2 = 13 , 21 13 ; 21 + 13 = 34

(one line). After each step the numbers that are left stand in their order, the newest last. A derivation that misses
the target ends with `no`, and another begins; one that reaches it ends the response. Problems have three to five
numbers.
"""

import numpy as np

from tsopsd_jax.data.countdown import random_derivation
from tsopsd_jax.rewards import verify_countdown

REST, AGAIN = ",", "no"
LEVELS = (3, 4, 4, 5)
"""How many numbers a problem has, each as likely as the others."""
TRIES = (0.45, 0.3, 0.25)
"""Shares of the documents with one, two and three derivations."""
MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 8, 76


def worked(derivation: str, numbers: list[int]) -> str:
    """Write the numbers that are left after each step but the last."""
    pool, written = [str(number) for number in numbers], []
    for step in derivation.split(" ; "):
        left, _, right, _, result = step.split(" ")
        pool.remove(left)
        pool.remove(right)
        pool.append(result)
        written.append(f"{step} {REST} {' '.join(pool)}" if len(pool) > 1 else step)
    return " ; ".join(written)


def random_document(rng: np.random.Generator, *, held_out: bool = False) -> tuple[str, str, str]:
    """Draw a problem with one of its responses: (prompt, response without the end token, gold answer)."""
    numbers = int(rng.choice(LEVELS))
    prompt, derivation, answer = random_derivation(rng, held_out=held_out, numbers=numbers)
    given, target = [int(word) for word in answer.split(" ")[:numbers]], answer.split(" ")[-1]
    tries = 1 + int(rng.choice(len(TRIES), p=TRIES))
    parts = [worked(derivation, given)]
    while len(parts) < tries:
        other = _derivation_of(rng, given)
        if other.split(" ")[-1] != target:
            parts.insert(0, worked(other, given))
    while sum(len(part.split(" ")) + 1 for part in parts) > MAX_RESPONSE_TOKENS - 1:
        parts.pop(0)
    return prompt, f" {AGAIN} ".join(parts), answer


def _derivation_of(rng: np.random.Generator, given: list[int]) -> str:
    pool, steps = list(given), []
    while len(pool) > 1:
        left, right = (pool.pop(int(rng.integers(len(pool)))) for _ in range(2))
        if left + right > 99 and left < right:
            left, right = right, left
        choices = [(o, v) for o, v in (("+", left + right), ("-", left - right), ("*", left * right)) if 0 <= v <= 99]
        operator, result = choices[int(rng.integers(len(choices)))]
        pool.append(result)
        steps.append(f"{left} {operator} {right} = {result}")
    return " ; ".join(steps)


def verify(response: str, gold: str) -> float:
    """Score 1.0 if the last derivation reaches the target of `gold` from its numbers, each step's rest as it is."""
    last = response.split(f" {AGAIN} ")[-1]
    if len(last) > 400 or gold.count("->") != 1:
        return 0.0
    steps = [step.split(f" {REST} ") for step in last.split(" ; ")]
    plain = " ; ".join(step[0] for step in steps)
    if verify_countdown(plain, gold) != 1.0:
        return 0.0
    return float(worked(plain, [int(word) for word in gold.split(" -> ")[0].split(" ")]) == last)
