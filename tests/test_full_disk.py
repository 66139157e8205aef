"""A full disk at each kind of write: what was there stays, and either the command ends with exit code 6 and one line
that says what to do, or it goes on without what was only to be looked at."""

import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from full_disk import KINDS, Disk, files_of
from jax._src import profiler as jax_profiler
from test_eval_command import arguments as eval_arguments
from test_eval_command import write_benchmark
from test_page import steps_of_a_run, write_run
from tiny_run import even, facts, finish, rl_phase, same

from tsopsd_jax.cli import main
from tsopsd_jax.commands import exit_codes, train
from tsopsd_jax.config import Config, claim
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.display.live_page import LivePage
from tsopsd_jax.display.screen import library_messages
from tsopsd_jax.model import load_pretrained, save_pretrained
from tsopsd_jax.rundir import files, object_store, resumable_jsonl, unfinished
from tsopsd_jax.rundir.checkpoints import Checkpoints
from tsopsd_jax.rundir.lock import locked
from tsopsd_jax.rundir.log import RunLog, append_evaluation, read_metrics, read_samples
from tsopsd_jax.rundir.trackers import Tracker
from tsopsd_jax.train.profiling import StepProfile
from tsopsd_jax.train.stopping import StopRule
from tsopsd_jax.writing import WriteError, is_full

MODEL = DEMO_CONFIG.parent / "countdown-tiny"
EVENTLESS = Tracker(tensorboard=False)


@pytest.fixture(params=KINDS)
def disk(request, tmp_path):
    """A disk of 512 KiB that can be filled."""
    (tmp_path / "disk").mkdir()
    made = Disk(tmp_path / "disk", request.param, size_kib=512)
    yield made
    made.close()


@pytest.fixture
def blocks(tmp_path):
    """The disk whose blocks can be used up, or where none can be mounted the limit of a file's size."""
    (tmp_path / "disk").mkdir()
    try:
        made = Disk(tmp_path / "disk", "blocks", size_kib=2048)
    except pytest.skip.Exception:
        made = Disk(tmp_path / "disk", "limit", size_kib=0)
    yield made
    made.close()


def line(step: int) -> dict:
    return {"step": step, "phase": "rl", "phase_step": step, "time_s": 1.0}


def told(error: BaseException, disk: Disk, capsys) -> str:
    """What a person reads of an error: one line, which names the place, the reason and what to do; exit code 6."""
    disk.room()
    capsys.readouterr()
    assert exit_codes.explain("train", error) == 6
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert disk.words in said
    assert str(disk.folder) in said
    assert "make room" in said or "choose another" in said
    return said


def begin(folder: Path) -> RunLog:
    log = RunLog(folder, last_step=0, tracker=EVENTLESS)
    log.write(line(1))
    log.write_samples([{"step": 1, "response": "first"}])
    log.write_evaluation({"stage": "base", "step": 0})
    return log


# --------------------------------------------------------------------------------------------- a run's files

