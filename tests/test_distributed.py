"""How a process finds its place, what processes divide, and how they watch one another (without JAX: a second each)."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tsopsd_jax import cli
from tsopsd_jax.distributed import heartbeat, processes
from tsopsd_jax.distributed.sharding import make_mesh, put, replicated, row_sharding
from tsopsd_jax.learn.micro_batches import device_bytes
from tsopsd_jax.train.signals import StopRequest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tsopsd_jax" / "assets" / "demo.yaml"


@pytest.fixture
def cluster(monkeypatch):
    """cluster(NAME=value, ...): the environment of a cluster, and of nothing else."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_")):
            monkeypatch.delenv(name)

    def set_to(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_one_process_initialises_nothing(cluster, monkeypatch):
    cluster(SLURM_NTASKS="4", SLURM_PROCID="0")  # a batch script: no step of srun
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("one process needs no service"))
    nothing = {"coordinator": None, "processes": None, "process": None, "heartbeat_s": 5, "stall_s": 60}
    with processes.joined(**nothing, explain=lambda _: 1):
        assert "watch" in [thread.name for thread in threading.enumerate()]
    with pytest.raises(KeyError), processes.joined(**nothing, explain=lambda _: 1):
        raise KeyError  # an exception is the caller's
    assert "watch" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"heartbeat_s": 0, "stall_s": 60}, "--heartbeat-s must be at least 1, got 0"),
        ({"heartbeat_s": 5, "stall_s": 0.5}, r"--stall-s must be 0 \(never\) or at least 1, got 0.5"),
        ({"heartbeat_s": 5, "stall_s": -1}, r"--stall-s must be 0 \(never\) or at least 1, got -1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, words):
    with (
        pytest.raises(ValueError, match=words),
        processes.joined(coordinator=None, processes=None, process=None, explain=lambda _: 1, **limits),
    ):
        pass


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
    ],
)
def test_the_environment_says_whether_there_are_many(environment, launched, cluster):
    cluster(**environment)
    assert processes._launched() is launched


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"SLURM_STEP_NODELIST": "n1"},
            "SLURM_NTASKS: expected the number of processes, since SLURM_STEP_NODELIST is set, got nothing;",
        ),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "2(x2)"}, "SLURM_STEP_NODELIST is set, got 2(x2);"),
        ({"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE: expected the number of processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1"}, "cannot find one another"),
    ],
)
def test_half_of_a_launchers_environment_is_one_line_and_exit_code_2(environment, words, cluster, capsys, monkeypatch):
    def initialize(*_, **__):  # as JAX does, unless another test of this process has started it
        raise KeyError("OMPI_COMM_WORLD_RANK")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    cluster(**environment)
    assert cli.main(["train", str(DEMO)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("many", [True, False])
def test_tpus_are_asked_for_the_other_hosts(many, cluster, monkeypatch):
    cluster(JAX_PLATFORMS="tpu,cpu")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"] if pattern == "/dev/accel*" else [])
    asked = []

    def initialize(*where, heartbeat_timeout_seconds):
        asked.append((*where, heartbeat_timeout_seconds))
        if not many:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert processes._initialised(None, None, None, 5) is many
    assert asked == [(None, None, None, 10)]
    cluster(JAX_PLATFORMS="cpu")
    assert processes._initialised(None, None, None, 5) is False
    cluster(OMPI_COMM_WORLD_SIZE="2")
    if not many:
        with pytest.raises(ValueError, match="cannot find one another .* give --coordinator HOST:PORT"):
            processes._initialised(None, None, None, 5)


def test_flags_are_completed_from_the_environment(cluster):
    assert processes._place("h:1", 2, 0) == ("h:1", 2, 0)
    cluster(SLURM_NTASKS="3", SLURM_PROCID="2")
    assert processes._place("h:1", None, None) == ("h:1", 3, 2)
    assert processes._place("h:1", 4, 3) == ("h:1", 4, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, 2, None), r"expect --coordinator HOST:PORT of process 0 beside them, got none"),
        (("h", 2, 0), r"--coordinator: expected HOST:PORT, got 'h'"),
        (("h:1", 2, None), r"0 <= I < N, got N 2, I None"),
        (("h:1", 2, 2), r"0 <= I < N, got N 2, I 2"),
    ],
)
def test_incomplete_flags_are_named(given, words, cluster):
    cluster()
    with pytest.raises(ValueError, match=words):
        processes._place(*given)


