"""Sets of real numbers: intervals, their unions, inequalities in one variable;
compared point by point and gap by gap."""

from collections.abc import Callable
from fractions import Fraction

from tsopsd_jax.rewards import exact
from tsopsd_jax.rewards.trees import SCALARS, negated, rational_node

INFINITIES = {("c", "oo"): 1, ("*", ("q", -1, 1), ("c", "oo")): -1}
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
"""Each operator seen from the other side."""
_ORDERS = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1), "=": (0,), "!=": (-1, 1)}

Order = Callable[[tuple, tuple], int | None]


def same_region(a: tuple, b: tuple, order: Order) -> bool:
    """Whether two trees are sets of real numbers, and the same one.

    Both must hold the same of all their end points and of the gaps between these.
    """
    names = set().union(*(exact.variables(tree) for tree in (a, b)))
    ends: list[tuple] = []
    if len(names) > 1 or not all(_collect(tree, ends, order) for tree in (a, b)):
        return False
    line = _Line(ends, order)
    return line.ordered and all(line.holds(a, at) == line.holds(b, at) for at in range(2 * len(line.points) + 1))


def is_infinite(tree: tuple) -> bool:
    """Whether infinity occurs in it."""
    return tree == ("c", "oo") or any(is_infinite(part) for part in tree[1:] if isinstance(part, tuple))


class _Line:
    """The real numbers, cut at all end points: position 2k + 1 is the k-th point, 2k the gap before it."""

    def __init__(self, ends: list[tuple], order: Order):
        self.order, self.points, self.ordered = order, [], True
        for end in ends:
            orders = [order(end, point) for point in self.points]
            if None in orders:
                self.ordered = False
            elif 0 not in orders:
                self.points.insert(orders.count(1), end)

    def holds(self, tree: tuple, at: int) -> bool:
        """Whether the region holds what is at the position."""
        kind, parts = tree[0], tree[1:]
        if kind in ("cup", "or"):
            return any(self.holds(part, at) for part in parts)
        if kind in ("cap", "and"):
            return all(self.holds(part, at) for part in parts)
        if kind == "minus":
            return self.holds(parts[0], at) and not self.holds(parts[1], at)
        if kind == "in":
            return self.holds(parts[1], at)
        if kind == "named":
            return True
        if kind == "set":
            return any(self.place(at, item) == 0 for item in parts)
        if kind == "seq":
            brackets, low, high = parts
            return self.place(at, low) in ((0, 1) if brackets[0] == "[" else (1,)) and self.place(at, high) in (
                (-1, 0) if brackets[1] == "]" else (-1,)
            )
        return all(self.obeys(at, *inequality) for inequality in _inequalities(tree))

    def obeys(self, at: int, operator: str, unknown: tuple, end: tuple) -> bool:
        """Whether the position fulfils `x < end`, or `|x| < end`."""
        right = self.place(at, end) in _ORDERS[operator]
        if unknown[0] == "v":
            return right
        left = self.place(at, negated(end)) in _ORDERS[MIRRORED[operator]]
        return left and right if operator in ("<", "<=") else left or right

    def place(self, at: int, end: tuple) -> int:
        """The order of a position and a number."""
        if end in INFINITIES:
            return -INFINITIES[end]
        point = 2 * next(i for i, point in enumerate(self.points) if self.order(end, point) == 0) + 1
        return (at > point) - (at < point)


def _collect(tree: tuple, ends: list[tuple], order: Order) -> bool:
    """Add the end points of a region; False if the tree is none."""
    kind = tree[0]
    if kind in ("cup", "cap", "minus", "and", "or"):
        return all(_collect(part, ends, order) for part in tree[1:])
    if kind == "in":
        return tree[1][0] == "v" and _collect(tree[2], ends, order)
    if kind == "named":
        return tree[1] == "R"
    if kind == "seq":
        found = list(tree[2:])
        if len(found) != 2 or order(*found) != -1:
            return False
        if any(is_infinite(end) and bracket in "[]" for end, bracket in zip(found, tree[1], strict=True)):
            return False
    elif kind == "set":
        found = list(tree[1:])
    elif kind == "rel":
        found = []
        for operator, unknown, end in _inequalities(tree):
            absolute = unknown[:2] == ("f", "abs") and unknown[2][0] == "v" and operator not in ("=", "!=")
            if operator not in MIRRORED or not (unknown[0] == "v" or absolute):
                return False
            found += [end, negated(end)] if absolute else [end]
    else:
        return False
    ends += [end for end in found if end not in INFINITIES]
    return all(end in INFINITIES or _is_number(end) for end in found)


def _is_number(tree: tuple) -> bool:
    return tree[0] in SCALARS and not exact.variables(tree) and not is_infinite(tree)


def _inequalities(tree: tuple) -> list[tuple[str, tuple, tuple]]:
    """(operator, unknown, number) for each operator of `1 < x < 2`,
    the unknown on the left and alone where it is linear."""
    found = []
    for operator, left, right in zip(tree[1], tree[2:], tree[3:], strict=False):
        if exact.variables(left):
            found += _solved(operator, left, right)
        else:
            found += _solved(MIRRORED.get(operator, "?"), right, left)
    return found


def _solved(operator: str, unknown: tuple, end: tuple) -> list[tuple[str, tuple, tuple]]:
    """`2x - 1 < 5` as `x < 3`; `|x - 1| < 2` as `x - 1 < 2` and `x - 1 > -2`."""
    unsolved = [(operator, unknown, end)]
    names = exact.variables(unknown)
    if unknown[:2] == ("f", "abs") and unknown[2][0] != "v" and operator in ("<", "<="):
        return _solved(operator, unknown[2], end) + _solved(MIRRORED[operator], unknown[2], negated(end))
    if unknown[0] == "v" or unknown[:2] == ("f", "abs") or len(names) != 1 or not _is_number(end):
        return unsolved
    (name,) = names
    places = [Fraction(place) for place in (0, 1, 2, 5, -7)]
    try:
        at = [exact.value(exact.substituted(unknown, {name: place})) for place in places]
    except (exact.Inexact, exact.Undefined):
        return unsolved
    slope = at[1] - at[0]
    if not slope or at != [at[0] + slope * place for place in places]:
        return unsolved
    bound = ("*", rational_node(1 / slope), ("+", end, rational_node(-at[0])))
    return [(operator if slope > 0 else MIRRORED.get(operator, "?"), ("v", name), bound)]
