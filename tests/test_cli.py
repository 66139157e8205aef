"""The command line: every kind of bad input is one line and exit code 2, and nothing is overwritten; export round
trip."""

import argparse
import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from etils import epath

from tsopsd_jax.cli import main
from tsopsd_jax.commands import train
from tsopsd_jax.commands.train import run_config, transitions
from tsopsd_jax.config import load_config
from tsopsd_jax.config.build import divide_cpu
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.model import load_pretrained
from tsopsd_jax.model.packaged import PACKAGED_MODEL
from tsopsd_jax.rewards import verify_countdown
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.checkpoints import SaveError
from tsopsd_jax.rundir.log import read_evaluations, read_metrics
from tsopsd_jax.train.trainer import Trainer

ASSETS = DEMO_CONFIG.parent / PACKAGED_MODEL
QUICK = (
    "evaluation.data.first=2",
    "evaluation.samples=2",
    "evaluation.rows_at_once=8",
    "phases.0.prompts_per_step=2",
    "phases.0.responses_per_prompt=4",
    "phases.0.stop.steps=1",
    "phases.0.stop.window_steps=9",
    "phases.0.reward.on_shortage=fill",
    "phases.1.prompts_per_step=8",
    "phases.1.stop.steps=1",
    "phases.1.guard.max_start_entropy_nats=null",
    "phases.1.stop.recovered_above_nats=9",
    "phases.2.prompts_per_step=2",
    "phases.2.responses_per_prompt=4",
    "phases.2.stop.steps=1",
    "phases.2.reward.on_shortage=fill",
)


def demo(run_dir: Path, *assignments: str) -> int:
    sets = [part for a in (*QUICK, *assignments) for part in ("--set", a)]
    return main(["demo", "--run-dir", str(run_dir), *sets])


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("TSOPSD_CACHE_DIR", str(cache))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A demo run of three steps, one per phase."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSOPSD_CACHE_DIR", str(cache))
        assert demo(run) == 0
    return run


@pytest.mark.parametrize(
    ("text", "steps"), [("3:5", (3, 5)), ("4", (4, 4)), ("5:3", None), ("0:2", None), ("a:b", None)]
)
def test_steps_to_profile_are_first_and_last(text, steps):
    from tsopsd_jax.commands.train import _steps

    if steps is None:
        with pytest.raises(argparse.ArgumentTypeError, match="expected A:B, the first and the last step"):
            _steps(text)
    else:
        assert _steps(text) == steps


def test_the_demos_schedule_runs_and_leaves_what_the_contract_names(finished):
    assert {p.name for p in finished.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "evaluations.jsonl",
        "events",
        "checkpoints",
        "report.html",
    }
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["rl", "reheat", "rl-again"]
    assert [line["optim/learning_rate"] for line in lines] == pytest.approx([5e-5, 2e-5, 5e-5])  # two warm up over 10
    assert "<svg" in (finished / "report.html").read_text()


def test_a_runs_metrics_are_those_of_the_page(finished):
    """docs/metrics.md; tests/test_docs.py holds it against the code."""
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    written = {key for line in read_metrics(finished) for key in line} - {"step", "phase", "phase_step", "time_s"}
    assert len(written) > 25
    assert {key for key in written if f"`{key}`" not in page} == set()


