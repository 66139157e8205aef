"""The scripts of tpu/: which commands they give, in which order, to stubs that record them; no cloud is needed.

The stubs stand alone on PATH, so that no real gcloud or kubectl can be reached from here.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
SCRIPTS = sorted([*TPU.glob("*.sh"), *TPU.glob("gke/*.sh")])
RUNNABLE = [s for s in SCRIPTS if s.name != "common.sh"]
TOOLS = "bash env cat dirname grep hostname id ln mkdir mktemp mv rm sed sleep touch tr wc"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLACE = ("--name", "a", "--zone", "us-east5-a")
TRAIN = ("--", "tsopsd", "train", "c.yaml", "--run-dir", "gs://bu/r", "--set", "x=a b")

# Records its words, then gives the first answer not yet given whose pattern occurs in them.
STUB = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).name
words = [name, *sys.argv[1:]]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(words) + "\\n")
for word in words:
    if word.startswith("--filename="):
        Path(os.environ["CALLS"]).with_name("manifest.yaml").write_text(Path(word[11:]).read_text())
file = Path(os.environ["CALLS"]).with_name("answers.json")
answers = json.loads(file.read_text())
for i, (pattern, code, out) in enumerate(answers):
    if pattern in " ".join(words):
        del answers[i]
        file.write_text(json.dumps(answers))
        if out:
            print(out, file=sys.stderr if code else sys.stdout)
        sys.exit(code)
if "describe" in words:
    print("FAILED")  # no answer left: a state that ends every wait
"""
ABSENT = (1, "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/locations/z/nodes/a' was not found")


class Cloud:
    """A PATH with the stubs; the answers they give; the calls they got."""

    def __init__(self, folder: Path):
        self.bin, self.calls_file, self.answers_file = folder / "bin", folder / "calls", folder / "answers.json"
        self.bin.mkdir()
        for tool in TOOLS.split(" "):
            found = shutil.which(tool)
            assert found, f"{tool} is not installed"
            (self.bin / tool).symlink_to(found)
        for name in ("gcloud", "kubectl", "git"):
            self.stub(name)
        self.answers: list[tuple[str, int, str]] = [("rev-parse", 0, COMMIT)]

    def stub(self, name: str) -> None:
        (self.bin / name).write_text(STUB)
        (self.bin / name).chmod(0o755)

    def answer(self, pattern: str, *codes_and_outputs: tuple[int, str] | str) -> None:
        """What the next calls with `pattern` in them give: stdout, or (exit code, stderr)."""
        self.answers += [(pattern, *((0, each) if isinstance(each, str) else each)) for each in codes_and_outputs]

    def env(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "CALLS": str(self.calls_file), "TPU_POLL_S": "0", "HOME": "/nowhere"} | more

    def run(self, script: str | Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.answers_file.write_text(json.dumps(self.answers))
        command = [str(self.bin / "bash"), str(TPU / script), *arguments]
        return subprocess.run(
            command, env=self.env(**env), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )

    @property
    def calls(self) -> list[str]:
        """The calls but for git's, temporary folders as TMP, long remote commands by their first words."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [short(json.loads(line)) for line in lines if json.loads(line)[0] != "git"]


def short(words: list[str]) -> str:
    words = [w for w in words if not w.startswith("--zone=")]
    if words[:3] == ["gcloud", "compute", "tpus"]:
        words = words[3:]
    remote = {
        "tsopsd/code/tpu/worker.sh start": "START",
        "tsopsd/code/tpu/worker.sh smoke": "SMOKE",
        "if [ -x": "STATUS",
        "! systemctl": "SETUP",
    }
    for i, word in enumerate(words):
        for begin, name in remote.items():
            if word.startswith(f"--command={begin}"):
                words[i] = name
        if word.endswith("/tsopsd.tar.gz"):
            words[i] = "TMP/tsopsd.tar.gz"
    return " ".join(words)


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """HOST:PORT of a server that answers so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


DESCRIBE = "tpu-vm describe a --format=value(state)"
DESCRIBE_QUEUED = "queued-resources describe a --format=value(state.state)"
CREATE = "tpu-vm create a --accelerator-type=v5p-64 --version=v2-alpha-tpuv5"
ASK = "tpu-vm ssh a --worker=all STATUS"
START = "tpu-vm ssh a --worker=all START"
SMOKE = "tpu-vm ssh a --worker=all SMOKE"
SET_UP = ["tpu-vm scp TMP/tsopsd.tar.gz a: --worker=all", "tpu-vm ssh a --worker=all SETUP", SMOKE, START]


# ------------------------------------------------------------------ all scripts


def test_shellcheck_is_silent():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool, "shellcheck not found; install the extra dev"
    found = subprocess.run([tool, *map(str, SCRIPTS)], capture_output=True, text=True, cwd=TPU)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda s: str(s.relative_to(TPU)))
