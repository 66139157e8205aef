"""Exact values of trees (`trees`), in rational numbers of bounded size: what needs no worker."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

from tsopsd_jax.rewards.trees import rational_node

LARGEST_BITS = 50_000
POINTS = 8
"""Points at which two formulas must agree, where both have values there."""
_LARGEST_FACTORIAL = 3000


_SERIES = (("f", "sum"), ("f", "prod"))


class Inexact(Exception):
    """No rational number of a reasonable size."""


class Undefined(Exception):
    """No number at all: division by zero."""


def value(tree: tuple) -> Fraction:
    """The exact value of a tree without variables.

    Raises:
        Inexact: it is irrational, too large, or needs what only a worker computes.
        Undefined: it divides by zero.
    """
    kind = tree[0]
    if kind == "q":
        return Fraction(tree[1], tree[2])
    if kind == "+":
        return _bounded(sum((value(part) for part in tree[1:]), Fraction(0)))
    if kind == "*":
        product = Fraction(1)
        for part in tree[1:]:
            product = _bounded(product * value(part))
        return product
    if kind == "/":
        above, below = value(tree[1]), value(tree[2])
        if not below:
            raise Undefined
        return _bounded(above / below)
    if kind == "^":
        return _power(value(tree[1]), value(tree[2]))
    if kind == "f":
        return _function(tree[1], tree[2:])
    raise Inexact


def variables(tree: tuple) -> set[str]:
    """Names of its free variables: that of a sum or product is bound."""
    if tree[0] == "v":
        return {tree[1]}
    if tree[:2] in _SERIES:
        return variables(tree[3]) | variables(tree[4]) | (variables(tree[5]) - variables(tree[2]))
    return set().union(*(variables(part) for part in tree[1:] if isinstance(part, tuple)))


def substituted(tree: tuple, values: dict[str, Fraction]) -> tuple:
    """The tree with numbers for variables."""
    if tree[0] == "v" and tree[1] in values:
        return rational_node(values[tree[1]])
    if tree[:2] in _SERIES:
        values = {name: value for name, value in values.items() if name not in variables(tree[2])}
    return tuple(substituted(part, values) if isinstance(part, tuple) else part for part in tree)


def points(names: set[str]) -> Iterator[dict[str, Fraction]]:
    """Values for variables, always the same ones: no round numbers, all combinations of signs, small and large."""
    seed = 0x9E3779B9
    for turn in itertools.count():
        point = {}
        for place, name in enumerate(sorted(names)):
            seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
            size = ((seed >> 33) % 2_500_009 + 1) * (1 if turn % 8 < 4 else 997)
            # Once a whole number: there floors and ceilings differ.
            value = Fraction(size % 7 + 2) if turn % 8 == 5 else Fraction(size, 1_000_003)
            point[name] = -value if (turn >> place % 3) & 1 else value
        yield point


def signs(tree: tuple) -> list[tuple]:
    """A scalar's values: two where it has plus-minus signs, all of them the same or opposite."""
    return [_resolved(tree, 1), _resolved(tree, -1)] if "pm" in _kinds(tree) else [tree]


def _resolved(tree: tuple, sign: int) -> tuple:
    if tree[0] == "pm":
        return ("*", ("q", tree[1] * sign, 1), _resolved(tree[2], sign))
    return tuple(_resolved(part, sign) if isinstance(part, tuple) else part for part in tree)


def _kinds(tree: tuple) -> set[str]:
    return {tree[0]}.union(*(_kinds(part) for part in tree[1:] if isinstance(part, tuple)))


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > LARGEST_BITS:
        raise Inexact
    return number


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise Inexact
    if not base:
        if exponent <= 0:
            raise Undefined
        return base
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (1, -1) and (abs(exponent) > LARGEST_BITS or bits * abs(exponent) > LARGEST_BITS):
        raise Inexact
    return base ** (int(exponent) if base not in (1, -1) else int(exponent) % 2)


def _function(name: str, arguments: tuple) -> Fraction:
    if name in ("sum", "prod"):
        raise Inexact
    numbers = [value(argument) for argument in arguments]
    whole = [int(number) for number in numbers if number.denominator == 1]
    if name == "root":
        return _root(*numbers)
    if name == "abs":
        return abs(numbers[0])
    if name in ("max", "min"):
        return max(numbers) if name == "max" else min(numbers)
    if name in ("floor", "ceil"):
        return Fraction(math.floor(numbers[0]) if name == "floor" else math.ceil(numbers[0]))
    if len(whole) != len(numbers):
        raise Inexact
    if name in ("gcd", "lcm"):
        return _bounded(Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole)))
    if name in ("factorial", "binom", "falling"):
        if min(whole) < 0:
            raise Undefined
        if whole[0] > _LARGEST_FACTORIAL:
            raise Inexact
        functions = {"factorial": math.factorial, "binom": math.comb, "falling": math.perm}
        return Fraction(functions[name](*whole))
    raise Inexact


def _root(number: Fraction, index: Fraction) -> Fraction:
    """The root of a perfect power."""
    if index.denominator != 1 or not 2 <= index <= 64 or (number < 0 and index % 2 == 0):
        raise Inexact
    degree = int(index)
    parts = [_whole_root(part, degree) for part in (abs(number.numerator), number.denominator)]
    return Fraction(parts[0] if number >= 0 else -parts[0], parts[1])


def _whole_root(number: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(number)
    else:
        root = 1 << -(-number.bit_length() // degree)
        while (smaller := ((degree - 1) * root + number // root ** (degree - 1)) // degree) < root:
            root = smaller
    if root**degree != number:
        raise Inexact
    return root
