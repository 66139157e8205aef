r"""The verifier of mathematical answers: extract the final answer, read both as formulas, compare exactly.

A wrong "right" teaches a policy to cheat, a wrong "wrong" only costs signal: what could mean two things is wrong.
Rational arithmetic is done here; the rest goes to a worker process, because model output is hostile.
"""

import re
from fractions import Fraction
from functools import lru_cache

from tsopsd_jax.rewards import words
from tsopsd_jax.rewards.answers import LONGEST_ANSWER_CHARACTERS, final_answer, labelled, lone_formula, option_of
from tsopsd_jax.rewards.compare import Comparison, TooMuch, scaled
from tsopsd_jax.rewards.formula import parse_formula
from tsopsd_jax.rewards.markup import clean, remove_spaces, unwrap_text
from tsopsd_jax.rewards.symbolic import Workers
from tsopsd_jax.rewards.trees import SCALARS, Unreadable
from tsopsd_jax.rewards.units import Quantity, Unit, measured, read_unit
from tsopsd_jax.rewards.workers import CutOff

WORKERS = Workers()

_LEAD_IN = re.compile(
    r"(?i)\A(\\text\{ ?)?(?:so |thus,? |hence,? |therefore,? )?(?:the )?(?:final |correct )?answer is:? ?(?(1)\})"
)
_PLAIN_NUMBER = re.compile(r"[$* ]*([+-]?[0-9]+(?:\.[0-9]+)?)[$* .]*")
# What stands before `=` and may be left out: a variable, a function of one, lines and angles, words.
_NO_VARIABLE = r"(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)|ln|lg|log|exp|pi|infty|sqrt|frac|max|min)"
_VARIABLE = rf"(?:[A-Za-z]|\\{_NO_VARIABLE}[A-Za-z]+ ?)" r"(?:_(?:\w|\{\w+\}))?'*(?:\^\{-1\})? ?(?:\([^()=<>]*\))?"
_NAME = re.compile(
    r"\A(?:\\frac\{d[a-z]\}\{d[a-z]\}|\\text\{[A-Za-z -]+\}|m?\\(?:angle|triangle) ?[A-Z]{1,3}|\|?[A-Z]{2}\|?|"
    rf"{_VARIABLE})"
    r" ?= ?(?=(?:(?!\\and|\\or)[^<>,;&])+\Z|[^=<>]+\Z)"
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_BLANK_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
_BASE = re.compile(r"\(?([0-9A-F]+)\)?_(?:\{? ?(?:\\text\{)? ?([0-9]+|[a-z]+) ?\}?\}?)")
_MODULAR = re.compile(r"(?:[a-zA-Z] ?(?:\\equiv|=) ?)?(-?[0-9]+) ?\\text\{mod\} ?([0-9]+)")
_SHORT_EXPONENT = re.compile(r"(?<=[0-9])e(?=[+-][0-9](?![0-9]))")
DEGREE, RADIAN = Unit((("degree", 1),), Fraction(1)), Unit((("radian", 1),), Fraction(1))


def verify_math(response: str, gold: str) -> float:
    r"""Score 1.0 if the response's final answer equals `gold`, else 0.0.

    The final answer is what follows the last `Answer:` (up to the end of its line) or the content of the last
    `\boxed{}` or `\fbox{}`, whichever stands later. Numbers are compared exactly: rational ones as such, others by
    intervals that are made narrower until they tell; formulas with variables at several points. Tuples are ordered,
    sets are not, intervals and ratios are neither; a list without brackets is what the other side is. Equations are
    equal up to a factor. A unit that only one of the two has is ignored, other units are converted; `gold` of a single
    letter A to J is an option of a multiple-choice question. An answer of more than 400 characters, or one that the
    worker process cannot compare in five seconds and half a gibibyte, is wrong; `answers_cut_off` counts the latter.

    No text makes it raise, hang or grow. Threads may call it; each keeps one worker busy.

    Raises:
        RuntimeError: a worker cannot be started: the installation is broken.
    """
    if not isinstance(response, str) or not isinstance(gold, str):
        return 0.0
    answer = final_answer(response)
    if answer is None or max(len(answer), len(gold)) > LONGEST_ANSWER_CHARACTERS:
        return 0.0
    try:
        return float(equal(answer, gold, Comparison(WORKERS.order)))
    except (CutOff, TooMuch, Unreadable, RecursionError):
        return 0.0


def answers_cut_off() -> int:
    """Count the answers so far, in this process, that a worker did not survive; they counted as wrong."""
    return WORKERS.pool.cut_off


def equal(answer: str, gold: str, comparison: Comparison) -> bool:
    """Whether two short answers are equal.

    Raises:
        CutOff, TooMuch, Unreadable, RecursionError: no verdict; the answer counts as wrong.
    """
    plain = _PLAIN_NUMBER.fullmatch(answer), _PLAIN_NUMBER.fullmatch(gold)
    if plain[0] and plain[1]:  # most of all answers
        return Fraction(plain[0][1]) == Fraction(plain[1][1])
    option, value = labelled(gold)
    if option is not None and option_of(answer) is None:
        option, gold = None, value
    option = option or (option_of(gold) if gold.strip() not in "abcdefghij" else None)  # e is a number
    if option is not None:
        return option_of(answer) == option
    answer = labelled(answer)[1]
    given, wanted = read_answer(answer), read_answer(gold)
    if not given or not wanted:
        return False
    keys = [remove_spaces(unwrap_text(text)) for text in (given, wanted)]
    if keys[0] == keys[1]:
        return True
    verdict = words.same(*keys)
    if verdict is not None:
        return verdict
    if (bases := [_based(text) for text in (given, wanted)]) != [None, None]:
        return _same_base(bases, keys)
    if ("=" in given) != (
        "=" in wanted
    ) and "\\text{mod}" not in given + wanted:  # x = 5 where 5 is asked for, and the other way round
        given, wanted = _NAME.sub("", given, count=1), _NAME.sub("", wanted, count=1)
    return any(_same(mine, other, comparison) for mine in _readings(given) for other in _readings(wanted))


def read_answer(answer: str) -> str:
    """The cleaned LaTeX of an answer, without lead-in and what stands around it."""
    text = lone_formula(_LEAD_IN.sub("", answer.strip('*`"“” \n#').removeprefix("__").removesuffix("__"), count=1))
    text = clean(text).strip("*`").rstrip(".,;:\\ ").strip("*` ")
    text = re.sub(r"\A(?:\\approx|=|\\colon|:) ?", "", _LEAD_IN.sub("", text))
    return words.number_in_words(text) or text


def _readings(text: str) -> list[str]:
    """A text, and once more where `2,100` could be one number or two, and `2e-3` a decimal or a difference."""
    if re.search(r"[(\[;]|\\\{|, ", text):  # commas separate
        return [text]
    texts = [_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)]
    if _BLANK_THOUSANDS.fullmatch(text):
        texts = [text.replace(" ", "")]
    if texts[0] != text and "," in text:
        texts.append(text)
    short = _SHORT_EXPONENT.sub(" e ", texts[0])
    return texts + ([short] if short != texts[0] else [])


