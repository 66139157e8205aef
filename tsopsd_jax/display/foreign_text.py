"""Texts that a model, a file or a program made, shown where they can do no harm."""

import re
from typing import Any

from tsopsd_jax.rundir.sample_texts import shortened

LONGEST_LINE = 2_000
"""Characters of a foreign text that are shown in one line."""
CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Control characters but for tab and line feed: escape sequences, carriage returns, bells."""
TURNS = "\u202a-\u202e\u2066-\u2069"
"""Marks of Unicode that turn the direction of all that follows."""
HALVES = "\ud800-\udfff"
"""Surrogates: halves of characters, which no stream can write."""
_UNSAFE = re.compile(f"[{CONTROLS}{TURNS}{HALVES}]")


def harmless(text: str) -> str:
    """Write a foreign text, tabs and lines as they are, so that it does nothing to a terminal: what could move the
    cursor, recolour, turn the text round or not be written at all becomes its escape such as `\\x1b`."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: Any) -> str:
    """Write a foreign text as one `harmless` line: white space becomes one space, a long text loses its middle."""
    return harmless(shortened(" ".join(str(text).split()), LONGEST_LINE))
