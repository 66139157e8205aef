r"""Commands of LaTeX and what follows them: roots, functions, sums, matrices; the reader in `formula` builds on it."""

from collections.abc import Callable
from fractions import Fraction

from tsopsd_jax.rewards.trees import Unreadable, negated, rational_node, times

_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}
_FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "exp", "log")},
    "lg": "lg", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot",
}  # fmt: skip
_OF_LISTS = ("gcd", "lcm", "max", "min")
CONSTANTS = {"\\pi": "pi", "\\infty": "oo", "e": "e", "i": "i"}
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell"
)
_SAME_LETTER = {"varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta"}


class Commands:
    """The tokens of a formula, and methods that read commands from them."""

    ends: frozenset[str | None] = frozenset()
    """Tokens that end an argument without brackets."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.bars = False
        """Whether an absolute value is open: `|` closes it."""

    def relation(self, part: Callable[[], tuple]) -> tuple:
        """Read sides and the operators between them."""
        raise NotImplementedError

    def sum(self) -> tuple:
        """Read a sum."""
        raise NotImplementedError

    def term(self, signs: int = 0) -> tuple:
        """Read a product with the signs before it."""
        raise NotImplementedError

    def factor(self) -> tuple:
        """Read an atom with its powers."""
        raise NotImplementedError

    def atom(self) -> tuple:
        """Read a number, a variable, a command with its arguments, or what brackets hold."""
        raise NotImplementedError

    def bracketed(self, opening: str) -> tuple:
        """Read on to the bracket that closes `opening`."""
        raise NotImplementedError

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

    def argument(self) -> tuple:
        """What follows a command, `^` or `_`: a group, or a sign and one token (all digits of a number)."""
        sign = self.next() if self.token in ("-", "+") else ""
        inner = self.atom()
        return negated(inner) if sign == "-" else inner

    def digit_or_group(self) -> tuple:
        r"""What follows `\frac`: `\frac12` is a half, so of a number only its first digit."""
        token = self.token
        if token is not None and token[0].isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.atom()

    def subscript(self) -> str:
        """`_1`, `_{n+1}`: part of a variable's name; and its primes."""
        name = ""
        if self.token == "_":
            self.next()
            name = "_" + self.next()
            if name == "_{":
                close = self.tokens.index("}", self.at) if "}" in self.tokens[self.at :] else None
                if close is None:
                    raise Unreadable
                name, self.at = "_" + "".join(self.tokens[self.at : close]), close + 1
        while self.token == "'":
            name += self.next()
        return name

    def counted(self, letter: str) -> tuple | None:
        """`C_5^2`, `A_5^2`, `P_5^2` with numbers: selections and arrangements of 2 out of 5."""
        if letter not in "CAP" or self.token != "_":
            return None
        start = self.at
        self.next()
        below = self.argument()
        if self.token == "^" and below[0] == "q":
            self.next()
            above = self.argument()
            if above[0] == "q":
                low, high = sorted((Fraction(*below[1:]), Fraction(*above[1:])))
                name = "binom" if letter == "C" else "falling"
                return ("f", name, rational_node(high), rational_node(low))
        self.at = start
        return None

    def choose_before(self) -> tuple:
        """`_5C_2`, `_5P_2`."""
        above = self.argument()
        letter = self.expect("C", "P")
        self.expect("_")
        return ("f", "binom" if letter == "C" else "falling", above, self.argument())

    def command(self, name: str) -> tuple:
        if name == "frac":
            above = self.digit_or_group()
            return ("/", above, self.digit_or_group())
        if name == "binom":
            above = self.digit_or_group()
            return ("f", "binom", above, self.digit_or_group())
        if name == "sqrt":
            return self.root()
        if name in _FUNCTIONS:
            return self.function(_FUNCTIONS[name])
        if name in _OF_LISTS:
            self.expect("(")
            inner = self.bracketed("(")
            return ("f", name, *(inner[2:] if inner[0] == "seq" else (inner,)))
        if name in ("sum", "prod"):
            return self.series(name)
        if name == "begin":
            return self.matrix()
        if name == "emptyset":
            return ("set",)
        if name == "mathbb":
            letter = self.argument()
            return ("named", letter[1]) if letter[0] == "v" else self.unreadable()
        if name in _GREEK.split():
            return ("v", "\\" + _SAME_LETTER.get(name, name) + self.subscript())
        raise Unreadable

    def unreadable(self) -> tuple:
        raise Unreadable

    def root(self) -> tuple:
        index = ("q", 2, 1)
        if self.token == "[":
            self.next()
            index = self.sum()
            self.expect("]")
        return ("f", "root", self.argument(), index)

    def function(self, name: str) -> tuple:
        r"""`\sin^2 2x`, `\log_2 8`, `\tan^{-1} x`; without brackets the argument goes up to the next operator."""
        base, power = None, None
        while self.token in ("_", "^"):
            if self.next() == "_":
                base = self.argument()
            else:
                power = self.argument()
        if power == ("q", -1, 1):
            if name not in _INVERSE:
                raise Unreadable
            name, power = _INVERSE[name], None
        if self.token == "(":
            self.next()
            inner = self.bracketed("(")
        else:
            inner = self.plain_argument()
        if name == "log" and base is not None:
            value = ("/", ("f", "ln", inner), ("f", "ln", base))
        elif base is not None:
            raise Unreadable
        elif name == "log":  # to which base? the same one everywhere: a positive unknown
            value = ("*", ("f", "ln", inner), ("f", "abs", ("v", "log")))
        elif name == "lg":
            value = ("/", ("f", "ln", inner), ("f", "ln", ("q", 10, 1)))
        else:
            value = ("f", name, inner)
        return value if power is None else ("^", value, power)

    def plain_argument(self) -> tuple:
        if self.token == "-":
            self.next()
            return negated(self.factor())
        inner = self.factor()
        while self.token not in self.ends and self.token != "(" and not (self.token == "|" and self.bars):
            if (self.token or "")[1:] in _FUNCTIONS or (self.token or "")[:1].isdigit():
                break
            inner = times(inner, self.factor())
        if self.token == "/" and inner[0] in ("q", "c", "v", "*"):
            self.next()
            inner = ("/", inner, self.factor())
            if self.token not in self.ends:
                raise Unreadable
        return inner

    def series(self, name: str) -> tuple:
        r"""`\sum_{k=1}^{10} k^2`: the summand is the term that follows."""
        self.expect("_")
        self.expect("{")
        start = self.relation(self.sum)
        self.expect("}")
        self.expect("^")
        last = self.argument()
        if start[0] != "rel" or start[1] != ("=",) or start[2][0] != "v":
            raise Unreadable
        return ("f", name, start[2], start[3], last, self.term())

    def matrix(self) -> tuple:
        self.expect("{")
        kind = ""
        while self.token != "}":
            kind += self.next()
        self.next()
        if kind == "array" and self.token == "{":  # its columns
            while self.next() != "}":
                pass
        rows, row = [], []
        while self.token != "\\end":
            row.append(self.relation(self.sum))
            if self.token == ",":
                self.next()
            if self.token == "&":
                self.next()
            elif self.token == "\\\\" or self.token == "\\end":
                rows, row = [*rows, tuple(row)], []
                if self.token == "\\\\":
                    self.next()
            else:
                raise Unreadable
        self.next()
        self.expect("{")
        while self.next() != "}":
            pass
        if not rows or len({len(row) for row in rows}) != 1:
            raise Unreadable
        if kind in ("cases", "aligned"):
            return ("list", *rows[0]) if len(rows) == 1 else ("list", *(row[0] for row in rows))
        return ("matrix", kind, *rows)
