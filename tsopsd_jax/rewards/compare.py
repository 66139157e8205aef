"""Whether two trees (`trees`) say the same: numbers by their order, tuples, sets, intervals,
ratios and equations by kind.

A tuple is ordered, a set is not, an interval is neither; a list without brackets may be a tuple or a set, whichever the
other side is. What two kinds do not share is different.
"""

import itertools
from collections.abc import Callable
from fractions import Fraction

from tsopsd_jax.rewards import exact
from tsopsd_jax.rewards.regions import INFINITIES, MIRRORED, is_infinite, same_region
from tsopsd_jax.rewards.trees import SCALARS, Unreadable, negated

_MOST_COMPARISONS = 2000
_MOST_SYMBOLIC_COMPARISONS = 60
_ZERO = ("q", 0, 1)


class TooMuch(Exception):
    """More comparisons than an answer is worth."""


class Comparison:
    """One comparison of two answers.

    Args:
        symbolic: (tree, tree) -> -1, 0, 1 by order, or None where they are no two equal or ordered numbers; asked for
            what rational arithmetic cannot tell.
    """

    def __init__(self, symbolic: Callable[[tuple, tuple], int | None]):
        self.symbolic = symbolic
        self.comparisons = self.symbolic_comparisons = 0

    def same(self, given: tuple, wanted: tuple) -> bool:
        """Whether both say the same.

        Raises:
            TooMuch: it takes more comparisons of numbers than an answer is worth.
        """
        return self._same(_plain(given), _plain(wanted))

    def order(self, a: tuple, b: tuple) -> int | None:
        """Order two scalars: -1, 0, 1 for a < b, a = b, a > b; None if they differ and have no order."""
        self.comparisons += 1
        if self.comparisons > _MOST_COMPARISONS:
            raise TooMuch
        if a[0] not in SCALARS or b[0] not in SCALARS:
            return None
        if is_infinite(a) or is_infinite(b):
            x, y = (INFINITIES.get(tree, None if is_infinite(tree) else 0) for tree in (a, b))
            return None if x is None or y is None else (x > y) - (x < y)
        if a == b:
            return 0
        try:
            return _exact_order(a, b)
        except exact.Inexact:
            pass
        self.symbolic_comparisons += 1
        if self.symbolic_comparisons > _MOST_SYMBOLIC_COMPARISONS:
            raise TooMuch
        return self.symbolic(a, b)

    def equal(self, a: tuple, b: tuple) -> bool:
        """Whether two scalars are equal."""
        return self.order(a, b) == 0

    def _same(self, a: tuple, b: tuple) -> bool:
        kinds = a[0], b[0]
        if a == b:
            return True
        if a[0] in SCALARS and b[0] in SCALARS:
            return self.equal(a, b)
        a, b = self._alternatives(a), self._alternatives(b)
        kinds = a[0], b[0]
        if "rel" in kinds and (kinds != ("rel", "rel")):
            relation, other = (a, b) if a[0] == "rel" else (b, a)
            if other[0] in SCALARS | {"list", "set", "seq", "matrix", "assign"} and set(relation[1]) <= {"=", "~"}:
                return self._all_sides(relation, other)
        if kinds == ("rel", "rel"):
            return self._same_relation(a, b) or same_region(a, b, self.order)
        if "assign" in kinds and {"set", "list"} & set(kinds):
            roots, other = (a, b) if a[0] == "assign" else (b, a)
            if len({name.partition("_")[0] for name, _ in roots[1:]}) == 1:  # x_1 = 2, x_2 = 5
                return self._same_members(tuple(value for _, value in roots[1:]), other[1:], counted=other[0] == "list")
        if set(kinds) <= {"set", "list"}:
            return self._same_members(a[1:], b[1:], counted=kinds == ("list", "list"))
        if set(kinds) <= {"seq", "matrix", "assign"} or ("list" in kinds and {"seq", "assign"} & set(kinds)):
            return self._same_places(a, b) or (kinds == ("seq", "seq") and same_region(a, b, self.order))
        if kinds == ("ratio", "ratio"):
            return self._same_ratio(a[1:], b[1:])
        for one, other in ((a, b), (b, a)):
            if one[0] == "set" and len(one) > 1 and other[0] in SCALARS | {"seq"}:
                return all(self._same(item, other) for item in one[1:])
        return same_region(a, b, self.order)

    def _alternatives(self, tree: tuple) -> tuple:
        """Inequalities between commas: all hold, unless they exclude each other."""
        if tree[0] != "list" or any(item[0] != "rel" or "=" in item[1] for item in tree[1:]):
            return tree
        both = ("and", *tree[1:])
        return ("or", *tree[1:]) if same_region(both, ("set",), self.order) else both

    def _all_sides(self, relation: tuple, other: tuple) -> bool:
        """Every side of `6/2 = 3` is the other answer;
        a rounded value behind an approximately-equal sign is near it."""
        operators, sides = relation[1], relation[2:]
        unknown = [i for i, side in enumerate(sides) if side[0] == "v" and side != other]
        if len(unknown) == 1:  # 5 = x
            at = unknown[0]
            operators = operators[: max(at - 1, 0)] + operators[max(at - 1, 0) + 1 :]
            sides = sides[:at] + sides[at + 1 :]
        if "~" not in operators:
            return all(self._same(side, other) for side in sides)
        if any(side[0] not in SCALARS for side in (*sides, other)) or other[0] not in SCALARS:
            return False
        cut = operators.index("~") + 1
        near = all(self._near(side, other) for side in sides)
        return near and any(all(self.equal(side, other) for side in part) for part in (sides[:cut], sides[cut:]))

    def _near(self, a: tuple, b: tuple) -> bool:
        difference = ("f", "abs", ("+", a, negated(b)))
        return self.order(("*", ("q", 100, 1), difference), ("f", "abs", b)) in (-1, 0)

    def _same_members(self, a: tuple, b: tuple, *, counted: bool) -> bool:
        """Each member of one is one of the other's; in lists also as often."""
        if counted and len(a) != len(b):
            return False
        left = list(b)
        for item in a:
            at = next((i for i, other in enumerate(left) if self._same(item, other)), None)
            if at is None:
                if counted or not any(self._same(item, other) for other in b):
                    return False
                continue
            del left[at]
        return not left or (not counted and all(any(self._same(item, other) for other in a) for item in left))

    def _same_places(self, a: tuple, b: tuple) -> bool:
        """Tuples, vectors and matrices: same form, same entries in the same places."""
        if a[0] == b[0] == "assign":
            names = [{item[0] for item in tree[1:]} for tree in (a, b)]
            values = dict(b[1:])
            return names[0] == names[1] and all(self._same(value, values[name]) for name, value in a[1:])
        if len({tree[1] if tree[0] == "seq" else "()" for tree in (a, b)}) > 1:
            return False
        left, right = (_rows(tree, flat=not a[0] == b[0] == "matrix") for tree in (a, b))
        return [len(row) for row in left] == [len(row) for row in right] and all(
            self._same(x, y) for x, y in zip(itertools.chain(*left), itertools.chain(*right), strict=True)
        )

    def _same_ratio(self, a: tuple, b: tuple) -> bool:
        if len(a) != len(b) or any(item[0] not in SCALARS for item in (*a, *b)):
            return False
        if any(self.equal(item, _ZERO) for item in (*a, *b)):
            return all(self.equal(x, y) for x, y in zip(a, b, strict=True))
        return all(self.equal(("*", x, b[0]), ("*", y, a[0])) for x, y in zip(a[1:], b[1:], strict=True))

    def _same_relation(self, a: tuple, b: tuple) -> bool:
        """Equations that differ by a factor, inequalities by a positive one."""
        if any(side[0] not in SCALARS for side in (*a[2:], *b[2:])):
            return a[1] == b[1] and len(a) == len(b) and all(self._same(*two) for two in zip(a[2:], b[2:], strict=True))
        if len(a[1]) > 1 or len(b[1]) > 1:
            return a[1] == b[1] and all(self.equal(*two) for two in zip(a[2:], b[2:], strict=True))
        ((operator,), left), ((other,), right) = [(tree[1], ("+", tree[2], negated(tree[3]))) for tree in (a, b)]
        names = exact.variables(left)
        if not names or names != exact.variables(right) or any(is_infinite(tree) for tree in (left, right)):
            return False
        values = []
        for point in itertools.islice(exact.points(names), exact.POINTS):
            two = exact.substituted(left, point), exact.substituted(right, point)
            if all(self.order(value, _ZERO) in (-1, 1) for value in two):
                values.append(two)
        if len(values) < 2:
            return False
        factors_agree = all(self.equal(("*", x, values[0][1]), ("*", y, values[0][0])) for x, y in values[1:])
        if not factors_agree:
            return False
        same_sign = self.order(values[0][0], _ZERO) == self.order(values[0][1], _ZERO)
        return other == (operator if same_sign else MIRRORED.get(operator))


