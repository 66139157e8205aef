"""The scripts of tpu/: which commands they give, in which order, to stubs that record them; no cloud is needed."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_cloud import (
    ABSENT,
    COMMIT,
    CREATE,
    DESCRIBE,
    DESCRIBE_QUEUED,
    PLACE,
    ROOT,
    RUNNABLE,
    SCRIPTS,
    SET_UP,
    START,
    TPU,
    TRAIN,
)

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
