"""What is logged is kept, strictly JSON, and survives a crash and a resume."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.rundir.log import TENSORBOARD, RunLog, append_evaluation, read_evaluations, read_metrics, read_samples
from tsopsd_jax.rundir.trackers import Tracker, Wandb


def line(step, **values):
    return {"step": step, "phase": "dapo", "phase_step": 1, "time_s": 1.5, **values}


def write_steps(run_dir, steps, *, last_step=0, tracker=TENSORBOARD):
    with RunLog(run_dir, last_step=last_step, tracker=tracker) as log:
        for step in steps:
            log.write(line(step, **{"policy/entropy_nats": 0.5 / step}))


def tensorboard_events(run_dir):
    """(step, tag, value) of every scalar, and the purge steps, in order of writing."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    scalars, purges = [], []
    for event in events(run_dir):
        if event.session_log.status == event_pb2.SessionLog.START:
            purges.append(event.step)
        scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return scalars, purges


def tensorboard_texts(run_dir):
    """(step, tag, text) of every text."""
    shown = [(event.step, value) for event in events(run_dir) for value in event.summary.value]
    texts = [(step, value) for step, value in shown if value.metadata.plugin_data.plugin_name == "text"]
    return [(step, value.tag, value.tensor.string_val[0].decode()) for step, value in texts]


def events(run_dir):
    """TensorBoard's events of a run, in order of writing."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    for path in sorted((run_dir / "events").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        at = 0
        while at < len(data):  # TFRecord: u64 length, u32 crc, data, u32 crc
            length = int.from_bytes(data[at : at + 8], "little")
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_a_log_does_not_import_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    code = "import sys; from tsopsd_jax.rundir.log import RunLog\n"
    code += "RunLog(sys.argv[1], last_step=0).close()\nprint('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])]))
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_line_per_step_flushed_at_once_and_strict_json(tmp_path):
    with RunLog(tmp_path, last_step=0) as log:
        log.write(
            line(
                1,
                **{
                    "reward/mean": float("nan"),
                    "loss/total": np.float32(0.25),
                    "optim/grad_norm": jnp.float32(jnp.inf),
                    "rollout/length_mean_tokens": jnp.asarray(7),
                    "reward/accuracy_fraction": None,
                },
            )
        )
        text = (tmp_path / "metrics.jsonl").read_text()  # before close

    def no_constant(name):
        raise AssertionError(f"not strict JSON: {name}")

    assert text.count("\n") == 1
    assert json.loads(text, parse_constant=no_constant) == {
        "step": 1,
        "phase": "dapo",
        "phase_step": 1,
        "time_s": 1.5,
        "reward/mean": None,
        "loss/total": 0.25,
        "optim/grad_norm": None,
        "rollout/length_mean_tokens": 7,
        "reward/accuracy_fraction": None,
    }
    assert read_metrics(tmp_path) == [json.loads(text)]


def test_resume_drops_later_lines_and_keeps_the_earlier_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = b'{"step":1,   "phase":"dapo"}\n{"step": 2, "x": 1e-3}\r\n'  # spacing that json.dumps would not make
    path.write_bytes(odd + b'{"step": 3}\n{"step": 4}\n{"step": 5, "ph')
    RunLog(tmp_path, last_step=3).close()
    assert path.read_bytes() == odd + b'{"step": 3}\n'
    write_steps(tmp_path, [4, 5], last_step=3)
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert path.read_bytes().startswith(odd)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", [b'{"step": 3, "policy/ent', b'{"step": 3}\x00\x00', b"\x00\x00\x00", b"\xff\xfe"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2]
    RunLog(tmp_path, last_step=9).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_whole_last_line_that_lost_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    write_steps(tmp_path, [3], last_step=2)
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error_that_says_where(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        RunLog(tmp_path, last_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_no_run_is_an_error_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl") as error:
        read_metrics(tmp_path / "absent")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [line(2), line(1), line(None), line(2.0), line(True), {"phase": "dapo"}])
def test_steps_go_up(tmp_path, bad):
    with RunLog(tmp_path, last_step=2) as log, pytest.raises(ValueError, match="above 2"):
        log.write(bad)


def test_only_scalars(tmp_path):
    with RunLog(tmp_path, last_step=0) as log:
        with pytest.raises(ValueError, match="loss/total"):
            log.write(line(1, **{"loss/total": np.zeros(2)}))
        with pytest.raises(ValueError, match="numbers and text"):
            log.write(line(1, **{"loss/total": object()}))
    assert read_metrics(tmp_path) == []


def test_tensorboard_mirrors_the_numbers_and_purges_on_resume(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [3, 4], last_step=2)  # within the same second: the files must not collide
    scalars, purges = tensorboard_events(tmp_path)
    tag = "policy/entropy_nats"
    expected = [(step, tag, np.float32(0.5 / step)) for step in (1, 2, 3, 3, 4)]
    assert scalars == expected
    assert purges == [1, 3]


def test_tensorboard_shows_evaluations_and_a_flush_leaves_nothing_behind(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    log.write_evaluation(evaluation("base", 0, 0.5, pass_at_k=0.75, avg_at_k_stderr=None, truncated_fraction=None))
    for step in range(1, 30):
        log.write(line(step, **{"optim/learning_rate": 1e-3}))
    log.flush()
    scalars, _ = tensorboard_events(tmp_path)  # the process may be killed here
    assert scalars[:2] == [(0, "evaluation/avg_at_k", 0.5), (0, "evaluation/pass_at_k", 0.75)]
    assert [each[:2] for each in scalars[2:]] == [(step, "optim/learning_rate") for step in range(1, 30)]
    log.close()
    assert read_evaluations(tmp_path)[0]["stage"] == "base"


def test_without_tensorboard_there_are_no_events(tmp_path):
    write_steps(tmp_path, [1], tracker=Tracker(tensorboard=False))
    assert not (tmp_path / "events").exists()


def test_close_twice(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    log.close()
    log.close()


class FakeRun:
    """A run of a tracker: what was logged, by its row. Rows only go up, as W&B's do; `die`: the service goes away."""

    def __init__(self):
        self.rows, self.finished, self.die = [], 0, False

    def log(self, values, step=None):
        if self.die:
            raise OSError("the service is gone")
        if self.rows and step < self.rows[-1][0]:
            raise AssertionError(f"W&B refuses step {step} after {self.rows[-1][0]}")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


