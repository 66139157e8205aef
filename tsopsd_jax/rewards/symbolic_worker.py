"""A process that compares two formulas by interval arithmetic; started by `symbolic.py`, and only as a program.

`python -P symbolic_worker.py WALL_S MEMORY_BYTES`. One line `ready` (or what went wrong), then for each JSON line
`[a, b]` of trees (`trees.py`) on stdin one line: `0`, `-1` or `1` by the order of two real numbers, `0` also for equal
formulas, `x` for what differs or has no value. What it reads is hostile. It imports nothing of this package, and it
ends at the end of its input, when an answer takes longer than WALL_S (SIGALRM, not handled), or when memory runs out.

Numbers: both are enclosed in intervals, at twice the precision each time, until these are disjoint, or so narrow that a
difference would have shown: a sum, product or root of given whole numbers that is not zero is not arbitrarily small
(Burnikel, Fleischer, Mehlhorn and Schirra, A strong and easily computable separation bound for arithmetic expressions
involving radicals, 2000). For other functions no such bound is known; the same precision is taken. Formulas with
variables: at several points.
"""

import json
import math
import os
import resource
import signal
import sys
from fractions import Fraction
from typing import Any

_LEAST_BITS, _DEFINED_BITS, _POINT_BITS, _MOST_BITS = 80, 1280, 1280, 20_000
_LARGEST_EXPONENT = 2**40
_LARGEST_FACTORIAL = 5000
_POINTS, _TRIES, _LEAST_AGREED = 8, 40, 3
_OF_WHOLE = {"factorial": math.factorial, "binom": math.comb, "falling": math.perm, "gcd": math.gcd, "lcm": math.lcm}
_COUNTING = (*_OF_WHOLE, "sum", "prod")


class _Undefined(Exception):
    """No value, or none that can be told at this precision."""


