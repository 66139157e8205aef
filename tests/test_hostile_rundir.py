"""A run directory in the hands of somebody who wishes it ill, or only looks: files that vanish, change, are copied
while the run goes on, cannot be written; clocks that are set back; two who look, start or write at once."""

import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from full_disk import files_of
from test_page import steps_of_a_run, write_run
from tiny_run import facts, finish, rl_phase, same

from tsopsd_jax.cli import main
from tsopsd_jax.commands import exit_codes, train
from tsopsd_jax.commands.status import facts_of, lines_of
from tsopsd_jax.config import Config, claim
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.rundir import files, lock, object_store, resumable_jsonl, unfinished
from tsopsd_jax.rundir.checkpoints import Checkpoints
from tsopsd_jax.rundir.lock import is_held, locked
from tsopsd_jax.rundir.log import RunLog, append_evaluation, read_metrics
from tsopsd_jax.rundir.status import MOST_STARTS, Status, read_status
from tsopsd_jax.rundir.trackers import Tracker, Wandb, _known
from tsopsd_jax.train.stopping import StopRule
from tsopsd_jax.writing import WriteError

NOW = 2_000_000_000.0
EVENTLESS = Tracker(tensorboard=False)


def line(step: int) -> dict:
    return {"step": step, "phase": "rl", "phase_step": step, "time_s": 4.0 * step}


