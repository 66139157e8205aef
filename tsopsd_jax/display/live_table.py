"""The progress of a run as text: a live table on a terminal, aligned lines in a log; and the table of its results."""

import contextlib
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tsopsd_jax.display.foreign_text import one_line
from tsopsd_jax.display.numbers import DASH, count, duration, finite, fixed
from tsopsd_jax.display.screen import in_ascii, library_messages
from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.metric_names import (
    ACCURACY,
    ENTROPY,
    GRAD_NORM,
    GROUPS_KEPT,
    LENGTH,
    REWARD,
    STEP_S,
    TOKENS_PER_S,
    TRUNCATED,
)
from tsopsd_jax.rollout import Progress

ROWS = 12
"""Steps shown at once on a terminal."""

PHASE_STYLES = ("cyan", "yellow", "green", "magenta", "blue")
"""Colours of phases in the order of their appearance; a phase that comes again keeps its colour."""

BARS = "▁▂▃▄▅▆▇█"
TREND_BUCKETS = 128
TREND_WORDS = 32
"""Characters of a terminal's line that the trend leaves to the words around it."""
WIDE, WIDEST = 96, 124
"""Widths of a terminal from which titles are written out, and from which more columns are shown."""


class Column(NamedTuple):
    """One column: its title, a short one for narrow terminals, its width in a log, the key of the metrics line, and how
    a value is written."""

    title: str
    short: str
    width: int
    key: str
    write: Callable[[Any], str]


COLUMNS = (
    Column("step", "step", 7, "step", fixed),
    Column("entropy (nats)", "entropy", 14, ENTROPY, lambda v: fixed(v, ".4f")),
    Column("reward", "reward", 8, REWARD, lambda v: fixed(v, ".3f")),
    Column("accuracy", "acc.", 8, ACCURACY, lambda v: fixed(v, ".1%")),
    Column("length", "length", 7, LENGTH, count),
    Column("grad norm", "grad", 9, GRAD_NORM, lambda v: fixed(v, ".3g")),
    Column("tokens/s", "tok/s", 8, TOKENS_PER_S, count),
)
MORE_COLUMNS = (
    Column("cut off", "cut", 7, TRUNCATED, lambda v: fixed(v, ".1%")),
    Column("groups kept", "kept", 11, GROUPS_KEPT, lambda v: fixed(v, ".0%")),
    Column("step (s)", "s", 8, STEP_S, lambda v: fixed(v, ".1f")),
)
"""Columns that only a wide terminal has room for."""


