"""The verifier of answers that are one number, for models too small to be told a format."""

import re
from fractions import Fraction

# A minus sign after a digit is a subtraction.
_NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_LONGEST_CHARACTERS = 30


def verify_last_number(response: str, gold: str) -> float:
    """Score 1.0 if the last number in the response equals `gold`, itself a number, else 0.0.

    Integers and decimals in ASCII digits, with thousands separators or without, compared exactly; a number of more than
    30 characters is wrong. Never raises, and takes time linear in the response's length.
    """
    if not _NUMBER.fullmatch(gold):
        return 0.0
    found = ""
    for match in _NUMBER.finditer(response):
        found = match[0]
    if not 0 < len(found) <= _LONGEST_CHARACTERS or len(gold) > _LONGEST_CHARACTERS:
        return 0.0
    return 1.0 if Fraction(found.replace(",", "")) == Fraction(gold.replace(",", "")) else 0.0
