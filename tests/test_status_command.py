"""`tsopsd status`: what it says of a run in each state, and of one that stalls."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tsopsd_jax.cli import main
from tsopsd_jax.commands.status import facts_of, lines_of
from tsopsd_jax.distributed import heartbeat
from tsopsd_jax.rundir.lock import is_held, locked
from tsopsd_jax.rundir.log import RunLog
from tsopsd_jax.rundir.trackers import Tracker

ROOT = Path(__file__).resolve().parents[1]
NOW = 2_000_000_000.0


def line(step: int, phase: str, phase_step: int, **more) -> dict:
    return {"step": step, "phase": phase, "phase_step": phase_step, "time_s": 100.0 + 4.0 * step, **more}


@pytest.fixture
def run_dir(tmp_path):
    """Three steps of a phase of ten, 4 s each; then comes one of five. Nothing says that it ended."""
    phases = [{"name": "rl", "stop": {"steps": 10}}, {"name": "reheat", "stop": {"steps": 5}}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"phases": phases}))
    with RunLog(tmp_path, last_step=0, tracker=Tracker(tensorboard=False)) as log:
        for step in (1, 2, 3):
            log.write(line(step, "rl", step))
        log.flush()
    for name in ("2", "3", "3.orbax-checkpoint-tmp-7", "1.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / ".lock").touch()
    os.utime(tmp_path / "metrics.jsonl", (NOW - 60, NOW - 60))
    os.utime(tmp_path / "status.json", (NOW - 90, NOW - 90))
    return tmp_path


def test_a_run_that_runs(run_dir):
    with locked(run_dir / ".lock", taken="", unwritable=""):
        facts = facts_of(run_dir, now=NOW)
    assert {key: facts[key] for key in ("state", "reason", "phase", "step", "last_checkpoint_step")} == {
        "state": "running",
        "reason": None,
        "phase": "rl",
        "step": 3,
        "last_checkpoint_step": 3,  # what is being written is none
    }
    assert facts["seconds_per_step"] == pytest.approx(4.0)
    assert facts["time_left_s"] == pytest.approx(48.0)  # (10 + 5 - 3) steps of 4 s
    assert facts["silent_s"] == pytest.approx(60.0)
    assert facts["warnings"] == ["damaged checkpoints were set aside: 1.damaged"]
    text = "\n".join(lines_of(facts))
    for words in ("rl", "4 s a step", "at most 48s", "step 3", "1m 00s ago"):
        assert words in text


def test_a_run_that_was_killed(run_dir):
    facts = facts_of(run_dir, now=NOW)
    assert facts["state"] == "killed"
    assert "goes on from the last checkpoint" in facts["warnings"][0]


def test_a_run_that_is_silent_is_a_warning_and_one_on_another_machine_is_no_killed_one(run_dir):
    (run_dir / ".lock").unlink()  # a store, or a file system without locks
    facts = facts_of(run_dir, now=NOW + 3600)
    assert facts["state"] == "running"
    assert "nothing was written for 1h 01m" in facts["warnings"]


def test_a_run_that_ended_says_why(run_dir):
    with RunLog(run_dir, last_step=3, tracker=Tracker(tensorboard=False)) as log:
        log.write(line(4, "rl", 4, **{"optim/skipped": 1.0, "reward/failed_fraction": 0.25}))
        log.status.phase_ended("rl", 4, "entropy under 0.1 nats")
        log.status.state("guard", "phase 'rl' stopped: 3 updates in a row were not finite")
    facts = facts_of(run_dir, now=NOW)
    text = "\n".join(lines_of(facts))
    assert "guard: phase 'rl' stopped: 3 updates in a row were not finite" in text
    assert "rl at step 4: entropy under 0.1 nats" in text
    assert "1 of the last 4 steps had updates that were not finite and were skipped" in text
    assert "rewards failed in 1 of the last 4 steps" in text


@pytest.mark.parametrize(
    ("phases", "left"),
    [
        ([{"name": "rl", "stop": {"steps": 3}}], 0.0),
        ([{"name": "rl", "stop": {"steps": 2}}], 0.0),
        ([{"name": "rl", "stop": {"collapsed_below_nats": 0.1}}], None),
        ([{"name": "other", "stop": {"steps": 3}}], None),
        ([{"name": "rl", "stop": None}], None),
        ("none", None),
    ],
)
def test_the_time_that_is_left_is_told_where_it_is_known(phases, left, run_dir):
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"phases": phases}))
    assert facts_of(run_dir, now=NOW)["time_left_s"] == left


def test_before_the_first_step(tmp_path, capsys):
    RunLog(tmp_path, last_step=0, tracker=Tracker(tensorboard=False)).close()
    assert main(["status", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["step"], facts["seconds_per_step"]) == ("running", 0, None)
    assert main(["status", str(tmp_path)]) == 0
    assert "not known" in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "expected a run directory, got no status.json and no metrics.jsonl" in said
    assert said.count("\n") == 1


def test_a_lock_is_held_while_it_is(tmp_path):
    lock = tmp_path / ".lock"
    assert is_held(lock) is None
    with locked(lock, taken="", unwritable=""):
        assert is_held(lock) is True
    assert is_held(lock) is False


def test_a_stall_is_reported_with_its_stack_while_it_lasts(run_dir, monkeypatch):
    """In the run directory, where `tsopsd status` finds it; it goes when the main thread goes on."""
    monkeypatch.setattr(heartbeat, "NOTICE_S", 0.3)
    file = run_dir / "stall-0.txt"
    file.write_text("of an earlier process")
    heartbeat.report_stalls(file)
    assert not file.exists()
    seen: list[dict] = []

    def looks() -> None:
        while not file.is_file() or "Thread" not in file.read_text():
            time.sleep(0.02)
        time.sleep(0.1)
        seen.append(facts_of(run_dir, now=NOW))

    def a_read_that_takes_long(thread: threading.Thread) -> None:
        thread.join(60)

    watch = heartbeat.Watch(index=0, count=1, heartbeat_s=30, stall_s=0, exchange=lambda value: [value])
    try:
        heartbeat.tick("restoring a checkpoint")
        thread = threading.Thread(target=looks)
        thread.start()
        a_read_that_takes_long(thread)
        heartbeat.tick("step 1")
        until = time.monotonic() + 60
        while file.exists() and time.monotonic() < until:
            heartbeat.tick()
            time.sleep(0.05)
        assert not file.exists()
    finally:
        watch.close()
        heartbeat.report_stalls(None)
    assert "waits: restoring a checkpoint" in seen[0]["warnings"][1]
    assert any("in a_read_that_takes_long" in text for text in lines_of(seen[0]))


HANGS = """
import sys, time
from pathlib import Path
from tsopsd_jax.distributed import heartbeat

heartbeat.report_stalls(Path(sys.argv[1]))
watch = heartbeat.Watch(index=0, count=1, heartbeat_s=30, stall_s=1, exchange=lambda value: [value])
heartbeat.tick("evaluating base")
def an_evaluation_that_never_ends():
    time.sleep(300)
an_evaluation_that_never_ends()
"""


def test_a_process_that_ended_because_it_hung_leaves_its_stack(run_dir):
    file = run_dir / "stall-0.txt"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = subprocess.run(
        [sys.executable, "-c", HANGS, str(file)], env=env, capture_output=True, timeout=300
    ).returncode
    assert code == 5
    facts = facts_of(run_dir, now=NOW)
    assert "hangs: evaluating base" in "\n".join(facts["warnings"])
    assert "in an_evaluation_that_never_ends" in facts["stalls"][0]