def _plain(tree: tuple) -> tuple:
    """Plus-minus as two values, assignments as what is assigned, a determinant as a number."""
    kind = tree[0]
    if kind in SCALARS | {"pm"}:
        values = exact.signs(tree)
        return values[0] if len(values) == 1 else ("list", *values)
    if kind == "rel":
        sides = tuple(_plain(side) for side in tree[2:])
        if (
            set(tree[1]) == {"="}
            and sides[0][0] in ("seq", "ratio")
            and all(item[0] == "v" for item in sides[0][1:] if isinstance(item, tuple))
        ):
            return sides[1] if len(sides) == 2 else ("rel", tree[1][1:], *sides[1:])
        if tree[1] == ("=",) and sides[0][0] == "v" and sides[1][0] in ("list", "set"):
            return sides[1]
        return ("rel", tree[1], *sides)
    if kind in ("list", "and", "or", "set"):
        return _plain_list(kind, [_plain(item) for item in tree[1:]])
    if kind == "matrix":
        rows = tuple(tuple(_plain(item) for item in row) for row in tree[2:])
        square = len(rows) == len(rows[0]) <= 5 and all(item[0] in SCALARS for row in rows for item in row)
        if tree[1] in ("vmatrix", "Vmatrix"):
            return _determinant(rows) if square and tree[1] == "vmatrix" else tree
        return ("matrix", "", *rows)
    if kind == "seq":
        return (kind, tree[1], *(_plain(item) for item in tree[2:]))
    return (kind, *(_plain(part) if isinstance(part, tuple) else part for part in tree[1:]))


