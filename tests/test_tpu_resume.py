"""tpu/resume.sh and watch.sh: what they do after preemption, crashes and errors of the cloud, and where they give
up."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tpu_cloud import (
    ABSENT,
    ASK,
    CREATE,
    DESCRIBE,
    DESCRIBE_QUEUED,
    PLACE,
    RESUME,
    SET_UP,
    SMOKE,
    START,
    TPU,
    TRAIN,
    words,
)


def test_resume_after_preemption_does_everything_again(cloud):
    cloud.answer("tpu-vm describe", "PREEMPTED", "CREATING", "READY")
    cloud.answer("tsopsd-status", words("bare", "bare"))
    done = cloud.run("resume.sh", *RESUME, "--spot", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [
        DESCRIBE,
        "tpu-vm delete a --quiet",
        f"{CREATE} --spot",
        DESCRIBE,
        DESCRIBE,
        ASK,
        *SET_UP,
    ]


def test_resume_of_a_suspended_queued_resource(cloud):
    cloud.answer("queued-resources describe", "SUSPENDING", "SUSPENDED", "ACTIVE")
    cloud.answer("tpu-vm describe", "READY")
    cloud.answer("tsopsd-status", words("bare"))
    done = cloud.run("resume.sh", *RESUME, "--queued", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.calls[:4] == [
        DESCRIBE_QUEUED,
        DESCRIBE_QUEUED,
        "queued-resources delete a --force --quiet",
        "queued-resources create a --accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 --node-id=a",
    ]


@pytest.mark.parametrize("lost", ["PREEMPTED", "TERMINATED", ABSENT])
def test_a_slice_lost_from_an_active_queued_resource_means_a_new_one(cloud, lost):
    cloud.answer("queued-resources describe", "ACTIVE", "ACTIVE")
    cloud.answer("tpu-vm describe a-0", lost, "READY")
    cloud.answer("tpu-vm describe a-1", "READY", "READY")
    cloud.answer("tsopsd-status", words("running"))
    assert cloud.run("resume.sh", *RESUME, "--slices", "2", *TRAIN).returncode == 0
    assert cloud.calls[2] == "queued-resources delete a --force --quiet"


@pytest.mark.parametrize(
    ("answers", "code", "after"),
    [
        (("running", "running"), 0, []),
        (("none", "none"), 0, [SMOKE, START]),  # set up, or rebooted: started
        (("bare", "4"), 0, SET_UP),
        (("4", "4"), 0, [START]),
        (("4", "0", "running"), 0, []),  # others will end by themselves
        (("0", "0"), 0, []),
        (("0", "4"), 0, [START]),
        (("2", "1"), 2, []),  # one had bad input, so the other lost it
        (("134", "3"), 3, []),
        (("5", "6"), 6, []),  # one could not write, so the other lost it
        (("none", "2"), 2, []),
        (("4", "137"), 0, [START]),
        ((), 1, []),  # no worker answered
    ],
)
def test_the_workers_words_decide(cloud, answers, code, after):
    cloud.answer("tpu-vm describe", "READY")
    cloud.answer("tsopsd-status", words(*answers))
    done = cloud.run("resume.sh", *RESUME, *TRAIN)
    assert done.returncode == code, done.stderr
    assert cloud.calls == [DESCRIBE, ASK, *after]


def test_watch_goes_on_through_preemption_crash_and_interruption_until_done(cloud):
    cloud.answer("tpu-vm describe", ABSENT, *["READY"] * 3, "PREEMPTED", *["READY"] * 4)
    cloud.answer("tsopsd-status", words("bare"), words("running"), (255, "ssh: timeout"))
    cloud.answer("tsopsd-status", words("bare"), words("1"), words("4"), words("0"))
    done = cloud.run("resume.sh", *RESUME, "--watch", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [
        *(DESCRIBE, CREATE, DESCRIBE, ASK, *SET_UP),
        *(DESCRIBE, ASK),  # running
        *(DESCRIBE, ASK),  # unreachable: it is being preempted
        *(DESCRIBE, "tpu-vm delete a --quiet", CREATE, DESCRIBE, ASK, *SET_UP),
        *(DESCRIBE, ASK, START),  # crashed
        *(DESCRIBE, ASK, START),  # interrupted and saved
        *(DESCRIBE, ASK),  # done
    ]


@pytest.mark.parametrize("code", [2, 3, 6])
def test_watch_ends_with_bad_input_guards_and_full_disks(cloud, code):
    cloud.answer("tpu-vm describe", "READY")
    cloud.answer("tsopsd-status", words(str(code)))
    assert cloud.run("resume.sh", *RESUME, "--watch", *TRAIN).returncode == code
    assert cloud.calls == [DESCRIBE, ASK]


def test_watch_gives_up_after_so_many_crashes(cloud):
    cloud.answer("tpu-vm describe", *["READY"] * 3)
    cloud.answer("tsopsd-status", *[words("1")] * 3)
    done = cloud.run("resume.sh", *RESUME, "--watch", "--crashes", "2", *TRAIN)
    assert done.returncode == 1
    assert "exit code 1, as 2 times before; giving up" in done.stderr
    assert cloud.calls == [DESCRIBE, ASK, START, DESCRIBE, ASK, START, DESCRIBE, ASK]


def test_a_command_that_vanishes_again_and_again_is_a_crash_loop(cloud):
    """Killed with its supervisor, as where memory runs out: there is no exit code."""
    cloud.answer("tpu-vm describe", *["READY"] * 5)
    cloud.answer("tsopsd-status", words("bare"), words("none"), words("running"), words("none"))
    done = cloud.run("resume.sh", *RESUME, "--watch", "--crashes", "1", *TRAIN)
    assert done.returncode == 1
    assert "ended without an exit code: killed, or a reboot, as 1 times before; giving up" in done.stderr
    assert cloud.calls == [DESCRIBE, ASK, *SET_UP, DESCRIBE, ASK, START, *[DESCRIBE, ASK] * 2]


def test_a_tpu_that_is_never_reached_is_given_up(cloud):
    cloud.answer("tpu-vm describe", *["READY"] * 21)
    cloud.answer("tsopsd-status", *[(255, "ssh: timeout")] * 20)
    done = cloud.run("resume.sh", *RESUME, "--watch", "--delete", *TRAIN)
    assert done.returncode == 1
    assert "no answer in 20 tries; giving up" in done.stderr
    assert cloud.calls[-2:] == [DESCRIBE, "tpu-vm delete a --quiet"]


@pytest.mark.parametrize(
    ("answers", "code"), [(["0"], 0), (["2"], 2), (["3"], 3), (["6"], 6), (["1", "137"], 1), (["bare", "bare"], 1)]
)
def test_however_the_watch_ends_the_tpu_is_deleted(cloud, answers, code):
    cloud.answer("tpu-vm describe", *["READY"] * (len(answers) + 1))
    cloud.answer("tsopsd-status", *map(words, answers))
    cloud.answer("tpu-vm scp", *[(1, "no space left on device")] * 2)
    done = cloud.run("resume.sh", *RESUME, "--watch", "--delete", "--crashes", "1", *TRAIN)
    assert done.returncode == code
    assert cloud.calls[-2:] == [DESCRIBE, "tpu-vm delete a --quiet"]


def test_a_tpu_that_will_not_come_is_deleted_too(cloud):
    cloud.answer("queued-resources describe", "FAILED", "FAILED")
    done = cloud.run("resume.sh", *RESUME, "--queued", "--watch", "--delete", *TRAIN)
    assert done.returncode == 2
    assert cloud.calls == [DESCRIBE_QUEUED, DESCRIBE_QUEUED, "queued-resources delete a --force --quiet"]


def test_deleting_is_tried_again_and_a_failure_is_loud(cloud):
    cloud.answer("tpu-vm describe", *["READY"] * 6)
    cloud.answer("tsopsd-status", words("0"))
    cloud.answer("tpu-vm delete", *[(1, "UNAVAILABLE")] * 5)
    done = cloud.run("resume.sh", *RESUME, "--watch", "--delete", *TRAIN)
    assert done.returncode == 1
    assert cloud.calls.count("tpu-vm delete a --quiet") == 5
    assert "a COSTS until delete.sh succeeds" in done.stderr


def test_bad_usage_deletes_nothing_and_neither_does_a_watch_that_is_interrupted(cloud):
    assert cloud.run("resume.sh", *PLACE, "--watch", "--delete", "--type", "v9-1", *TRAIN).returncode == 2
    assert cloud.calls == []
    answers = [("tpu-vm describe", 0, "READY"), ("tsopsd-status", 0, words("running"))]
    cloud.answers_file.write_text(json.dumps(answers * 300))  # it may look again before it is interrupted
    command = [str(cloud.bin / "bash"), str(TPU / "resume.sh"), *RESUME, "--watch", "--delete", *TRAIN]
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    watch = subprocess.Popen(
        [sys.executable, "-c", heard, *command],  # tests that run in the background ignore SIGINT, and bash would too
        env=cloud.env(TPU_POLL_S="1"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while not (cloud.calls_file.exists() and ASK in cloud.calls):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(watch.pid, signal.SIGINT)
    said = watch.communicate(timeout=300)[1]
    assert watch.returncode == 130, said
    assert "the run goes on, and the TPU costs until delete.sh" in said
    assert not any("delete" in call for call in cloud.calls)


def test_watch_tries_again_where_gcloud_fails_for_once(cloud):
    cloud.answer("tpu-vm describe", (1, "UNAVAILABLE"), ABSENT, ABSENT, "READY", "READY", "READY")
    cloud.answer("tpu-vm create", (1, "no capacity"))
    cloud.answer("tpu-vm scp", (1, "ssh: timeout"))
    cloud.answer("tsopsd-status", words("bare"), words("bare"), words("0"))
    done = cloud.run("resume.sh", *RESUME, "--watch", *TRAIN)
    assert done.returncode == 0, done.stderr
    again = [DESCRIBE, CREATE] * 2
    assert cloud.calls == [DESCRIBE, *again, DESCRIBE, ASK, SET_UP[0], DESCRIBE, ASK, *SET_UP, DESCRIBE, ASK]


def test_a_slice_that_fails_the_smoke_test_gets_no_run(cloud):
    """Nor the next time, when it is set up and has not passed yet."""
    cloud.answer("tpu-vm describe", "READY", "READY", "READY")
    cloud.answer("tsopsd-status", words("bare"), words("none"))
    cloud.answer("worker.sh smoke", *[(1, "expected 64 devices of tpu, got 60 of tpu")] * 2)
    done = cloud.run("resume.sh", *RESUME, "--watch", "--delete", "--crashes", "1", *TRAIN)
    assert done.returncode == 1
    assert "testing or starting failed" in done.stderr
    assert cloud.calls == [DESCRIBE, ASK, *SET_UP[:3], DESCRIBE, ASK, SMOKE, DESCRIBE, "tpu-vm delete a --quiet"]


@pytest.mark.parametrize(
    ("kind", "slices", "devices"), [("v4-16", 1, 8), ("v5p-128", 2, 128), ("v5litepod-16", 1, 16), ("v6e-8", 3, 24)]
)
def test_the_smoke_test_expects_the_chips_of_all_slices(cloud, kind, slices, devices):
    assert cloud.run("smoke.sh", *PLACE, "--type", kind, "--slices", str(slices), *TRAIN).returncode == 0
    [call] = [json.loads(line) for line in cloud.calls_file.read_text().splitlines()]
    assert f"--command=tsopsd/code/tpu/worker.sh smoke 'gs://bu/r' --devices {devices}" in call


def test_a_run_that_was_stopped_on_purpose_ends_the_watch_and_keeps_the_tpu(cloud):
    cloud.answer("tpu-vm describe", "READY", "READY")
    cloud.answer("tsopsd-status", words("running"), words("stopped", "stopped"))
    done = cloud.run("resume.sh", *RESUME, "--watch", "--delete", *TRAIN)
    assert done.returncode == 4
    assert "stopped by stop.sh, and saved; the TPU is kept and costs" in done.stderr
    assert cloud.calls == [DESCRIBE, ASK, DESCRIBE, ASK]


def test_resume_after_stop_starts_again(cloud):
    cloud.answer("tpu-vm describe", "READY")
    cloud.answer("tsopsd-status", words("stopped"))
    assert cloud.run("resume.sh", *RESUME, *TRAIN).returncode == 0
    assert cloud.calls == [DESCRIBE, ASK, START]


def test_stop_and_fetch(cloud, tmp_path):
    assert cloud.run("stop.sh", *PLACE, "--slices", "2").returncode == 0
    to = tmp_path / "here"
    assert cloud.run("fetch.sh", "--run-dir", "gs://bu/runs/x/", "--to", str(to)).returncode == 0
    assert to.is_dir()
    assert cloud.calls == [
        "queued-resources ssh a --node=all --worker=all --command=tsopsd/code/tpu/worker.sh stop",
        f"gcloud storage rsync --recursive --exclude=^checkpoints/ gs://bu/runs/x {to}",
    ]
