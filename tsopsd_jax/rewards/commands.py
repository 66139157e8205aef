r"""Commands of LaTeX and what follows them: roots, functions, sums, matrices; the reader in `formula` builds on it."""

from collections.abc import Callable
from fractions import Fraction
from typing import Protocol, runtime_checkable

from tsopsd_jax.rewards.trees import Unreadable, negated, rational_node, times

_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}
_FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "exp", "log")},
    "lg": "lg", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot",
}  # fmt: skip
_OF_LISTS = ("gcd", "lcm", "max", "min")
CONSTANTS = {"\\pi": "pi", "\\infty": "oo", "e": "e", "i": "i"}
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
    "xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell"
)
_SAME_LETTER = {"varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta"}


@runtime_checkable
class Reader(Protocol):
    """The tokens of a formula, where they are read, and how: the reader in `formula` is one."""

    tokens: list[str]
    at: int
    bars: bool
    """Whether an absolute value is open: `|` closes it."""
    ends: frozenset[str | None]
    """Tokens that end an argument without brackets."""

    @property
    def token(self) -> str | None:
        """The next token; None at the end."""
        ...

    def next(self) -> str:
        """Take the next token."""
        ...

    def expect(self, *wanted: str) -> str:
        """Take the next token, which is one of these."""
        ...

    def relation(self, part: Callable[[], tuple]) -> tuple:
        """Read sides and the operators between them."""
        ...

    def sum(self) -> tuple:
        """Read a sum."""
        ...

    def term(self, signs: int = 0) -> tuple:
        """Read a product with the signs before it."""
        ...

    def factor(self) -> tuple:
        """Read an atom with its powers."""
        ...

    def atom(self) -> tuple:
        """Read a number, a variable, a command with its arguments, or what brackets hold."""
        ...

    def bracketed(self, opening: str) -> tuple:
        """Read on to the bracket that closes `opening`."""
        ...


def argument(reader: Reader) -> tuple:
    """What follows a command, `^` or `_`: a group, or a sign and one token (all digits of a number)."""
    sign = reader.next() if reader.token in ("-", "+") else ""
    inner = reader.atom()
    return negated(inner) if sign == "-" else inner


def digit_or_group(reader: Reader) -> tuple:
    r"""What follows `\frac`: `\frac12` is a half, so of a number only its first digit."""
    token = reader.token
    if token is not None and token[0].isdigit() and len(token) > 1:
        reader.tokens[reader.at : reader.at + 1] = [token[0], token[1:]]
    return reader.atom()


def subscript(reader: Reader) -> str:
    """`_1`, `_{n+1}`: part of a variable's name; and its primes."""
    name = ""
    if reader.token == "_":
        reader.next()
        name = "_" + reader.next()
        if name == "_{":
            close = reader.tokens.index("}", reader.at) if "}" in reader.tokens[reader.at :] else None
            if close is None:
                raise Unreadable
            name, reader.at = "_" + "".join(reader.tokens[reader.at : close]), close + 1
    while reader.token == "'":
        name += reader.next()
    return name


def counted(reader: Reader, letter: str) -> tuple | None:
    """`C_5^2`, `A_5^2`, `P_5^2` with numbers: selections and arrangements of 2 out of 5."""
    if letter not in "CAP" or reader.token != "_":
        return None
    start = reader.at
    reader.next()
    below = argument(reader)
    if reader.token == "^" and below[0] == "q":
        reader.next()
        above = argument(reader)
        if above[0] == "q":
            low, high = sorted((Fraction(*below[1:]), Fraction(*above[1:])))
            name = "binom" if letter == "C" else "falling"
            return ("f", name, rational_node(high), rational_node(low))
    reader.at = start
    return None


def choose_before(reader: Reader) -> tuple:
    """`_5C_2`, `_5P_2`."""
    above = argument(reader)
    letter = reader.expect("C", "P")
    reader.expect("_")
    return ("f", "binom" if letter == "C" else "falling", above, argument(reader))


