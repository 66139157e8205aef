"""The live table, the plain lines of a log, and the table of results, as text."""

import io
import re

import pytest

from tsopsd_jax.display import live_table
from tsopsd_jax.display.live_table import LiveTable, Trend, results_table
from tsopsd_jax.display.numbers import duration
from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.rollout import Progress


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


@pytest.fixture
def log(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return io.StringIO()


def line(step, phase="dapo", **values):
    return {"step": step, "phase": phase, "policy/entropy_nats": 0.5 / step, "reward/mean": 0.25, **values}


def visible(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def last_frame(terminal):
    """What the last redraw left on the screen: a redraw begins by going up and clearing lines."""
    return visible(re.split(r"\x1b\[2K", terminal.getvalue())[-1]).splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (float("inf"), "-"),
        (-3.0, "0s"),
        (47.4, "47s"),
        (59.6, "1m 00s"),
        (185, "3m 05s"),  # 185 = 3 * 60 + 5
        (7620, "2h 07m"),  # 7620 = 2 * 3600 + 7 * 60
        (273600, "3d 04h"),  # 273600 = 3 * 86400 + 4 * 3600
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_log_gets_every_tenth_step_and_the_first_and_last_of_a_phase(log):
    with LiveTable(stream=log, every=10) as table:
        table.phase("collapse", "entropy < 0.08 nats")
        for step in range(1, 24):
            table.step(line(step, "collapse"), time_left_s=90)
        table.phase("reheat", "entropy >= 0.12 nats")
        for step in range(24, 28):
            table.step(line(step, "reheat"), time_left_s=None)
    text = log.getvalue()
    assert "\x1b" not in text
    steps = [int(match) for match in re.findall(r"^(?:collapse|reheat) +(\d+)", text, re.MULTILINE)]
    # collapse: its steps 1, 11, 21 of 23, then its last; reheat: its first, then its last
    assert steps == [1, 11, 21, 23, 24, 27]
    assert "== phase collapse: until entropy < 0.08 nats\n" in text
    assert text.index("     23 ") < text.index("== phase reheat")
    assert text.count("entropy (nats)") == 2  # the header, at each phase


def test_a_logs_columns_line_up_and_the_header_comes_again(log):
    with LiveTable(stream=log, every=1) as table:
        for step in range(1, 43):
            table.step(line(step, **{"rollout/tokens_per_s": 12345.0, "optim/grad_norm": 1e-5}), time_left_s=60)
    lines = log.getvalue().splitlines()
    headers = [at for at, text in enumerate(lines) if text.startswith("phase")]
    assert headers == [0, 21, 42]  # after every 20 steps
    assert {len(text) for text in lines} == {len(lines[0])}
    end = lines[0].index("entropy (nats)") + len("entropy (nats)")
    assert lines[1][:end].endswith(" 0.5000")  # 0.5 / 1
    assert lines[1].split() == ["dapo", "1", "0.5000", "0.250", "-", "-", "1e-05", "12.3k", "1m", "00s"]


def test_a_log_says_early_what_is_done_and_then_once_a_minute(log, monkeypatch):
    """Whoever starts a run sees that its first program is being compiled; who reads a log of days is not flooded."""
    now = 100.0
    monkeypatch.setattr(live_table.time, "monotonic", lambda: now)
    said = []
    with LiveTable(stream=log) as table:
        for second in range(4 * 60):
            now = 100.0 + second
            table.status(f"at {second}")
            said.extend([second] if log.getvalue().endswith(f"at {second}\n") else [])
    assert said == [5, 15, 35, 75, 135, 195]  # after 5, 10, 20, 40 and then 60 s of silence


@pytest.mark.parametrize("empty", [{}, {"step": None, "phase": None}, {"reward/mean": None, "step": 3}])
def test_missing_values_show_as_a_dash(log, terminal, empty):
    for stream in (log, terminal):
        with LiveTable(stream=stream) as table:
            table.step(empty, None)
        assert "-" in stream.getvalue()
        assert "None" not in stream.getvalue()


def test_a_log_that_is_not_unicode_does_not_end_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with LiveTable(stream=stream) as table:
        table.note("43.1 ± 0.5 漢")
    assert raw.getvalue() == b"43.1 +- 0.5 ?\n"


def test_a_terminal_shows_the_latest_rows_under_the_phase(terminal):
    with LiveTable(stream=terminal) as table:
        table.phase("collapse", "entropy < 0.08 nats")
        for step in range(1, 41):
            table.step(line(step, "collapse", **{"reward/accuracy_fraction": 0.425}), time_left_s=125)
    frame = last_frame(terminal)
    assert frame[0].rstrip() == "● collapse   2m 05s left   until entropy < 0.08 nats"
    assert "█" in frame[1]
    assert "0.0125 to 0.5 nats" in frame[1]  # 0.5 / 40 and 0.5 / 1
    rows = [text for text in frame if text.startswith("collapse")]
    assert [int(row.split()[1]) for row in rows] == list(range(29, 41))  # the latest 12
    assert "42.5%" in rows[-1]
    assert all(len(text) <= 100 for text in frame)


def test_a_low_terminal_shows_fewer_rows(terminal, monkeypatch):
    monkeypatch.setenv("LINES", "10")
    with LiveTable(stream=terminal) as table:
        for step in range(1, 41):
            table.step(line(step), None)
    # head, entropy, blank, titles and the cursor's line leave 10 - 6 = 4 (one to spare)
    assert sum(text.startswith("dapo") for text in last_frame(terminal)) == 4


def test_phases_have_their_own_colours(terminal):
    with LiveTable(stream=terminal) as table:
        table.phase("collapse", "x")
        table.phase("reheat", "y")
        table.phase("collapse", "z")
    cyan, yellow = "\x1b[1;36m● collapse", "\x1b[1;33m● reheat"
    assert terminal.getvalue().count(cyan) >= 2
    assert yellow in terminal.getvalue()


def test_notes_stay_above_and_are_not_taken_for_markup(terminal, log):
    for stream in (terminal, log):
        with LiveTable(stream=stream) as table:
            table.step(line(1, "[bold]a[/nope]"), None)
            table.note("[red]avg@8[/red] 12.5 :smile: [/]")
        assert "[red]avg@8[/red] 12.5 :smile: [/]" in visible(stream.getvalue())
        assert "[bold]a[/no" in visible(stream.getvalue())


def test_an_error_inside_leaves_the_terminal_usable(terminal):
    def training():
        with LiveTable(stream=terminal) as table:
            table.step(line(1), None)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        training()
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_the_trend_halves_its_resolution_when_full():
    trend = Trend()
    for value in range(258):
        trend.add(float(value), "cyan")
    # 128 buckets are full at 128 values and merge to 64 pairs; full again at 256 they merge to 64 fours, the
    # first (0+1+2+3)/4 = 1.5; 256 and 257 open the 65th: (256+257)/2 = 256.5, written 256 (half to even)
    text = trend.text().plain
    assert text.endswith("1.5 to 256 nats")
    assert len(text.split("  ")[0]) == 65
    assert text[0] == "▁"
    assert text[64] == "█"


def test_the_trend_is_as_wide_as_there_is_room():
    trend = Trend()
    for value in range(1, 11):
        trend.add(float(value), "cyan" if value < 10 else "red")
    # 10 buckets in at most 4 characters: joined by threes, 1-3, 4-6, 7-9 and 10 alone; means 2, 5, 8, 10
    text = trend.text(4)
    assert text.plain.endswith("  2 to 10 nats")
    assert len(text.plain.split("  ")[0]) == 4
    assert [span.style for span in text.spans[:4]] == ["cyan", "cyan", "cyan", "red"]
    assert len(trend.text(10).plain.split("  ")[0]) == 10


VALUES = {
    "rollout/tokens_per_s": 123_456.0,
    "optim/grad_norm": 1.23e-5,
    "rollout/length_mean_tokens": 8192.0,
    "reward/accuracy_fraction": 1.0,
    "rollout/truncated_fraction": 0.125,
    "rollout/groups_kept_fraction": 0.5,
    "time/step_s": 61.25,
}


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (80, "phase step entropy reward acc. length grad tok/s"),
        (100, "phase step entropy (nats) reward accuracy length grad norm tokens/s"),
        (140, "phase step entropy (nats) reward accuracy length grad norm tokens/s cut off groups kept step (s)"),
    ],
)
def test_nothing_is_cut_whatever_the_width(terminal, monkeypatch, columns, titles):
    monkeypatch.setenv("COLUMNS", str(columns))
    with LiveTable(stream=terminal) as table:
        table.phase("rl-again", "entropy < 0.08 nats")
        for step in range(100_000, 100_300):
            table.step(line(step, "rl-again", **VALUES), time_left_s=125)
    frame = last_frame(terminal)
    assert max(map(len, frame)) <= columns
    assert "…" not in "".join(frame)
    assert frame[1].rstrip().endswith("nats")
    [head] = [text for text in frame if text.startswith("phase")]
    assert head.split() == titles.split()
    assert frame[-1].split()[:2] == ["rl-again", "100299"]
    assert ("12.5%" in frame[-1]) == (columns == 140)


