"""What is logged is kept, strictly JSON, and survives a crash and a resume."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.rundir.log import RunLog, append_evaluation, read_evaluations, read_metrics


def line(step, **values):
    return {"step": step, "phase": "dapo", "phase_step": 1, "time_s": 1.5, **values}


def write_steps(run_dir, steps, *, last_step=0):
    with RunLog(run_dir, last_step=last_step) as log:
        for step in steps:
            log.write(line(step, **{"policy/entropy_nats": 0.5 / step}))


def tensorboard_events(run_dir):
    """(step, tag, value) of every scalar, and the purge steps, in order of writing."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    scalars, purges = [], []
    for path in sorted((run_dir / "events").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        at = 0
        while at < len(data):  # TFRecord: u64 length, u32 crc, data, u32 crc
            length = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == event_pb2.SessionLog.START:
                purges.append(event.step)
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return scalars, purges


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


def test_close_twice(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    log.close()
    log.close()


class FakeWandbRun:
    def __init__(self):
        self.logged, self.defined, self.finished = [], [], False

    def define_metric(self, name, *, step_metric):
        self.defined.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_wandb_gets_the_numbers_and_the_same_id_on_resume(tmp_path, monkeypatch):
    inits, run = [], FakeWandbRun()

    def init(*, project, entity, name, mode, dir, id, resume):
        inits.append((project, entity, name, mode, dir, id, resume))
        return run

    fake = types.ModuleType("wandb")
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = tmp_path / "first"
    for last_step in (0, 1):
        with RunLog(run_dir, last_step=last_step, wandb_project="reheat", wandb_mode="offline") as log:
            log.write(line(last_step + 1, **{"loss/total": 0.5, "reward/mean": None}))
    assert len(inits) == 2
    assert inits[0] == inits[1]
    assert inits[0][:5] == ("reheat", None, "first", "offline", str(run_dir))
    assert inits[0][5] == (run_dir / "wandb_id.txt").read_text().strip() != ""
    assert inits[0][6] == "allow"
    assert run.defined[0] == ("*", "step")
    assert run.logged[0] == {"step": 1, "phase": "dapo", "loss/total": 0.5}
    assert run.finished


def test_without_wandb_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'pip install "tsopsd-jax\[wandb\]"'):
        RunLog(tmp_path, last_step=0, wandb_project="reheat")
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
