"""What a run says of itself in status.json, after each way of ending and after a resume; what the page makes of it."""

import dataclasses
import json
import os
import signal
import subprocess

import numpy as np
import pytest
from test_page import Page, steps_of_a_run, write_run
from tiny_run import even, reheat_phase, rl_phase

from tsopsd_jax.metric_names import HELD, SKIPPED
from tsopsd_jax.objectives import dapo
from tsopsd_jax.rundir import status
from tsopsd_jax.rundir.log import RunLog, read_metrics
from tsopsd_jax.rundir.status import Status, read_status
from tsopsd_jax.train.phase import Guard, GuardError, StopRule
from tsopsd_jax.train.trainer import Interrupted


def line(step, **values):
    return {"step": step, "phase": "rl", "phase_step": step, "time_s": 1.0, SKIPPED: 0.0, HELD: 0.0, **values}


def test_a_resume_takes_back_what_will_be_taken_again(tmp_path):
    with RunLog(tmp_path, last_step=0) as log:
        for step in range(1, 6):
            log.write(line(step, **{SKIPPED: float(step in (2, 4)), HELD: float(step == 5)}))
            if step in (3, 5):
                log.status.phase_ended(f"p{step}", step, f"{step} steps")
        log.flush()
        found = read_status(tmp_path)
        assert (found["step"], found["skipped_updates"], found["held_updates"]) == (5, 2, 1)
        log.status.state(status.GUARD, "too hot")
        log.flush()
        assert read_status(tmp_path)["state"] == "guard"
    with RunLog(tmp_path, last_step=3) as log:
        found = read_status(tmp_path)
        assert (found["state"], found["reason"], found["step"]) == ("running", None, 3)
        assert (found["skipped_updates"], found["held_updates"]) == (1, 0)
        assert found["phases"] == [{"phase": "p3", "step": 3, "reason": "3 steps"}]
        assert [start["step"] for start in found["starts"]] == [0, 3]
        log.write(line(4))
        log.status.state(status.ENDED)
    found = read_status(tmp_path)
    assert (found["state"], found["step"], found["skipped_updates"], found["phase"]) == ("ended", 4, 1, "rl")
    assert not list(tmp_path.glob("*.partial"))


def test_the_machine_is_named(tmp_path):
    Status(tmp_path, last_step=0, lines=[])
    [start] = json.loads((tmp_path / "status.json").read_text())["starts"]
    assert start["devices"] == "8 x cpu"
    assert start["versions"]["jax"].startswith("0.")
    assert set(start["versions"]) == {"tsopsd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    assert start["host"]
    assert start["processes"] == 1


def test_a_package_inside_of_somebody_elses_repository_has_no_commit(tmp_path, monkeypatch):
    run = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*run, "init", "-q"], check=True)
    subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    package = tmp_path / "env" / "tsopsd_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(status.tsopsd_jax, "__file__", str(package / "__init__.py"))
    assert status._commit() is None
    subprocess.run([*run, "add", "."], check=True)
    subprocess.run([*run, "commit", "-q", "-m", "ours"], check=True)
    commit = status._commit()
    assert commit is not None
    assert len(commit) == 40
    (package / "__init__.py").write_text("changed = True")
    assert status._commit() == f"{commit}-dirty"


def told(trainer):
    with trainer.told():
        trainer.run()


def test_a_run_tells_why_its_phases_ended(trainer_in, tmp_path):
    phases = (rl_phase(stop=StopRule(steps=1)), reheat_phase(stop=StopRule(recovered_above_nats=0.12)))
    told(trainer_in(tmp_path, phases=phases))
    found = read_status(tmp_path)
    assert (found["state"], found["reason"], found["step"]) == ("ended", None, 2)
    assert [(end["phase"], end["step"]) for end in found["phases"]] == [("rl", 1), ("reheat", 2)]
    assert found["phases"][0]["reason"] == "1 steps"
    assert found["phases"][1]["reason"].startswith("recovered: entropy ")
    assert found["held_updates"] == 1  # the policy that was measured is kept
    told(trainer_in(tmp_path, phases=phases))
    again = read_status(tmp_path)
    assert (again["state"], again["phases"], len(again["starts"])) == ("ended", found["phases"], 2)