def test_rows_are_divided_and_come_back_in_order(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = {}
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(processes, "exchange", lambda mine, index=index: parts.update({index: mine}) or [[]] * 3)
        with pytest.raises(IndexError):
            processes.divided(lambda row: 10 * row, 7)
    assert parts == {0: [0, 30, 60], 1: [10, 40], 2: [20, 50]}
    monkeypatch.setattr(processes, "exchange", lambda _: [parts[i] for i in range(3)])
    assert processes.divided(lambda row: 10 * row, 7) == [0, 10, 20, 30, 40, 50, 60]


def test_what_one_process_sees_is_everyones(monkeypatch):
    monkeypatch.setattr(processes, "exchange", lambda mine: [mine, signal.SIGTERM])
    assert StopRequest().asked() == signal.SIGTERM
    monkeypatch.setattr(processes, "exchange", lambda mine: [mine, 1000])
    mesh = SimpleNamespace(local_devices=[SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2000})])
    assert device_bytes(mesh) == 970  # the least, less 3 %


def test_a_batch_is_laid_out_by_rows():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    x = np.arange(24, dtype=np.int32).reshape(8, 3)
    laid = put({"x": x}, row_sharding(mesh))["x"]
    assert [s.data.shape for s in laid.addressable_shards] == [(2, 3)] * 8
    np.testing.assert_array_equal(laid, x)
    assert put(np.float32(2), replicated(mesh)).is_fully_replicated


# ------------------------------------------------------------------------------------------------ the watch

PROCESS = """
import json, os, sys, time
from pathlib import Path
from tsopsd_jax.distributed.heartbeat import Watch, tick

index, count, folder, does = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
turn = iter(range(100))

def exchange(value):
    "Through files: what JAX does by collectives."
    n = next(turn)
    part = folder / f"{n}.{index}.part"
    part.write_text(json.dumps(value))
    part.rename(folder / f"{n}.{index}")
    while not all((folder / f"{n}.{i}").is_file() for i in range(count)):
        time.sleep(0.01)
    return [json.loads((folder / f"{n}.{i}").read_text()) for i in range(count)]

watch = Watch(index=index, count=count, heartbeat_s=float(sys.argv[5]), stall_s=float(sys.argv[6]),
              exchange=exchange)
(folder / f"ready{index}").touch()
if does.endswith("leave"):
    if does.startswith("work"):
        for _ in range(100):
            tick()
            time.sleep(0.05)
    watch.close()
elif does.startswith("fail"):
    if does == "fail over unread bytes":  # the others' signs of life
        watch._stop()
        time.sleep(1.5)
    watch.tell("ValueError: no such verifier")
    os._exit(2)
elif does == "read":
    tick("restoring a checkpoint")
    def a_read_that_never_ends():
        time.sleep(300)
    a_read_that_never_ends()
elif does == "step":
    tick("step 7")
    time.sleep(300)
else:
    time.sleep(300)
"""


