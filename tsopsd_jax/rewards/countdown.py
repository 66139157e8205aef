"""The verifier of the countdown-steps task: is this derivation right, step by step?"""

from collections import Counter

_LARGEST = 99
# A lookup, not int(): only these spellings count ("07", "+7" and other scripts' digits do not).
_INTEGERS = {str(value): value for value in range(_LARGEST + 1)}
# Longer than any derivation from six numbers: keeps hostile input from costing anything.
_LONGEST_CHARACTERS = 200


def verify_countdown(response: str, gold: str) -> float:
    """Score 1.0 if the steps `a op b = c ; ...` use each number of `gold` exactly once and reach its target.

    Args:
        response: text such as `3 * 7 = 21 ; 11 + 2 = 13 ; 21 + 13 = 34`, words separated by spaces. Each step
            takes two values that are still unused (given numbers or earlier results); all values lie in
            0..99; there is one step fewer than there are numbers; nothing may follow.
        gold: the numbers and the target, such as `3 7 11 2 -> 34`.

    Never raises: anything that is not such a derivation (or such a gold string) scores 0.0.
    """
    problem = _parse_gold(gold)
    steps = _parse_steps(response)
    if problem is None or steps is None:
        return 0.0
    numbers, target = problem
    if len(steps) != len(numbers) - 1:
        return 0.0
    unused = Counter(numbers)
    for left, operator, right, result in steps:
        for operand in (left, right):
            if unused[operand] == 0:
                return 0.0
            unused[operand] -= 1
        if _apply(left, operator, right) != result:
            return 0.0
        unused[result] += 1
    # n - 1 steps, each taking two and giving one, leave exactly one of the n values: the last result.
    return 1.0 if unused[target] == 1 else 0.0


def _apply(left: int, operator: str, right: int) -> int | None:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return None


def _words(text: str) -> list[str] | None:
    if not isinstance(text, str) or len(text) > _LONGEST_CHARACTERS:
        return None
    return text.split()


def _parse_gold(gold: str) -> tuple[list[int], int] | None:
    words = _words(gold)
    if words is None or len(words) < 4 or words[-2] != "->":
        return None
    values = [_INTEGERS.get(word) for word in (*words[:-2], words[-1])]
    numbers = [value for value in values if value is not None]
    if len(numbers) != len(values):
        return None
    return numbers[:-1], numbers[-1]


def _parse_steps(response: str) -> list[tuple[int, str, int, int]] | None:
    words = _words(response)
    # Five words a step and one `;` between steps.
    if words is None or len(words) % 6 != 5:
        return None
    steps = []
    for start in range(0, len(words), 6):
        if start and words[start - 1] != ";":
            return None
        left, operator, right, equals, result = words[start : start + 5]
        if equals != "=" or not {left, right, result} <= _INTEGERS.keys():
            return None
        steps.append((_INTEGERS[left], operator, _INTEGERS[right], _INTEGERS[result]))
    return steps