@pytest.fixture
def run_dir(tmp_path):
    """Three steps of a run that says that it goes on, and holds no lock."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"phases": [{"name": "rl", "stop": {"steps": 10}}]}))
    with RunLog(folder, last_step=0, tracker=EVENTLESS) as log:
        for step in (1, 2, 3):
            log.write(line(step))
        log.flush()
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / ".lock").touch()
    for name in ("metrics.jsonl", "status.json"):
        os.utime(folder / name, (NOW - 60, NOW - 60))
    return folder


@pytest.fixture
def sealed(tmp_path):
    """sealed(folder) -> a copy of the folder that nobody can write, whoever he is; skipped where none can be made."""
    made = []

    def seal(folder: Path) -> Path:
        place = tmp_path / f"sealed-{len(made)}"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        made.append(place)
        shutil.copytree(folder, place / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        return place / "run"

    yield seal
    for place in made:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# --------------------------------------------------------------------------------------------- who only looks


def test_a_run_that_cannot_be_written_can_be_looked_at(run_dir, sealed, tmp_path, capsys):
    there = sealed(run_dir)
    assert is_held(there / ".lock") is False, "a right to read is enough to see that nobody holds it"
    assert facts_of(there, now=NOW)["state"] == "killed"
    assert main(["status", str(there)]) == 0
    assert main(["report", str(there), "--out", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()
    assert main(["report", str(there)]) == 2
    said = capsys.readouterr().err
    assert "Read-only file system" in said
    assert "or name another file with --out" in said
    assert said.count("\n") == 1


def test_a_start_in_a_directory_that_cannot_be_written_is_one_line(run_dir, sealed):
    with pytest.raises(ValueError, match="expected a directory to write to, got Read-only file system; choose another"):
        claim.held(sealed(run_dir)).__enter__()


def test_who_looks_keeps_nobody_from_starting(tmp_path):
    """Nor does he take another who looks for a run."""
    file = tmp_path / ".lock"
    file.touch()
    with file.open() as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)  # as `is_held` does, for a moment
        assert is_held(file) is False
        later = threading.Timer(0.2, fcntl.flock, (looker, fcntl.LOCK_UN))
        later.start()
        with locked(file, taken="taken", unwritable=""):
            assert is_held(file) is True
        later.join()
    assert is_held(file) is False


def test_a_second_start_still_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PAUSE_S", 0.001)
    with (
        locked(tmp_path / ".lock", taken="", unwritable=""),
        pytest.raises(ValueError, match="^taken$"),
        locked(tmp_path / ".lock", taken="taken", unwritable=""),
    ):
        pass


@pytest.mark.usefixtures("buckets")
def test_looking_at_the_local_files_of_a_run_on_a_store_changes_nothing(tmp_path, capsys):
    """They are ahead of the store while the run goes on, which has them open."""
    folder = object_store.folder_of("gs://looked/at", tmp_path)
    (folder / "config.yaml").write_text("phases: []")
    with RunLog(folder, last_step=0, tracker=EVENTLESS) as log:
        log.write(line(1))
        log.push()
        log.write(line(2))
        before = files_of(folder)
        for command in (["status", str(folder)], ["report", str(folder), "--out", str(tmp_path / "p.html")]):
            assert main(command) == 0
            assert files_of(folder) == before
        log.write(line(3))
    assert [each["step"] for each in read_metrics(folder)] == [1, 2, 3]
    capsys.readouterr()


@pytest.mark.usefixtures("buckets")
def test_a_dead_run_on_a_store_is_a_silent_one(tmp_path):
    """Its files were copied just now; its status knows when it wrote last."""
    folder = object_store.folder_of("gs://dead/run", tmp_path)
    (folder / "config.yaml").write_text("phases: []")
    with RunLog(folder, last_step=0, tracker=EVENTLESS) as log:
        log.write(line(1))
        log.push()
    with object_store.opened("gs://dead/run") as copy:
        found = facts_of(copy, now=time.time() + 7200)
    assert found["silent_s"] == pytest.approx(7200, abs=60)
    assert "nothing was written for 2h 00m" in found["warnings"]


@pytest.mark.parametrize("text", ["", "runs/x\n", "/etc", "\x00\xff"])
def test_an_address_that_is_none(text, run_dir, capsys):
    """An empty one would be the working directory, into which a run would copy itself."""
    (run_dir / ".store").write_bytes(text.encode("latin-1"))
    before = files_of(run_dir)
    assert main(["status", str(run_dir)]) == 2
    said = capsys.readouterr().err
    assert "expected the address of a run on a store" in said
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match="expected the address of a run on a store"):
        object_store.fetch(run_dir)
    assert files_of(run_dir) == before


def test_a_store_that_is_out_of_reach_removes_nothing(tmp_path, monkeypatch, buckets):
    folder = object_store.folder_of("gs://away/x", tmp_path)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')

    class Away:
        def exists(self):
            raise ConnectionError("no route")

    monkeypatch.setattr(object_store, "address", lambda _: Away())
    with pytest.raises(ConnectionError):
        object_store.fetch(folder)
    assert (folder / "metrics.jsonl").is_file()
    assert buckets.is_dir()


# ------------------------------------------------------------------------------------------------ tsopsd status

ODD = {
    "phases: null": ("config.yaml", "phases: null"),
    "phases: a number": ("config.yaml", "phases: 5"),
    "a stop that is a list": ("config.yaml", "phases: [{name: rl, stop: [1]}]"),
    "a stop that is a text": ("config.yaml", "phases: [{name: rl, stop: soon}]"),
    "a name that is a mapping": ("config.yaml", "phases: [{name: {a: 1}}, {name: rl}]"),
    "no YAML": ("config.yaml", "phases: [\n"),
    "a list": ("config.yaml", "[1]"),
    "not text": ("config.yaml", "\x00\xff"),
    "no numbers": ("metrics.jsonl", '{"step": "x", "phase": {"a": 1}, "time_s": [1], "phase_step": NaN}\n'),
    "huge numbers": ("metrics.jsonl", '{"step": 1e400, "phase": "rl", "time_s": 1e308, "phase_step": -1e308}\n' * 3),
    "step that is not finite": ("status.json", '{"state": "running", "step": NaN}'),
    "saved step that is a text": ("status.json", '{"state": "running", "saved_step": "x"}'),
    "checkpoints that are a file": ("checkpoints", "x"),
    "a checkpoint with odd digits": ("checkpoints/²", "x"),
    "a checkpoint with too many digits": ("checkpoints/" + "9" * 200, "x"),
    "a stall of other bytes": ("stall-0.txt", "\xff\x1b[2J\n" * 10),
    "an empty stall": ("stall-0.txt", ""),
}


@pytest.mark.parametrize("kind", ODD)
def test_status_of_a_directory_with_odd_files(kind, run_dir, capsys):
    name, text = ODD[kind]
    if name == "checkpoints":
        shutil.rmtree(run_dir / name)
    (run_dir / name).write_bytes(text.encode("latin-1") if "²" not in text else text.encode())
    assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert main(["status", str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if name == "config.yaml" and kind in ("no YAML", "a list", "not text"):
        assert any("config.yaml" in text for text in found["warnings"])
        assert found["step"] == 3


def test_status_reads_the_end_of_a_long_log(run_dir, monkeypatch):
    """All of its lines do not fit into memory."""
    kept, most = [], [0]

    class Line(dict):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(1)
            most[0] = max(most[0], len(kept))

        def __del__(self):
            kept.pop()

    with (run_dir / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps(line(step)) + "\n" for step in range(4, 3000))
    loads = json.loads
    monkeypatch.setattr(files.json, "loads", lambda text: Line(loads(text)))
    found = facts_of(run_dir, now=NOW)
    gc.collect()
    assert found["step"] == 2999
    assert found["seconds_per_step"] == pytest.approx(4.0)
    assert most[0] < 100


def test_status_when_a_clock_was_set_back(run_dir):
    facts_ = facts_of(run_dir, now=NOW - 86_400)
    assert facts_["silent_s"] == 0.0
    assert "files were written 23h 59m after now: a clock was set back" in facts_["warnings"]
    assert facts_["seconds_per_step"] == pytest.approx(4.0), "steps are timed by a clock that cannot be set"


def test_a_clock_that_is_set_back_changes_no_run(trainer_in, tmp_path, monkeypatch):
    phases = (rl_phase(stop=StopRule(steps=3)),)
    whole = finish(trainer_in(tmp_path / "whole", phases=phases))
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(ticks))
    assert same(whole, finish(trainer_in(tmp_path / "back", phases=phases)))
    assert facts(tmp_path / "whole") == facts(tmp_path / "back")
    times = [each["time_s"] for each in read_metrics(tmp_path / "back")]
    assert times == sorted(times)
    assert read_status(tmp_path / "back")["step"] == 3


def test_status_says_that_the_checkpoints_are_gone(run_dir):
    log = Status(run_dir, last_step=3, lines=[])
    log.saved(2)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    text = "\n".join(lines_of(facts_of(run_dir, now=NOW)))
    assert "the checkpoint of step 2 is gone, and no other is there" in text


def test_the_starts_of_a_run_are_bounded(tmp_path):
    for at in range(MOST_STARTS + 20):
        Status(tmp_path, last_step=at, lines=[])
    steps = [start["step"] for start in read_status(tmp_path)["starts"]]
    assert steps == [0, *range(21, MOST_STARTS + 20)]
    assert len(steps) == MOST_STARTS


def test_a_stall_of_earlier_processes_is_gone_with_the_next_start(run_dir, monkeypatch):
    """Of four processes one hung; the run goes on as one."""
    (run_dir / "stall-3.txt").write_text("process 3 of 4 waits")
    assert facts_of(run_dir, now=NOW)["stalls"] == ["process 3 of 4 waits"]
    monkeypatch.setattr(claim, "claim", lambda *_, **__: [])
    with train._claimed(Config.__new__(Config), run_dir, {}, False):
        pass
    assert facts_of(run_dir, now=NOW)["stalls"] == []


# ------------------------------------------------------------------------------ what vanishes, or is another's


@pytest.mark.parametrize("how", ["removed", "replaced", "all"])
def test_a_log_that_is_taken_away_ends_the_run(how, run_dir, capsys):
    """Its lines would go into a file without a name; or into another run's, which began in the same place."""
    log = RunLog(run_dir, last_step=3, tracker=EVENTLESS)
    log.write(line(4))
    if how == "all":
        shutil.rmtree(run_dir)
    else:
        (run_dir / "metrics.jsonl").unlink()
    if how == "replaced":
        (run_dir / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    with pytest.raises(WriteError, match=r"metrics\.jsonl was removed, replaced or written by") as caught:
        log.write(line(5))
    log.close()
    assert exit_codes.explain("train", caught.value) == 6
    assert capsys.readouterr().err.count("\n") == 1


def test_two_runs_in_one_directory_whose_lock_was_removed(run_dir):
    """The second cuts off what it takes again. The first sees it at its next step, and ends; so does the second, into
    whose file the first wrote one line; and the next start drops that."""
    first = RunLog(run_dir, last_step=3, tracker=EVENTLESS)
    first.write(line(4))
    second = RunLog(run_dir, last_step=3, tracker=EVENTLESS)
    second.write(line(4) | {"time_s": 99.125})
    with pytest.raises(WriteError, match="written by another process while the run went on"):
        first.write(line(5))
    with pytest.raises(WriteError, match="written by another process while the run went on"):
        second.write(line(5))
    first.close()
    second.close()
    with RunLog(run_dir, last_step=4, tracker=EVENTLESS) as log:
        log.write(line(5))
    assert [each["time_s"] for each in read_metrics(run_dir)] == [4.0, 8.0, 12.0, 99.125, 20.0]


def test_a_run_directory_that_is_removed_while_it_runs(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path / "run", phases=(rl_phase(stop=StopRule(steps=4)),), every=1)
    trainer.after_step = lambda: trainer.run_state.step == 2 and (tmp_path / "run").rename(tmp_path / "gone")
    with pytest.raises(WriteError):
        trainer.run()


def test_the_log_is_on_the_disk_before_a_checkpoint(run_dir, monkeypatch):
    """A machine that loses power has then no checkpoint ahead of its log."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    with RunLog(run_dir, last_step=3, tracker=EVENTLESS) as log:
        log.write(line(4))
        log.push()
    assert str(run_dir / "metrics.jsonl") in synced


def test_a_run_whose_checkpoints_were_emptied_is_not_started_over(run_dir):
    """The folder is there, as the place of a disk that is not mounted would be: its log must not be dropped."""
    Status(run_dir, last_step=3, lines=[]).saved(2)
    claim._check_not_lost(run_dir)
    (run_dir / "checkpoints" / "2").rmdir()
    with pytest.raises(ValueError, match="whose checkpoints are gone, so that it cannot go on"):
        claim._check_not_lost(run_dir)


def test_a_run_says_in_its_status_what_it_saved(trainer_in, tmp_path):
    seen = []
    trainer = trainer_in(tmp_path, phases=(rl_phase(stop=StopRule(steps=4)),), every=1)
    trainer.after_step = lambda: seen.append(read_status(tmp_path)["saved_step"])
    trainer.run()
    assert seen[0] is None
    assert seen[-1] in (2, 3)
    assert read_status(tmp_path)["saved_step"] == 4
    again = trainer_in(tmp_path, phases=(rl_phase(stop=StopRule(steps=4)),))
    assert read_status(tmp_path)["saved_step"] == 4
    again.run()


def test_saves_that_were_killed_take_no_room(trainer_in, tmp_path):
    """Whatever their step: a run that goes on from an earlier one need not save that one again."""
    phases = (rl_phase(stop=StopRule(steps=2)),)
    trainer_in(tmp_path, phases=phases).run()
    for name in ("7.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-12"):
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
    looking = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "who reads removes nothing: a run may be writing"
    looking.close()
    trainer_in(tmp_path, phases=phases).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("when", ["checkpoints first", "log first"])
def test_a_copy_that_was_made_while_the_run_went_on_goes_on(when, trainer_in, tmp_path):
    """The copy has the log as of step 2 and the checkpoint of step 4, or the log as of step 4 and the checkpoint of 2.
    It ends with the same policy; what the log lacks is said."""
    phases = (rl_phase(stop=StopRule(steps=6)),)
    run, copy = tmp_path / "run", tmp_path / "copy"
    trainer = trainer_in(run, phases=phases, every=2)

    def copies() -> None:
        step = trainer.run_state.step
        names = {2: ("checkpoints",), 4: ()} if when == "checkpoints first" else {2: (), 4: ("checkpoints",)}
        if step not in (3, 5):
            return
        trainer.checkpoints.settle()
        for path in run.iterdir():
            if (path.name in names[step - 1]) == (path.name == "checkpoints"):
                copy_to = shutil.copytree if path.is_dir() else shutil.copy2
                if not (copy / path.name).exists():
                    copy.mkdir(exist_ok=True)
                    copy_to(path, copy / path.name)

    trainer.after_step = copies
    whole = finish(trainer)
    notes = []
    other = trainer_in(copy, phases=phases)
    assert int(other.state.step) == (2 if when == "checkpoints first" else 4)
    assert other.log.missing_steps == (0 if when == "checkpoints first" else 1)
    other.table.note = notes.append
    assert same(whole, finish(other))
    steps = [each["step"] for each in read_metrics(copy)]
    assert steps == ([1, 2, 3, 4, 5, 6] if when == "checkpoints first" else [1, 2, 3, 5, 6])


def test_what_the_log_lacks_is_said(trainer_in, tmp_path, monkeypatch):
    phases, notes = (rl_phase(stop=StopRule(steps=2)),), []
    trainer_in(tmp_path, phases=phases).run()
    monkeypatch.setattr(LiveTable, "note", lambda _, text: notes.append(text))
    trainer_in(tmp_path, phases=phases).run()
    assert notes == []
    (tmp_path / "metrics.jsonl").write_text("")
    trainer_in(tmp_path, phases=phases).run()
    assert notes[0].startswith("warning: the log lacks 2 of the 2 steps that were taken")


# -------------------------------------------------------------------------------------- signals at odd moments


def test_a_signal_while_the_last_checkpoint_is_written_does_not_cut_it_off(trainer_in, tmp_path):
    """It is the first one: what stands is saved. (A second one would end the process.)"""
    phases = (rl_phase(stop=StopRule(steps=2)),)
    trainer = trainer_in(tmp_path, phases=phases)
    close = trainer.checkpoints.close

    def slow_close() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        close()

    trainer.checkpoints.close = slow_close
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the signal met nobody who kept it for the loop"))
    try:
        trainer.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.signals.number == signal.SIGTERM
    assert Checkpoints(tmp_path / "checkpoints", keep=1).steps() == [2]


def test_a_signal_before_the_loop_is_exit_code_4():
    """While a model is read, or an analysis goes on."""
    script = """
import sys, time, types
from tsopsd_jax import cli
def run(_):
    print("ready", flush=True)
    time.sleep(60)
cli._module = lambda name: types.SimpleNamespace(add=lambda parser: None, run=run)
sys.argv = ["tsopsd", "demo"]
sys.exit(cli.program())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 4, said
    assert said == "tsopsd demo: interrupted; the same command goes on from the last checkpoint\n"


# ------------------------------------------------------------------------------------ damaged and doubled files


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"id": 1, "sent": {}}', '{"id": "x", "sent": {"metrics.jsonl": "9"}}']
)
def test_a_damaged_note_on_the_tracked_run(text, tmp_path):
    (tmp_path / "tracker.json").write_text(text)
    with pytest.raises(ValueError, match=r"tracker\.json: expected .*; remove it, and another run begins there"):
        _known(tmp_path / "tracker.json")
    (tmp_path / "tracker.json").write_text('{"id": "x", "sent": {"metrics.jsonl": 9}}')
    assert _known(tmp_path / "tracker.json")["id"] == "x"
    assert Wandb(project="p").mode is None


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "not zip", "other arrays"])
def test_what_a_computation_kept_is_damaged(harm, tmp_path, monkeypatch):
    """It is found out again."""
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)
    file = tmp_path / "unfinished.npz"
    kept = unfinished.Unfinished(file, {"seed": 0})
    kept.save(lambda: {"sum": np.arange(1000)})
    assert kept.load()["sum"].size == 1000
    data = bytearray(file.read_bytes())
    if harm == "flipped":
        for at in range(len(data) // 3, len(data) // 3 + 40):
            data[at] ^= 0xFF
    content = {"flipped": bytes(data), "cut": bytes(data[:-200]), "empty": b"", "not zip": b"x" * 500}
    if harm == "other arrays":
        np.savez(file, other=np.arange(3))
    else:
        file.write_bytes(content[harm])
    assert kept.load() == {}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"sample": 0}, "line 1: expected a number or a text as id, got None"),
        ({"id": ["x"], "sample": 0}, r"line 1: expected a number or a text as id, got \['x'\]"),
        ({"id": "x"}, "line 1: expected a number or a text as sample, got None"),
    ],
)
def test_a_line_of_results_without_its_keys_is_named(bad, says, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=says):
        resumable_jsonl.lines(out, "id", "sample")


