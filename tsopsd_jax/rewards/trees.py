r"""Trees of formulas: nested tuples, so that they compare, hash and travel as JSON.

Scalars: ("q", numerator, denominator), ("v", name), ("c", "pi" | "e" | "i" | "oo"), ("+", *terms), ("*", *factors),
("/", a, b), ("^", a, b), ("f", name, *arguments), ("pm", 1 | -1, a) for plus-minus a and minus-plus a.
Others: ("set", *items), ("seq", brackets, *items) such as `(1, 2]`, ("list", *items) for items without brackets,
("and", *items), ("or", *items), ("ratio", *items), ("rel", operators, *sides), ("in", a, b), ("cup", a, b),
("cap", a, b), ("minus", a, b), ("matrix", environment, *rows), ("named", set).
"""

from fractions import Fraction

SCALARS = frozenset(("q", "v", "c", "+", "*", "/", "^", "f"))


class Unreadable(Exception):
    """The text is no formula, or one that could mean two things."""


def number(text: str) -> tuple:
    """("q", numerator, denominator) of a decimal such as `1.5e3`; the exponent has at most three digits."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-")) > 3:
        raise Unreadable
    return rational_node(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def rational_node(value: Fraction | int) -> tuple:
    """A rational number as a tree."""
    return ("q", value.numerator, value.denominator)


def times(a: tuple, b: tuple) -> tuple:
    """A product; flat, so that a long one is not deep."""
    return (*a, b) if a[0] == "*" else ("*", a, b)


def negated(tree: tuple) -> tuple:
    """Minus a tree; of a number, the number."""
    return ("q", -tree[1], tree[2]) if tree[0] == "q" else ("*", ("q", -1, 1), tree)