def serve(wall_s: float, memory_bytes: int) -> None:
    """Serve until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.setrecursionlimit(10_000)
    try:
        compare = Intervals().compare
    except Exception as error:
        replies.write(f"{type(error).__name__}: {error}".replace("\n", " ") + "\n")
        return
    replies.write("ready\n")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        try:
            order = compare(*json.loads(line))
        except (_Undefined, ValueError, OverflowError, ZeroDivisionError, NotImplementedError):
            order = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write("x\n" if order is None else f"{order}\n")


class Intervals:
    """Trees -> real (`mpf`) or complex (`mpc`) intervals of mpmath."""

    def __init__(self):
        from mpmath import iv

        self.iv: Any = iv  # it has no types that a checker understands
        self.zero, self.one, self.two = (self.iv.mpf(number) for number in (0, 1, 2))
        self.point: dict[str, tuple[int, int]] = {}
        self.bits = 0
        """The largest exponent (as a power of two) met, above or below 0."""

    def compare(self, a: list, b: list) -> int | None:
        """The order of two numbers, 0 for equal formulas, None for different ones."""
        names = sorted(_variables(a) | _variables(b))
        if not names:
            self.point = {}
            return self._order(a, b, real=False)
        whole = _counts(a) or _counts(b)
        real = not (_imaginary(a) or _imaginary(b))
        agreed = 0
        for turn, point in enumerate(_points(names, whole), 1):
            self.point = point
            try:
                order = self._order(a, b, real=real)
            except (_Undefined, ValueError, ZeroDivisionError):
                continue
            if order != 0:
                return None
            agreed += 1
            if turn >= _POINTS and agreed >= _LEAST_AGREED:
                return 0
        return None

    def _order(self, a: list, b: list, *, real: bool) -> int | None:
        """At the point. With `real`, _Undefined where one of both is no real number."""
        degree, size = _separation(a, b)
        self.bits = 0
        bits = _LEAST_BITS
        while True:
            self.iv.prec = bits
            try:
                left, right = self.value(a), self.value(b)
            except _Undefined:  # by this many bits: what is divided by may still turn out not to be zero
                if bits >= _DEFINED_BITS:
                    raise
                bits *= 4
                continue
            if real and (self._is_complex(left) or self._is_complex(right)):
                raise _Undefined
            difference = left - right
            if self._is_complex(difference):
                if not (self._has_zero(difference.real) and self._has_zero(difference.imag)):
                    return (1 if difference.real.a > 0 else -1) if self._has_zero(difference.imag) else None
            elif not self._has_zero(difference):
                return 1 if difference.a > 0 else -1
            given = max(size, 2 * self.bits) + _LEAST_BITS
            if given > _MOST_BITS or bits > 2 * _MOST_BITS:
                return None
            # At the points of a formula the roots are of no whole numbers, and several points must agree.
            most = max(given, _POINT_BITS) if self.point else _MOST_BITS
            if self._magnitude(difference) < -min(given * degree, most):
                return 0
            bits *= 2

    def value(self, tree: list) -> Any:
        """An interval that holds the tree's value at the point."""
        kind = tree[0]
        if kind == "q":
            return self._seen(self._quotient(tree[1], tree[2]))
        if kind == "v":
            return self._quotient(*self.point[tree[1]])
        if kind == "c":
            constants = {"pi": lambda: +self.iv.pi, "e": lambda: self.iv.exp(1), "i": lambda: self.iv.mpc(0, 1)}
            if tree[1] not in constants:
                raise _Undefined
            return constants[tree[1]]()
        if kind == "f":
            return self._seen(self._function(tree[1], tree[2:]))
        parts = [self.value(part) for part in tree[1:]]
        result = parts[0]
        for part in parts[1:]:
            if kind == "+":
                result = result + part
            elif kind == "*":
                result = result * part
            elif kind == "/":
                result = self._divided(result, part)
            else:
                result = self._power(result, part)
        return self._seen(result)

    def _function(self, name: str, arguments: list) -> Any:
        if name in ("sum", "prod"):
            return self._series(name, *arguments)
        values = [self.value(argument) for argument in arguments]
        x, iv = values[0], self.iv
        if name == "root":
            return self._root(x, arguments[1])
        if name == "abs":
            return iv.sqrt(x.real**2 + x.imag**2) if self._is_complex(x) else abs(x)
        if name in ("sin", "cos", "exp"):
            self._seen(x)
            return {"sin": iv.sin, "cos": iv.cos, "exp": self._exp}[name](x)
        if name == "ln":
            return self._log(x)
        if name in ("tan", "cot", "sec", "csc"):
            sine, cosine = iv.sin(x), iv.cos(x)
            pair = {"tan": (sine, cosine), "cot": (cosine, sine), "sec": (self.one, cosine), "csc": (self.one, sine)}
            return self._divided(*pair[name])
        if name in ("sinh", "cosh", "tanh"):
            up, down = self._exp(x), self._exp(-x)
            pair = {"sinh": (up - down, self.two), "cosh": (up + down, self.two), "tanh": (up - down, up + down)}
            return self._divided(*pair[name])
        if any(self._is_complex(value) for value in values):
            raise _Undefined
        return self._real_function(name, values)

    def _real_function(self, name: str, values: list) -> Any:
        x, iv = values[0], self.iv
        if name in ("asin", "acos"):
            if x.b < -1 or x.a > 1:
                raise _Undefined
            sine = iv.atan2(x, self._root(1 - x**2, ["q", 2, 1]))
            return sine if name == "asin" else iv.pi / 2 - sine
        if name in ("atan", "acot"):
            angle = iv.atan2(x, self.one)
            return angle if name == "atan" else iv.pi / 2 - angle
        if name in ("max", "min"):
            pick = max if name == "max" else min
            return iv.mpf([pick(value.a for value in values), pick(value.b for value in values)])
        if name in ("floor", "ceil"):
            return iv.mpf(self._whole(x, math.floor if name == "floor" else math.ceil))
        numbers = [self._whole(value, None) for value in values]
        if name not in _OF_WHOLE or min(numbers) < 0 or max(numbers) > _LARGEST_FACTORIAL:
            raise _Undefined
        return iv.mpf(_OF_WHOLE[name](*numbers))

    def _series(self, name: str, variable: list, first: list, last: list, body: list) -> Any:
        """A finite sum or product, term by term: only the worker's limits end a long one."""
        start, stop = (self._whole(self.value(end), None) for end in (first, last))
        outer = dict(self.point)
        total = self.zero if name == "sum" else self.one
        for number in range(start, stop + 1):
            self.point[variable[1]] = (number, 1)
            term = self.value(body)
            total = total + term if name == "sum" else total * term
        self.point = outer
        return total

    def _quotient(self, above: int, below: int) -> Any:
        return self.iv.mpf(above) / self.iv.mpf(below)

    def _divided(self, a, b) -> Any:
        if self._contains_zero(b):
            raise _Undefined
        return a / b

    def _power(self, base, exponent) -> Any:
        try:
            whole = self._whole(exponent, None)
        except _Undefined:
            whole = None
        if whole is not None:
            if abs(whole) > _LARGEST_EXPONENT or (whole == 0 and self._contains_zero(base)):
                raise _Undefined
            return base**whole if whole >= 0 else self._divided(self.one, base ** (-whole))
        if not self._is_complex(base) and self._has_zero(base):  # zero, as far as this precision tells
            if self._is_complex(exponent) or not exponent.a > 0:
                raise _Undefined
            high = self.iv.mpf(max(abs(base.a), base.b))
            return self.iv.mpf([0, self._exp(exponent * self._log(high)).b]) if high > 0 else self.zero
        return self._exp(exponent * self._log(base))

    def _root(self, x, index: list) -> Any:
        if index[0] != "q" or index[2] != 1 or not 2 <= index[1] <= 1000:
            raise _Undefined
        degree = index[1]
        if self._is_complex(x) or (x.b < 0 and degree in range(4, 1001, 2)):
            return self._exp(self._log(x) / degree)
        if x.b < 0:
            return -self._root(-x, index) if degree % 2 else self.iv.mpc(0, self.iv.sqrt(-x))
        if x.a <= 0:  # zero, as far as this precision tells
            high = self._root(self.iv.mpf(max(abs(x.a), x.b)), index) if x.b > 0 or x.a < 0 else self.zero
            return self.iv.mpf([0 if degree % 2 == 0 else -high.b, high.b])
        return self.iv.sqrt(x) if degree == 2 else self._exp(self._log(x) / degree)

    def _log(self, x) -> Any:
        if self._contains_zero(x):
            raise _Undefined
        if not self._is_complex(x):
            return self.iv.log(x) if x.a > 0 else self.iv.mpc(self.iv.log(-x), +self.iv.pi)
        return self.iv.log(x)

    def _exp(self, x) -> Any:
        real = x.real if self._is_complex(x) else x
        if self._magnitude(real) > 40:
            raise _Undefined
        return self.iv.exp(x)

    def _whole(self, x, rounding) -> int:
        """The whole number in an interval, or that all of its numbers are rounded to."""
        if self._is_complex(x) or self._magnitude(x) > 64:
            raise _Undefined
        low, high = _fraction(x.a), _fraction(x.b)
        if rounding is None:
            if low != high or low != int(low):
                raise _Undefined
            return int(low)
        if rounding(low) != rounding(high):
            raise _Undefined
        return rounding(low)

    def _seen(self, x) -> Any:
        """The value itself; its exponent is remembered, and a value out of all bounds is none."""
        for part in (x.real, x.imag) if self._is_complex(x) else (x,):
            if not self._has_zero(part):
                size = abs(self._magnitude(part))
                if size > 4 * _LARGEST_EXPONENT:
                    raise _Undefined
                self.bits = max(self.bits, size)
        return x

    def _is_complex(self, x) -> bool:
        return isinstance(x, self.iv.mpc)

    def _has_zero(self, x) -> bool:
        return x.a <= 0 <= x.b

    def _contains_zero(self, x) -> bool:
        return self._has_zero(x.real) and self._has_zero(x.imag) if self._is_complex(x) else self._has_zero(x)

    def _magnitude(self, x) -> int:
        """The exponent of the largest number in it."""
        parts = (x.real, x.imag) if self._is_complex(x) else (x,)
        return max(max(_exponent(end) for end in part._mpi_) for part in parts)