def command(reader: Reader, name: str) -> tuple:
    if name == "frac":
        above = digit_or_group(reader)
        return ("/", above, digit_or_group(reader))
    if name == "binom":
        above = digit_or_group(reader)
        return ("f", "binom", above, digit_or_group(reader))
    if name == "sqrt":
        return root(reader)
    if name in _FUNCTIONS:
        return function(reader, _FUNCTIONS[name])
    if name in _OF_LISTS:
        reader.expect("(")
        inner = reader.bracketed("(")
        return ("f", name, *(inner[2:] if inner[0] == "seq" else (inner,)))
    if name in ("sum", "prod"):
        return series(reader, name)
    if name == "begin":
        return matrix(reader)
    if name == "emptyset":
        return ("set",)
    if name == "mathbb":
        letter = argument(reader)
        if letter[0] != "v":
            raise Unreadable
        return ("named", letter[1])
    if name in _GREEK.split():
        return ("v", "\\" + _SAME_LETTER.get(name, name) + subscript(reader))
    raise Unreadable


def root(reader: Reader) -> tuple:
    index = ("q", 2, 1)
    if reader.token == "[":
        reader.next()
        index = reader.sum()
        reader.expect("]")
    return ("f", "root", argument(reader), index)


def function(reader: Reader, name: str) -> tuple:
    r"""`\sin^2 2x`, `\log_2 8`, `\tan^{-1} x`; without brackets the argument goes up to the next operator."""
    base, power = None, None
    while reader.token in ("_", "^"):
        if reader.next() == "_":
            base = argument(reader)
        else:
            power = argument(reader)
    if power == ("q", -1, 1):
        if name not in _INVERSE:
            raise Unreadable
        name, power = _INVERSE[name], None
    if reader.token == "(":
        reader.next()
        inner = reader.bracketed("(")
    else:
        inner = plain_argument(reader)
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


def plain_argument(reader: Reader) -> tuple:
    if reader.token == "-":
        reader.next()
        return negated(reader.factor())
    inner = reader.factor()
    while reader.token not in reader.ends and reader.token != "(" and not (reader.token == "|" and reader.bars):
        if (reader.token or "")[1:] in _FUNCTIONS or (reader.token or "")[:1].isdigit():
            break
        inner = times(inner, reader.factor())
    if reader.token == "/" and inner[0] in ("q", "c", "v", "*"):
        reader.next()
        inner = ("/", inner, reader.factor())
        if reader.token not in reader.ends:
            raise Unreadable
    return inner


def series(reader: Reader, name: str) -> tuple:
    r"""`\sum_{k=1}^{10} k^2`: the summand is the term that follows."""
    reader.expect("_")
    reader.expect("{")
    start = reader.relation(reader.sum)
    reader.expect("}")
    reader.expect("^")
    last = argument(reader)
    if start[0] != "rel" or start[1] != ("=",) or start[2][0] != "v":
        raise Unreadable
    return ("f", name, start[2], start[3], last, reader.term())


def matrix(reader: Reader) -> tuple:
    reader.expect("{")
    kind = ""
    while reader.token != "}":
        kind += reader.next()
    reader.next()
    if kind == "array" and reader.token == "{":  # its columns
        while reader.next() != "}":
            pass
    rows, row = [], []
    while reader.token != "\\end":
        row.append(reader.relation(reader.sum))
        if reader.token == ",":
            reader.next()
        if reader.token == "&":
            reader.next()
        elif reader.token == "\\\\" or reader.token == "\\end":
            rows, row = [*rows, tuple(row)], []
            if reader.token == "\\\\":
                reader.next()
        else:
            raise Unreadable
    reader.next()
    reader.expect("{")
    while reader.next() != "}":
        pass
    if not rows or len({len(row) for row in rows}) != 1:
        raise Unreadable
    if kind in ("cases", "aligned"):
        return ("list", *rows[0]) if len(rows) == 1 else ("list", *(row[0] for row in rows))
    return ("matrix", kind, *rows)
