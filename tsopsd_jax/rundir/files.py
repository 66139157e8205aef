"""Files that survive a crash: written aside and renamed, and JSON lines whose last one may be torn."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tsopsd_jax.writing import writes_to


def partial(path: Path) -> Path:
    """Name the file that `replace` writes before it becomes `path`; a process that died there leaves it."""
    return path.with_name(path.name + ".partial")


def replace(path: Path, content: Iterable[bytes], *, alone: bool = True) -> None:
    """Write `content` beside `path`, then rename: a crash leaves the old file or the new one, never half of one.

    Args:
        path: of the file.
        content: its bytes.
        alone: whether nobody else writes it at the same time; False: the last one's is there in the end, whole.

    Raises:
        WriteError: it could not be written; the old file stands, and nothing beside it takes up room.
    """
    aside = partial(path if alone else path.with_name(f"{path.name}.{os.getpid()}"))
    try:
        with writes_to(path):
            with aside.open("wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def append_bytes(file: io.FileIO, data: bytes) -> None:
    """Write all of `data` at the end of a file that was opened with `buffering=0`.

    Nothing is held back: what a full disk did not take is not tried again where the file is closed.

    Raises:
        WriteError: it could not be written; a part of it may stand there (see `mend`).
    """
    with writes_to(file.name):
        while data:
            data = data[file.write(data) :]


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Read a file's lines, each with its newline, and the JSON object in each.

    A last line that a crash tore is left out; one that lost only its newline is not.

    Raises:
        ValueError: a line before the last is no JSON object; names the file and the line.
    """
    with path.open("rb") as file:
        broken = 0
        for number, line in enumerate(file, start=1):
            if broken:
                raise ValueError(
                    f"expected one JSON object per line, got something else at {path}:{broken}: "
                    "remove that line to go on"
                )
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # no JSON, no text, or nested thousands of levels deep
                record = None
            if isinstance(record, dict):
                yield line if line.endswith(b"\n") else line + b"\n", record
            else:
                broken = number


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a file of JSON lines, one after the other; none if it is absent. Raises as `json_lines`
    does."""
    if path.is_file():
        for _, record in json_lines(path):
            yield record


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Read all objects of a file of JSON lines; none if it is absent. Raises as `json_lines` does."""
    return list(objects(path))


def read_object(path: Path, *, what: str, remedy: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        path: of a file that is there.
        what: what it holds, and `remedy`: what to do where it does not, for messages.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what}, got no JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected {what}, got a {type(found).__name__}; {remedy}")
    return found


def mend(path: Path, keep: Callable[[dict[str, Any]], bool] = lambda _: True) -> None:
    """Take from a file of JSON lines, if it exists, a torn end and the objects that `keep` rejects.

    The other lines stay as they are, byte for byte. What goes is nearly always the end of the file, which is cut off
    where it stands: that takes no room, and no time. Raises as `json_lines` does.
    """
    if not path.is_file():
        return
    at = end = 0
    for line, record in json_lines(path):
        if keep(record):
            if end < at:  # something before it goes
                replace(path, (line for line, record in json_lines(path) if keep(record)))
                return
            end += len(line)
        at += len(line)
    with writes_to(path), path.open("r+b", buffering=0) as file:
        missing = end - file.seek(0, os.SEEK_END)
        if missing > 0:  # the last line has lost its newline
            append_bytes(file, b"\n")
        elif missing < 0:
            file.truncate(end)