def test_a_refused_phase_is_not_called_reheated(trainer_in, tmp_path):
    hot = reheat_phase(guard=Guard(max_start_entropy_nats=0.12), outcome="reheated")
    phases = (rl_phase(stop=StopRule(steps=1), outcome="collapsed"), hot)
    with pytest.raises(GuardError):
        told(trainer_in(tmp_path, phases=phases))
    found = read_status(tmp_path)
    assert (found["state"], found["phase"], found["step"]) == ("guard", "reheat", 2)
    assert found["reason"].startswith("phase 'reheat' refuses to start: entropy ")
    config = {"phases": [{"name": "rl", "outcome": "collapsed"}, {"name": "reheat", "outcome": "reheated"}]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    page = Page(tmp_path)
    assert [row[-1] for row in page.rows(0)] == ["collapsed", "–"]
    assert page.rows(0)[0][-2].endswith("1 steps")
    assert "guard, not at its end" in page.rows(0)[1][-2]
    assert "Stopped by a guard after step 2: phase 'reheat' refuses to start" in page.text
    # The remedy is taken: what the guard said is gone.
    told(trainer_in(tmp_path, phases=(phases[0], reheat_phase(stop=StopRule(steps=1)))))
    assert [row[-1] for row in Page(tmp_path).rows(0)] == ["collapsed", "reheated"]
    assert read_status(tmp_path)["state"] == "ended"


def test_a_run_without_a_finite_update_does_not_look_healthy(trainer_in, tmp_path):
    objective = dapo()

    def loss(stats, batch):
        out = objective.loss(stats, batch)
        return type(out)(type(out.loss)(out.loss.total * np.float32("nan"), out.loss.count), out.metrics)

    phase = rl_phase(objective=objective._replace(loss=loss), stop=StopRule(steps=2))
    told(trainer_in(tmp_path, phases=(phase,)))
    assert read_status(tmp_path)["skipped_updates"] == 2
    page = Page(tmp_path)
    assert "Every update was skipped, because the gradient was not finite" in page.text
    assert "Updates skipped 2 of 2" in page.text
    # Two updates a rollout: of two more steps' four updates all are skipped.
    phase = dataclasses.replace(phase, updates_per_rollout=2, guard=Guard(max_skipped_in_row=5))
    told(trainer_in(tmp_path / "two", phases=(phase,)))
    assert read_status(tmp_path / "two")["skipped_updates"] == 4
    assert "Updates skipped 4 of 4" in Page(tmp_path / "two").text


def test_a_signal_and_a_failure_are_told(trainer_in, tmp_path):
    def dies(response, gold):
        if len(read_metrics(tmp_path)) == 2:
            raise RuntimeError("the verifier\nis broken")
        return even(response, gold)

    trainer = trainer_in(tmp_path, phases=(rl_phase(),))
    trainer.table.sampling = lambda _: os.kill(os.getpid(), signal.SIGTERM) if int(trainer.state.step) == 1 else None
    with pytest.raises(Interrupted):
        told(trainer)
    found = read_status(tmp_path)
    assert (found["state"], found["reason"]) == ("stopped", "SIGTERM: left the rollout after step 1")
    with pytest.raises(RuntimeError):
        told(trainer_in(tmp_path, phases=(rl_phase(),), verify=dies))
    found = read_status(tmp_path)
    assert (found["state"], found["reason"]) == ("failed", "RuntimeError: the verifier is broken")
    assert (found["step"], found["phase"]) == (2, "rl")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"state": "running", "step": null}', '{"state": "ru', '{"state": "?"}', '{"phases": [], "time": null}'],
)
def test_a_poor_status_still_gives_a_page(text, tmp_path):
    run_dir = write_run(tmp_path / "run", steps_of_a_run((3, 1, 1)))
    (run_dir / "status.json").write_text(text)
    assert Page(run_dir).text


def test_the_page_of_a_run_that_goes_on_is_up_to_its_log(tmp_path):
    run_dir = write_run(tmp_path / "run", steps_of_a_run((3, 1, 1)))
    os.utime(run_dir / "metrics.jsonl", (2 * 86400, 2 * 86400))
    said = {"state": "running", "step": 3, "phase": "collapse", "time": 90000.0, "phases": []}
    (run_dir / "status.json").write_text(json.dumps(said))
    page = Page(run_dir)
    assert "Running, or killed: last heard of after step 5, 1970-01-03 00:00" in page.text
    assert page.rows(0)[-1][-2].endswith("running, not at its end")
    (run_dir / "status.json").write_text(json.dumps(said | {"state": "stopped"}))
    assert "Stopped after step 3;" in Page(run_dir).text


def test_the_page_shows_what_the_run_ran_on(tmp_path):
    run_dir = write_run(tmp_path / "run", steps_of_a_run((3, 1, 1)))
    start = {"step": 0, "time": 86400.0, "host": "<b>pod-7", "devices": "8 x TPU v5e", "processes": 2, "commit": None}
    said = {"state": "running", "step": 5, "time": 90000.0, "starts": [start | {"versions": {"jax": "0.10.2"}}]}
    (run_dir / "status.json").write_text(json.dumps(said))
    page = Page(run_dir)
    assert "Running, or killed: last heard of after step 5, 1970-01-02 01:00" in page.text
    assert page.rows(-1) == [["1970-01-02 00:00", "0", "&lt;b&gt;pod-7", "8 x TPU v5e, 2 processes", "jax 0.10.2", "–"]]