class Trend:
    """A value over the whole run in at most `TREND_BUCKETS` means; halves its resolution when full."""

    def __init__(self):
        self._buckets: list[tuple[float, int, str]] = []  # total, count, style of the last value
        self._per_bucket = 1

    def add(self, value: float, style: str) -> None:
        """Append one value of a phase drawn in `style`."""
        if self._buckets and self._buckets[-1][1] < self._per_bucket:
            total, count, _ = self._buckets.pop()
            self._buckets.append((total + value, count + 1, style))
            return
        if len(self._buckets) == TREND_BUCKETS:
            pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
            self._buckets = [(a + b, m + n, style_b) for (a, m, _), (b, n, style_b) in pairs]
            self._per_bucket *= 2
        self._buckets.append((value, 1, style))

    def text(self, columns: int = TREND_BUCKETS) -> Text:
        """One block character per bucket, from the lowest mean to the highest, on a logarithmic scale; buckets are
        joined to at most `columns` characters."""
        each = -(-len(self._buckets) // max(1, columns)) or 1
        joined = [self._buckets[at : at + each] for at in range(0, len(self._buckets), each)]
        means = [sum(total for total, _, _ in part) / sum(count for _, count, _ in part) for part in joined]
        # A collapse is a matter of factors: on a linear scale its bottom, where reheating happens, is flat.
        heights = [math.log(max(mean, 1e-6)) for mean in means]
        text = Text()
        for height, part in zip(heights, joined, strict=True):
            share = (height - min(heights)) / ((max(heights) - min(heights)) or 1.0)
            text.append(BARS[round(share * (len(BARS) - 1))], style=part[-1][2])
        if means:
            text.append(f"  {min(means):.3g} to {max(means):.3g} nats", style="dim")
        return text


class LiveTable:
    """Shows the steps of a run as they come: a live table on a terminal, else a line every `every` steps.

    Used as a context manager, in which it also shows what the main thread says by `heartbeat.tick`. `stream`: where to
    write, standard output by default. It is the live table if the stream is a terminal that takes Unicode. Several
    threads may call it.
    """

    def __init__(self, *, stream: TextIO | None = None, every: int = 10):
        out: TextIO = stream or sys.stdout
        console = Console(file=out, highlight=False)
        # A dumb terminal cannot be drawn over, and a screen that is not Unicode has none of the characters.
        self.live = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
        self._view = _Screen(console) if self.live else _Lines(out, every)
        self._doing = ""
        self._lock = threading.RLock()
        self._heard = contextlib.ExitStack()

    def phase(self, name: str, until: str) -> None:
        """Announce a phase and, in words, what ends it."""
        with self._lock:
            self._view.phase(one_line(name), one_line(until))

    def step(self, line: Mapping[str, Any], time_left_s: float | None = None) -> None:
        """Show a metrics line; values that are absent or null show as `-`."""
        with self._lock:
            self._view.step(line, time_left_s)

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take in the metrics lines of steps that an earlier process took: rows and trend stand as it left them."""
        with self._lock:
            self._view.restore(lines)

    def sampling(self, progress: Progress) -> None:
        """Show how far a rollout is; on a log, at most a line a minute after the first minute."""
        text = f"{progress.finished:,} of {progress.rows:,} responses, {progress.tokens:,} tokens"
        left = f", {duration(progress.left_s)} left" if progress.finished else ""
        with self._lock:
            self._view.status(f"{self._doing or 'sampling'}: {text}{left}")

    def status(self, text: str) -> None:
        """Show what is being done now; on a log, at most a line a minute after the first minute."""
        with self._lock:
            self._view.status(text)

    def _hear(self, doing: str) -> None:
        self._doing = doing
        self.status(doing)

    def note(self, text: str) -> None:
        """Write a message that stays: above the live table, or as a line of its own."""
        with self._lock:
            self._view.note(one_line(text))

    @contextlib.contextmanager
    def without_messages(self, file: Path) -> Iterator[None]:
        """Inside the block keep what libraries log and write to standard error out of the live table: in `file`. In a
        log it stands where it always does."""
        if not self.live:
            yield
            return
        before = file.stat().st_size if file.is_file() else 0
        with library_messages(file):
            yield
        size = file.stat().st_size if file.is_file() else before
        if size > before:
            self.note(f"messages of libraries are in {file}")
        elif not size:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the screen as it is, the cursor below the table."""
        self._heard.close()
        self._view.close()

    def __enter__(self) -> "LiveTable":
        self._view.open()
        self._heard.enter_context(heartbeat.heard_by(self._hear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Screen:
    """The live table. It redraws when told something, never by itself: no thread beside the training loop."""

    def __init__(self, console: Console):
        self._console = console
        self._rows: deque[tuple[str, Mapping[str, Any]]] = deque(maxlen=ROWS)
        self._trend = Trend()
        self._styles: dict[str, str] = {}
        self._now: tuple[str, str] | None = None
        self._left_s: float | None = None
        self._status = ""
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)

    def _style(self, phase: str) -> str:
        return self._styles.setdefault(phase, PHASE_STYLES[len(self._styles) % len(PHASE_STYLES)])

    def phase(self, name: str, until: str) -> None:
        self._now, self._left_s = (name, until), None
        self._style(name)
        self._live.refresh()

    def step(self, line: Mapping[str, Any], time_left_s: float | None) -> None:
        self._add(line)
        self._left_s, self._status = time_left_s, ""
        self._live.refresh()

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            self._add(line)
        self._live.refresh()

    def _add(self, line: Mapping[str, Any]) -> None:
        phase = str(line.get("phase") or (self._now[0] if self._now else "-"))
        self._rows.append((phase, line))
        style = self._style(phase)
        if (entropy := finite(line.get(ENTROPY))) is not None:
            self._trend.add(entropy, style)

    def status(self, text: str) -> None:
        self._status = text
        self._live.refresh()

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def open(self) -> None:
        self._live.start(refresh=False)

    def close(self) -> None:
        self._status = ""
        if self._live.is_started:
            self._live.refresh()
        self._live.stop()

    def _render(self) -> Group:
        parts: list[Text | Table] = []
        if self._now is not None:
            name, until = self._now
            left = "" if self._left_s is None else f"   {duration(self._left_s)} left"
            head = Text.assemble(
                (f"● {name}", f"bold {self._style(name)}"), (left, "bold"), (f"   until {until}", "dim")
            )
            parts.append(head)
        if self._rows:
            trend = self._trend.text(self._console.width - TREND_WORDS)
            parts += [Text.assemble(("entropy  ", "dim"), trend), Text(), self._table()]
        if self._status:
            parts.append(Text(self._status, style="dim"))
        for part in parts:
            if isinstance(part, Text):
                part.no_wrap, part.overflow = True, "ellipsis"
        return Group(*parts)

    def _table(self) -> Table:
        width = self._console.width
        columns = (*COLUMNS, *MORE_COLUMNS) if width >= WIDEST else COLUMNS
        table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
        table.add_column("phase", no_wrap=True, max_width=16 if width >= WIDE else 10)
        for column in columns:
            title = column.title if width >= WIDE else column.short
            table.add_column(title, justify="right", no_wrap=True)
        shown = list(self._rows)[-max(1, min(ROWS, self._console.height - 6)) :]
        for index, (phase, line) in enumerate(shown):
            cells = (column.write(line.get(column.key)) for column in columns)
            last = index == len(shown) - 1
            table.add_row(Text(phase, style=self._style(phase)), *cells, style="bold" if last else "")
        return table


class _Lines:
    """Plain aligned lines: every `every` steps, and the first and the last step of each phase."""

    REPEAT_HEADER_LINES = 20
    FIRST_STATUS_S, STATUS_S = 5.0, 60.0

    def __init__(self, stream: TextIO, every: int):
        self._stream = stream
        self._every = every
        self._since_header = self.REPEAT_HEADER_LINES
        self._phase: str | None = None
        self._seen = 0  # steps of the phase
        self._held: str | None = None  # the latest step's line, while it is not written
        self._said = time.monotonic()  # something, last
        self._silence_s = self.FIRST_STATUS_S  # after which a status is written; twice that after each

    def phase(self, name: str, until: str) -> None:
        self._flush_held()
        self._phase, self._seen = name, 0
        self._print(f"== phase {name}: until {until}")
        self._since_header = self.REPEAT_HEADER_LINES

    def step(self, line: Mapping[str, Any], time_left_s: float | None) -> None:
        phase = str(line.get("phase") or self._phase or "-")
        if phase != self._phase:
            self._flush_held()
            self._phase, self._seen = phase, 0
        cells = [column.write(line.get(column.key)).rjust(column.width) for column in COLUMNS]
        self._held = "  ".join([_cut(phase, 12), *cells, duration(time_left_s).rjust(9)])
        if self._seen % self._every == 0:
            self._flush_held()
        self._seen += 1

    def status(self, text: str) -> None:
        if time.monotonic() - self._said >= self._silence_s:
            self._silence_s = min(2 * self._silence_s, self.STATUS_S)
            self._flush_held()
            self._print(text)

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        pass  # a log holds them, or another one does

    def note(self, text: str) -> None:
        self._flush_held()  # in the order of what happened
        self._print(text)

    def open(self) -> None:
        pass

    def close(self) -> None:
        self._flush_held()

    def _flush_held(self) -> None:
        if self._held is None:
            return
        if self._since_header >= self.REPEAT_HEADER_LINES:
            titles = [column.title.rjust(column.width) for column in COLUMNS]
            self._print("  ".join(["phase".ljust(12), *titles, "time left"]))
            self._since_header = 0
        self._print(self._held)
        self._since_header += 1
        self._held = None

    def _print(self, text: str) -> None:
        self._said = time.monotonic()
        self._stream.write(in_ascii(text, self._stream.encoding or "utf-8") + "\n")
        self._stream.flush()


def _cut(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "~"


def results_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Write evaluations as aligned text: avg@k ± standard error and pass@k in percent, mean length in tokens."""
    if not records:
        return "no evaluations"
    samples = {record.get("samples") for record in records}
    k = samples.pop() if len(samples) == 1 else None
    shown_k = "k" if k is None else str(k)
    rows = [["stage", "step", "benchmark", f"avg@{shown_k} (%)", f"pass@{shown_k} (%)", "length (tokens)"]]
    for record in records:
        average, error = (fixed(record.get(key), ".1f", 100) for key in ("avg_at_k", "avg_at_k_stderr"))
        rows.append(
            [
                str(record.get("stage", "-")),
                fixed(record.get("step")),
                str(record.get("benchmark", "-")),
                average if error == DASH else f"{average} ± {error}",
                fixed(record.get("pass_at_k"), ".1f", 100),
                fixed(record.get("length_mean_tokens"), ".1f"),
            ]
        )
        if k is None:
            rows[-1].append(fixed(record.get("samples")))
    if k is None:
        rows[0].append("k")
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    left = {0, 2}  # text to the left, numbers to the right
    lines = [
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])