def test_running_it_again_says_that_it_is_done(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert demo(finished) == 0
    assert "is done: 3 steps" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_an_evaluation_keeps_all_responses_to_a_few_problems(finished):
    for record in read_evaluations(finished):
        assert len(record["examples"]) == 2  # of two problems
        for example in record["examples"]:
            counts = [each["count"] for each in example["responses"]]
            assert sum(counts) == record["samples"]
            assert counts == sorted(counts, reverse=True)
            assert len({each["response"] for each in example["responses"]}) == len(counts)


def test_a_run_that_goes_on_says_where(finished):
    stream = io.StringIO()
    for step, phase in ((2, "rl-again"), (0, "rl"), (3, None)):
        trainer = SimpleNamespace(run_state=SimpleNamespace(step=step), phase_name=phase)
        train._tell_resumed(trainer, finished, LiveTable(stream=stream))
    assert stream.getvalue().splitlines() == ["resumed at step 2 of rl-again", f"{finished} is done: 3 steps"]


def test_a_run_from_python_is_the_run_of_the_command(finished, tmp_path):
    """docs/python.md: the same steps, bit for bit; and the same call says that it is done."""
    config = load_config(DEMO_CONFIG, list(QUICK))
    assert run_config(config, tmp_path / "run") == 0

    def lines(run: Path) -> list[dict]:
        clock = ("time_s", "rollout/tokens_per_s")
        return [
            {k: v for k, v in line.items() if k not in clock and not k.startswith(("time/", "perf/"))}
            for line in read_metrics(run)
        ]

    assert lines(tmp_path / "run") == lines(finished)
    assert (tmp_path / "run" / "report.html").is_file()
    assert run_config(config, str(tmp_path / "run")) == 0


def test_convert_exports_the_policy(finished, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["convert", str(finished), "--out", str(out), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{out}: the policy after step 3, in float32\n"
    model, params = load_pretrained(out)
    _, base = load_pretrained(ASSETS)
    tokens = jnp.asarray([[3, 7, 11, 2, 105, 34, 106]], jnp.int32)
    assert not np.array_equal(model.logits(params, tokens), model.logits(base, tokens)), "the policy has learned"
    assert (out / "tokenizer.json").read_bytes() == (ASSETS / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "# countdown-tiny, after 3 steps" in card
    assert "| reheat | ts_opsd direction forward, teacher_temperature 1.2 | 1 |" in card
    assert "avg@" in card
    assert main(["convert", str(finished), "--out", str(out)]) == 0  # what was exported may be exported again
    assert main(["convert", str(finished), "--out", str(tmp_path / "x"), "--step", "77"]) == 2
    assert "no checkpoint of step 77" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax leaves
def test_every_reader_of_a_damaged_checkpoint_names_it(finished, tmp_path, capsys):
    """Flipped bytes in the newest of two: exports and the run itself take the one before it, an evaluation is
    refused."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    data = max((run / "checkpoints" / "3" / "state").rglob("*"), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(b ^ 0xFF for b in content[middle : middle + 64])
    data.write_bytes(content)
    damaged = r"checkpoint 3 is damaged: digest of state/\S+ is \S+ \w+, \S+ \w+ was written"
    export = ["convert", str(run), "--out", str(tmp_path / "hf")]
    assert main(export) == 0
    assert re.fullmatch(rf"{damaged}; step 2 is read instead\n", capsys.readouterr().err)
    assert "after 2 steps" in (tmp_path / "hf" / "README.md").read_text()
    benchmark = ["--benchmarks", "countdown", "--first", "2", "--samples", "1", "--max-tokens", "19"]
    for arguments in (
        [*export, "--step", "3"],
        ["eval", "--run", str(run), *benchmark, "--out", str(tmp_path / "eval")],
    ):
        assert main(arguments) == 2
        assert re.search(rf"{damaged}; other checkpoints of {run}: 2\n$", capsys.readouterr().err)
    before = read_metrics(run)
    assert demo(run) == 0
    assert re.search(
        rf"{damaged}; it is kept aside, and the run goes on from step 2$", capsys.readouterr().out, flags=re.MULTILINE
    )
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "3", "3.damaged"]
    for line, again in zip(before, read_metrics(run), strict=True):
        assert again["policy/entropy_nats"] == line["policy/entropy_nats"]
    for step in ("2", "3"):
        shutil.rmtree(run / "checkpoints" / step / "state")
    for arguments in (["demo", "--run-dir", str(run), *(x for a in QUICK for x in ("--set", a))], export):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "has no checkpoint that can be read: checkpoint 3 is damaged: " in error
        assert "; checkpoint 2 is damaged: " in error
        assert error.count("\n") == 1
    gc.collect()  # here, where the warning is expected


def test_what_cannot_be_written_is_one_line_and_exit_code_6(tmp_path, capsys, monkeypatch):
    for error in (SaveError("step 2 could not be saved"), OSError(errno.ENOSPC, "No space left on device")):

        def evaluate(_, error=error):
            raise error

        monkeypatch.setattr(Trainer, "_evaluate", evaluate)
        assert demo(tmp_path / "run") == 6
        said = capsys.readouterr().err
        assert str(error) in said
        assert said.count("\n") == 1


def test_a_finished_run_without_its_checkpoints_is_not_started_over(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert demo(run) == 2
    assert (
        f"checkpoints are gone, so that it cannot go on; to begin anew choose another --run-dir, or remove {run}"
        in (capsys.readouterr().err)
    )
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_convert_replaces_exports_alone(finished, tmp_path, capsys):
    """Not the model that the run began with, nor another that this program wrote."""
    base = tmp_path / "base"
    shutil.copytree(ASSETS, base)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    assert main(["convert", str(finished), "--out", str(base)]) == 2
    assert f"{base} is not empty and is no export of `tsopsd convert`" in capsys.readouterr().err
    config = finished / "config.yaml"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.read_text().replace("countdown-tiny", str(base)))
    assert main(["convert", str(run), "--out", str(base / ".." / "base")]) == 2
    assert "is the model that the run began with" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_report_can_be_written_again(finished, capsys):
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")


def test_a_run_of_another_configuration_is_refused_and_left_alone(finished, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert demo(finished, "phases.1.optimizer.learning_rate=1e-4") == 2  # of a phase that is finished
    error = capsys.readouterr().err
    assert (
        "another configuration (phases.reheat.optimizer.learning_rate: 2e-05 != 0.0001, a phase that is over)" in error
    )
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("flag", ["", "--xla_force_host_platform_device_count=8"])
def test_a_cpus_cores_become_devices(flag):
    code = "import jax; from tsopsd_jax.config.build import divide_cpu; divide_cpu(3); print(jax.device_count())"
    env = dict(os.environ, XLA_FLAGS=flag)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "3"


def test_dividing_the_cpu_comes_too_late_once_jax_has_started():
    before = jax.device_count()
    divide_cpu(before + 1)
    assert jax.device_count() == before


def test_settings_of_the_machine_may_change_between_starts(finished):
    assert demo(finished, "checkpoint_every_steps=7") == 0


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (
            "phases.0.optimizer.learning_rat=1",
            "phases.rl.optimizer.learning_rat: unknown key; did you mean 'learning_rate'? (from --set "
            "phases.0.optimizer.learning_rat)",
        ),
        ("wandb_project=reheat", "wandb_project: expected under its new name tracker.wandb.project"),
        ("tracker.wandb={}", "tracker.wandb.project: expected a value, got none"),
        (
            "tracker.wandb.project=p tracker.wandb.mode=off-line",
            "tracker.wandb: mode: expected online, offline, disabled or null",
        ),
        ("phases.0.optimizer.learning_rate=fast", "expected float, got 'fast'"),
        ("seed=1.5", "seed: expected int, got 1.5"),
        ("phases.0.micro_batches=3", "micro_batches 3 does not divide the step's 8 rows"),
        ("phases.0.rows_at_once=0", "rows_at_once must be at least 1, got 0"),
        ("mesh.tensor=3", "does not fit 8 devices"),
        ("mesh.cpu_devices=0", "mesh: cpu_devices must be at least 1, got 0"),
        ("model.path=/nowhere/at-all", "/nowhere/at-all: no such directory"),
        ("data.max_prompt_tokens=6 evaluation.data.max_prompt_tokens=6", "has 7 tokens, expected 1 to 6"),
        ("phases.0.reward.overlong_buffer_tokens=20", "phase 'rl': "),
        ("phases.0.objective.name=dappo", "objective 'dappo' is unknown; known: dapo, ts_opsd"),
        ("phases.0.objective.hyperparameters.clip_lo=0.1", "did you mean 'clip_low'?"),
        ("phases.0.sampling.sampling_temperature=1.2", "objective 'dapo' compares the policy at temperature 1 with"),
        ("phases.1.objective.hyperparameters.direction=sideways", "direction must be 'forward' or 'reverse'"),
        ("phases.0.max_response_tokens=4000", "more than the model's 128 positions"),
        ("phases.0.stop={}", "a phase needs at least one of steps"),
        ("data.verifier=vibes", "verifier: expected one of"),
        ("nonsense", "--set expects a.b=value"),
        ("phases.9.name=x", "expected an index 0 to 2"),
    ],
)
def test_bad_settings_are_one_line_and_leave_no_trace(assignment, says, tmp_path, capsys):
    run = tmp_path / "run"
    assert demo(run, *assignment.split(" ")) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not run.exists()


def test_a_broken_objective_is_one_line_and_leaves_no_trace(tmp_path, capsys):
    """By `check`, and by a run before it samples: the promise `tokenwise` of a loss over sequences."""
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(
        "import jax.numpy as jnp\n"
        "from tsopsd_jax.losses import token_logp\n"
        "from tsopsd_jax.objectives import Objective\n"
        "from tsopsd_jax.types import LossOutput, Mean\n"
        "def mine():\n"
        "    def loss(stats, batch):\n"
        "        return LossOutput(Mean.of(jnp.cumsum(stats['logp'], axis=1), batch.mask), {})\n"
        "    return Objective(lambda z, t: {'logp': token_logp(z, t)}, loss, tokenwise=True)\n"
    )
    change = f"phases.0.objective={{name: '{file}:mine'}}"
    check = ["check", str(DEMO_CONFIG), "--set", change]
    for refused in (lambda: main(check), lambda: main([*check, "--syntax-only"]), lambda: demo(run, change)):
        assert refused() == 2
        error = capsys.readouterr().err
        assert f"phase 'rl': objective '{file}:mine': {file}:6, loss: expected the loss's total to stay" in error
        assert "tokenwise=True" in error
        assert error.count("\n") == 1
    assert not run.exists()


def test_check_warns_of_an_objective_that_changes_nothing(capsys):
    same = "phases.1.objective.hyperparameters.teacher_temperature=1.0"
    for more in ([], ["--syntax-only"]):
        assert main(["check", str(DEMO_CONFIG), "--set", same, *more]) == 0
        assert "warning: phase 'reheat': objective 'ts_opsd': " in capsys.readouterr().out


def test_bad_files_are_one_line(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2")
    models = {}
    for name in ("other", "mismatch"):
        models[name] = tmp_path / name
        shutil.copytree(ASSETS, models[name])
    config = json.loads((ASSETS / "config.json").read_text())
    (models["other"] / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    (models["mismatch"] / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    cases = [
        (["train", str(tmp_path / "no.yaml")], "no such file"),
        (["train", str(broken)], "not valid YAML"),
        (["report", str(tmp_path / "nothing")], "nothing"),
        (["convert", str(foreign), "--out", str(tmp_path / "o")], "is not a run directory"),
        (["demo", "--run-dir", str(foreign)], "holds no run"),
        (["demo", "--run-dir", str(tmp_path / "r"), "--set", f"model.path={models['other']}"], "GPT2LMHeadModel"),
        (["demo", "--run-dir", str(tmp_path / "r"), "--set", f"model.path={models['mismatch']}"], "64"),
        (
            ["demo", "--run-dir", str(tmp_path / "r"), "--set", "data.name=jsonl", "--set", "data.split=null"]
            + ["--set", f"data.path={empty}"],
            "empty.jsonl",
        ),
    ]
    for arguments, says in cases:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1, error
    assert not (tmp_path / "r").exists()
    assert (foreign / "thesis.tex").read_text() == "precious"


def test_a_start_that_fails_does_not_keep_the_directory_for_its_configuration(tmp_path, capsys):
    broken, run = tmp_path / "broken", tmp_path / "run"
    shutil.copytree(ASSETS, broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    assert demo(run, f"model.path={broken}") == 2
    assert "truncated or corrupt" in capsys.readouterr().err
    assert (run / "config.yaml").is_file()
    (broken / "model.safetensors").unlink()
    assert demo(tmp_path / "other", f"model.path={broken}") == 2
    assert "got no model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert demo(run) == 0


def test_a_run_directory_that_is_a_file_or_broken_is_one_line(tmp_path, capsys):
    file, run = tmp_path / "file", tmp_path / "run"
    file.write_text("precious")
    run.mkdir()
    (run / "config.yaml").write_text("a: [1")
    cases = [
        (["demo", "--run-dir", str(file)], "expected a run directory, got a file"),
        (["demo", "--run-dir", str(run)], "invalid YAML"),
        (["convert", str(run), "--out", str(tmp_path / "o")], "invalid YAML"),
        (["report", str(run)], "no such file in it"),
    ]
    for arguments, says in cases:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1, error
    (run / "metrics.jsonl").write_text('{"step": 1, "phase": "rl"}\n')
    assert main(["report", str(run)]) == 0  # what was measured can be shown without it
    assert file.read_text() == "precious"
    assert (run / "config.yaml").read_text() == "a: [1"


def test_a_broken_objective_of_ones_own_leaves_no_trace(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("import no_such_module_at_all")
    assert demo(tmp_path / "run", f"phases.2.objective={{name: '{mine}:f'}}") == 2
    error = capsys.readouterr().err
    assert "phase 'rl-again': objective file" in error
    assert "ModuleNotFoundError" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_second_signal_is_one_line_and_exit_code_4(tmp_path, capsys, monkeypatch):
    def evaluate(_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    assert demo(tmp_path / "run") == 4
    error = capsys.readouterr().err
    assert "interrupted; the same command goes on" in error
    assert error.count("\n") == 1


def test_check_finds_a_prompt_of_the_evaluation_that_is_too_long(tmp_path, capsys):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"id": "long", "problem": "1 2 3 4 5 6 7 8 9 -> 1 :", "answer": "1"}) + "\n")
    data = f"evaluation.data={{name: jsonl, path: {file}, verifier: countdown, max_prompt_tokens: 7}}"
    assert main(["check", str(DEMO_CONFIG), "--set", data]) == 2
    assert "evaluation.data: prompt 'long' has 12 tokens, expected 1 to 7" in capsys.readouterr().err


def test_a_guards_remedy_can_be_followed(tmp_path, capsys):
    run = tmp_path / "run"
    assert demo(run, "phases.1.guard.max_start_entropy_nats=1e-6") == 3
    assert "raise guard.max_start_entropy_nats" in capsys.readouterr().err
    assert demo(run, "phases.1.guard.max_start_entropy_nats=9") == 0
    out = capsys.readouterr().out
    assert "goes on with changed settings: phases.reheat.guard.max_start_entropy_nats: 1e-06 -> 9.0" in out


def test_check_reads_configurations(capsys, tmp_path):
    assert main(["check", "--syntax-only", str(DEMO_CONFIG)]) == 0
    assert main(["check", str(DEMO_CONFIG), "--set", "evaluation.rows_at_once=1024"]) == 0
    assert "3 phases" in capsys.readouterr().out
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(yaml.safe_load(DEMO_CONFIG.read_text()) | {"sead": 1}))
    assert main(["check", str(wrong)]) == 2
    assert "sead: unknown key; did you mean 'seed'?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "just text", "3"])
def test_a_file_that_is_no_mapping_is_one_line(text, tmp_path, capsys):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    for extra in ([], ["--set", "seed=1"]):
        assert main(["train", str(file), *extra]) == 2
        error = capsys.readouterr().err
        assert "odd.yaml" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (
            "phases.0.optimizer={learning_rate: .nan}",
            "phases.rl.optimizer.learning_rate: expected float, got nan (float) (from --set phases.0.optimizer)",
        ),
        ("phases.0.optimizer.learning_rate=-1", "learning_rate must be positive"),
        ("evaluation.samples=0", "samples must be at least 1"),
        ("evaluation.every_steps=0", "every_steps must be at least 1"),
        ("evaluation.data.chat=direct", "expected the chat of data, none, in which the policy is trained, got direct"),
        (
            "evaluation.max_response_tokens=4000",
            "128 positions; lower evaluation.data.max_prompt_tokens or evaluation.max_response_tokens",
        ),
        (
            "phases.0.max_response_tokens=4000",
            "128 positions; lower data.max_prompt_tokens or phases.rl.max_response_tokens",
        ),
    ],
)
def test_values_out_of_range_are_found_before_the_run(assignment, says, tmp_path, capsys):
    assert demo(tmp_path / "run", assignment) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_evaluated_as_it_evaluates_itself(finished, tmp_path, capsys):
    """The command and training share code, key and settings: a checkpoint's numbers are those that the run has
    recorded."""
    recorded = read_evaluations(finished)[-1]
    options = ["--samples", "2", "--first", "2", "--max-tokens", "19", "--slots", "8", "--out", str(tmp_path)]
    assert main(["eval", "--run", str(finished), "--benchmarks", "countdown", *options]) == 0
    [line] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["model"] == f"{finished.name}-{recorded['step']}"
    for name in ("problems", "avg_at_k", "avg_at_k_stderr", "pass_at_k", "length_mean_tokens", "truncated_fraction"):
        assert line[name] == recorded[name], name
    # Says most: it differs with every response, and between seeds.
    assert line["entropy_nats"] == pytest.approx(recorded["entropy_nats"], abs=2e-6)
    assert 0.05 < line["entropy_nats"] < 1
    capsys.readouterr()
    assert main(["eval", "--run", str(finished), "--step", "1", "--benchmarks", "countdown", *options]) == 2
    assert "has no checkpoint of step 1" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "countdown").glob("*.jsonl")] == [f"{line['model']}.jsonl"]


def test_a_run_brings_its_own_benchmark_and_settings(finished, tmp_path, capsys):
    """`eval --run` alone measures what the run itself has recorded; `generate --run` asks the same problems the same
    way."""
    recorded = read_evaluations(finished)[-1]
    assert main(["eval", "--run", str(finished), "--out", str(tmp_path / "out"), "--slots", "8", "--show", "1"]) == 0
    [line] = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert line["benchmark"] == "countdown-test"
    for name in ("problems", "samples", "avg_at_k", "pass_at_k", "length_mean_tokens"):
        assert line[name] == recorded[name], name
    shown = capsys.readouterr().out
    example = recorded["examples"][0]
    first = shown.split("\n--- ")[1]
    assert shown.startswith(f"=== countdown-test-0\n{example['prompt']}\n--- ")
    assert {response["correct"] for response in example["responses"]} >= {first.startswith("right, ")}
    assert shown.split("--- answer: ")[1].startswith(f"{example['answer']}\n\n| model |")
    assert shown.count("\n--- right, ") + shown.count("\n--- wrong, ") == recorded["samples"]

    out = tmp_path / "out.jsonl"
    assert main(["generate", "--run", f"{finished}@3", "--first", "2", "--out", str(out), "--slots", "8"]) == 0
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert (settings["step"], settings["max_tokens"], settings["sampling"]["top_p"]) == (3, 19, 0.7)
    for row in map(json.loads, out.read_text().splitlines()):
        assert row["correct"] == (verify_countdown(row["response"], row["answer"]) > 0)
        assert row["prompt"].startswith(row["answer"])
    assert out.read_text().count("\n") == 2
    capsys.readouterr()
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "3 5 7 9 -> 24 :"}\n{"prompt": "never asked"}\n')
    assert main(["generate", "--run", str(finished), "--prompts", str(prompts), "--show", "1", "--top-p", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.fullmatch(r"=== 1\n3 5 7 9 -> 24 :\n--- not scored, \d+ tokens(, cut off)?\n.*\n", shown, re.DOTALL)
    assert {each.name for each in tmp_path.glob("[!.]*")} == {"out", "out.jsonl", "out.jsonl.settings.json", "p.jsonl"}


def test_a_run_on_an_object_store_is_asked_as_a_local_one(finished, buckets, tmp_path, capsys, monkeypatch):
    """The same responses, under the run's address. (Orbax asks Google itself: here its part is a local folder.)"""
    far = shutil.copytree(finished, buckets / "runs" / "seven")
    monkeypatch.setattr(object_store, "checkpoints_address", lambda _: epath.Path(far / "checkpoints"))
    ask = ["generate", "--show", "1", "--first", "1", "--slots", "8", "--run"]
    assert main([*ask, str(finished)]) == 0
    local = capsys.readouterr().out
    assert main([*ask, "gs://runs/seven@3"]) == 0
    assert capsys.readouterr().out == local
    out = tmp_path / "out.jsonl"
    assert main(["generate", "--first", "1", "--slots", "8", "--run", "gs://runs/seven", "--out", str(out)]) == 0
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text())["model"] == "gs://runs/seven"
    capsys.readouterr()
    assert main([*ask, "gs://runs/eight"]) == 2
    assert "gs://runs/eight is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate --run RUN", "--out: expected a file for the responses, got none; give one, or --show N"),
        ("generate --run RUN --show 0", "--show: expected at least 1, got 0"),
        ("generate --run RUN --show 1 --score math", "--score: the run's own problems have theirs; leave it out"),
        ("generate --run RUN@1 --show 1", "has no checkpoint of step 1"),
        ("generate --run RUN@3 --step 2 --show 1", "--step: expected the step of --run"),
        ("generate --model DIR --show 1", "--prompts: expected a file of JSON lines, got none; only --run has"),
        ("eval --model DIR --out OUT", "--benchmarks: expected names or files, got none"),
        ("eval --run RUN --out OUT --verifier math", "--verifier: the run's own problems have theirs; leave it out"),
        ("eval --run RUN --out OUT --k 3", "--k: expected 1 to --samples 2, got 3"),
    ],
)
def test_what_cannot_be_asked_of_a_run_is_one_line(finished, tmp_path, capsys, command, says):
    words = {"RUN": str(finished), "DIR": str(ASSETS), "OUT": str(tmp_path / "out")}
    arguments = [re.sub("|".join(words), lambda found: words[found[0]], word) for word in command.split(" ")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_results_of_a_run_that_was_made_anew_are_not_its_own(tmp_path, capsys):
    """The same name and step, other weights: the old numbers are not shown for them."""
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["eval", "--run", str(run), "--benchmarks", "countdown", "--first", "2", "--samples", "2"]
    command += ["--max-tokens", "19", "--slots", "8", "--seed", "0", "--out", str(out)]
    assert demo(run) == 0
    assert main(command) == 0
    assert main(command) == 0, "of the same weights they are"
    shutil.rmtree(run)
    assert demo(run, "seed=5") == 0
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "was begun with other settings (model_weights: " in error
    assert "--again" in error
    assert main([*command, "--again"]) == 0


def test_transitions_say_what_a_phase_took_and_cost():
    evaluations = [
        {"stage": "collapsed", "step": 2, "avg_at_k": 0.5, "pass_at_k": 0.75},
        {"stage": "during reheat", "step": 3, "phase_step": 1, "avg_at_k": 0.1, "pass_at_k": 0.1},
        {"stage": "reheated", "step": 4, "avg_at_k": 0.45, "pass_at_k": 0.8},
    ]
    metrics = [{"step": s, "policy/entropy_nats": 0.1 * s} for s in range(1, 6)]
    want = "collapsed -> reheated: 2 steps, entropy 0.300 -> 0.400 nats, avg@k -5.0, pass@k +5.0 points"
    assert transitions(evaluations, metrics) == [want]


def test_a_reward_of_ones_own_ends_with_the_exit_code_of_its_fault(tmp_path, capsys):
    """2 where it cannot be had or breaks its contract on toy responses, 3 where it fails at those of the run."""
    file = tmp_path / "r.py"
    verifier = f"data.verifier={file}:f"
    assert demo(tmp_path / "run", verifier) == 2
    assert "does not exist" in capsys.readouterr().err
    file.write_text("def f(response, answer): return len(response) / 0\n")
    assert demo(tmp_path / "run", verifier) == 2
    assert "r.py:f, line 1: raised ZeroDivisionError: division by zero (for a right response" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    file.write_text("def f(response, answer): return 1.0 if ' = ' not in response else {}['x']\n")
    assert demo(tmp_path / "run", verifier) == 3
    assert re.search(
        r"phase 'rl' stopped: rewards of \d of 8 .*r.py:f, line 1: raised KeyError: 'x'", capsys.readouterr().err
    )
    assert main(["check", "--syntax-only", str(DEMO_CONFIG), "--set", f"data.verifier={file}:g"]) == 2
    assert "data: reward file" in capsys.readouterr().err