def _exponent(number: tuple) -> int:
    """The exponent of a raw mpmath number (sign, mantissa, exponent, bits)."""
    _, mantissa, exponent, bits = number
    if not mantissa:
        return -(10**9) if exponent == 0 else 10**15  # zero; infinity or no number
    return exponent + bits


def _fraction(number) -> Fraction:
    """The exact value of an interval of one number."""
    sign, mantissa, exponent, _ = number._mpi_[0]
    return (-1) ** sign * mantissa * Fraction(2) ** exponent


def _parts(tree: list) -> list[Any]:
    return [part for part in tree[1:] if isinstance(part, list)]


def _variables(tree: list) -> set[str]:
    """Free variables: that of a sum is bound."""
    if tree[0] == "v":
        return {tree[1]}
    if tree[:2] in (["f", "sum"], ["f", "prod"]):
        return _variables(tree[3]) | _variables(tree[4]) | (_variables(tree[5]) - {tree[2][1]})
    return set().union(*(_variables(part) for part in _parts(tree)))


def _imaginary(tree: list) -> bool:
    return tree == ["c", "i"] or any(_imaginary(part) for part in _parts(tree))


def _counts(tree: list[Any]) -> bool:
    """Whether its variables are whole numbers: factorials of them, powers of a negative number."""
    if tree[0] == "f" and tree[1] in _COUNTING and _variables(tree):
        return True
    base: Any = tree[1]
    if tree[0] == "^" and base[0] == "q" and base[1] < 0 and _variables(tree[2]):
        return True
    return any(_counts(part) for part in _parts(tree))


