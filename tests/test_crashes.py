"""Runs that are killed at any moment lose nothing: a short run of `scripts/crash_test.py`, and what it would see."""

import json
from pathlib import Path

import numpy as np
import pytest
from project_scripts import run_script, script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def crash_test():
    """The script as a module."""
    return script("crash_test")


@pytest.mark.slow
def test_a_run_that_was_killed_at_each_kind_of_moment_is_the_run_that_was_not(tmp_path):
    run_script(
        "crash_test.py", "plain", "--kills", "5", "--steps", "2", "1", "1", "--json", str(tmp_path / "table.json")
    )
    [row] = json.loads((tmp_path / "table.json").read_text())
    assert sum(row["kills"].values()) == 5
    assert row["starts"] >= 6
    assert row["compared_arrays"] > 50
    assert row["differences"] == []


def test_one_changed_bit_is_a_difference(crash_test):
    """The comparison sees the last bit of a parameter, a missing line, and a value of the log; no clocks."""
    params = np.arange(4, dtype=np.float32)
    records = {"metrics": [{"step": 1, "loss/total": 0.5}], "evaluations": [], "samples": []}
    alone = {"state": params, "progress.phase": 1}, records
    assert crash_test.differences(alone, ({"state": params.copy(), "progress.phase": 1}, records)) == []
    nudged = np.nextafter(params, np.float32(9))
    assert crash_test.differences(alone, ({"state": nudged, "progress.phase": 1}, records)) == ["state"]
    assert crash_test.differences(alone, ({"state": -params * -1, "progress.phase": True}, records)) == [
        "progress.phase"
    ]
    assert crash_test.differences(alone, ({"progress.phase": 1}, records)) == ["state"]
    changed = records | {"metrics": [{"step": 1, "loss/total": 0.25}], "samples": [{"step": 1}]}
    odd = crash_test.differences(alone, (alone[0], changed))
    assert odd == ["metrics[0].loss/total", "samples: 0 records, 1 after the kills"]


def test_few_kills_meet_every_kind_of_moment(crash_test):
    kills = [crash_test.next_kill(number, crash_test.random.Random(0), 0.2) for number in range(5)]
    assert {kill.moment for kill in kills} == set(crash_test.MOMENTS)