def test_help_names_the_script_and_its_options(cloud, script):
    done = cloud.run(script, "--help")
    assert done.returncode == 0
    assert script.name in done.stdout.splitlines()[0]
    assert "--dry-run" in done.stdout
    assert os.access(script, os.X_OK)


DRY_RUNS = {
    "create.sh": (*PLACE, "--type", "v5p-64"),
    "setup.sh": PLACE,
    "run.sh": (*PLACE, *TRAIN),
    "logs.sh": PLACE,
    "resume.sh": (*PLACE, "--type", "v5p-64", "--watch", *TRAIN),
    "delete.sh": PLACE,
    "stop.sh": PLACE,
    "smoke.sh": (*PLACE, "--type", "v5p-64", *TRAIN),
    "fetch.sh": ("--run-dir", "gs://bu/runs/x"),
    "gke/submit.sh": ("--name", "a", "--image", "i", "--topology", "v5p:4x4x4", "--bucket", "bb", *TRAIN),
    "gke/logs.sh": ("--name", "a"),
    "gke/delete.sh": ("--name", "a"),
}


def test_every_script_has_a_dry_run_here():
    assert {*DRY_RUNS, "worker.sh"} == {str(s.relative_to(TPU)) for s in RUNNABLE}


@pytest.mark.parametrize("script", DRY_RUNS)
def test_a_dry_run_prints_commands_and_runs_none(cloud, script):
    done = cloud.run(script, "--dry-run", *DRY_RUNS[script])
    assert done.returncode == 0, done.stderr
    assert cloud.calls == []
    tool = (
        "kubectl" if script.startswith("gke") else "gcloud storage" if script == "fetch.sh" else "gcloud compute tpus"
    )
    assert any(line.startswith(tool) for line in done.stdout.splitlines())
    assert done.stderr == ""


