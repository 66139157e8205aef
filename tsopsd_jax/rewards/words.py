"""Answers in words: yes and no, no solution, numbers spelled out, times of day; compared as words,
never as formulas."""

import re

_ONES_TEXT = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS_TEXT = "twenty thirty forty fifty sixty seventy eighty ninety"
_ONES, _TENS = _ONES_TEXT.split(), _TENS_TEXT.split()
_NUMBERS = {word: number for number, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_NUMBERS |= {f"{ten}-{one}": _NUMBERS[ten] + i for ten in _TENS for i, one in enumerate(_ONES[1:10], 1)}
_NUMBERS |= {f"{ten} {one}": _NUMBERS[ten] + i for ten in _TENS for i, one in enumerate(_ONES[1:10], 1)}
_NUMBERS |= {"hundred": 100, "one hundred": 100, "one thousand": 1000, "one million": 10**6}
# Several ways to say one thing, without blanks.
_MEANINGS = {
    "emptyset": "thereisnosolution therearenosolutions none nosolution nosolutions "
    "nosolutionexists norealsolution norealsolutions \\emptyset \\{\\} emptyset theemptyset nullset",
    "none": "doesnotexist dne thelimitdoesnotexist limitdoesnotexist undefined notdefined",
    "infinitelymany": "infinitelymany infinitelymanysolutions infinitesolutions",
    "allreals": "allrealnumbers allreals allrealx \\mathbb{R} (-\\infty,\\infty)",
}
_MEANING = {spelling: meaning for meaning, spellings in _MEANINGS.items() for spelling in spellings.split()}
_LETTERS = re.compile(r"[A-Za-z' -]+")
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?(?:([ap])\.?m\.?)?")


def number_in_words(text: str) -> str | None:
    """The digits of a number spelled out (`twenty-one`), or None."""
    word = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().lower()
    return str(_NUMBERS[word]) if word in _NUMBERS else None


def same(given: str, wanted: str) -> bool | None:
    """Whether two texts without blanks that are not equal mean the same; None where one is no words."""
    a, b = given.casefold().rstrip("."), wanted.casefold().rstrip(".")
    if (times := [_TIME.fullmatch(text.replace("\\", "")) for text in (a, b)]) != [None, None]:
        verdict = _same_time(times)
        if verdict is not None:
            return verdict
    meanings = _MEANING.get(a), _MEANING.get(b)
    if None not in meanings:
        return meanings[0] == meanings[1]
    letters = [_LETTERS.fullmatch(text) is not None for text in (given, wanted)]
    if all(letters) and min(len(a), len(b)) > 2:
        return a == b
    # One side alone is prose where it is no product of variables.
    if meanings == (None, None) and any(two and len(text) > 3 for two, text in zip(letters, (a, b), strict=True)):
        return a == b
    if re.search("[a-z]{3}", a) and a == b and "\\" not in a:
        return True
    return None


def _same_time(times: list) -> bool | None:
    """Times of day are equal in all of their parts; what could be a ratio is left to others."""
    parts = [match and match.groups() for match in times]
    if None in parts:
        return False if any(part and (part[3] or part[1][0] == "0") for part in parts) else None
    if any(part[3] for part in parts):
        return [int(x or 0) for x in parts[0][:3]] == [int(x or 0) for x in parts[1][:3]] and parts[0][3] == parts[1][3]
    # 2:30 and 1:15: as ratios these are equal, as times not.
    return False
