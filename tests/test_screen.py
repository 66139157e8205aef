"""The screen is never worth the run: whatever becomes of it, a run saves,
writes its page and ends with its own exit code."""

import os
import subprocess
import sys

import pytest
import yaml

from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.display.screen import in_ascii
from tsopsd_jax.rundir.status import read_status

SMALL = "import sys; from tsopsd_jax.display.screen import secure; secure(keep_going={keep_going}); "


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The demo's reheater alone: two steps on eight prompts, evaluated before and after."""
    folder = tmp_path_factory.mktemp("screen")
    config = yaml.safe_load(DEMO_CONFIG.read_text())
    [phase] = [phase for phase in config["phases"] if phase["objective"]["name"] == "ts_opsd"]
    phase |= {"prompts_per_step": 8, "stop": {"steps": 2}, "guard": {}}
    config["evaluation"] |= {"samples": 2, "rows_at_once": 8}
    config["evaluation"]["data"]["first"] = 2
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(config | {"phases": [phase], "cache_dir": str(folder / "cache")}))
    return file


def start(command, **streams):
    env = os.environ | {"XLA_FLAGS": "", "PYTHONWARNINGS": "error"} | streams.pop("env", {})
    return subprocess.Popen(command, env=env, **{"stderr": subprocess.PIPE, **streams})


def check_run(run, process, stderr=b""):
    assert process.returncode == 0, stderr
    assert (run / "report.html").is_file()
    assert read_status(run)["state"] == "ended"
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == 2
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]
    assert b"Traceback" not in stderr
    assert b"Exception ignored" not in stderr


@pytest.mark.parametrize("screen", ["goes away", "closed", "full", "ascii"])
def test_a_run_does_not_need_its_screen(screen, tiny_run, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tsopsd_jax", "train", str(tiny_run), "--run-dir", str(run)]
    if screen == "goes away":
        process = start(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        check_run(run, process, process.communicate()[1])
    elif screen == "full":
        with open("/dev/full", "wb") as full:
            process = start(command, stdout=full, stderr=full)
            process.wait()
        check_run(run, process)
    elif screen == "ascii":
        process = start(command, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
        stdout, stderr = process.communicate()
        check_run(run, process, stderr)
        assert b"+- " in stdout
        assert b"-------" in stdout
        assert b"?" not in stdout
    else:
        process = start(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])
        check_run(run, process, process.communicate()[1])


def small(code, *, keep_going=True, shell=None, env=None, **streams):
    command = [sys.executable, "-c", SMALL.format(keep_going=keep_going) + code]
    if shell is not None:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(command, env=os.environ | (env or {}), check=False, **{"stderr": subprocess.PIPE, **streams})


def test_what_is_closed_is_not_taken_by_a_log(tmp_path):
    """Descriptor 1 would be that of the next file: what a library prints would go into it."""
    file = tmp_path / "metrics.jsonl"
    code = (
        f"import os; f = open({str(file)!r}, 'w'); os.write(1, b'chatter'); os.write(2, b'chatter'); "
        "print('shown'); f.close()"
    )
    assert small(code, shell="<&- >&- 2>&-").returncode == 0
    assert file.read_text() == ""


def test_a_full_disk_is_told_where_the_output_is_the_product():
    for keep_going, code in ((True, 0), (False, 1)):
        with open("/dev/full", "wb") as full:
            done = small(
                "print('x' * 100); sys.stdout.flush(); print('y', file=sys.stderr)", keep_going=keep_going, stdout=full
            )
        assert done.returncode == code
        assert (b"No space left on device" in done.stderr) == (not keep_going)


@pytest.mark.parametrize("keep_going", [True, False])
def test_a_viewer_that_went_away_is_no_error(keep_going):
    """Also for what was printed last, which Python flushes when it ends."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = small("print('x' * 100_000); print('y')", keep_going=keep_going, stdout=pipe)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_printed_arrives():
    for flag in ("", "1"):  # as with `python -u`
        done = small(
            "print('a ± b'); print('c', file=sys.stderr)", stdout=subprocess.PIPE, env={"PYTHONUNBUFFERED": flag}
        )
        assert (done.stdout.decode(), done.stderr) == ("a ± b\n", b"c\n")


def test_plain_characters():
    assert in_ascii("± ─ → 漢 é", "latin-1") == "± - -> ? é"
    assert in_ascii("± ─ → 漢 é", "ascii") == "+- - -> ? ?"
    assert in_ascii("± ─ → 漢 é", "utf-8") == "± ─ → 漢 é"