def test_a_dry_run_prints_what_a_real_one_gives_to_gcloud(cloud):
    """Its lines, read by a shell, are the words of the recorded calls."""
    place = (*PLACE, "--project", "p p")
    printed = cloud.run("run.sh", *place, "--dry-run", *TRAIN).stdout
    cloud.run("run.sh", *place, *TRAIN)
    real = json.loads(cloud.calls_file.read_text())
    words = subprocess.run(
        ["bash", "-c", f"set -- {printed.strip()}; printf '%s\\n' \"$@\""], capture_output=True, text=True
    )
    assert words.stdout.splitlines() == real
    assert real[-3:] == [
        "--command=tsopsd/code/tpu/worker.sh start 'tsopsd' 'train' 'c.yaml' '--run-dir' 'gs://bu/r' '--set' 'x=a b'",
        "--zone=us-east5-a",
        "--project=p p",
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("create.sh", ("--zone", "us-east5-a", "--type", "v5p-8"), "expected --name or TPU_NAME"),
        ("create.sh", ("--name", "a", "--type", "v5p-8"), "expected --zone or TPU_ZONE"),
        ("create.sh", ("--name", "A b", "--zone", "us-east5-a"), "--name: expected lower-case letters"),
        ("create.sh", ("--name", "a", "--zone", "east"), "--zone: expected one such as us-east5-a, got east"),
        ("create.sh", PLACE, "expected --type or TPU_TYPE"),
        ("create.sh", (*PLACE, "--type", "v9-8"), "expected v4-N, v5litepod-N, v5p-N or v6e-N, got v9-8"),
        ("create.sh", (*PLACE, "--type", "v5e-8"), "the accelerator type of v5e is v5litepod-N, got v5e-8"),
        ("create.sh", (*PLACE, "--type", "v5p-x"), "expected a number after the dash, got v5p-x"),
        ("create.sh", (*PLACE, "--type", "v5p-8", "--slices", "0"), "--slices: expected a number from 1, got 0"),
        ("create.sh", (*PLACE, "--typo", "v5p-8"), "unknown option --typo"),
        ("create.sh", (*PLACE, "--type"), "--type needs a value"),
        ("create.sh", (*PLACE, "--spot=1"), "--spot takes no value"),
        ("create.sh", (*PLACE, "v5p-8"), "expected an option, got v5p-8"),
        ("setup.sh", (*PLACE, "--assets", "bucket"), "--assets: expected gs://BUCKET/FOLDER, got bucket"),
        ("run.sh", PLACE, "expected -- COMMAND"),
        ("resume.sh", (*PLACE, "--type", "v5p-8"), "expected -- COMMAND"),
        ("resume.sh", (*PLACE, "--type", "v5p-8", "--crashes", "x", *TRAIN), "--crashes: expected a number, got x"),
        ("resume.sh", (*PLACE, "--type", "v5p-8", "--delete", *TRAIN), "--delete expects --watch"),
        ("smoke.sh", (*PLACE, *TRAIN), "expected --type or TPU_TYPE"),
        ("smoke.sh", (*PLACE, "--type", "v5p-8", "--", "tsopsd", "eval"), "expected a COMMAND with --run-dir gs://..."),
        ("fetch.sh", (), "--run-dir: expected gs://BUCKET/FOLDER, got nothing"),
        ("fetch.sh", ("--run-dir", "runs/x"), "--run-dir: expected gs://BUCKET/FOLDER, got runs/x"),
        ("logs.sh", (*PLACE, "--worker", "x"), "--worker: expected a number or all, got x"),
        ("logs.sh", (*PLACE, "--slice", "1"), "--slice: expected a number below 1 (--slices), got 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_called(cloud, script, arguments, message):
    done = cloud.run(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert cloud.calls == []


def test_a_setting_of_the_environment_is_checked_too(cloud):
    done = cloud.run("create.sh", *PLACE, TPU_SPOT="yes")
    assert (done.returncode, done.stderr) == (2, "create.sh: TPU_SPOT: expected 1 or nothing, got yes\n")


@pytest.mark.parametrize(
    ("tool", "script"), [("gcloud", "create.sh"), ("gcloud", "logs.sh"), ("kubectl", "gke/delete.sh")]
)
def test_a_missing_tool_is_named(cloud, tool, script):
    (cloud.bin / tool).unlink()
    done = cloud.run(script, *DRY_RUNS[script])
    assert done.returncode == 2
    assert f"{tool} not found" in done.stderr


# ------------------------------------------------------------- create and delete


def test_create_on_demand_waits_until_it_is_ready(cloud):
    cloud.answer("tpu-vm describe", ABSENT, "CREATING", "READY")
    done = cloud.run("create.sh", *PLACE, "--type", "v5p-64")
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [DESCRIBE, CREATE, DESCRIBE, DESCRIBE]


def test_create_takes_its_settings_from_the_environment(cloud):
    cloud.answer("tpu-vm describe", ABSENT, "READY")
    env = {"TPU_NAME": "a", "TPU_ZONE": "us-east5-a", "TPU_TYPE": "v6e-16", "TPU_SPOT": "1", "TPU_SERVICE_ACCOUNT": "s"}
    assert cloud.run("create.sh", **env).returncode == 0
    assert cloud.calls[1] == (
        "tpu-vm create a --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e --spot --service-account=s"
    )


def test_create_through_the_queue(cloud):
    cloud.answer("queued-resources describe", ABSENT, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    cloud.answer("tpu-vm describe", "READY")
    done = cloud.run("create.sh", *PLACE, "--type=v5litepod-16", "--queued", "--spot")
    assert done.returncode == 0, done.stderr
    create = "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot --node-id=a"
    assert cloud.calls == [
        DESCRIBE_QUEUED,
        f"queued-resources create a {create}",
        *[DESCRIBE_QUEUED] * 3,
        DESCRIBE,
    ]


def test_several_slices_are_one_queued_resource_and_all_its_nodes_are_awaited(cloud):
    cloud.answer("queued-resources describe", ABSENT, "ACTIVE", "ACTIVE")
    cloud.answer("tpu-vm describe a-0", "READY", "READY")
    cloud.answer("tpu-vm describe a-1", "CREATING", "READY")
    done = cloud.run("create.sh", *PLACE, "--type", "v4-16", "--slices", "2")
    assert done.returncode == 0, done.stderr
    create = "--accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base --node-count=2 --node-prefix=a"
    assert cloud.calls[1] == f"queued-resources create a {create}"
    assert cloud.calls[-1] == "tpu-vm describe a-1 --format=value(state)"


def test_create_refuses_a_name_that_is_taken(cloud):
    cloud.answer("tpu-vm describe", "READY")
    done = cloud.run("create.sh", *PLACE, "--type", "v5p-64")
    assert done.returncode == 2
    assert "a exists already and is READY; resume.sh" in done.stderr
    assert cloud.calls == [DESCRIBE]


def test_an_error_of_gcloud_is_not_taken_for_absence(cloud):
    cloud.answer("tpu-vm describe", (1, "PERMISSION_DENIED: no"))
    done = cloud.run("create.sh", *PLACE, "--type", "v5p-64")
    assert done.returncode == 2
    assert "PERMISSION_DENIED" in done.stderr
    assert cloud.calls == [DESCRIBE]


def test_a_request_that_failed_is_left_for_the_user_to_see(cloud):
    cloud.answer("queued-resources describe", ABSENT, "FAILED")
    done = cloud.run("create.sh", *PLACE, "--type", "v5p-64", "--queued")
    assert done.returncode == 2
    assert "a is FAILED: see gcloud's describe" in done.stderr


def test_create_passes_on_that_there_is_no_capacity(cloud):
    cloud.answer("tpu-vm describe", ABSENT)
    cloud.answer("tpu-vm create", (1, "There is no more capacity in the zone"))
    done = cloud.run("create.sh", *PLACE, "--type", "v5p-64")
    assert done.returncode == 1
    assert "no more capacity" in done.stderr


@pytest.mark.parametrize(
    ("queued", "calls"),
    [
        ((), [DESCRIBE, "tpu-vm delete a --quiet"]),
        (("--queued",), [DESCRIBE_QUEUED, "queued-resources delete a --force --quiet"]),
    ],
)
def test_delete(cloud, queued, calls):
    cloud.answer("describe", "SUSPENDED")
    assert cloud.run("delete.sh", *PLACE, "--yes", *queued).returncode == 0
    assert cloud.calls == calls


def test_delete_asks_first_and_nothing_is_deleted_twice(cloud):
    cloud.answer("describe", "READY", ABSENT)
    done = cloud.run("delete.sh", *PLACE)  # no answer on stdin
    assert done.returncode == 2
    assert "not deleted" in done.stderr
    cloud.answers = [("describe", *ABSENT)]
    done = cloud.run("delete.sh", *PLACE, "--yes")
    assert done.returncode == 0
    assert "there is no a" in done.stderr
    assert cloud.calls == [DESCRIBE, DESCRIBE]


# ------------------------------------------------------------ setup, run and logs


def test_setup_copies_the_commit_to_all_workers_and_installs_it(cloud):
    done = cloud.run("setup.sh", *PLACE, "--ref", "v1", "--assets", "gs://bu/as")
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in cloud.calls_file.read_text().splitlines()]
    assert calls[0][3:] == ["rev-parse", "--verify", "--quiet", "v1^{commit}"]
    assert calls[1][3:5] == ["archive", "--format=tar.gz"]
    assert calls[1][-1] == COMMIT
    assert cloud.calls == SET_UP[:2]
    assert calls[3][-2].endswith("tsopsd/code/tpu/worker.sh setup 'gs://bu/as'")


def test_run_reaches_every_worker_of_every_slice(cloud):
    assert cloud.run("run.sh", *PLACE, "--slices", "2", *TRAIN).returncode == 0
    assert cloud.calls == ["queued-resources ssh a --node=all --worker=all START"]


def test_logs_of_one_worker_and_of_all(cloud):
    assert cloud.run("logs.sh", *PLACE, "--slices=2", "--slice=1", "--worker=3").returncode == 0
    assert cloud.run("logs.sh", *PLACE, "--worker=all").returncode == 0
    follow = "--command=tail -n 100 -F tsopsd/state/train.log"
    assert cloud.calls == [
        f"tpu-vm ssh a-1 --worker=3 {follow}",
        f'tpu-vm ssh a --worker=all {follow} | sed -u "s/^/$(hostname): /"',
    ]


# ------------------------------------------------------------------------ resume

RESUME = (*PLACE, "--type", "v5p-64")


def words(*each: str) -> str:
    """What gcloud prints when the workers say these."""
    return "\n".join(["SSH: Attempting to connect to worker 0...", *(f"tsopsd-status {word}" for word in each)])


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
    cloud.answers_file.write_text(json.dumps([("tpu-vm describe", 0, "READY"), ("tsopsd-status", 0, words("running"))]))
    command = [str(cloud.bin / "bash"), str(TPU / "resume.sh"), *RESUME, "--watch", "--delete", *TRAIN]
    watch = subprocess.Popen(
        command, env=cloud.env(TPU_POLL_S="1"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not (cloud.calls_file.exists() and ASK in cloud.calls):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(watch.pid, signal.SIGINT)
    said = watch.communicate(timeout=60)[1]
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


# ----------------------------------------------------------- the run's directory


@pytest.mark.parametrize("script", ["run.sh", "resume.sh", "gke/submit.sh"])
@pytest.mark.parametrize(
    ("command", "got"),
    [
        ("tsopsd train c.yaml", "none"),
        ("/x/bin/tsopsd train c.yaml --run-dir runs/a", "runs/a"),
        ("python -m tsopsd_jax train c.yaml --run-dir=/home/a", "/home/a"),
        ("tsopsd train c.yaml --run-dir gs://bu/a --run-dir b", "b"),
        ("tsopsd train c.yaml --run-dir gs://MY_BUCKET/a", "gs://MY_BUCKET/a"),
        ("tsopsd demo", "none"),
    ],
)
def test_a_run_directory_that_goes_with_the_machine_is_refused(cloud, script, command, got):
    arguments = DRY_RUNS[script][: DRY_RUNS[script].index("--")]
    done = cloud.run(script, *arguments, "--", *command.split(" "))
    assert done.returncode == 2
    assert f"--run-dir: expected gs://BUCKET/FOLDER, got {got}: the disks here go with the machine" in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    "command", ["tsopsd train c.yaml --run-dir=gs://bu/a", "tsopsd eval --out x", "tsopsd plan train", "python train x"]
)
def test_other_commands_are_left_alone(cloud, command):
    assert cloud.run("run.sh", *PLACE, "--", *command.split(" ")).returncode == 0
    assert cloud.calls == [START]


# --------------------------------------------------------------------- the README


def readme_blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (TPU / "README.md").read_text(), re.DOTALL)


def test_the_readmes_commands_are_accepted_as_they_stand(cloud):
    """All its blocks in one shell: ours in dry runs, all other tools stubs."""
    for tool in ("docker", "pip", "ssh-add", "tsopsd"):
        cloud.stub(tool)
    cloud.answers_file.write_text(json.dumps([("rev-parse", 0, COMMIT)] * 9))
    script = "set -euo pipefail\n" + "\n".join(readme_blocks())
    done = subprocess.run(
        [str(cloud.bin / "bash"), "-c", script],
        env=cloud.env(TPU_DRY_RUN="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for line in ("tpu-vm create qwen4b", "kubectl create", "queued-resources delete qwen4b"):
        assert line in done.stdout, line


def test_the_readme_plans_the_slice_that_it_creates():
    """v5p-N counts cores, two a chip; a topology counts chips."""
    text = (TPU / "README.md").read_text()
    cores = {int(n) for n in re.findall(r"TPU_TYPE=v5p-(\d+)", text)}
    chips = {math.prod(map(int, shape.split("x"))) for shape in re.findall(r"topology[= ](?:v5p:)?([\dx]+)", text)}
    assert chips == {64}
    assert cores == {128}


# ------------------------------------------------------------------ what is installed

INSTALL = re.compile(r"""pip install .*(?:\$\{CODE\}|[ "]\.)(?:\[([a-z0-9,]*)\])?["\s]""")
EXTRAS = {
    f"{file.relative_to(ROOT)}: {found[1]}": tuple((found[1] or "").split(","))
    for file in [TPU / "worker.sh", TPU / "gke" / "Dockerfile", TPU / "README.md"]
    for found in INSTALL.finditer(file.read_text())
}
OPENS = """
import importlib.metadata as metadata, json, sys
from pathlib import Path
from packaging.requirements import Requirement

# The distributions that these requirements bring, as far as they are installed here.
todo, allowed = [Requirement(each) for each in json.loads(sys.argv[1])], set()
while todo:
    one = todo.pop()
    key = (one.name.lower().replace("_", "-"), frozenset(one.extras))
    if key in allowed:
        continue
    allowed.add(key)
    try:
        wants = [Requirement(each) for each in metadata.requires(one.name) or ()]
    except metadata.PackageNotFoundError:
        continue
    todo += [w for w in wants if w.marker is None or any(w.marker.evaluate({"extra": e}) for e in ("", *one.extras))]
names = {name for name, _ in allowed} | {"tsopsd-jax"}
homes = metadata.packages_distributions()

class OnlyThose:
    def find_spec(self, module, *_):
        homes_of = [home.lower().replace("_", "-") for home in homes.get(module, ())]
        if homes_of and names.isdisjoint(homes_of):
            raise ModuleNotFoundError(f"No module named {module!r}: not among what is installed", name=module)

sys.meta_path.insert(0, OnlyThose())
from tsopsd_jax.rundir import object_store
print(object_store.folder_of("gs://bu/runs/x", Path(sys.argv[2])))
"""


def requirements(extras: tuple[str, ...]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]


def test_workers_and_image_install_the_accelerator_and_the_store():
    assert len(EXTRAS) == 3, "worker.sh, the image, and the README's command to read a run"
    for place, extras in EXTRAS.items():
        assert any(each.startswith("gcsfs") for each in requirements(extras)), place
        if "README" not in place:
            assert any(each.startswith("jax[tpu]") for each in requirements(extras)), place


@pytest.fixture
def store():
    """(address, paths): a stand-in for Cloud Storage that holds nothing; the paths that it was asked for."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"error": {"code": 404, "message": "Not Found"}}')

        def log_message(self, *_):
            pass

    with serving(Handler) as address:
        yield address, paths


@pytest.mark.parametrize(
    ("extras", "reached"), [*((extras, True) for extras in sorted(set(EXTRAS.values()))), (("tpu",), False)]
)
def test_what_is_installed_opens_a_bucket_and_nothing_less_does(store, tmp_path, extras, reached):
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed (extra dev)")
    address, paths = store
    env = os.environ | {"STORAGE_EMULATOR_HOST": f"http://{address}", "PYTHONPATH": str(ROOT)}
    env |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # would look for credentials first
    opened = subprocess.run(
        [sys.executable, "-c", OPENS, json.dumps(requirements(extras)), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if reached:
        assert opened.returncode == 0, opened.stderr
        assert any("/b/bu/o" in path for path in paths), "the real client asked the store"
    else:
        assert 'for gs:// pip install "tsopsd-jax[gcs]"' in opened.stderr
        assert paths == []


# -------------------------------------------------------------------- on a worker


@pytest.fixture
def worker(cloud, tmp_path):
    """run(*arguments): worker.sh as it stands on a worker, ~/tsopsd/code/tpu/worker.sh."""
    code = tmp_path / "tsopsd" / "code"
    shutil.copytree(TPU, code / "tpu")
    for name in ("python3", "sudo", "systemctl"):
        cloud.stub(name)
    python = tmp_path / "tsopsd" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase $1 in -c) ;; *) exec "{sys.executable}" "$@" ;; esac\n')
    python.chmod(0o755)
    cloud.answer("systemctl is-active", *[(3, "")] * 9)  # inactive
    return lambda *arguments: cloud.run(code / "tpu" / "worker.sh", *arguments)


def test_a_worker_is_set_up_with_a_python_of_its_own(cloud, worker, tmp_path):
    base = tmp_path / "tsopsd"
    assert worker("status", "x").stdout == "tsopsd-status bare\n"
    done = worker("setup", "gs://bu/as")
    assert done.returncode == 0, done.stderr
    assert cloud.calls[1:] == [
        "python3 -m pip install --quiet --user --upgrade uv",
        f"python3 -m uv venv --quiet --allow-existing --python 3.12 {base}/venv",
        f"python3 -m uv pip install --quiet --python {base}/venv/bin/python --editable {base}/code[tpu,gcs]",
        f"gcloud storage rsync --recursive gs://bu/as {base}/assets",
    ]
    assert (base / "code" / "models").readlink() == base / "assets" / "models"
    assert worker("status", "x").stdout == "tsopsd-status none\n"


def test_a_worker_whose_installation_failed_stays_bare(cloud, worker):
    cloud.answer("uv pip install", (1, "no such version"))
    assert worker("setup").returncode == 1
    assert worker("status", "x").stdout == "tsopsd-status bare\n"
    done = worker("start", "x")
    assert done.returncode == 2
    assert "not set up; run setup.sh" in done.stderr


def test_a_command_is_started_as_a_service_and_its_exit_code_is_told(cloud, worker, tmp_path):
    state = tmp_path / "tsopsd" / "state"
    assert worker("setup").returncode == 0
    assert worker("start", "sh", "-c", "exit 3").returncode == 0
    call = json.loads(cloud.calls_file.read_text().splitlines()[-1])
    assert call[:2] == ["sudo", "systemd-run"]
    assert {"--unit=tsopsd", "--property=KillMode=mixed", "--property=TimeoutStopSec=10min"} < set(call)
    service = call[next(i for i, word in enumerate(call) if word.endswith("/python")) :]
    assert worker("status", "sh", "-c", "exit 3").stdout == "tsopsd-status none\n"
    assert subprocess.run(service, env={"PATH": os.environ["PATH"], "GCE_METADATA_HOST": "127.0.0.1:9"}).returncode == 3
    assert (state / "exit_code").read_text().split() == ["3"]
    assert worker("status", "sh", "-c", "exit 3").stdout == "tsopsd-status 3\n"
    assert worker("status", "another").stdout == "tsopsd-status none\n"  # the code of another command says nothing
    assert worker("start", "sh", "-c", "exit 3").returncode == 0
    assert not (state / "exit_code").exists()  # nor does that of the last time


def test_a_command_that_runs_is_not_started_twice(cloud, worker):
    assert worker("setup").returncode == 0
    cloud.answers = [("systemctl is-active", 0, "")] * 2
    assert worker("status", "x").stdout == "tsopsd-status running\n"
    assert "a run is going on here" in worker("start", "x").stderr


def test_a_worker_stops_its_run_and_remembers_that_it_was_asked_to(cloud, worker, tmp_path):
    state = tmp_path / "tsopsd" / "state"
    assert worker("setup").returncode == 0
    assert "no run is going on here" in worker("stop").stderr
    assert worker("start", "x").returncode == 0
    (state / "exit_code").write_text("4\n\n")  # as the supervisor leaves it, once systemctl has returned
    cloud.answers.insert(0, ("systemctl is-active", 0, ""))
    done = worker("stop")
    assert done.returncode == 0, done.stderr
    assert "ended with 4" in done.stdout
    assert cloud.calls[-1] == "sudo systemctl stop tsopsd"
    cloud.answers.pop(0)
    assert worker("status", "x").stdout == "tsopsd-status stopped\n"
    (state / "exit_code").write_text("0\n")  # it was done before it could stop
    assert worker("status", "x").stdout == "tsopsd-status 0\n"
    assert worker("start", "x").returncode == 0
    (state / "exit_code").write_text("4\n")
    assert worker("status", "x").stdout == "tsopsd-status 4\n", "a preemption after a new start"


def test_the_smoke_test_is_a_service_that_is_waited_for(cloud, worker):
    assert "not set up" in worker("smoke", "gs://bu/r", "--devices", "4").stderr
    assert worker("setup").returncode == 0
    assert worker("smoke", "gs://bu/r", "--devices", "4").returncode == 0
    call = json.loads(cloud.calls_file.read_text().splitlines()[-1])
    assert {"--unit=tsopsd-smoke", "--wait", "--pipe", "--property=LimitMEMLOCK=infinity"} < set(call)
    assert call[-4].endswith("/tsopsd/code/tpu/smoke.py")
    assert call[-3:] == ["gs://bu/r", "--devices", "4"]
    cloud.answers = [("systemctl is-active", 0, "")]
    assert "a run is going on here" in worker("smoke", "gs://bu/r", "--devices", "4").stderr


def smoke(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, str(TPU / "smoke.py"), *arguments], env=env, cwd=tmp_path, capture_output=True, text=True
    )


def test_the_toy_trains_on_all_devices_and_leaves_nothing(tmp_path):
    done = smoke(tmp_path, str(tmp_path / "runs" / "a"), "--devices", "2", "--platform", "cpu")
    assert done.returncode == 0, done.stderr
    for phase in ("rl", "reheat"):
        assert f"phase '{phase}' ends at step" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


def test_too_few_devices_and_a_place_that_cannot_be_written_are_one_line(tmp_path):
    done = smoke(tmp_path, str(tmp_path / "a"), "--devices", "4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tsopsd smoke: expected 4 devices of tpu, got 2 of cpu" in done.stderr
    (tmp_path / "file").touch()
    done = smoke(tmp_path, str(tmp_path / "file" / "a"), "--devices", "2", "--platform", "cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected to write, read and delete there, got FileExistsError" in done.stderr


def test_a_dry_run_on_a_worker_runs_nothing(cloud, worker, tmp_path):
    for verb in (("setup", "gs://bu/as"), ("smoke", "gs://bu/r"), ("start", "x"), ("stop",)):
        done = worker("--dry-run", *verb)
        assert done.returncode == 0
        assert done.stdout
    assert cloud.calls == []
    assert not (tmp_path / "tsopsd" / "state").exists()


# --------------------------------------------------------------------- preemption


@pytest.fixture
def supervisor(monkeypatch):
    spec = importlib.util.spec_from_file_location("supervise", TPU / "supervise.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLL_S", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def metadata():
    """(host:port, values): a metadata server; values[key] may be changed; it refuses requests without the header."""
    values = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            allowed = self.headers["Metadata-Flavor"] == "Google" and key in values
            self.send_response(200 if allowed else 403)
            self.end_headers()
            self.wfile.write((values[key] if allowed else "no").encode())

        def log_message(self, *_):
            pass

    with serving(Handler) as address:
        yield address, values


# Like a run: it answers SIGTERM by finishing what it does, and ends with 4; a second signal would be fatal to it.
RUN = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("stepping", flush=True)
until = time.monotonic() + 20
while not asked and time.monotonic() < until: time.sleep(0.01)
time.sleep(0.4)
print("signals:", len(asked), flush=True)
sys.exit(4 if len(asked) == 1 else 1)
"""


def later(state: Path, act) -> None:
    """Act when the command has begun."""

    def wait():
        log = state / "train.log"
        while not (log.exists() and "stepping" in log.read_text()):
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_becomes_one_sigterm(supervisor, metadata, tmp_path, key, value):
    host, values = metadata
    later(tmp_path, lambda: values.update({key: value}))
    assert supervisor.supervise([sys.executable, "-c", RUN], tmp_path, host) == 4
    log = (tmp_path / "train.log").read_text()
    assert f"{key} is {value}" in log
    assert "signals: 1" in log


def test_shutdown_and_notice_together_are_still_one_sigterm(supervisor, metadata, tmp_path):
    host, values = metadata

    def both():
        values["preempted"] = "TRUE"
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    later(tmp_path, both)
    assert supervisor.supervise([sys.executable, "-c", RUN], tmp_path, host) == 4


@pytest.mark.parametrize("host", ["127.0.0.1:9", None])
def test_without_a_notice_the_command_is_left_alone(supervisor, metadata, tmp_path, host):
    """A metadata server that says nothing new (None: the fixture's), and one that does not answer."""
    quiet, values = metadata
    values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # a pause, not an end
    assert supervisor.supervise(["sh", "-c", "sleep 0.3; exit 7"], tmp_path, host or quiet) == 7
    assert supervisor.supervise(["sh", "-c", "kill -9 $$"], tmp_path, host or quiet) == 137
    assert (tmp_path / "train.log").read_text() == ""


@pytest.mark.parametrize(
    ("code", "says"), [(2, "bad input"), (3, "a guard"), (5, "another process"), (6, "could not write")]
)
def test_the_log_says_what_an_exit_code_means(supervisor, tmp_path, code, says):
    assert supervisor.supervise(["sh", "-c", f"exit {code}"], tmp_path, "127.0.0.1:9") == code
    assert says in (tmp_path / "train.log").read_text()


def test_a_full_disk_does_not_hide_the_exit_code(tmp_path):
    (tmp_path / "train.log").symlink_to("/dev/full")
    command = [sys.executable, str(TPU / "supervise.py"), str(tmp_path), "sh", "-c", "echo x; exit 6"]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"], "GCE_METADATA_HOST": "127.0.0.1:9"})
    assert done.returncode == 6
    assert (tmp_path / "exit_code").read_text().split() == ["6"]


# ---------------------------------------------------------------------------- GKE

SUBMIT = ("--name", "a", "--image", "eu-docker.pkg.dev/p/r/t:1", "--bucket", "bu", "--topology")


def submitted(cloud: Cloud, topology: str, *more: str) -> dict:
    done = cloud.run("gke/submit.sh", *SUBMIT, topology, *more, "--", "tsopsd", "eval", 'a "b" \\c')
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(cloud.calls_file.with_name("manifest.yaml").read_text())


def test_the_template_is_yaml_and_every_gap_is_filled(cloud):
    assert yaml.safe_load((TPU / "gke" / "jobset.yaml").read_text())["kind"] == "JobSet"
    submitted(cloud, "v5p:4x4x4")
    assert "${" not in cloud.calls_file.with_name("manifest.yaml").read_text().split("apiVersion", 1)[1]
    assert cloud.calls[0].startswith("kubectl create --filename=")


def test_the_manifest_says_what_a_run_needs(cloud):
    manifest = submitted(cloud, "v5p:4x4x4", "--slices", "2", "--spot", "--service-account", "sa")
    assert (manifest["apiVersion"], manifest["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "a")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    [slices] = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (16, 16, 0)  # 64 chips, 4 a host
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3, 6])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
    assert pod["terminationGracePeriodSeconds"] == 1800
    assert pod["serviceAccountName"] == "sa"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["image"] == "eu-docker.pkg.dev/p/r/t:1"
    assert container["command"] == ["tsopsd", "eval", 'a "b" \\c']
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bu"


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
    ],
)
def test_hosts_and_chips_of_a_topology(cloud, topology, accelerator, hosts, chips):
    job = submitted(cloud, topology)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    assert pod["nodeSelector"] == selector
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v7:4x4",), "expected v4, v5e, v5p or v6e before the colon, got v7"),
        (("v5p:4x4",), "expected 3 numbers for v5p, got 4x4"),
        (("v5p",), "expected KIND:SHAPE such as v5p:4x4x4, got v5p"),
        (("v5e:3x3",), "expected a multiple of 4 chips, got 3x3: 9"),
        (("v5e:4x4", "--slices", "x"), "--slices: expected a number from 1, got x"),
        (("v5e:4x4", "--bucket", "gs://bu"), "--bucket: expected its name without gs://, got gs://bu"),
        (("v5e:4x4", "--image", "a b"), "--image: expected an image's name, got a b"),
        (("v5e:4x4", "--name", "A"), "--name: expected lower-case letters"),
    ],
)
def test_submit_refuses_bad_input(cloud, arguments, message):
    done = cloud.run("gke/submit.sh", *SUBMIT, *arguments, *TRAIN)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.calls == []


def test_logs_and_delete_on_gke(cloud):
    assert cloud.run("gke/logs.sh", "--name", "a", "--slice", "1", "--namespace", "n").returncode == 0
    assert cloud.run("gke/delete.sh", "--name", "a").returncode == 0
    of = "jobset.sigs.k8s.io/jobset-name=a,jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=0"
    assert cloud.calls == [
        f"kubectl logs --follow --prefix --tail=100 --max-log-requests=1000 --selector={of} --namespace=n",
        "kubectl delete jobset a --cascade=foreground",
    ]
