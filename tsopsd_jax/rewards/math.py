r"""The verifier of mathematical answers: extract the final answer, normalise it, compare exactly.

Deliberately conservative, and no computer algebra: numbers are compared as exact rationals, everything else
as normalised text, so `2\sqrt{2}` and `\sqrt{8}` count as different. A wrong "right" teaches a policy to
cheat, a wrong "wrong" only costs signal. A full symbolic comparison can come behind the same name.
"""

import re
from fractions import Fraction

_LONGEST_ANSWER_CHARACTERS = 300
# With a capital letter, as prompts ask for it: in running text ("to check our answer: ...") it is no mark.
_ANSWER_MARKS = ("Answer:", "Answer**:")
_BOX = "\\boxed{"

# Every pattern below only ever sees at most _LONGEST_ANSWER_CHARACTERS characters.
_DELIMITER_SIZE = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])")
_FRACTION_SPELLING = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SHORT_FRACTION = re.compile(r"\\frac ?([0-9]) ?([0-9])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)(?= ?\{)")
_SPACING = re.compile(r"\\[!,;: ]|\\(?:quad|qquad)(?![A-Za-z])|~")
_DEGREES = re.compile(r"\^ ?(?:\\circ(?![A-Za-z])|\{ ?\\circ ?\})|°")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?(?:\\?%)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_SLASH_FRACTION = re.compile(rf"({_NUMBER.pattern})/({_NUMBER.pattern})")
_LATEX_FRACTION = re.compile(rf"([+-]?)([0-9]*)\\frac\{{({_NUMBER.pattern})\}}\{{({_NUMBER.pattern})\}}")


def verify_math(response: str, gold: str) -> float:
    r"""1.0 if the response's final answer equals `gold`, else 0.0.

    The final answer is what follows the last `Answer:` (up to the end of its line), else the content of the
    last `\boxed{}`. Compared after normalisation: integers, decimals, fractions and percentages (50% = 1/2)
    as exact rationals, anything else as text. This is not a symbolic comparison: equal expressions written
    differently are counted as wrong, and so is an answer of more than 300 characters.

    Never raises, and takes time linear in the response's length, whatever that contains.
    """
    if not isinstance(response, str) or not isinstance(gold, str):
        return 0.0
    answer = _extract(response)
    if answer is None or len(answer) > _LONGEST_ANSWER_CHARACTERS or len(gold) > _LONGEST_ANSWER_CHARACTERS:
        return 0.0
    left, right = _normalise(answer), _normalise(gold)
    if not left or not right:
        return 0.0
    if left == right:
        return 1.0
    left_value, right_value = _rational(left), _rational(right)
    return 1.0 if left_value is not None and left_value == right_value else 0.0


def _extract(response: str) -> str | None:
    """The final answer as written, or None where there is none."""
    start, length = max((response.rfind(mark), len(mark)) for mark in _ANSWER_MARKS)
    if start >= 0:
        # The answer may stand on the line after "Answer:", and the mark may be bold ("**Answer:** 7").
        line = response[start + length :].lstrip("* \t\r\n").partition("\n")[0].strip()
        if line:
            return _last_box(line) or line
    return _last_box(response)


def _last_box(text: str) -> str | None:
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    return _braced(text[start : start + _LONGEST_ANSWER_CHARACTERS + 1])


def _braced(text: str) -> str | None:
    r"""The part of `text` before the brace that closes an open one; `\{` and `\}` are plain characters."""
    depth, escaped = 1, False
    for at, character in enumerate(text):
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[:at]
        escaped = character == "\\" and not escaped
    return None


def _normalise(answer: str) -> str:
    """One spelling for plainly equal answers: markup, spacing, fraction commands, thousands, degrees."""
    text = answer.replace("−", "-").replace("\\$", "").replace("$", "")
    for delimiter in ("\\(", "\\)", "\\[", "\\]"):
        text = text.replace(delimiter, "")
    text = _SPACING.sub(" ", text.replace("\\!", ""))
    text = _DELIMITER_SIZE.sub("", text)
    text = _FRACTION_SPELLING.sub(r"\\frac", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _DEGREES.sub("", text)
    text = _unwrap_text(text).replace("{,}", ",")
    text = _remove_spaces(text).strip("*`").rstrip(".").strip("*` ")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return text


def _unwrap_text(text: str) -> str:
    r"""`\text{cm}` -> `cm`, and the like. At most as many rounds as the (short) text has characters."""
    while (match := _TEXT.search(text)) is not None:
        opening = text.index("{", match.end())
        content = _braced(text[opening + 1 :])
        if content is None:
            return text
        text = text[: match.start()] + content + text[opening + len(content) + 2 :]
    return text


def _remove_spaces(text: str) -> str:
    """Drop white space, except between two digits: `3 4` is not 34, and `1 1/2` is not 11/2."""
    words = text.split()
    joined = words[0] if words else ""
    for word in words[1:]:
        between_digits = joined[-1].isdigit() and word[0].isdigit()
        joined += (" " if between_digits else "") + word
    return joined


def _rational(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, `a/b`, `\frac{a}{b}`, mixed number or percentage."""
    scale = 1
    if text.endswith("%"):
        text, scale = text[:-1].removesuffix("\\"), 100
    if _NUMBER.fullmatch(text):
        return Fraction(text) / scale
    if match := _SLASH_FRACTION.fullmatch(text):
        sign, whole, above, below = "", "", match[1], match[2]
    elif match := _LATEX_FRACTION.fullmatch(text):
        sign, whole, above, below = match.groups()
    else:
        return None
    numerator, denominator = Fraction(above), Fraction(below)
    if denominator == 0:
        return None
    value = numerator / denominator
    if whole:
        if not 0 <= value < 1:
            return None
        value += int(whole)
    return (-value if sign == "-" else value) / scale
