"""The paper's arms: each differs from its base in what it claims and in nothing else; the README's lines are valid."""

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tsopsd_jax.config import load_config, overlay, strict
from tsopsd_jax.config.build import make_phase
from tsopsd_jax.train.signals import StopRequest, leave

PAPER = Path(__file__).resolve().parents[1] / "configs" / "paper"
BASES = ("qwen3_4b", "qwen3_8b")
GONE = "left out"

ARMS = {
    "dapo": {
        "phases.rl.outcome": "trained",
        "phases.rl.stop.collapsed_below_nats": None,
        "phases.rl.stop.window_steps": 1,
        "phases.reheat": GONE,
        "phases.rl-again": GONE,
    },
    "rr": {
        "phases.reheat": GONE,
        "phases.rl-again.objective.hyperparameters.policy_temperature": 1.2,
        "phases.rl-again.sampling.sampling_temperature": 1.2,
    },
    "pr_rkl": {"phases.reheat.objective.hyperparameters.direction": "reverse"},
}
DIFFERENCES = {f"{base}_{arm}": (base, changes) for base in BASES for arm, changes in ARMS.items()} | {
    "qwen3_4b_base_reheated": (
        "qwen3_4b",
        {
            "phases.rl": GONE,
            "phases.rl-again": GONE,
            "phases.reheat.stop.recovered_above_nats": None,
            "phases.reheat.guard.max_start_entropy_nats": None,
            "phases.reheat.guard.runaway_entropy_nats": None,
        },
    ),
    "qwen3_8b_long_horizon": (
        "qwen3_8b",
        {
            "phases.rl-again": GONE,
            "phases.reheat.prompts_per_step": 256,
            "phases.reheat.stop.recovered_above_nats": None,
            "phases.reheat.stop.steps": 31,
            "phases.reheat.guard.runaway_entropy_nats": None,
        },
    ),
    "qwen3_8b_recooled": (
        "qwen3_8b",
        {
            "model.path": "models/Qwen3-8B-reheated",
            "phases.rl": GONE,
            "phases.rl-again": GONE,
            "phases.reheat.outcome": "recooled",
            "phases.reheat.objective.hyperparameters.direction": "reverse",
            "phases.reheat.objective.hyperparameters.teacher_temperature": 0.8333,
            "phases.reheat.stop.recovered_above_nats": None,
            "phases.reheat.stop.collapsed_below_nats": 0.08,
            "phases.reheat.stop.steps": 15,
            "phases.reheat.guard.max_start_entropy_nats": None,
        },
    ),
    "qwen3_4b_scarce": (
        "qwen3_4b",
        {"data.sample": 2048, "phases.rl.stop.epochs": None, "phases.rl-again.stop.epochs": None},
    ),
    "qwen3_4b_scarce_dapo": ("qwen3_4b_dapo", {"data.sample": 2048, "phases.rl.stop.epochs": None}),
}


def by_name(path: Path) -> dict:
    """The resolved settings, with phases by their names."""
    settings = strict.plain(load_config(path, []))
    return settings | {"phases": {phase["name"]: phase for phase in settings["phases"]}}


def changed(base: Path, arm: Path) -> dict:
    """{setting: its new value} of all that differ; a phase of the base that the arm has not is GONE."""
    old, new = by_name(base), by_name(arm)
    gone = {f"phases.{name}": GONE for name in old["phases"].keys() - new["phases"].keys()}
    old["phases"] = {name: phase for name, phase in old["phases"].items() if name in new["phases"]}
    return gone | {difference.key: difference.new for difference in strict.differences(old, new)}


def test_every_file_of_the_paper_is_a_base_or_a_known_arm():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*BASES, *DIFFERENCES}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_arm_differs_in_what_it_claims_and_in_nothing_else(name):
    base, changes = DIFFERENCES[name]
    path = PAPER / f"{name}.yaml"
    assert changed(PAPER / f"{base}.yaml", path) == changes
    assert overlay.read(path)[1][1].path.name == f"{base}.yaml", "the file says so itself"


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_arm_opens_with_its_claim(name):
    head = (PAPER / f"{name}.yaml").read_text(encoding="utf-8").split("\nextends:")[0]
    assert re.search(r"^# Claims:   paper \(arXiv 2606\.00755\), (table|figures?) \d+", head, flags=re.MULTILINE)
    assert re.search(r"^# Hardware: the paper's 8 x H800: [\d.]+ h", head, flags=re.MULTILINE)
    assert f"tsopsd train configs/paper/{name}.yaml" in head


