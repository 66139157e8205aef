"""Run directories on an object store; the store is a folder behind fsspec, in the place of gcsfs."""

from types import SimpleNamespace

import pytest
from etils import epath
from fsspec.implementations.local import LocalFileSystem

from tsopsd_jax import cli
from tsopsd_jax.config import claim
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.log import RunLog
from tsopsd_jax.rundir.run_state import RunProgress, RunState
from tsopsd_jax.rundir.status import read_status
from tsopsd_jax.train.trainer import Trainer


def test_a_local_directory_is_itself(tmp_path):
    folder = object_store.folder_of(str(tmp_path / "run"), tmp_path / "cache")
    assert folder == tmp_path / "run"
    assert object_store.address(folder) is None
    assert str(object_store.checkpoints_address(folder)) == str(tmp_path / "run" / "checkpoints")
    object_store.fetch(folder)
    object_store.push(folder)
    assert not folder.exists()


def test_what_one_machine_pushed_another_fetches(buckets, tmp_path):
    here = object_store.folder_of("gs://one/runs/x", tmp_path / "here")
    (here / "events").mkdir()
    contents = {"config.yaml": b"seed: 0\n", "metrics.jsonl": b'{"step": 1}\n', "events/a.1": b"\0\xff"}
    contents |= {"status.json": b'{"state": "ended"}', "tracker.json": b"{}"}
    for name, content in contents.items():
        (here / name).write_bytes(content)
    (here / ".lock").touch()
    object_store.push(here)
    there = object_store.folder_of("gs://one/runs/x", tmp_path / "there")
    object_store.fetch(there)
    assert {n: (there / n).read_bytes() for n in contents} == contents
    assert {n: (buckets / "one/runs/x" / n).read_bytes() for n in contents} == contents
    assert not (buckets / "one/runs/x/.lock").exists()
    assert str(object_store.checkpoints_address(there)) == "gs://one/runs/x/checkpoints"
    assert object_store.folder_of("gs://one/runs/y", tmp_path / "here") != here


@pytest.mark.usefixtures("buckets")
def test_the_store_is_the_truth(tmp_path):
    folder = object_store.folder_of("gs://two/x", tmp_path)
    (folder / "config.yaml").write_text("new")
    (folder / "metrics.jsonl").write_text("1\n")
    object_store.push(folder)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write("2\n")  # a step after the last checkpoint, on a machine that died
    (folder / "evaluations.jsonl").write_text("lost\n")
    object_store.fetch(folder)
    assert (folder / "metrics.jsonl").read_text() == "1\n"
    assert not (folder / "evaluations.jsonl").exists()
    epath.Path("gs://two/x").rmtree()
    object_store.fetch(folder)  # the run was deleted: a new one may begin
    assert not (folder / "config.yaml").exists()
    with claim.held(folder):
        pass


def test_something_elses_place_is_refused(buckets, tmp_path):
    (buckets / "three").mkdir()
    (buckets / "three" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"gs://three is not empty and holds no run; choose another --run-dir"):
        object_store.fetch(object_store.folder_of("gs://three", tmp_path))


def test_a_store_that_cannot_be_reached_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"ftp://x/y: expected a local directory or a store that can be reached"):
        object_store.folder_of("ftp://x/y", tmp_path)


@pytest.mark.usefixtures("buckets")
def test_a_store_without_network_or_credentials_is_one_line(tmp_path, monkeypatch, capsys):
    """A client's own exception, whose text has lines: exit code 2 and one line, no traceback."""

    class RefreshError(Exception):
        pass

    def refuse(*_, **__):
        raise RefreshError("Failed to retrieve a token\nno route to host")

    for call in ("exists", "info"):
        monkeypatch.setattr(LocalFileSystem, call, refuse)
    said = r"gs://x/y: expected a local directory or a store .*, got RefreshError: Failed to retrieve a token no route"
    with pytest.raises(ValueError, match=said):
        object_store.folder_of("gs://x/y", tmp_path)
    assert cli.main(["convert", "gs://x/y", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_reading_takes_a_copy(buckets, tmp_path):
    (buckets / "four" / "x").mkdir(parents=True)
    (buckets / "four" / "x" / "config.yaml").write_text("seed: 0")
    with object_store.opened("gs://four/x") as copy:
        assert (copy / "config.yaml").read_text() == "seed: 0"
    assert not copy.exists()
    with object_store.opened(str(tmp_path)) as folder:
        assert folder == tmp_path


def test_the_log_is_pushed_before_the_checkpoint():
    done = []
    checkpoints = SimpleNamespace(save=lambda *_: done.append("checkpoint"))
    run = SimpleNamespace(
        run_state=RunState(SimpleNamespace(step=3), RunProgress()),
        log=SimpleNamespace(push=lambda: done.append("log")),
        saved_step=2,
        began=0.0,
        checkpoints=checkpoints,
        _saved=lambda: None,
    )
    Trainer._save(run)
    assert done == ["log", "checkpoint"]
    Trainer._save(run)
    assert done == ["log", "checkpoint"], "a step is saved once"


@pytest.mark.usefixtures("buckets")
def test_what_the_mirrors_hold_back_is_flushed_before_it_is_pushed(tmp_path):
    folder = object_store.folder_of("gs://five/x", tmp_path)
    (folder / "events").mkdir()
    log = SimpleNamespace(flush=lambda: (folder / "events" / "a.1").write_bytes(b"event"), run_dir=folder)
    RunLog.push(log)
    assert epath.Path("gs://five/x/events/a.1").read_bytes() == b"event"


@pytest.mark.usefixtures("buckets")
def test_a_failure_reaches_the_store(tmp_path):
    folder = object_store.folder_of("gs://six/x", tmp_path)
    (folder / "config.yaml").write_text("seed: 0")
    with RunLog(folder, last_step=0) as log:
        pass  # the loop closes it when it is left
    with pytest.raises(RuntimeError), Trainer.told(SimpleNamespace(log=log, run_dir=folder)):
        raise RuntimeError("broken")
    with object_store.opened("gs://six/x") as copy:
        found = read_status(copy)
    assert (found["state"], found["reason"]) == ("failed", "RuntimeError: broken")
    with pytest.raises(KeyboardInterrupt), Trainer.told(SimpleNamespace(log=log, run_dir=folder)):
        raise KeyboardInterrupt
    found = read_status(folder)
    assert (found["state"], found["reason"]) == ("stopped", "a second signal, which does not wait for the step")