def test_what_the_main_thread_does_is_shown(terminal):
    with LiveTable(stream=terminal) as table:
        heartbeat.tick("step 7: updating")
        with heartbeat.within("compiling"):
            assert last_frame(terminal)[-1].rstrip() == "step 7: updating (compiling)"
        assert last_frame(terminal)[-1].rstrip() == "step 7: updating"
        heartbeat.tick("evaluating base")
        table.sampling(Progress(rows=8, finished=2, tokens=1500, seconds=3.0))
        # two of eight in 3 s: six more in 9 s
        assert last_frame(terminal)[-1].rstrip() == "evaluating base: 2 of 8 responses, 1,500 tokens, 9s left"
        table.sampling(Progress(rows=8, finished=0, tokens=900, seconds=3.0))
        assert last_frame(terminal)[-1].rstrip() == "evaluating base: 0 of 8 responses, 900 tokens"
    shown = terminal.getvalue()
    heartbeat.tick("nobody hears")
    assert terminal.getvalue() == shown


def test_the_table_of_a_resumed_run_is_that_of_one_that_went_on(terminal, log):
    lines = [line(step, "rl" if step < 20 else "reheat") for step in range(1, 31)]
    with LiveTable(stream=terminal) as table:
        for each in lines[:25]:
            table.step(each)
        for each in lines[25:]:
            table.step(each)
    went_on = last_frame(terminal)
    terminal.truncate(0)
    with LiveTable(stream=terminal) as table:
        table.restore(lines[:25])
        for each in lines[25:]:
            table.step(each)
    assert last_frame(terminal) == went_on
    with LiveTable(stream=log, every=1) as table:
        table.restore(lines[:25])
        table.step(lines[25])
    assert [text.split()[1] for text in log.getvalue().splitlines()] == ["step", "26"]