def test_settings_of_results_without_their_keys_are_named(tmp_path, capsys):
    file = tmp_path / "toy" / "model.jsonl"
    file.parent.mkdir()
    file.touch()
    resumable_jsonl.settings_file(file).write_text('{"problems": 2}')
    assert main(["eval", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "expected the settings that model.jsonl was begun with, got None as samples" in said
    assert said.count("\n") == 1


def test_two_who_write_one_page_at_once(tmp_path, monkeypatch):
    """The run and a person: the last one's is there in the end, whole, and neither fails."""
    page = tmp_path / "report.html"

    def content():
        yield b"first half "
        monkeypatch.setattr(os, "getpid", lambda: 4711)  # the other process
        files.replace(page, [b"the other's page"], alone=False)
        monkeypatch.undo()
        assert page.read_bytes() == b"the other's page"
        yield b"second half"

    files.replace(page, content(), alone=False)
    assert page.read_bytes() == b"first half second half"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_is_written_aside_goes_where_writing_fails(tmp_path):
    def content():
        yield b"x"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(tmp_path / "file", content())
    assert list(tmp_path.iterdir()) == []


def test_a_torn_end_and_later_lines_are_cut_off_and_a_line_in_between_goes(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 5}\n{"step": 2}\n{"step": 3}')
    inode = file.stat().st_ino
    files.mend(file)
    assert file.read_bytes().endswith(b'{"step": 3}\n'), "only its newline was lost"
    assert file.stat().st_ino == inode, "nothing was copied"
    files.mend(file, lambda record: record["step"] < 5)
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    file.write_bytes(b'{"step": 1}\n' + bytes(4096))  # what a file system may leave of a line when the power goes
    files.mend(file)
    assert file.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "x"), NotADirectoryError(20, "No", "x")])
def test_a_file_that_cannot_be_had_is_one_line(error, capsys):
    assert exit_codes.explain("status", error) == 2
    said = capsys.readouterr().err
    assert "mend its place or its rights, or name another" in said
    assert said.count("\n") == 1


def test_evaluations_of_a_torn_file_are_kept(run_dir):
    append_evaluation(run_dir, {"stage": "base", "step": 0})
    with (run_dir / "evaluations.jsonl").open("a") as file:
        file.write('{"stage": "half')
    append_evaluation(run_dir, {"stage": "later", "step": 3})
    assert len((run_dir / "evaluations.jsonl").read_text().splitlines()) == 2
    write_run(run_dir / "page", steps_of_a_run((1, 1, 1)))
