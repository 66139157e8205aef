r"""A formula in cleaned LaTeX -> a tree (`trees`). What could mean two things, or is no formula, is `Unreadable`."""

import re
from collections.abc import Callable
from fractions import Fraction

from tsopsd_jax.rewards import commands
from tsopsd_jax.rewards.commands import CONSTANTS
from tsopsd_jax.rewards.trees import SCALARS, Unreadable, negated, number, rational_node, times

DEEPEST = 30
_TOKEN = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\\(?:[A-Za-z]+|.)|[A-Za-z]{4,}|\S")
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "~", "\\equiv": "=="
}  # fmt: skip
_SET_OPERATORS = {"\\cup": "cup", "\\cap": "cap", "\\setminus": "minus"}
_TIMES = ("*", "\\cdot", "\\times")
_OVER = ("/", "\\div")
_BRACKETS = {"(": ")]", "[": ")]"}
_FENCES = {"|": ("|", "abs"), "\\lfloor": ("\\rfloor", "floor"), "\\lceil": ("\\rceil", "ceil")}
_ENDS = frozenset({
    None, ",", ";", ")", "]", "}", "\\}", "&", "\\\\", "+", "-", "\\pm", "\\mp", ":", "\\rfloor", "\\rceil", "\\in",
    "\\and", "\\or", "\\end", "!", "^", "_", *_TIMES, *_OVER, *_RELATIONS, *_SET_OPERATORS,
})  # fmt: skip


def parse_formula(text: str) -> tuple:
    """Read the whole of `text`.

    Raises:
        Unreadable: see above.
    """
    if "--" in text:  # a dash between two numbers
        raise Unreadable
    reader = _Reader(_TOKEN.findall(text))
    tree = reader.items(None)
    if reader.token is not None or not _well_formed(tree):
        raise Unreadable
    return tree


def _well_formed(tree: tuple) -> bool:
    """No set or tuple inside a sum, a product or a function."""
    inside = tree[0] in SCALARS | {"pm", "ratio"}
    allowed = SCALARS if tree[0] == "ratio" else SCALARS | {"pm"}
    for part in tree[1:]:
        items = part if isinstance(part, tuple) and isinstance(part[0], tuple) else (part,)
        for item in items:  # of a matrix, a row
            if isinstance(item, tuple) and ((inside and item[0] not in allowed) or not _well_formed(item)):
                return False
    return True


