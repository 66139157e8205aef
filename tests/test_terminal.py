"""A run on a real terminal: signals are answered at once, and libraries write elsewhere than into the table."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.display import live_page as live_page_module
from tsopsd_jax.display.live_page import LivePage
from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.train import signals
from tsopsd_jax.train.compile_ahead import Compilations
from tsopsd_jax.train.perf import Pace

PROGRAM = """
import hashlib, logging, os, sys, warnings
from pathlib import Path
from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.train import signals

signals.LEAVING_S = float(sys.argv[2])
with LiveTable() as table, table.without_messages(Path(sys.argv[1])):
    stop = signals.StopRequest(table.note, table.close)
    with stop.heard():
        warnings.warn("a warning of Python")
        logging.getLogger("library").warning("a line of logging")
        os.write(2, b"a line of C++\\n")
        print("ours", file=sys.stderr)
        table.step({"step": 1, "phase": "rl", "policy/entropy_nats": 0.5})
        heartbeat.tick("updating")
        # One call that no signal ends, as a compilation is.
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(float(sys.argv[3])))
        print("over", stop.number)
"""


COMPILES = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from tsopsd_jax import cli

def run(_):
    ThreadPoolExecutor(1, thread_name_prefix="compile").submit(time.sleep, 300)
    return int(sys.argv[2])

cli._module = lambda name: SimpleNamespace(add=lambda parser: parser.add_argument("code"), run=run)
sys.exit(cli.program())
"""


class Terminal:
    """A program on a terminal of 80 columns, and what it wrote there so far."""

    def __init__(self, *command):
        self._screen, theirs = pty.openpty()
        env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        self.program = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        self.text = ""

    def read_until(self, text, seconds=300.0):
        """Read until `text` was written, within so many seconds, or until the program's end if that is None."""
        began = time.monotonic()
        while text is None or text not in self.text:
            assert time.monotonic() - began < seconds, self.text
            if not select.select([self._screen], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self._screen, 65536)
            except OSError:  # nobody has the terminal any more
                break
            self.text += re.sub(r"\x1b\[[0-9;]*[mKA]", "", data.decode())
        assert text is None or text in self.text, self.text


@pytest.fixture
def terminal():
    made = []

    def start(*command):
        made.append(Terminal(sys.executable, *command))
        return made[-1]

    yield start
    for each in made:
        each.program.kill()
        each.program.wait()


def test_a_signal_is_answered_while_nothing_else_can_be(terminal, tmp_path):
    """The main thread is in a call of minutes; a second signal ends the process all the same."""
    screen = terminal("-c", PROGRAM, str(tmp_path / "messages.log"), "0.3", "2e9")
    screen.read_until("updating")
    time.sleep(0.2)  # in which it enters the call
    screen.program.send_signal(signal.SIGINT)
    screen.read_until("SIGINT: finishing the step; again to stop now")
    assert screen.program.poll() is None
    screen.program.send_signal(signal.SIGINT)
    screen.read_until(None, seconds=60.0)
    assert screen.program.wait() == exit_codes.INTERRUPTED == signals.EXIT_INTERRUPTED
    assert "interrupted; the same command goes on from the last checkpoint" in screen.text
    assert "Traceback" not in screen.text
    assert screen.text.rindex("\x1b[?25h") > screen.text.rindex("\x1b[?25l")  # the cursor is shown again


def test_the_table_is_kept_from_what_libraries_write(terminal, tmp_path):
    messages = tmp_path / "messages.log"
    screen = terminal("-c", PROGRAM, str(messages), "60", "1e6")
    screen.read_until("updating")
    screen.program.send_signal(signal.SIGTERM)
    screen.read_until(None)
    assert screen.program.wait() == 0
    assert "over 15" in screen.text  # SIGTERM, heard by the loop once the call was over
    assert "SIGTERM: finishing the step" in screen.text
    assert "ours" in screen.text
    for text in ("a warning of Python", "a line of logging", "a line of C++"):
        assert text not in screen.text
        assert text in messages.read_text()
    assert f"messagesoflibrariesarein{messages}" in "".join(screen.text.split())  # the terminal breaks long lines


def test_messages_that_nobody_wrote_leave_no_file(tmp_path):
    from tsopsd_jax.display.screen import library_messages

    before = os.fstat(2).st_ino
    with library_messages(tmp_path / "messages.log"):
        os.write(2, b"one\n")
    with library_messages(tmp_path / "messages.log"):
        os.write(2, b"two\n")
    assert (tmp_path / "messages.log").read_text() == "one\ntwo\n"
    assert os.fstat(2).st_ino == before


def test_a_process_that_a_signal_ends_does_not_wait_for_a_compilation():
    done = subprocess.run([sys.executable, "-c", COMPILES, "report", "4"], timeout=60, check=False)
    assert done.returncode == exit_codes.INTERRUPTED
    with pytest.raises(subprocess.TimeoutExpired):  # any other end is an orderly one
        subprocess.run([sys.executable, "-c", COMPILES, "report", "0"], timeout=3, check=False)


def test_compilations_of_the_main_thread_are_said_and_timed():
    said = []
    compilations = Compilations()
    heartbeat.tick("step 3: updating")
    with heartbeat.heard_by(said.append), compilations.told():
        jax.jit(lambda x: x * 3.25)(np.float32(1.0))
        there = compilations.seconds
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: jax.jit(lambda x: x * 4.25)(np.float32(1.0))).result()
        assert compilations.seconds == there
    assert said == ["step 3: updating (compiling)", "step 3: updating"]
    assert there > 0
    jax.jit(lambda x: x * 5.25)(np.float32(1.0))
    assert compilations.seconds == there


def live_page(run_dir, times, said):
    """A page every 100 s; `times` are what the clock shows each time it is looked at."""
    clock = iter(times)
    return LivePage(run_dir, every_s=100, say=said.append, clock=lambda: next(clock))


def test_the_page_is_written_when_due_and_never_for_over_a_hundredth_of_the_time(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(live_page_module, "write_report", written.append)
    # Made at 0; asked at 99 (early), at 100 (takes 2 s: a hundredth of 200 s, so due at 302), at 301 and 302.
    page = live_page(tmp_path, [0.0, 99.0, 100.0, 102.0, 301.0, 302.0, 302.5], [])
    for expected in (0, 1, 1, 2):
        page()
        assert len(written) == expected
    never = LivePage(tmp_path, every_s=0, say=written.append, clock=lambda: 1e9)
    never()
    assert len(written) == 2


def test_a_page_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path):
    said = []
    page = live_page(tmp_path, [0.0, 100.0, 100.0, 200.0, 200.0], said)
    page()  # there is no metrics.jsonl
    page()
    assert len(said) == 1
    assert said[0].startswith("warning: the page was not written (ValueError: expected a run directory")


def test_the_time_left_is_without_the_first_step():
    pace = Pace()
    pace.add(500.0)  # programs were compiled
    assert pace.left_s(10) is None
    pace.add(3.0)
    assert pace.left_s(10) == 30.0
    for seconds in (4.0, 100.0):  # a step of another shape
        pace.add(seconds)
    assert pace.left_s(10) == 40.0  # the median of 3, 4 and 100
    for _ in range(9):
        pace.add(2.0)
    assert pace.left_s(10) == 20.0  # of the latest nine
