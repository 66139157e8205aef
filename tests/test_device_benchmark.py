"""benchmarks/device.py: its cases at toy shapes; what the command does with minutes, failures and results."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import device
import device_cases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "asked", "says"),
    [
        ("decode", {"rows": 4, "context": 40}, {"step_ms", "tokens_per_s"}),
        ("prefill", {"rows": 4, "length": 32}, {"ms", "tokens_per_s"}),
        ("update", {"rows": 4, "length": 64, "packed": True}, {"layers", "seconds", "useful_fraction"}),
        ("parity", {}, {"rollout/logp_gap_max_nats", "tokens"}),
        ("determinism", {}, {"parameters_equal"}),
        ("step", {"rows": 4, "mean": 12, "limit": 24}, {"rl", "reheat"}),
    ],
)
def test_a_case_at_toy_shape(kind, asked, says):
    found = device_cases.KINDS[kind](shape="toy", **asked)
    assert says <= set(found)
    assert json.loads(json.dumps(found)) == found
    if kind == "determinism":
        assert found == {"tokens_equal": True, "logp_equal": True, "parameters_equal": True, "largest_difference": 0.0}
    if kind == "parity":  # bfloat16, sampler against learner
        assert found["rollout/logp_gap_max_nats"] < 0.05
        assert found["tokens"] == 96


def test_every_case_is_of_a_known_kind_and_the_best_come_first():
    found = list(device.cases())
    assert {case.kind for case in found} == set(device_cases.KINDS)
    assert len({case.name for case in found}) == len(found)
    assert [case.kind for case in found[:3]] == ["parity", "decode", "update"]


def test_results_are_kept_failures_tried_again_and_the_minutes_end_it(tmp_path, monkeypatch, capsys):
    """A case that runs out of memory says so in one line, and the next one is measured."""
    ran, out = [], tmp_path / "device.json"

    def process(command, **_):
        ran.append(command[2])
        if command[2] == "decode" and len(ran) < 10:
            return SimpleNamespace(returncode=1, stdout="", stderr="noise\nXlaError: RESOURCE_EXHAUSTED: 90 GiB\nend\n")
        return SimpleNamespace(returncode=0, stdout='warm\n{"ms": 1.5}\n', stderr="")

    monkeypatch.setattr(device.subprocess, "run", process)
    asked = ["--out", str(out), "--only", "parity", "64 slots, 1k"]
    device.main(asked)
    cases = json.loads(out.read_text())["cases"]
    assert cases["parity 0.6b"]["ms"] == 1.5
    assert cases["decode 4b, 64 slots, 1k"] == {"failed": "XlaError: RESOURCE_EXHAUSTED: 90 GiB"}
    first, ran[:] = len(ran), ["x"] * 10
    device.main(asked)  # again: what failed only
    assert (first, ran[10:]) == (4, ["decode"] * 3)
    device.main([*asked, "--again", "--minutes", "0.4"])
    assert len(ran) == 13
    assert "minutes are over before 'parity 0.6b'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        device.main([*asked, "--dry"])  # toys beside true shapes