def test_a_flat_trend():
    trend = Trend()
    assert trend.text().plain == ""
    trend.add(0.1, "cyan")
    assert trend.text().plain.startswith("▁")


def record(stage, step, **values):
    base = {"stage": stage, "step": step, "benchmark": "sums", "samples": 8, "length_mean_tokens": 41.25}
    return {**base, "avg_at_k": 0.4312, "avg_at_k_stderr": 0.0051, "pass_at_k": 0.7, **values}


def test_results_table():
    text = results_table([record("base", 0), record("collapsed", 120, avg_at_k=1.0, avg_at_k_stderr=None)])
    assert text.splitlines() == [
        "stage      step  benchmark   avg@8 (%)  pass@8 (%)  length (tokens)",
        "─" * 67,
        "base          0  sums       43.1 ± 0.5        70.0             41.2",
        "collapsed   120  sums            100.0        70.0             41.2",
    ]


def test_results_table_without_values_or_with_several_k():
    assert results_table([]) == "no evaluations"
    lines = results_table([{"stage": "base"}, record("reheated", 9)]).splitlines()
    assert "avg@k (%)" in lines[0]
    assert lines[0].endswith("  k")
    assert lines[2].split() == ["base", "-", "-", "-", "-", "-", "-"]
    assert lines[3].split()[-1] == "8"


def test_a_note_follows_the_step_that_it_came_after(log):
    with LiveTable(stream=log, every=10) as table:
        for step in (1, 2, 3):
            table.step(line(step), None)
        table.note("evaluated")
    texts = log.getvalue().splitlines()
    assert [text.split()[:2] for text in texts[1:]] == [["dapo", "1"], ["dapo", "3"], ["evaluated"]]


def test_the_trend_is_logarithmic():
    trend = Trend()
    for power in range(8):
        trend.add(0.01 * 2.0**power, "cyan")
    assert trend.text().plain.startswith("▁▂▃▄▅▆▇█ ")  # equal factors, equal steps