class _Reader:
    """Recursive descent: one method for each level of precedence."""

    ends: frozenset[str | None] = _ENDS

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.bars: bool = False

    @property
    def token(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next(self) -> str:
        token = self.token
        if token is None:
            raise Unreadable
        self.at += 1
        return token

    def expect(self, *wanted: str) -> str:
        if self.token not in wanted:
            raise Unreadable
        return self.next()

    def items(self, close: str | None) -> tuple:
        """Everything up to a closing bracket: one item, or several between commas and words."""
        found, separators = [self.item()], set()
        while self.token in (",", ";", "\\and", "\\or"):
            separators.add(self.next())
            if self.token in ("\\and", "\\or"):
                separators.add(self.next())
            if self.token == close and len(found) > 1:
                break
            found.append(self.item())
        if len(found) == 1:
            return found[0]
        words = separators & {"\\and", "\\or"}
        return ({"\\and": "and", "\\or": "or"}[words.pop()] if len(words) == 1 else "list", *found)

    def item(self) -> tuple:
        """Relations between expressions or sets; without a membership sign, sets are joined last."""
        if "\\in" in self.tokens:
            return self.relation(lambda: self.joined(self.ratio))
        return self.joined(lambda: self.relation(self.ratio))

    def joined(self, part: Callable[[], tuple]) -> tuple:
        left = part()
        while self.token in _SET_OPERATORS:
            left = (_SET_OPERATORS[self.next()], left, part())
        return left

    def relation(self, part: Callable[[], tuple]) -> tuple:
        sides, operators = [part()], []
        while self.token in _RELATIONS or self.token == "\\in":
            operator = self.next()
            if operator == "\\in":
                if operators:
                    raise Unreadable
                return ("in", sides[0], part())
            operators.append(_RELATIONS[operator])
            sides.append(part())
        return ("rel", tuple(operators), *sides) if operators else sides[0]

    def ratio(self) -> tuple:
        parts = [self.sum()]
        while self.token == ":":
            self.next()
            parts.append(self.sum())
        return ("ratio", *parts) if len(parts) > 1 else parts[0]

    def sum(self) -> tuple:
        if self.tokens[self.at : self.at + 2] and all(t in ("+", "-") for t in self.tokens[self.at : self.at + 2]):
            raise Unreadable
        terms = [self.term()]
        while self.token in ("+", "-", "\\pm", "\\mp"):
            terms.append(self.term())
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def term(self, signs: int = 0) -> tuple:
        """A product with the sign before it."""
        if self.token in ("+", "-", "\\pm", "\\mp"):
            sign = self.next()
            signs += 1
            if signs > 2:
                raise Unreadable
            inner = self.term(signs)
            if sign in ("\\pm", "\\mp"):
                return ("pm", 1 if sign == "\\pm" else -1, inner)
            return inner if sign == "+" else negated(inner)
        product = self.mixed_number() or self.factor()
        whole, unclear = product[0] == "q", False
        while True:
            if self.token in _TIMES:
                self.next()
                product, unclear = times(product, self.signed_factor()), False
            elif self.token in _OVER:
                self.next()
                below = self.signed_factor()
                # 1/2 x is half of x, and what a/b c is nobody knows.
                unclear = not (whole and below[0] == "q")
                product = ("/", product, below)
            elif self.token in _ENDS or (self.token == "|" and self.bars):
                return product
            else:
                if unclear or (self.token or "")[:1].isdigit() or (self.token or "")[:1] == ".":
                    raise Unreadable
                product = times(product, self.factor())
            whole = False

    def signed_factor(self) -> tuple:
        if self.token == "-":
            self.next()
            return negated(self.factor())
        return self.factor()

    def mixed_number(self) -> tuple | None:
        r"""`1\frac{1}{2}` or `1 1/2`; a fraction of 1 or more after a whole number may be a product: unreadable."""
        whole, after = self.token, self.tokens[self.at + 1 : self.at + 4]
        if whole is None or not re.fullmatch("[0-9]+", whole) or not after:
            return None
        if after[0] == "\\frac":
            self.at += 1
            fraction = self.factor()
            if fraction[0] != "/" or {fraction[1][0], fraction[2][0]} != {"q"}:
                return ("*", number(whole), fraction)
            above, below = (Fraction(*part[1:]) for part in fraction[1:])
        elif len(after) == 3 and after[0].isdigit() and after[1] == "/" and after[2].isdigit():
            self.at += 4
            above, below = Fraction(after[0]), Fraction(after[2])
        else:
            return None
        if below == 0 or not 0 <= above / below < 1 or {above.denominator, below.denominator} != {1}:
            raise Unreadable
        return rational_node(int(whole) + above / below)

    def factor(self) -> tuple:
        """An atom with what stands behind it: powers, factorials, degrees, percent."""
        base = self.atom()
        while self.token in ("^", "!", "°", "%"):
            mark = self.next()
            if mark == "^":
                base = ("^", base, commands.argument(self))
                if self.token == "^":
                    raise Unreadable
            elif mark == "!":
                if self.token == "!":
                    raise Unreadable
                base = ("f", "factorial", base)
            elif mark == "°":
                base = ("*", base, ("/", ("c", "pi"), ("q", 180, 1)))
                if self.token == "°":
                    raise Unreadable
            else:
                base = ("/", base, ("q", 100, 1))
                if self.token == "%":
                    raise Unreadable
        return base

    def atom(self) -> tuple:
        """A number, a variable, a command with its arguments, or what brackets hold."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable
        tree = self.atom_here()
        self.depth -= 1
        return tree

    def atom_here(self) -> tuple:
        token = self.next()
        if token[0].isdigit() or token[0] == ".":
            if self.token == "_" or not token.isascii():
                raise Unreadable
            return number(token)
        if token in ("(", "["):
            return self.bracketed(token)
        if token == "{":
            inner = self.items("}")
            self.expect("}")
            return inner
        if token == "\\{":
            return self.braced_set()
        if token in _FENCES:
            return self.fenced(token)
        if token == "_":
            return commands.choose_before(self)
        if token in CONSTANTS and self.token != "_":
            return ("c", CONSTANTS[token])
        if token.isascii() and token.isalpha():  # a word of four letters or more is one name, no product
            if token in "fgh" and self.token == "(":  # a function's value is no product
                self.next()
                return ("v", f"{token}{self.bracketed('(')}")
            return commands.counted(self, token) or ("v", token + commands.subscript(self))
        if token.startswith("\\"):
            return commands.command(self, token[1:])
        raise Unreadable

    def bracketed(self, opening: str) -> tuple:
        bars, self.bars = self.bars, False
        inner = self.items(")")
        closing = self.expect(*_BRACKETS[opening])
        self.bars = bars
        if inner[0] == "list":
            return ("seq", opening + closing, *inner[1:])
        if opening + closing in ("(]", "[)"):
            raise Unreadable
        return inner

    def braced_set(self) -> tuple:
        if self.token == "\\}":
            self.next()
            return ("set",)
        inner = self.items("\\}")
        self.expect("\\}")
        if inner[0] == "ratio" and len(inner) == 3 and inner[1][0] == "v":
            raise Unreadable
        return ("set", *(inner[1:] if inner[0] in ("list", "and", "or") else (inner,)))

    def fenced(self, token: str) -> tuple:
        closing, name = _FENCES[token]
        bars, self.bars = self.bars, token == "|"
        inner = self.sum()
        self.expect(closing)
        self.bars = bars
        return ("matrix", "vmatrix", *inner[2:]) if inner[0] == "matrix" and name == "abs" else ("f", name, inner)