def _same(given: str, wanted: str, comparison: Comparison) -> bool:
    if (modular := [_MODULAR.fullmatch(text) for text in (given, wanted)]) != [None, None]:
        return _same_modulo(modular, given, wanted)
    mine, other = measured(given), measured(wanted)
    return any(_same_measured(a, b, comparison) for a in mine for b in other)


def _letter_unit(parts: list[Quantity]) -> list[Quantity]:
    """`7000 g` beside `7 kg`: a lone letter is a unit only where the other side has one that measures the same."""
    for i, part in enumerate(parts):
        match = re.fullmatch(r"([0-9.]+) ?([A-Za-z])", part.text)
        other = parts[1 - i].unit
        unit = read_unit(match[2]) if match and part.unit is None else None
        if match and unit is not None and other is not None and unit.measures == other.measures:
            parts[i] = Quantity(match[1], unit, part.factor)
    return parts


def _same_measured(given: Quantity, wanted: Quantity, comparison: Comparison) -> bool:
    given, wanted = _letter_unit([given, wanted])
    one, other = given.unit, wanted.unit
    percents = [part.text.endswith("%") for part in (given, wanted)]
    a, b = (_tree(part.text.removesuffix("%").rstrip()) for part in (given, wanted))
    if a is None or b is None:
        return False
    a, b = scaled(a, given.factor), scaled(b, wanted.factor)
    if one is not None and other is not None:
        if one.size != other.size:
            a, b = scaled(a, one.size), scaled(b, other.size)
        if one.measures == other.measures:
            return comparison.same(a, b)
        if {one.measures, other.measures} != {DEGREE.measures, RADIAN.measures}:
            return False
    elif percents[0] != percents[1]:
        return _same_percent(*((a, b) if percents[0] else (b, a)), comparison)
    elif comparison.same(a, b):
        return True
    if DEGREE not in (one, other):
        return False
    degrees, plain = (a, b) if one == DEGREE else (b, a)
    return degrees[0] in SCALARS and comparison.same(("*", degrees, ("/", ("c", "pi"), ("q", 180, 1))), plain)


def _same_percent(percent: tuple, plain: tuple, comparison: Comparison) -> bool:
    """50% is 0.5, and 50 where the sign was left out; not below 1, where the sign makes the difference."""
    if percent[0] not in SCALARS or plain[0] not in SCALARS:
        return False
    if comparison.same(scaled(percent, Fraction(1, 100)), plain):
        return True
    return comparison.order(("f", "abs", plain), ("q", 1, 1)) == 1 and comparison.same(percent, plain)


@lru_cache(4096)
def _tree(text: str) -> tuple | None:
    try:
        return parse_formula(text)
    except (Unreadable, ArithmeticError, ValueError):
        return None


def _based(text: str) -> tuple[str, int] | None:
    """(digits, base) of `1011_2`, `(1011)_{two}`."""
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    base = words.number_in_words(match[2]) or match[2]
    return (match[1], int(base)) if base.isdigit() and len(base) < 4 else None


def _same_base(bases: list, keys: list[str]) -> bool:
    """Same digits to the same base; the base may be left out where it is asked for, and 10 is understood."""
    given, wanted = bases
    if wanted is None:
        return given == (keys[1].lstrip("+"), 10)
    return given == wanted or (given is None and keys[0] == wanted[0])


def _same_modulo(matches: list, given: str, wanted: str) -> bool:
    """Residues: the same modulus and class; a number alone is the residue written."""
    if None not in matches:
        (a, m), (b, n) = (map(int, match.groups()) for match in matches)
        return m == n and m > 0 and (a - b) % m == 0
    number, modulus = map(int, (matches[0] or matches[1]).groups())
    plain = wanted if matches[0] else given
    return re.fullmatch(r"-?[0-9]{1,300}", plain) is not None and (
        int(plain) == number or (modulus > 0 and int(plain) == number % modulus)
    )
