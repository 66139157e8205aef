"""Texts that a model, a file or a program made, shown where they can do no harm."""

import re
from typing import Any

LONGEST_LINE = 2_000
"""Characters of a foreign text that are shown in one line."""
CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Control characters but for tab and line feed: escape sequences, carriage returns, bells."""
TURNS = "\u202a-\u202e\u2066-\u2069"
"""Marks of Unicode that turn the direction of all that follows."""
HALVES = "\ud800-\udfff"
"""Surrogates: halves of characters, which no stream can write."""
_UNSAFE = re.compile(f"[{CONTROLS}{TURNS}{HALVES}]")


def one_line(text: Any) -> str:
    """Write a foreign text as one line that does nothing to a terminal.

    White space becomes one space; what could move the cursor, recolour, turn the text round or not be written at all
    becomes its escape such as `\\x1b`; a long text loses its middle.
    """
    line = " ".join(str(text).split())
    if len(line) > LONGEST_LINE:
        left_out = len(line) - LONGEST_LINE
        line = f"{line[: LONGEST_LINE * 3 // 4]} [... {left_out:,} characters ...] {line[-LONGEST_LINE // 4 :]}"
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], line)