def _plain_list(kind: str, items: list[tuple]) -> tuple:
    assigned = [_assigned(item) for item in items]
    if items and None not in assigned and kind != "set":
        pairs = [pair for pair in assigned if pair is not None]
        letters = {name.partition("_")[0] for name, _ in pairs}
        if len({name for name, _ in pairs}) == 1:
            return _plain_list("set", [value for _, value in pairs])
        if kind == "or":
            return _plain_list("list", [value for _, value in pairs]) if len(letters) == 1 else (kind, *items)
        if len({name for name, _ in pairs}) < len(pairs):
            return ("list", *items)
        return ("assign", *sorted(pairs, key=lambda pair: pair[0]))
    if len(items) > 1 and assigned[0] is not None and not any(item[0] == "rel" for item in items[1:]):
        return _plain_list("list", [assigned[0][1], *items[1:]])  # n = 1, 2, 3
    if kind in ("and", "or"):
        if all(item[0] in ("rel", "in") for item in items):
            return (kind, *items)
        kind = "list"
    members: list[tuple] = []
    for item in items:
        members += item[1:] if item[0] == "list" else (item,)
    return (kind, *members)


def _assigned(item: tuple) -> tuple[str, tuple] | None:
    if item[0] == "rel" and item[1] == ("=",) and item[2][0] == "v":
        return item[2][1], item[3]
    return None


def _rows(tree: tuple, *, flat: bool) -> list[tuple]:
    """The entries row by row; flat: a vector, standing or lying, as one row."""
    if tree[0] == "matrix":
        rows = list(tree[2:])
        return [tuple(row[0] for row in rows)] if flat and all(len(row) == 1 for row in rows) else rows
    if tree[0] == "assign":
        return [tuple(value for _, value in tree[1:])]
    return [tree[2:] if tree[0] == "seq" else tree[1:]]


def _determinant(rows: tuple) -> tuple:
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for column, entry in enumerate(rows[0]):
        minor = tuple(row[:column] + row[column + 1 :] for row in rows[1:])
        terms.append(("*", ("q", (-1) ** column, 1), entry, _determinant(minor)))
    return ("+", *terms)


def _exact_order(a: tuple, b: tuple) -> int | None:
    """The order by rational arithmetic; exact.Inexact where that cannot tell."""
    names = exact.variables(a) | exact.variables(b)
    agreed = 0
    for point in itertools.islice(exact.points(names), exact.POINTS if names else 1):
        try:
            x, y = (exact.value(exact.substituted(tree, point) if names else tree) for tree in (a, b))
        except exact.Undefined:
            continue
        if not names:
            return (x > y) - (x < y)
        if x != y:
            return None
        agreed += 1
    return 0 if agreed > 2 else None


def scaled(tree: tuple, factor: Fraction) -> tuple:
    """A tree of numbers times a rational number, member by member.

    Raises:
        Unreadable: it is no number, list, tuple or set.
    """
    if factor == 1:
        return tree
    if tree[0] in SCALARS or tree[0] == "pm":
        return ("*", ("q", factor.numerator, factor.denominator), tree)
    if tree[0] in ("list", "set", "seq"):
        return (tree[0], *(scaled(item, factor) if isinstance(item, tuple) else item for item in tree[1:]))
    raise Unreadable
