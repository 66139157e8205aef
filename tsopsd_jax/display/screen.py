"""Standard output and error that can break without ending a run: a viewer that goes away, a full disk,
another character set."""

import codecs
import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

PLAIN = {"±": "+-", "─": "-", "–": "-", "→": "->", "≥": ">=", "…": "...", "●": "*", "✓": "+", "✗": "x"}
"""Spellings of the characters that are shown, for character sets that lack them; others become `?`."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end


codecs.register_error("tsopsd.plain", _plain)


def in_ascii(text: str, encoding: str) -> str:
    """Write `text` in the characters that `encoding` has."""
    return text.encode(encoding, "tsopsd.plain").decode(encoding)


class _Raw(io.FileIO):
    """A descriptor that becomes the null device at the first write that fails.

    Args:
        keep_going: whatever it was that failed; else only because the reader went away, and other errors are raised.
    """

    def __init__(self, descriptor: int, keep_going: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._keep_going = keep_going

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if not (self._keep_going or isinstance(error, BrokenPipeError)):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # not only for us: libraries write there too
            os.close(null)
            written = None
        # None: the reader of a pipe that does not block is slow; what it cannot take is not worth waiting for.
        return memoryview(data).nbytes if written is None else written


def secure(*, keep_going: bool) -> None:
    """Keep this process from ending because what it prints cannot be shown.

    Args:
        keep_going: for whatever reason; else only if the viewer went away, and other errors are raised as usual.

    Descriptors 0 to 2 that were closed (`>&-`) become the null device: the next file opened, such as a log, would take
    their place, and what libraries print would be written into it. Streams that somebody replaced are left alone.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest that is free: this one
    if sys.stdout is sys.__stdout__:
        sys.stdout = _secured(sys.stdout, keep_going)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _secured(sys.stderr, keep_going)


def _secured(stream: TextIO | None, keep_going: bool) -> TextIO:
    """Make a stream to the descriptor of `stream`,
    or to the null device for None (it was closed when the process began)."""
    if not isinstance(stream, io.TextIOWrapper):
        nowhere = io.BufferedWriter(_Raw(os.open(os.devnull, os.O_WRONLY), keep_going))
        return io.TextIOWrapper(nowhere, encoding="utf-8", errors="replace")
    raw = _Raw(stream.fileno(), keep_going)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType] - as Python does for -u
        encoding=stream.encoding,
        errors="tsopsd.plain",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Messages(logging.FileHandler):
    """A file of messages; those that a full disk does not take are left out."""

    def handleError(self, _record: logging.LogRecord) -> None:
        pass


@contextlib.contextmanager
def library_messages(file: Path) -> Iterator[None]:
    """Append to `file` what libraries log, warn of or write to descriptor 2, inside the block.

    What is printed to `sys.stderr` is shown as before, if that is a stream of its own meanwhile, as `rich.live.Live`
    makes one.
    """
    handler = _Messages(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, shown = logging.getLogger(), os.dup(2)
    before = root.handlers[:]
    root.handlers[:] = [handler]
    logging.captureWarnings(True)
    with file.open("ab") as out:
        os.dup2(out.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        logging.captureWarnings(False)
        root.handlers[:] = before
        with contextlib.suppress(OSError):  # a full disk
            handler.close()