class FakeTable:
    """A table of a tracker, with the two arguments that W&B and trackio both take."""

    def __init__(self, *, columns, data):
        assert all(len(row) == len(columns) for row in data)
        self.rows = [dict(zip(columns, row, strict=True)) for row in data]


@pytest.fixture
def wandb(monkeypatch):
    """A module with W&B's interface: `.inits`, the arguments of each start, and `.run`, which all starts share."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    fake: Any = types.ModuleType("wandb")
    fake.inits, fake.run = [], FakeRun()

    def init(*, entity=None, project=None, dir=None, id=None, name=None, tags=None, config=None, allow_val_change=None,
             group=None, mode=None, resume=None):  # fmt: skip
        fake.inits.append({key: value for key, value in locals().items() if value is not None})
        fake.inits[-1].pop("fake")
        return fake.run

    fake.init = init
    fake.Table = FakeTable
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


REHEAT = Tracker(wandb=Wandb(project="reheat"))


def test_wandb_gets_the_numbers_the_settings_and_the_same_id_on_resume(tmp_path, wandb):
    run_dir = tmp_path / "first"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 3\nphases: [{name: rl}]\n")
    for last_step in (0, 1):
        with RunLog(run_dir, last_step=last_step, tracker=REHEAT) as log:
            log.write(line(last_step + 1, **{"loss/total": 0.5, "reward/mean": None}))
    assert len(wandb.inits) == 2
    assert wandb.inits[0] == wandb.inits[1]
    known = json.loads((run_dir / "tracker.json").read_text())
    assert wandb.inits[0] == {
        "project": "reheat",
        "name": "first",
        "dir": str(run_dir),
        "id": known["id"],
        "resume": "allow",
        "allow_val_change": True,
        "config": {"seed": 3, "phases": [{"name": "rl"}]},
    }
    assert len(known["id"]) == 12
    assert wandb.run.rows[0] == (1, {"phase": "dapo", "loss/total": 0.5})
    assert wandb.run.finished == 2


def test_wandbs_environment_decides_what_the_settings_leave_open(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # read by W&B itself, unless it is told another
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    RunLog(tmp_path / "a", last_step=0, tracker=REHEAT).close()
    assert not wandb.inits[0].keys() & {"mode", "name", "dir", "entity", "tags", "group"}
    assert wandb.inits[0]["id"] == "abc"
    asked = Wandb(project="p", entity="team", name="n", mode="disabled", group="g", tags=("x", "y"))
    RunLog(tmp_path / "b", last_step=0, tracker=Tracker(wandb=asked)).close()
    expected = {"project": "p", "entity": "team", "name": "n", "mode": "disabled", "group": "g", "tags": ("x", "y")}
    assert {key: wandb.inits[1].get(key) for key in expected} == expected
    with pytest.raises(ValueError, match="mode: expected online, offline, disabled or null, got 'off'"):
        Wandb(project="p", mode="off")


def test_a_killed_run_shows_no_step_twice(tmp_path, wandb):
    """Killed after step 4, and after step 3 of a second start, with a checkpoint of step 2; evaluated at step 2."""
    for upto in (4, 3, 5):
        log = RunLog(tmp_path, last_step=2 if upto != 4 else 0, tracker=REHEAT)
        for step in range(1 if upto == 4 else 3, upto + 1):
            log.write(line(step, **{"loss/total": 0.25 * step}))
            if step == 4 and upto == 4:
                log.write_evaluation(evaluation("during", 4, 0.5))
        log.close()
    assert [(row, values.get("loss/total")) for row, values in wandb.run.rows] == [
        *((1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (4, None)),  # the row of an evaluation is its step's
        (5, 1.25),
    ]
    assert [each["step"] for each in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_an_evaluation_that_was_interrupted_is_sent_when_it_is_made(tmp_path, wandb):
    write_steps(tmp_path, [1, 2], tracker=REHEAT)
    with RunLog(tmp_path, last_step=2, tracker=REHEAT) as log:
        log.write_evaluation(evaluation("collapsed", 2, 0.5))  # the row of step 2 is closed
        log.write(line(3))
    sent = [(row, values.get("evaluation/step"), values.get("evaluation/avg_at_k")) for row, values in wandb.run.rows]
    assert sent == [(1, None, None), (2, None, None), (3, 2, 0.5), (3, None, None)]
    with RunLog(tmp_path, last_step=2, tracker=REHEAT) as log:
        log.write_evaluation(evaluation("collapsed", 2, 0.5))
    assert len(wandb.run.rows) == 4, "an evaluation that was sent is not sent again"


def test_a_tracker_that_is_new_to_a_run_gets_all_that_it_takes(tmp_path, wandb):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [2, 3], last_step=1, tracker=REHEAT)
    assert [row for row, _ in wandb.run.rows] == [2, 3]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, wandb, capsys):
    with RunLog(tmp_path, last_step=0, tracker=REHEAT) as log:
        wandb.run.die = True
        log.write(line(1))
        log.write(line(2))
    warning = capsys.readouterr().err
    assert warning == "warning: wandb: the service is gone; the run goes on without it\n"
    assert len(read_metrics(tmp_path)) == 2


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, wandb):
    def init(*, project, config, resume):
        raise RuntimeError(f"no API key\nfor {project}, {config}, {resume}")

    wandb.init = init
    with pytest.raises(
        ValueError, match="tracker: wandb did not start .RuntimeError: no API key for reheat, {}, allow.; "
    ) as error:
        RunLog(tmp_path, last_step=0, tracker=REHEAT)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tracker.json").exists()


def test_any_module_with_wandbs_interface_may_track(tmp_path, monkeypatch):
    """One that continues a run by its name, and knows neither entity nor id, as trackio does."""
    fake, inits = types.ModuleType("trackio"), []
    monkeypatch.setattr(fake, "init", lambda project, name=None, config=None, resume="never": (
        inits.append((project, name, config, resume)) or FakeRun()), raising=False)  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for last_step in (0, 1):
        write_steps(
            tmp_path / "r", [last_step + 1], last_step=last_step, tracker=Tracker(module="trackio", wandb=REHEAT.wandb)
        )
    run_id = json.loads((tmp_path / "r" / "tracker.json").read_text())["id"]
    assert inits == [("reheat", f"r-{run_id}", {}, "allow")] * 2
    with pytest.raises(ValueError, match=r"tracker.wandb.entity: trackio.init takes no entity; leave it out"):
        RunLog(tmp_path, last_step=0, tracker=Tracker(module="trackio", wandb=Wandb(project="p", entity="team")))


def sample(step, **more):
    kept = {"which": "best", "prompt": "1+1", "response": "2", "answer": "2", "reward": 1.0, "length_tokens": 3}
    return {"step": step, "phase": "rl", **kept, **more}


def test_trackers_get_control_values_and_samples(tmp_path, wandb):
    """A table for W&B, in the row of its step; shortened: 3,000 characters from the front, 1,000 from the back."""
    with RunLog(tmp_path, last_step=0, tracker=REHEAT) as log:
        long, odd = "a" * 4_000 + "b" * 6_000, "\ud83d"
        log.write_samples([sample(1, response=long), sample(1, which="worst", answer=odd, reward=float("nan"))])
        log.write(line(1, **{"control/coefficient": 0.25}))
    (row, shown), (next_row, numbers) = wandb.run.rows
    assert (row, next_row, numbers["control/coefficient"]) == (1, 1, 0.25)
    best, worst = shown["samples"].rows
    assert best["response"] == "a" * 3_000 + " [... 6,000 characters ...] " + "b" * 1_000
    assert (best["step"], best["phase"], best["prompt"], best["reward"]) == (1, "rl", "1+1", 1.0)
    assert (worst["which"], worst["answer"], worst["reward"]) == ("worst", "?", None)
    assert ("control/coefficient", 0.25) in [event[1:] for event in tensorboard_events(tmp_path)[0]]


def test_samples_that_a_tracker_has_are_not_sent_again(tmp_path, wandb):
    """Killed after the samples of step 2, then resumed from step 1; those of step 4, of a step that was not sent."""
    for steps, last in (((1, 2), 0), ((2, 4), 1)):
        with RunLog(tmp_path, last_step=last, tracker=REHEAT) as log:
            for step in steps:
                log.write_samples([sample(step)])
    assert [(row, shown["samples"].rows[0]["step"]) for row, shown in wandb.run.rows] == [(1, 1), (2, 2), (4, 4)]


def test_a_tracker_without_tables_or_with_one_that_fails_costs_no_run(tmp_path, wandb, capsys):
    def table(**_):
        raise TypeError("no such column")

    for number, broken in enumerate((None, table)):
        wandb.Table = broken
        with RunLog(tmp_path / str(number), last_step=0, tracker=REHEAT) as log:
            log.write_samples([sample(1)])
            log.write(line(1))
    assert len(wandb.run.rows) == 1, "the numbers of the run without tables"
    assert capsys.readouterr().err == "warning: wandb: no such column; the run goes on without it\n"
    assert len(read_samples(tmp_path / "1")) == len(read_metrics(tmp_path / "1")) == 1


def test_tensorboard_shows_samples_as_text_that_acts_as_nothing(tmp_path):
    """Every line of a response is indented by four: a block of code, whatever ends its lines."""
    hostile = "<b>x</b>\n\n# y\r```\u2028[z](http://z)"
    with RunLog(tmp_path, last_step=0) as log:
        log.write_samples([sample(3, prompt="# p", response=hostile)])
    [(step, tag, page)] = tensorboard_texts(tmp_path)
    assert (step, tag) == (3, "samples/text_summary")
    head, *rest = [line for line in page.splitlines() if line]
    assert head == "**best: reward 1.0, 3 tokens**"
    texts = [line for line in rest if line.startswith("    ")]
    assert texts == ["    # p", "    <b>x</b>", "    ", "    # y", "    ```", "    [z](http://z)", "    2"]
    assert [line for line in rest if line not in texts] == ["prompt:", "response:", "answer:"]


def test_without_wandb_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'pip install "tsopsd-jax\[wandb\]"'):
        RunLog(tmp_path, last_step=0, tracker=REHEAT)
    with pytest.raises(ValueError, match="expected the package no_such_tracker, got none"):
        RunLog(tmp_path, last_step=0, tracker=Tracker(module="no_such_tracker", wandb=REHEAT.wandb))
    RunLog(tmp_path, last_step=0).close()


def evaluation(stage, step, avg, **more):
    return {"stage": stage, "step": step, "benchmark": "sums", "samples": 8, "avg_at_k": avg, **more}


def test_evaluations_are_appended_and_an_equal_one_is_replaced(tmp_path):
    assert read_evaluations(tmp_path) == []
    hostile = {
        "prompt": "1+1\u2028\ud800",
        "response": "</script>\n{",
        "answer": "2",
        "correct": np.bool_(True),
    }
    append_evaluation(tmp_path, evaluation("base", 0, np.float32(0.5), examples=[hostile]))
    append_evaluation(tmp_path, evaluation("collapsed", 9, float("nan")))
    append_evaluation(tmp_path, evaluation("collapsed", 9, 0.75))  # the same again: replaces
    append_evaluation(tmp_path, evaluation("collapsed", 9, 0.25, sampling={"top_p": 0.7}))  # sampled differently
    records = read_evaluations(tmp_path)
    assert [(each["stage"], each["avg_at_k"]) for each in records] == [
        ("base", 0.5),
        ("collapsed", 0.75),
        ("collapsed", 0.25),
    ]
    assert records[0]["examples"] == [{**hostile, "correct": True}]


def test_resume_drops_evaluations_of_steps_to_be_taken_again(tmp_path):
    for stage, step in (("base", 0), ("collapsed", 9), ("reheated", 12)):
        append_evaluation(tmp_path, evaluation(stage, step, 0.5))
    RunLog(tmp_path, last_step=9).close()
    assert [each["stage"] for each in read_evaluations(tmp_path)] == ["base", "collapsed"]


def test_an_evaluation_torn_by_a_crash_does_not_spoil_the_next(tmp_path):
    append_evaluation(tmp_path, evaluation("base", 0, 0.5))
    with (tmp_path / "evaluations.jsonl").open("ab") as file:
        file.write(b'{"stage": "coll')
    append_evaluation(tmp_path, evaluation("collapsed", 9, 0.5))
    assert [each["stage"] for each in read_evaluations(tmp_path)] == ["base", "collapsed"]


def test_samples_are_kept_up_to_the_step_that_a_run_goes_on_from(tmp_path):
    with RunLog(tmp_path, last_step=0) as log:
        log.write_samples([])
        assert not (tmp_path / "samples.jsonl").exists()
        log.write_samples([{"step": 1, "response": "\ud83d\u2028"}, {"step": 1, "reward": np.float32(0.5)}])
        log.write_samples([{"step": 4, "reward": float("nan")}])
    RunLog(tmp_path, last_step=3).close()
    assert read_samples(tmp_path) == [{"step": 1, "response": "\ud83d\u2028"}, {"step": 1, "reward": 0.5}]