def _points(names: list[str], whole: bool):
    """Values for the variables, always the same ones: whole numbers from 1, or fractions of both signs."""
    seed = 0x2545F491
    for attempt in range(_TRIES):
        point = {}
        for place, name in enumerate(names):
            seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
            size = ((seed >> 33) % 2_500_009 + 1) * (1 if attempt % 8 < 4 else 97)
            sign = -1 if (attempt >> place % 3) & 1 else 1
            # Small ones too, where an arcsine has values.
            below = 2_500_013 if attempt % 2 else 1_000_003
            if attempt % 8 == 5:  # where floors and ceilings differ
                size, below = size % 7 + 2, 1
            point[name] = ((seed >> 33) % (4 + attempt) + 1, 1) if whole else (sign * size, below)
        yield point


def _separation(a: list, b: list) -> tuple[int, int]:
    """(degree, size in bits): a difference that is not 0 is no smaller than 2 ** -(degree * size), see above."""
    roots: set[str] = set()
    above, below, degree = _bounds(["+", a, b], roots)
    return degree, above + below


def _bounds(tree: list, roots: set[str]) -> tuple[int, int, int]:
    """log2 of bounds of numerator and denominator, and the product of the degrees of all different roots."""
    kind = tree[0]
    if kind == "q":
        return max(abs(tree[1]) - 1, 0).bit_length(), (tree[2] - 1).bit_length(), 1
    if kind == "v":
        return 32, 22, 1  # see _points
    if kind == "^" and tree[2][0] == "q" and tree[2][2] == 1:
        above, below, degree = _bounds(tree[1], roots)
        power = abs(tree[2][1])
        above, below = (above, below) if tree[2][1] >= 0 else (below, above)
        return above * power, below * power, degree
    if kind not in ("+", "*", "/"):
        parts = [_bounds(part, roots) for part in _parts(tree)] or [(2, 0, 1)]
        above, below = max(part[0] for part in parts), max(part[1] for part in parts)
        degree = math.prod(part[2] for part in parts)
        if kind in ("f", "^") and json.dumps(tree) not in roots:
            roots.add(json.dumps(tree))
            degree *= tree[3][1] if tree[1] == "root" and tree[3][0] == "q" and tree[3][1] > 0 else 1
        return above, below, degree
    above, below, degree = _bounds(tree[1], roots)
    for part in tree[2:]:
        more_above, more_below, more_degree = _bounds(part, roots)
        degree *= more_degree
        if kind == "+":
            above, below = max(above + more_below, more_above + below) + 1, below + more_below
        elif kind == "*":
            above, below = above + more_above, below + more_below
        else:
            above, below = above + more_below, below + more_above
    return above, below, degree


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
