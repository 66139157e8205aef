r"""The final answer of a response: what it marks as such, and the option or the formula in that.

Model output is hostile: everything here is linear in the length of the response, and what looks closer only ever sees
at most LONGEST_ANSWER_CHARACTERS characters.
"""

import re

from tsopsd_jax.rewards.markup import braced, clean, unwrap_text
from tsopsd_jax.rewards.units import measured

LONGEST_ANSWER_CHARACTERS = 400
# With a capital letter, as prompts ask for it: in running text ("to check our answer: ...") it is no mark.
_ANSWER_MARK = re.compile(r"(?:Answer|ANSWER)(?:\*\*)? ?[:：]|答案(?:是|为)?[:：]")
_BOXES = ("\\boxed", "\\fbox")
_DISPLAYS = {"\\[": "\\]", "$$": "$$"}
_UNBRACED = re.compile(r" *([+-]?[0-9][0-9.,/]*|[A-Za-z](?![A-Za-z]))")

_INLINE_MATH = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$|\\\((.+?)\\\)")
# Prose that says something else than that it is so.
_RESERVED = re.compile(
    r"(?i)\b(?:not|no|never|cannot|or|nor|but|if|unless|except|wrong|incorrect|less|more|fewer|greater|than|least|most|"
    r"about|approximately|roughly|nearly|almost|between|either|neither|times|half|twice)\b|n't\b"
)
_OPTION = re.compile(
    r"(?i:the )?(?i:correct |best |final )?(?i:option|choice|answer)?(?: is)?:? ?"
    r"(?:[(\[]([A-J])[)\]][.:,]?(?: .*)?|([A-J])(?:[).:](?: ?[^ ].*)?)?)"
)
_ANOTHER_OPTION = re.compile(r"\([A-J]\)|\b[A-J]\)|\b(?:and|or)\b \(?[A-J]\b|\\(?:and|or)\b|[, ]\(?[A-J]\)?$")
_LABEL = re.compile(r"(?:\(([A-J])\)|([A-J])[).:]) ?(?=.*[0-9A-Za-z])")


def final_answer(response: str) -> str | None:
    r"""Find what a response gives as its answer, or None: the line after the last `Answer:` or the content of the last
    `\boxed{}` or `\fbox{}`, whichever stands later; a box in that line wins."""
    start, end = -1, 0
    for mark in _ANSWER_MARK.finditer(response):
        start, end = mark.span()
    box = max(response.rfind(command) for command in _BOXES)
    boxed = _boxed(response[box : box + LONGEST_ANSWER_CHARACTERS + 20]) if box >= 0 else None
    if start < 0 or (box > start and boxed):
        return boxed
    # The answer may stand on the line after "Answer:", and the mark may be bold ("**Answer:** 7").
    rest = response[end:].lstrip("* \t\r\n")
    closing = _DISPLAYS.get(rest[:2])
    if closing and 0 < (end := rest.find(closing, 2)) <= LONGEST_ANSWER_CHARACTERS:
        return rest[2:end]
    return rest.partition("\n")[0].strip() or boxed


def option_of(answer: str) -> str | None:
    """The letter of a multiple-choice answer, A to J: `(B)`,
    `B) 34`, `Option B.`, `b`; None where it is none, or two."""
    text = _plain(answer)
    if re.fullmatch(r"[(\[]?[a-j][)\]]?", text):
        return text.strip("()[]").upper()
    match = _OPTION.fullmatch(text)
    if match is None:
        return None
    which = 1 if match[1] else 2
    return None if _ANOTHER_OPTION.search(text[match.end(which) + 1 :]) else match[which]


def labelled(answer: str) -> tuple[str | None, str]:
    r"""(option, value) of an option with its value, `\textbf{(B)}\ 26`; (None, answer) where it is none."""
    text = _plain(answer)
    match = _LABEL.match(text)
    if match is None or option_of(answer) is None:
        return None, answer
    return match[1] or match[2], clean(answer).partition(match[0].strip())[2].strip() or answer


def lone_formula(line: str) -> str:
    """The formula, and what may be its unit, of a line of prose with one formula and no digit outside;
    else the line."""
    formulas = list(_INLINE_MATH.finditer(line))
    if len(formulas) != 1:
        return line
    found = formulas[0]
    before, after = line[: found.start()], line[found.end() :]
    around = before + after
    if not re.search("[A-Za-z]{2}", around) or re.search(r"[0-9\\%]", around) or _RESERVED.search(around):
        return line
    formula = found[1] or found[2]
    with_unit = f"{formula} {after.strip('. ')}"
    return with_unit if measured(clean(with_unit))[0].unit is not None else formula


def _plain(answer: str) -> str:
    return " ".join(unwrap_text(clean(answer.strip("*` \n"))).split()).strip(". ")


def _boxed(text: str) -> str | None:
    r"""The content of the box that opens `text`: `\boxed{7}`, `\boxed {7}`, `\boxed 7`."""
    rest = text.partition("box")[2].removeprefix("ed").lstrip()
    if rest.startswith("{"):
        return braced(rest[1:])
    match = _UNBRACED.match(rest)
    return match[1].rstrip(".,") if match else None