def readme_commands() -> list[list[str]]:
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"^    (tsopsd train .*)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("words", readme_commands(), ids=lambda words: words[-1])
def test_the_readmes_lines_are_valid_and_change_what_they_name(words):
    file = PAPER.parents[1] / words[2]
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert overrides
    assert words[-2] == "--run-dir"
    config = load_config(file, overrides)
    for phase in config.phases:
        make_phase(phase)
    before = strict.plain(load_config(file, []))
    assert strict.first_difference(before, strict.plain(config)) is not None


def test_every_run_of_the_readme_has_a_directory_of_its_own():
    folders = [words[-1] for words in readme_commands()]
    assert len(folders) == len(set(folders)) > 8


# -------------------------------------------------------------- the arms at toy size

ROOT = PAPER.parents[1]
TOY = sorted(path.stem for path in (ROOT / "configs" / "arms").glob("*.yaml"))
DEMO = "tsopsd_jax/assets/demo.yaml"


def test_the_toy_has_every_arm_of_the_paper_and_every_method_of_its_readme():
    methods = {
        re.search(r"name: (\w+)", " ".join(words))[1] for words in readme_commands() if "objective={" in str(words)
    }
    assert set(TOY) >= {*ARMS, "pr_fkl", "base_reheated", "long_horizon", "scarce", "cycle", *methods}


@pytest.mark.parametrize("name", TOY)
def test_a_toy_arm_is_the_demo_but_for_what_it_says(name):
    """No arm changes what all share: model, data source, seed, batch and rate of RL."""
    demo, arm = by_name(ROOT / DEMO), by_name(ROOT / "configs" / "arms" / f"{name}.yaml")
    changes = {difference.key for difference in strict.differences(demo, arm)}
    allowed = [
        r"data\.sample|cycle|phases\.[\w-]+",
        r"phases\.(rl|reheat)\.(outcome|stop|guard|learning_rate_control)(\..+)?",
        r"phases\.rl\.(objective(\..+)?|updates_per_rollout)|phases\.reheat\.(prompts_per_step|reference)",
        r"phases\.reheat\.objective\.(name|hyperparameters\.(beta|direction|teacher|teacher_temperature))",
        r"phases\.rl-again\.(objective\.hyperparameters\.policy_temperature|sampling\.sampling_temperature)",
    ]
    assert [key for key in changes if not re.fullmatch("|".join(allowed), key)] == []


@pytest.fixture
def arms(monkeypatch):
    """The script, whose trainer waits for a signal, or sends itself one first, as a person would."""
    spec = importlib.util.spec_from_file_location("arms", ROOT / "scripts" / "arms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sent = []

    class Waits:
        def run(self):
            asked = StopRequest()
            with asked.heard():
                for number in sent:
                    os.kill(os.getpid(), number)
                while not asked.asked():
                    time.sleep(0.01)
            leave(asked.asked(), "saved step 3")

    def open_trainer(_config, run_dir, _observer):
        run_dir.mkdir(exist_ok=True)
        (run_dir / "metrics.jsonl").touch()
        return contextlib.nullcontext(Waits())

    monkeypatch.setattr(module, "open_trainer", open_trainer)
    return module, sent


def test_an_arm_ends_by_its_time_and_the_script_by_a_persons_signal(arms, tmp_path, capsys):
    module, sent = arms
    module.main(["dapo", "rr", "--minutes", "0.001", "--out", str(tmp_path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| dapo", "| rr"]
    assert all(row.endswith("| time is over |") for row in rows)
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == rows
    sent.append(signal.SIGINT)
    with pytest.raises(SystemExit, match="SIGINT: saved step 3; the same command goes on"):
        module.main(["dapo", "rr", "--minutes", "5", "--out", str(tmp_path)])


@pytest.mark.slow
def test_three_steps_of_every_arm(tmp_path):
    """`scripts/arms.py` as a person runs it, on fewer problems and with small batches of one shape."""
    small = ["evaluation.data.first=8", "evaluation.samples=2", "evaluation.rows_at_once=16"]
    small = [word for setting in small for word in ("--set", setting)]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "arms.py"),
        "--steps",
        "3",
        "--prompts",
        "8",
        "--out",
        str(tmp_path / "arms"),
        *small,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == TOY
    for row in rows:
        assert row[-1] == "done", row
        assert int(row[1]) >= 3
        assert all(0 < float(value) < 5 for value in row[3:5]), row
