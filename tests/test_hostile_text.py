"""Text that a model wrote to do harm is shown escaped and bounded, wherever it is shown."""

import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tsopsd_jax.commands import exit_codes, status
from tsopsd_jax.display import live_table
from tsopsd_jax.display.foreign_text import LONGEST_LINE, one_line
from tsopsd_jax.display.page import write_report
from tsopsd_jax.rundir import resumable_jsonl
from tsopsd_jax.rundir.log import RunLog, read_evaluations, read_metrics, read_samples
from tsopsd_jax.rundir.trackers import Tracker

TITLE = "\x1b]0;owned\x07"
"""An escape sequence that names the terminal's window."""
HOSTILE = f"{TITLE}\x1b[2J\r\n\x00\x9b31m<script>alert(1)</script>\u202egnp.exe\u2066\ud800\u2028end"
LONG = HOSTILE + "x" * 1_000_000
HARM = ("\x1b", "\x07", "\x00", "\x9b", "\r", "\u202e", "\u2066", "\u2028", "\ud800")


def check_harmless(shown: str) -> None:
    """Nothing of the text acts on a terminal or on its reader, and all of it can be written."""
    assert not [mark for mark in HARM if mark in shown]
    shown.encode("utf-8")


def test_one_line_by_hand():
    assert one_line("a\n\tb  c\u2028d") == "a b c d"
    assert one_line("\x1b[31mred\x9b") == r"\x1b[31mred\x9b"
    assert one_line("\u202eabc\ud800") == r"\u202eabc\ud800"
    assert one_line("日本語, é, \u200f") == "日本語, é, \u200f"  # what is text stays text
    # 2,000 of 2,003 characters: 1,500 from the beginning, 500 from the end.
    assert one_line("a" * 1501 + "b" * 502) == "a" * 1500 + " [... 3 characters ...] " + "b" * 500


def test_a_log_and_a_terminal(monkeypatch):
    written = io.BytesIO()
    log = io.TextIOWrapper(written, encoding="utf-8")
    with live_table.LiveTable(stream=log) as table:
        table.phase(HOSTILE, HOSTILE)
        table.note(LONG)
        table.step({"step": 1, "phase": one_line(HOSTILE)})
    log.flush()
    shown = written.getvalue().decode()
    check_harmless(shown)
    assert "<script>" in shown, "as text"
    assert max(map(len, shown.splitlines())) < LONGEST_LINE + 100

    terminal = io.StringIO()
    drawn = Console(file=terminal, force_terminal=True, width=100, height=30)
    monkeypatch.setattr(live_table, "Console", lambda **_: drawn)
    with live_table.LiveTable(stream=terminal) as table:
        table.phase(HOSTILE, HOSTILE)
        table.note(LONG)
    shown = terminal.getvalue()
    assert TITLE not in shown
    assert "\x1b]" not in shown, "no sequence but those of the table itself"
    assert "\u202e" not in shown
    assert len(shown) < 20 * LONGEST_LINE


def test_an_error_that_quotes_a_file(capsys):
    assert exit_codes.explain("train", ValueError(f"row 3: expected an answer, got {LONG}")) == 2
    said = capsys.readouterr().err
    check_harmless(said)
    assert said.count("\n") == 1
    assert len(said) < LONGEST_LINE + 100


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        del attrs
        self.found.add(tag)


@pytest.fixture
def run_dir(tmp_path):
    """A run whose phase, responses, reasons and stall are hostile."""
    with RunLog(tmp_path, last_step=0, tracker=Tracker()) as log:
        log.write({"step": 1, "phase": HOSTILE, "phase_step": 1, "time_s": 1.0, "policy/entropy_nats": 0.3})
        kept = {"which": "best", "prompt": HOSTILE, "response": LONG, "answer": HOSTILE, "reward": 1.0}
        log.write_samples([{"step": 1, "phase": HOSTILE, "failed": [HOSTILE], **kept}])
        example = {"prompt": HOSTILE, "response": LONG, "answer": HOSTILE, "correct": False}
        log.write_evaluation({"stage": HOSTILE, "step": 1, "avg_at_k": 0.5, "examples": [example]})
        log.status.phase_ended(HOSTILE, 1, HOSTILE)
        log.status.state("failed", LONG)
    (tmp_path / "stall-0.txt").write_text(HOSTILE.replace("\ud800", "") + "\n  File in_a_read\n", encoding="utf-8")
    return tmp_path


def test_files_of_a_run_hold_it_as_it_is_a_record_a_line(run_dir):
    for name, read in (("metrics", read_metrics), ("samples", read_samples), ("evaluations", read_evaluations)):
        content = (run_dir / f"{name}.jsonl").read_bytes()
        assert content.isascii()
        assert len(content.decode().splitlines()) == len(read(run_dir)) == 1
    assert read_samples(run_dir)[0]["response"] == LONG


def test_status_of_a_run(run_dir):
    facts = status.facts_of(run_dir, now=2e9)
    lines = status.lines_of(facts)
    check_harmless("\n".join(lines).replace("\r", "!"))
    assert max(map(len, lines)) < LONGEST_LINE + 100
    assert any("in_a_read" in line for line in lines)
    json.dumps(facts).encode("ascii")


def test_the_page_of_a_run(run_dir):
    source = write_report(run_dir).read_text(encoding="utf-8")
    check_harmless(source.replace("\u2028", " "))  # a line end that only programs see: harmless in HTML
    assert "script" not in Tags(source).found
    assert "&lt;script&gt;" in source
    assert len(source) < 1_000_000


def test_responses_that_utf8_cannot_hold_are_kept(tmp_path):
    """And a line stays one for readers that split at all line ends of Unicode; other text is left readable."""
    out = tmp_path / "out.jsonl"
    with resumable_jsonl.open_lines(out) as file:
        resumable_jsonl.append(file, {"response": HOSTILE})
        resumable_jsonl.append(file, {"response": "日本"})
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["response"] for line in lines] == [HOSTILE, "日本"]
    assert "日本" in lines[1]
