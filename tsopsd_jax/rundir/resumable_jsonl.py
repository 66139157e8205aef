"""Files of JSON lines that the same command resumes after an interruption,
with the settings that they were begun with."""

import io
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsopsd_jax.rundir import files
from tsopsd_jax.writing import writes_to

_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
BEGUN = "begun"
"""Key of the time at which a file was begun; it stands among the settings and is none."""


def settings_file(out: Path) -> Path:
    """Name the file that holds the settings of `out`, beside it."""
    return out.with_name(out.name + ".settings.json")


def read_output_settings(out: Path, *numbers: str) -> dict[str, Any]:
    """Read the settings that `out` was begun with.

    Args:
        numbers: settings that must be there, as numbers.

    Raises:
        ValueError: there are none, so another program wrote `out`; or they cannot be read.
    """
    beside = settings_file(out)
    if not beside.is_file():
        raise ValueError(
            f"{out} exists and was not written by this command ({beside.name} is missing); choose another --out"
        )
    what, remedy = f"the settings that {out.name} was begun with", "choose another --out, or --again"
    found = files.read_object(beside, what=what, remedy=remedy)
    for name in numbers:
        if type(found.get(name)) not in (int, float):
            raise ValueError(f"{beside}: expected {what}, got {found.get(name)!r:.80} as {name}; {remedy}")
    return found


def first_changed(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """Describe the first setting that differs as `name: theirs != mine`; None if none does."""
    for name in [n for n in {**mine, **theirs} if n != BEGUN]:
        if mine.get(name) != theirs.get(name):
            return f"{name}: {theirs.get(name)!r} != {mine.get(name)!r}"
    return None


def check_ours(out: Path, settings: Mapping[str, Any]) -> None:
    """Check that `out` is absent, or was begun with these settings.

    Raises:
        ValueError: another program wrote it, or other settings (the first is named).
    """
    if out.exists() and (differs := first_changed(read_output_settings(out), settings)):
        raise ValueError(
            f"{out} was begun with other settings ({differs}); choose another --out, or --again to replace it"
        )


def remove(out: Path) -> None:
    """Remove `out` and its settings, to begin anew; no other file is touched.

    Raises:
        ValueError: another program wrote `out`.
    """
    if out.exists():
        read_output_settings(out)
        out.unlink()
    settings_file(out).unlink(missing_ok=True)


def lines(out: Path, *keys: str) -> list[dict[str, Any]]:
    """Read the lines of `out`, without a half-written last one; none if it is absent.

    Args:
        keys: of numbers or texts that each line must have.

    Raises:
        ValueError: a line lacks one, or a line before the last is no object; names the line.
    """
    found = files.read_objects(out)
    for number, line in enumerate(found, start=1):
        for key in keys:
            if not isinstance(line.get(key), int | float | str):
                raise ValueError(
                    f"{out}, line {number}: expected a number or a text as {key}, got {line.get(key)!r:.80}; remove "
                    "that line to go on"
                )
    return found


def claim_output(out: Path, settings: Mapping[str, Any]) -> None:
    """Make `out` and the file of its settings if it is absent; else cut off a half-written last line.

    Raises:
        ValueError: another program wrote it, or other settings (the first is named), or a line in its midst is broken.
    """
    check_ours(out, settings)
    if not out.exists():
        text = json.dumps({**settings, BEGUN: time.time()}, indent=1) + "\n"
        with writes_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            files.replace(settings_file(out), [text.encode()])
            out.touch()
    elif sum(len(line) for line, _ in files.json_lines(out)) != out.stat().st_size:
        files.mend(out)


def open_lines(out: Path) -> io.FileIO:
    """Open `out` for `append`.

    Raises:
        WriteError: it cannot be opened.
    """
    with writes_to(out):
        return out.open("ab", buffering=0)


def append(file: io.FileIO, line: Mapping[str, Any]) -> None:
    """Append a line at once, so that what was sampled is kept. A text that UTF-8 cannot hold, or that some readers
    would take for two lines, is written with escapes.

    Raises:
        WriteError: it could not be written; what was before it stays.
    """
    text = json.dumps(line, ensure_ascii=False)
    files.append_bytes(file, (json.dumps(line) if _ESCAPED.search(text) else text).encode() + b"\n")