WRITES = {
    "metrics": lambda log: log.write({**line(2), "filler/text": "x" * 9000}),
    "evaluation": lambda log: append_evaluation(log.run_dir, {"stage": "later", "step": 1}),
    "samples": lambda log: log.write_samples([{"step": 1, "response": "more" * 3000}]),
    "status": lambda log: log.status.state("ended"),
    "end of a phase": lambda log: log.status.phase_ended("rl", 1, "enough"),
    "rows that are not finite": lambda log: log.write_nonfinite(1, "weight", {"row": np.arange(2)}),
    "before a checkpoint": lambda log: log.push(),
    "next start": lambda log: RunLog(log.run_dir, last_step=1, tracker=EVENTLESS),
    "another lock": lambda log: locked(log.run_dir / "new" / ".lock", taken="", unwritable="{reason}").__enter__(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_run_writes_leaves_what_was_there_and_is_exit_code_6(write, disk, capsys):
    run_dir = disk.folder / "run"
    with begin(run_dir) as log:
        before = files_of(run_dir)
        disk.fill()
        try:
            write(log)
        except Exception as error:
            caught = error
        else:
            caught = None
    after = files_of(run_dir)
    disk.room()
    if caught is None:  # this kind of full disk still takes it: an open file grows, an empty one is made
        assert (disk.kind, write) in ALL_THE_SAME
        return
    assert is_full(caught)
    assert exit_codes.explain("train", caught) == 6
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert disk.words in said
    after["metrics.jsonl"] = after["metrics.jsonl"].split(b"\n")[0] + b"\n"  # half a line may follow
    after["samples.jsonl"] = after["samples.jsonl"].split(b"\n")[0] + b"\n"
    assert after == before, "nothing is lost, and no half of a file takes up room"
    with RunLog(run_dir, last_step=1, tracker=EVENTLESS) as log:
        log.write(line(2))
    assert [each["step"] for each in read_metrics(run_dir)] == [1, 2]
    assert [each["response"] for each in read_samples(run_dir)] == ["first"]


ALL_THE_SAME = {
    ("inodes", WRITES["metrics"]),
    ("inodes", WRITES["samples"]),
    ("limit", WRITES["another lock"]),
    ("blocks", WRITES["another lock"]),
}
"""Writes that a disk takes although it is full in this way."""


def test_a_torn_end_is_cut_off_on_a_disk_without_room(disk):
    """The next start needs no room for a second copy of the log."""
    file = disk.folder / "lines.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    disk.fill()
    try:
        files.mend(file, lambda record: record["step"] < 3)
        once = file.read_bytes()
        files.mend(file)
    finally:
        disk.room()  # at once: pytest writes too
    assert once == file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_claiming_a_run_directory(disk, tmp_path, capsys):
    function = tmp_path / "own.py"
    function.write_text("def reward(response, answer): return 1.0\n" * 200)
    config, inputs = Config.__new__(Config), {"problems": "2, sha256 00", str(function): "sha256 11"}
    run_dir = disk.folder / "run"
    run_dir.mkdir()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(claim.strict, "plain", lambda _: {"seed": 0, "phases": []})
    try:
        disk.fill()
        with pytest.raises(WriteError) as caught:
            claim.claim(run_dir, config, inputs)
        told(caught.value, disk, capsys)
        assert files_of(run_dir) == {}
        claim.claim(run_dir, config, None)
        before = files_of(run_dir)
        disk.fill(left=1 if disk.kind == "inodes" else 0)
        with pytest.raises(WriteError) as caught:
            claim._keep_inputs(run_dir, inputs)
        told(caught.value, disk, capsys)
        assert files_of(run_dir) == before
        claim._keep_inputs(run_dir, inputs)
        assert set(files_of(run_dir)) > {"config.yaml", "inputs.json"}
    finally:
        monkey.undo()


@pytest.mark.usefixtures("buckets")
def test_what_is_fetched_from_a_store(disk, tmp_path, capsys):
    here = object_store.folder_of("gs://full/x", tmp_path / "here")
    (here / "config.yaml").write_text("seed: 0")
    (here / "metrics.jsonl").write_bytes(b'{"step": 1}\n' * 500)
    object_store.push(here)
    there = object_store.folder_of("gs://full/x", disk.folder)
    disk.fill()
    with pytest.raises(WriteError) as caught:
        object_store.fetch(there)
    told(caught.value, disk, capsys)
    object_store.fetch(there)
    assert (there / "metrics.jsonl").read_bytes() == (here / "metrics.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax leaves
def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(trainer_in, tmp_path, blocks, capsys):
    """In the midst of its second step, where a step is saved each time."""
    phases = (rl_phase(stop=StopRule(steps=4)),)
    whole = finish(trainer_in(tmp_path / "whole", phases=phases, every=1))
    run = blocks.folder / "run"
    calls = iter(range(10**6))

    def fills(response: str, gold: str) -> float:
        if next(calls) == 20:
            blocks.fill()
        return even(response, gold)

    trainer = trainer_in(run, phases=phases, verify=fills, every=1)
    with pytest.raises(WriteError) as caught:
        trainer.run()
    told(caught.value, blocks, capsys)
    assert same(whole, finish(trainer_in(run, phases=phases, every=1)))
    assert facts(tmp_path / "whole") == facts(run)


# ----------------------------------------------------------------------------------- what is only looked at


def test_events_that_cannot_be_written_are_said_once_and_end_nothing(disk, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "events").symlink_to(disk.folder)
    with RunLog(run_dir, last_step=0) as log:
        log.write(line(1) | {"loss/total": 1.0})
        if disk.kind == "limit":  # which holds for all files: the rest is tried on the mirror alone
            [mirror] = log._mirrors
            disk.fill()
            for step in (2, 3):
                mirror.show("metrics.jsonl", step, {f"loss/{name}": 1.0 for name in range(300)})
                mirror.flush()
            disk.room()
        else:
            disk.fill()
        for step in (2, 3):
            log.write(line(step) | {f"loss/{name}": 1.0 for name in range(300)})
            log.flush()
    said = capsys.readouterr().err
    assert [each["step"] for each in read_metrics(run_dir)] == [1, 2, 3]
    if disk.kind == "inodes":  # the file that is open grows; the next start makes none
        assert said == ""
        with RunLog(run_dir, last_step=3) as log:
            log.write(line(4))
            log.flush()
        said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "warning: events in " in said
    assert disk.words in said
    assert "the run goes on" in said


def test_the_page_of_a_run_that_goes_on(disk):
    run_dir = write_run(disk.folder / "run", steps_of_a_run((3, 1, 1)))
    before, said, now = files_of(run_dir), [], [0.0]
    page = LivePage(run_dir, every_s=1.0, say=said.append, clock=lambda: now[0])
    disk.fill()
    for now[0] in (2.0, 4.0):
        page()
    assert files_of(run_dir) == before
    disk.room()
    [words] = said
    assert "the page was not written" in words
    assert disk.words in words
    now[0] = 6.0
    page()
    assert "report.html" in files_of(run_dir)


def test_the_page_at_the_end_is_not_worth_the_exit_code(disk, capsys):
    run_dir = write_run(disk.folder / "run", steps_of_a_run((3, 1, 1)))
    disk.fill()
    train._tell(run_dir)
    disk.room()
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {run_dir / 'report.html'} could not be written: {disk.words}")
    assert said.endswith(f"(or tsopsd report {run_dir})\n")


def test_messages_of_libraries(disk, capfd):
    file = disk.folder / "messages.log"
    file.touch()
    if disk.kind == "limit":
        return  # the test's own output could not be written either
    disk.fill()
    stderr, sys.stderr = sys.stderr, sys.__stderr__
    try:
        with library_messages(file):
            for _ in range(3):
                logging.getLogger("library").warning("x" * 5000)
    finally:
        sys.stderr = stderr
    disk.room()
    assert "Logging error" not in capfd.readouterr().err


def test_a_trace_that_cannot_be_written_ends_nothing(blocks, capsys):
    profile = StepProfile((1, 1), blocks.folder / "profile")
    with profile.step(1):
        jax.block_until_ready(jax.numpy.ones(3))
        blocks.fill()
    blocks.room()
    said = capsys.readouterr().err
    jax_profiler._profile_state.reset()  # jax takes the trace for one that still runs; other tests want their own
    assert "warning: the trace was not written" in said
    assert said.count("\n") == 1


def test_what_a_computation_keeps_to_go_on_from(disk, capsys, monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)
    kept = unfinished.Unfinished(disk.folder / "unfinished.npz", {"seed": 0})
    kept.save(lambda: {"sum": np.arange(3)})
    before = files_of(disk.folder)
    disk.fill()
    kept.save(lambda: {"sum": np.arange(10_000)})
    assert files_of(disk.folder) == before
    disk.room()
    assert "the computation goes on" in capsys.readouterr().err
    assert kept.load()["sum"].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------- commands


def ends_with_6(arguments: list[str], disk: Disk, capsys) -> str:
    """Run a command on the full disk, which takes nothing; returns what it says."""
    try:
        code = main(arguments)
    finally:
        disk.room()
    said = [each for each in capsys.readouterr().err.splitlines() if each.startswith("tsopsd ")]
    assert code == 6, said
    [words] = said
    assert disk.words in words or "Not enough disk space" in words
    assert str(disk.folder) in words
    assert "make room" in words
    return words


def test_responses_are_kept_and_the_same_command_goes_on(tmp_path, blocks, capsys):
    """`tsopsd generate`, which the disk leaves room for some of its lines."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} 5 7 9 :"}) + "\n" for i in range(1, 10)))
    shared = ["generate", "--model", str(MODEL), "--prompts", str(prompts), "--samples", "6", "--max-tokens", "19"]
    assert main([*shared, "--out", str(tmp_path / "whole.jsonl")]) == 0
    out = blocks.folder / "part.jsonl"
    blocks.fill(left=12_288)
    ends_with_6([*shared, "--out", str(out)], blocks, capsys)
    kept = resumable_jsonl.lines(out)
    assert 0 < len(kept) < 54
    assert main([*shared, "--out", str(out)]) == 0
    assert f"54 responses, {54 - len(kept)} of them new" in capsys.readouterr().out
    assert sorted(out.read_bytes().splitlines()) == sorted((tmp_path / "whole.jsonl").read_bytes().splitlines())


def test_evaluations_are_kept_and_the_same_command_goes_on(tmp_path, blocks, capsys):
    toy = write_benchmark(tmp_path / "toy.jsonl")
    assert main(eval_arguments([toy], tmp_path / "whole", "--samples", "12")) == 0
    out = blocks.folder / "part"
    blocks.fill(left=12_288)
    ends_with_6(eval_arguments([toy], out, "--samples", "12"), blocks, capsys)
    file = Path("toy") / "countdown-tiny.jsonl"
    assert 0 < len(resumable_jsonl.lines(out / file)) < 48
    assert main(eval_arguments([toy], out, "--samples", "12")) == 0
    assert sorted((out / file).read_bytes().splitlines()) == sorted(
        (tmp_path / "whole" / file).read_bytes().splitlines()
    )
    before = files_of(out)
    blocks.fill()
    ends_with_6(["eval", "--out", str(out)], blocks, capsys)  # tables alone
    assert files_of(out) == before


def test_an_export_that_does_not_fit_leaves_the_one_before(disk, tiny, capsys):
    model, params = tiny
    save_pretrained(disk.folder / "export", model, params)
    before = files_of(disk.folder)
    disk.fill()
    with pytest.raises(WriteError) as caught:
        save_pretrained(disk.folder / "export", model, jax.tree.map(lambda x: x + 1, params))
    assert files_of(disk.folder) == before
    told(caught.value, disk, capsys)
    load_pretrained(disk.folder / "export")


def test_a_page_or_an_analysis(disk, tmp_path, capsys):
    run_dir = write_run(tmp_path / "run", steps_of_a_run((3, 1, 1)))
    out = disk.folder / "page.html"
    out.write_text("the one before")
    commands = {
        "report": ["report", str(run_dir), "--out", str(out)],
        "several": ["report", str(run_dir), str(run_dir), "--out", str(out)],
        "analyse": ["analyse", "curves", str(run_dir), "--out", str(disk.folder)],
    }
    before = files_of(disk.folder)
    for arguments in commands.values():
        disk.fill()
        ends_with_6(arguments, disk, capsys)
        assert files_of(disk.folder) == before
    for arguments in commands.values():
        assert main(arguments) == 0


def test_a_configuration_to_start_from(disk, capsys):
    disk.fill()
    ends_with_6(["init", str(disk.folder / "run.yaml")], disk, capsys)
    assert files_of(disk.folder) == {}, "an empty file would be taken for one that somebody wrote"
    assert main(["init", str(disk.folder / "run.yaml")]) == 0


@pytest.mark.parametrize("left", [0, 8192])
def test_a_data_set_that_does_not_fit_leaves_the_one_before(left, blocks, capsys):
    prepare = ["data", "prepare", "arithmetic", "--cache-dir", str(blocks.folder)]
    assert main(prepare) == 0
    before = files_of(blocks.folder)
    blocks.fill(left)
    ends_with_6(prepare, blocks, capsys)
    assert files_of(blocks.folder) == before
    assert main(["data", "list", "--cache-dir", str(blocks.folder)]) == 0
    assert "train 512" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_that_does_not_fit_is_removed(blocks):
    """What Orbax had written of it takes up no room afterwards."""
    from test_checkpoints import run_at

    checkpoints = Checkpoints(blocks.folder / "checkpoints", keep=1)
    checkpoints.save(run_at(1))
    checkpoints.settle()
    blocks.fill(8192)
    checkpoints.save(run_at(2))
    with pytest.raises(WriteError, match="step 2 could not be saved .* goes on from step 1$"):
        checkpoints.close()
    blocks.room()
    again = Checkpoints(blocks.folder / "checkpoints", keep=1)
    assert again.steps() == [1]
    again.save(run_at(2))
    again.close()
    assert [path.name for path in (blocks.folder / "checkpoints").iterdir()] == ["2"]
    shutil.rmtree(blocks.folder / "checkpoints")
