"""What `scripts/soak.py` sees, and what it complains of; a soak of a few steps."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from project_scripts import script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def soak():
    """The script as a module."""
    return script("soak")


def seen_of(steps: int = 300, **slopes: float) -> list[dict]:
    """Steps of two phases that hold the same; `slopes`: what grows, by how much a step."""
    base = {"resident_bytes": 1e9, "files": 10, "threads": 90, "arrays": 48, "cpu_s": 0.1, "clock_s": 0.2}
    rows = []
    for step in range(1, steps + 1):
        warm = 0.5 if step < steps / 3 else 1.0  # programs and buffers are still being made
        held = {name: value * (warm if name in ("resident_bytes", "files") else 1) for name, value in base.items()}
        rows.append({"step": step, "phase": "a" if step <= 200 else "b", **held})
        for name, slope in slopes.items():
            rows[-1][name] += slope * step
    return rows


def complaints(soak, seen, weights=None) -> list[str]:
    args = argparse.Namespace(steps=len(seen))
    return soak.complaints(soak.facts_of(seen, {300: weights or {"metrics.jsonl": 10**9}}, args, 1.0))


def test_what_is_flat_is_no_complaint(soak):
    assert complaints(soak, seen_of()) == []
    noise = np.random.default_rng(0)
    seen = seen_of()
    for each in seen:
        each["resident_bytes"] += 3e6 * noise.normal()
        each["files"] += int(noise.integers(0, 10))
    assert complaints(soak, seen) == []


@pytest.mark.parametrize(
    ("slopes", "says"),
    [
        ({"resident_bytes": 1e5}, "memory grows by 95 MiB in 1,000 steps"),
        ({"files": 0.01}, "files grow by 10.0 in 1,000 steps"),
        ({"threads": 0.01}, "threads grow by 10.0 in 1,000 steps"),
        ({"cpu_s": 0.01}, "a step of a costs"),
    ],
)
def test_what_grows_is_said(soak, slopes, says):
    assert complaints(soak, seen_of(**slopes))[0].startswith(says)


def test_a_file_that_is_no_log_is_bounded(soak):
    assert complaints(soak, seen_of(), {"status.json": 10**7}) == ["status.json has 10,000,000 bytes"]


def test_the_phases_take_the_steps_that_are_asked_for(soak, tmp_path):
    args = argparse.Namespace(steps=5000, prompts=4, responses=4, evaluate_every=50, save_every=20)
    config = yaml.safe_load(soak.configuration(tmp_path, args).read_text())
    assert [phase["stop"]["steps"] for phase in config["phases"]] == [1666, 1667, 1667]
    assert [phase["prompts_per_step"] for phase in config["phases"]] == [4, 8, 4]


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    """Its numbers are too few to judge by: what it notes is there."""
    small = ["--steps", "15", "--prompts", "2", "--evaluate-every", "5", "--save-every", "4"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    out = ["--json", str(tmp_path / "x.json"), "--png", str(tmp_path / "x.png")]
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), *small, *out]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]  # what it complains of after 15 steps means nothing
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["steps"], found["steps_asked"], len(found["curve"])) == (15, 15, 15)
    assert list(found["median_step"]) == ["rl", "reheat", "rl-again"]
    assert found["run_directory_bytes"]["15"]["metrics.jsonl"] > 0
    assert (tmp_path / "x.png").stat().st_size > 1000