@pytest.fixture
def watching(tmp_path):
    """watching("wait", "leave", ...): processes that watch one another, once all do; none outlives the test.
    The heartbeat is long where it is not what is tested: a busy machine must not fail the test."""
    env, processes = os.environ | {"PYTHONPATH": str(ROOT)}, []

    def start(*does: str, heartbeat_s: float = 30, stall_s: float = 0) -> list[subprocess.Popen]:
        for i, what in enumerate(does):
            command = [sys.executable, "-c", PROCESS, str(i), str(len(does)), str(tmp_path), what]
            command += [str(heartbeat_s), str(stall_s)]
            processes.append(subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE))
        until = time.monotonic() + 300
        while not all((tmp_path / f"ready{i}").is_file() for i in range(len(does))):
            assert time.monotonic() < until, "the processes did not meet"
            time.sleep(0.01)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def outcome(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    said = [p.communicate(timeout=300)[1] for p in processes]
    return [p.returncode for p in processes], said


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_ends_the_others(victim, watching):
    processes = watching("wait", "wait", "wait")
    processes[victim].kill()
    codes, said = outcome(processes)
    assert codes == [-signal.SIGKILL if i == victim else 5 for i in range(3)]
    for i in {0, 1, 2} - {victim}:
        assert said[i].startswith(f"process {i} of 3 (host ")
        assert f"process {victim} of 3" in said[i]
        assert "died; start all processes again with the same command" in said[i]


def test_a_silent_process_ends_the_others_after_the_heartbeat(watching):
    processes = watching("wait", "wait", "wait", heartbeat_s=4)
    processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for i in (0, 2):
        assert processes[i].wait(timeout=60) == 5
    processes[1].kill()
    assert time.monotonic() - began > 2.0
    _, said = outcome(processes)
    for i in (0, 2):
        assert "process 1 of 3" in said[i]
        assert "gave no sign of life for 4 s" in said[i]


def test_a_pause_of_all_processes_is_nobodys_silence(watching):
    """As when a machine is moved to another host: all go on after longer than the heartbeat, and than a stall."""
    processes = watching("work and leave", "work and leave", "work and leave", heartbeat_s=4, stall_s=5)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert outcome(processes) == ([0, 0, 0], ["", "", ""])


@pytest.mark.parametrize("fail", ["fail", "fail over unread bytes"])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_told_to_the_others(failing, fail, watching):
    does = ["wait"] * 3
    does[failing] = fail
    codes, said = outcome(watching(*does))
    assert codes == [2 if i == failing else 5 for i in range(3)]
    assert said[failing] == ""
    for i in {0, 1, 2} - {failing}:
        assert f"ends: process {failing} of 3" in said[i]
        assert "failed: ValueError: no such verifier; start all processes again" in said[i]


def test_a_process_that_hangs_says_at_what_and_ends_with_its_stack(watching):
    [process] = watching("read", stall_s=2)
    [code], [said] = outcome([process])
    assert code == 5
    notice, end, *stack = said.splitlines()
    assert re.fullmatch(
        r"process 0 of 1 \(host .*\) waits: restoring a checkpoint for 1 s; it ends after 2 s \(--stall-s\)", notice
    )
    assert "hangs: restoring a checkpoint for 2 s (--stall-s); start all processes again" in end
    assert any("in a_read_that_never_ends" in line for line in stack)


STALLED = """
import sys, time
from tsopsd_jax import cli
from tsopsd_jax.rundir.checkpoints import Checkpoints

def a_read_that_never_ends(self, *_, **__):
    time.sleep(100)

Checkpoints.restore_newest = a_read_that_never_ends
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def test_a_run_whose_checkpoint_cannot_be_read_ends(tmp_path):
    """One process, from the command line."""
    command = [str(DEMO), "--run-dir", str(tmp_path / "run"), "--stall-s", "12"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", STALLED, *command], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 5, run.stderr
    assert "waits: restoring a checkpoint for 6 s; it ends after 12 s (--stall-s)" in run.stderr
    assert "hangs: restoring a checkpoint for 12 s (--stall-s); start all processes again" in run.stderr
    assert "in a_read_that_never_ends" in run.stderr


def test_where_one_process_hangs_the_first_one_says_which(watching):
    """The others wait for it in their step; the first process's log is the one that is read."""
    processes = watching("step", "read", stall_s=4)
    codes, said = outcome(processes)
    assert codes == [5, 5]
    assert "process 1 of 2" in next(line for line in said[0].splitlines() if "waits: restoring a checkpoint" in line)
    assert "waits: step 7 for" in said[0]
    assert "waits: step 7 for" not in said[1]
    for text in said:
        assert "start all processes again with the same command" in text
        assert " died;" not in text
    assert "in a_read_that_never_ends" in said[1]


def test_who_hangs_ends_those_that_work(watching):
    codes, said = outcome(watching("work and leave", "read", stall_s=2.5))
    assert codes == [5, 5]
    assert "ends: process 1 of 2" in said[0]
    assert "hangs: restoring a checkpoint for" in said[0]
    assert "Thread 0x" not in said[0], "its own stack says nothing"


def test_work_of_any_length_is_no_stall_while_it_ticks(watching):
    processes = watching("work and leave", "work and leave", stall_s=4)
    codes, _ = outcome(processes)
    assert codes == [0, 0]


def test_a_farewell_on_the_heels_of_the_greeting_is_heard(monkeypatch):
    ended, met = [], []
    monkeypatch.setattr(heartbeat.Watch, "_end", lambda _self, reason, **_: ended.append(reason))

    def exchange(value):
        if not isinstance(value, dict):
            return [value, "process 1 of 2"]
        peer = socket.create_connection(("127.0.0.1", value["port"]))
        peer.sendall(f'{value["token"]} 1\n"alive"\n"bye"\n'.encode())
        peer.shutdown(socket.SHUT_WR)
        met.append(peer)
        return [value, None]

    watch = heartbeat.Watch(index=0, count=2, heartbeat_s=30, stall_s=0, exchange=exchange)
    until = time.monotonic() + 300
    while watch.peers and not ended and time.monotonic() < until:
        time.sleep(0.01)
    watch.close()
    met[0].close()
    assert (ended, watch.peers) == ([], {})


def test_who_takes_leave_is_not_missed(watching):
    assert outcome(watching("leave", "leave", "leave")) == ([0, 0, 0], ["", "", ""])
