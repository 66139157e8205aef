"""The scripts for GPU clusters: what they start and when they start again, against stubs; the image's files."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_cloud import Cloud

from tsopsd_jax.config import load_config

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "scripts" / "slurm" / "train.sh"
DOCKERFILE = ROOT / "scripts" / "docker" / "Dockerfile"
COMMAND = ("tsopsd", "train", "c.yaml", "--run-dir", "/shared/r", "--set", "x=a b")
START = f"srun --gpu-bind=none --kill-on-bad-exit=0 {' '.join(COMMAND)}"
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}


@pytest.fixture
def slurm(tmp_path) -> Cloud:
    cloud = Cloud(tmp_path)
    for tool in ("srun", "scontrol"):
        cloud.stub(tool)
    return cloud


def test_shellcheck_is_silent():
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
    found = subprocess.run([tool, str(TRAIN)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_dry_run_prints_what_a_job_starts(slurm):
    printed = slurm.run(TRAIN, "--dry-run", *COMMAND)
    assert (printed.returncode, printed.stderr, slurm.calls) == (0, "", [])
    words = subprocess.run(["bash", "-c", f"printf '%s ' {printed.stdout}"], capture_output=True, text=True)
    assert slurm.run(TRAIN, *COMMAND, **JOB).returncode == 0
    assert slurm.calls == [START] == [words.stdout.strip()]


@pytest.mark.parametrize(
    ("code", "restarts", "calls", "says"),
    [
        (0, 0, [START], ""),
        (2, 0, [START], "ended with 2; it is not queued again"),
        (3, 0, [START], "ended with 3; it is not queued again"),
        (6, 0, [START], "ended with 6; it is not queued again"),
        (4, 0, [START, "scontrol requeue 7"], "ended with 4; the job is queued again"),
        (5, 19, [START, "scontrol requeue 7"], "ended with 5; the job is queued again"),
        (137, 20, [START], "ended with 137 after 20 restarts; giving up"),
    ],
)
def test_the_exit_code_decides_what_comes_next(slurm, code, restarts, calls, says):
    slurm.answer("srun", (code, "") if code else "")
    done = slurm.run(TRAIN, *COMMAND, **JOB, SLURM_RESTART_COUNT=str(restarts))
    assert slurm.calls == calls
    assert says in done.stderr
    assert done.returncode == (0 if len(calls) == 2 else code)


@pytest.mark.parametrize(
    ("command", "job", "says"),
    [
        ((), JOB, "expected a command, such as tsopsd train"),
        (COMMAND[:3], JOB, "expected --run-dir DIR, on a file system that all nodes share, got none in: tsopsd train"),
        (COMMAND, {}, "expected to be started by sbatch"),
        (COMMAND, JOB | {"SLURM_NTASKS_PER_NODE": "1"}, "got 1 and 8; sbatch --ntasks-per-node=8"),
    ],
)
def test_bad_input_of_a_job_is_one_line(slurm, command, job, says):
    done = slurm.run(TRAIN, *command, **job)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert slurm.calls == []


def test_one_task_may_have_a_whole_node(slurm):
    one = JOB | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    assert slurm.run(TRAIN, *COMMAND, **one).returncode == 0


def test_the_job_asks_for_what_the_script_expects():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", TRAIN.read_text(), re.MULTILINE))
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert (asked["signal"], asked["open-mode"], asked["requeue"]) == ("TERM@300", "append", "")


def test_the_image_copies_what_is_there_and_runs_a_configuration_that_is():
    text = DOCKERFILE.read_text()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert [name for name in line.split() if not (ROOT / name).exists()] == []
    project = (ROOT / "pyproject.toml").read_text()
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert [extra for extra in extras.split(",") if f"\n{extra} = [" not in project] == []
    [python] = re.findall(r"^FROM python:(\d\.\d+)-slim$", text, re.MULTILINE)
    assert (ROOT / "constraints" / f"python{python}.txt").is_file()
    [config] = re.findall(r"tsopsd train (\S+)", text)
    load_config(ROOT / config, [])
