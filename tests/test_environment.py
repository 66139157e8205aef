"""What the environment gives: variables, a home, folders that cannot be written.
Bad input is one line and exit code 2."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_configs import demo_file
from test_data import write_jsonl

from tsopsd_jax.cli import main
from tsopsd_jax.commands.exit_codes import BAD_INPUT
from tsopsd_jax.config import load_config, places
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.rundir import files

ROOT = Path(__file__).resolve().parents[1]


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# ------------------------------------------------------------------ variables


@pytest.mark.parametrize("value", ["1", "True", "on"])
def test_runs_in_64_bits_are_refused(value, monkeypatch, capsys):
    monkeypatch.setenv("JAX_ENABLE_X64", value)
    assert main(["check", str(DEMO_CONFIG)]) == BAD_INPUT
    assert "JAX_ENABLE_X64: expected it unset" in one_line(capsys)
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    assert main(["check", "--syntax-only", str(DEMO_CONFIG)]) == 0


@pytest.mark.parametrize("tasks", [None, "", "two"])
def test_a_step_of_srun_without_its_number_of_tasks(tasks, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    if tasks is not None:
        monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert main(["train", str(DEMO_CONFIG), "--run-dir", str(tmp_path / "run")]) == BAD_INPUT
    assert "SLURM_NTASKS: expected the number of processes, since SLURM_STEP_NODELIST is set" in one_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["check", "train", "eval"])
@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_a_platform_that_is_not_there(command, platform, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    arguments = [command, str(demo_file(tmp_path, rows=4))]
    if command == "eval":
        arguments = [command, "--model", str(DEMO_CONFIG.parent / "countdown-tiny"), "--benchmarks", "countdown"]
    place = {"train": ["--run-dir", str(tmp_path / "run")], "eval": ["--out", str(tmp_path / "run")]}.get(command, [])
    done = subprocess.run(
        [sys.executable, "-m", "tsopsd_jax", *arguments, *place],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == BAD_INPUT, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"tsopsd {command}: expected JAX to start with JAX_PLATFORMS={platform}, got: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ folders that cannot be written


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_a_home_that_cannot_be_written_and_no_cache_named(home, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("TSOPSD_CACHE_DIR", raising=False)
    assert main(["check", str(DEMO_CONFIG)]) == BAD_INPUT  # prepares the countdown problems
    assert f"expected a folder to write to, got {home}/.cache/tsopsd_jax/datasets: " in one_line(capsys)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert main(["train", str(demo_file(tmp_path, rows=4)), "--run-dir", str(tmp_path / "run")]) == BAD_INPUT
    error = one_line(capsys)
    assert f"cache {home}/.cache/tsopsd_jax: expected a folder that can be made, got " in error
    assert "name another with cache_dir or TSOPSD_CACHE_DIR" in error
    assert not (tmp_path / "run").exists()


def test_programs_are_not_kept_in_a_cache_that_is_read_only(monkeypatch, tmp_path):
    asked = []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(places.jax.config, "update", lambda name, _: asked.append(name))
    monkeypatch.setattr(os, "access", lambda *_: False)
    places.use_compilation_cache(tmp_path / "cache")
    assert asked == []
    monkeypatch.setattr(os, "access", lambda *_: True)
    places.use_compilation_cache(tmp_path / "cache")
    assert "jax_compilation_cache_dir" in asked


def test_the_page_of_a_run_that_is_read_only_goes_elsewhere(monkeypatch, tmp_path, capsys):
    run, replace = tmp_path / "run", files.replace
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "phase": "rl"}\n')

    def read_only(file, content, **how):
        if file.parent == run:
            raise OSError(errno.EROFS, "Read-only file system")
        replace(file, content, **how)

    monkeypatch.setattr(files, "replace", read_only)
    assert main(["report", str(run)]) == BAD_INPUT
    assert f"{run}: cannot write the page (Read-only file system); name another file with --out" in one_line(capsys)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert [file.name for file in run.iterdir()] == ["metrics.jsonl"]


# ------------------------------------------------------------------ the user's folder


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_tilde_in_settings(home, capsys):
    file = demo_file(home, rows=4)
    shutil.copytree(DEMO_CONFIG.parent / "countdown-tiny", home / "model")
    settings = {
        "model.path": "~/model",
        "data.path": "~/problems.jsonl",
        "data.exclude": "[~/none.jsonl]",
        "cache_dir": "~/c",
    }
    write_jsonl(home / "none.jsonl", {"problem": "another", "answer": "1"})
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    config = load_config(file, sets[1::2])
    assert config.model.path == str(home / "model")
    assert config.data.exclude == (str(home / "none.jsonl"),)
    assert places.cache_folder(config) == home / "c"
    assert main(["check", "~/c.yaml", *sets]) == 0, capsys.readouterr().err  # a shell may leave it to us
    mine = home / "mine.py"
    mine.write_text("from tsopsd_jax.objectives import OBJECTIVES\ndapo = OBJECTIVES['dapo']\n")
    assert main(["check", "--syntax-only", str(file), "--set", "phases.0.objective={name: ~/mine.py:dapo}"]) == 0


def test_a_tilde_in_the_environment_and_in_options(home, monkeypatch, capsys):
    (home / "aime").mkdir()
    write_jsonl(home / "aime" / "test.jsonl", {"problem": "p", "answer": "7"})
    assert main(["data", "prepare", "aime_2024", "--from=~/aime", "--cache-dir=~/cache"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(home / "cache" / "datasets" / "aime_2024" / "1.0.0")
    monkeypatch.setenv("TSOPSD_CACHE_DIR", "~/cache")
    assert main(["data", "list"]) == 0
    assert "test 1" in capsys.readouterr().out
    (home / "run").mkdir()
    (home / "run" / "metrics.jsonl").write_text('{"step": 1, "phase": "rl"}\n')
    assert main(["report", "~/run"]) == 0
    assert (home / "run" / "report.html").is_file()
    asked = json.dumps({"prompt": "3 7 11 2 -> 34 :"})
    (home / "prompts.jsonl").write_text(asked + "\n")
    (home / "model").symlink_to(DEMO_CONFIG.parent / "countdown-tiny")
    arguments = ["--model=~/model", "--prompts=~/prompts.jsonl", "--out=~/out.jsonl", "--max-tokens=2", "--slots=8"]
    assert main(["generate", *arguments]) == 0, capsys.readouterr().err
    assert (home / "out.jsonl").is_file()
    assert not list(Path.cwd().glob("~*"))


def test_a_tilde_without_a_home_is_one_line(monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("TSOPSD_CACHE_DIR", raising=False)
    assert main(["data", "list"]) == BAD_INPUT
    assert "expected HOME to name the user's folder, got none" in one_line(capsys)


# ------------------------------------------------------------------ what a killed preparation leaves


def test_workplaces_of_killed_preparations_go_at_the_next_one(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", {"problem": "p", "answer": "7"})
    datasets = tmp_path / "cache" / "datasets"
    dead, alive = (datasets / f".{name}-building-abc" for name in ("aime_2024", "countdown"))
    for folder in (dead, alive):
        (folder / "below").mkdir(parents=True)
        (folder / "below" / "part").write_text("half")
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    command = [
        "data",
        "prepare",
        "aime_2025",
        "--from",
        str(tmp_path / "test.jsonl"),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    assert main(command) == 0
    assert not dead.exists()
    assert (alive / "below" / "part").is_file(), "another process builds there"
    os.close(handle)
    assert main(command) == 0
    assert [each.name for each in datasets.iterdir()] == ["aime_2025"]
