"""A run directory: who may write to it, which settings may change on resuming, what a failed start leaves."""

import fcntl
import json

import pytest
import yaml

from tsopsd_jax.config import Config, claim, strict
from tsopsd_jax.rundir.checkpoints import Progress


def config_of(*assignments: str) -> Config:
    phase = {
        "objective": {"name": "dapo"},
        "optimizer": {"learning_rate": 1e-6},
        "stop": {"steps": 3},
        "prompts_per_step": 4,
        "responses_per_prompt": 2,
        "max_response_tokens": 8,
        "reward": {"max_generation_batches": 2},
    }
    data = strict.plain(
        {
            "model": {"path": "somewhere"},
            "data": {"name": "countdown", "verifier": "countdown"},
            "phases": [phase | {"name": "rl"}, phase | {"name": "again"}],
        }
    )
    for assignment in assignments:
        strict.override(data, assignment)
    return strict.build(Config, data)


def stored(run):
    return strict.build(Config, yaml.safe_load((run / "config.yaml").read_text()))


@pytest.fixture
def run(tmp_path):
    """A claimed run directory in which nothing was trained."""
    run = tmp_path / "run"
    with claim.held(run):
        assert claim.claim(run, config_of()) == []
    return run


@pytest.fixture
def reached(monkeypatch):
    """reached(phase): the run's newest checkpoint goes on with that phase."""

    def at(phase: int) -> None:
        monkeypatch.setattr(claim, "read_progress", lambda _: Progress(phase=phase))

    return at


# ------------------------------------------------------------------ whose directory


def test_another_process_is_kept_out_until_the_first_is_done(run):
    with claim.held(run):
        with pytest.raises(ValueError, match=rf"another process runs in {run}; wait for it"), claim.held(run):
            pass
        with (run / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with claim.held(run):
        pass


@pytest.mark.parametrize("name", [".lock", "config.yaml.partial"])
def test_what_a_dying_process_leaves_is_no_foreign_directory(name, tmp_path):
    (tmp_path / name).touch()
    with claim.held(tmp_path):
        claim.claim(tmp_path, config_of())
    assert stored(tmp_path) == config_of()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"), claim.held(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_run_directory(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"expected a run directory, got a file; choose another --run-dir"):
        claim.held(file).__enter__()
    with pytest.raises(ValueError, match=r"expected a directory to write to, got Not a directory"):
        claim.held(file / "below").__enter__()


@pytest.mark.parametrize(("content", "words"), [("a: [1", "invalid YAML"), ("- 1", "is not a configuration")])
def test_a_broken_configuration_in_the_directory(content, words, run):
    (run / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        claim.claim(run, config_of())
    assert "\n" not in str(error.value)
    assert (run / "config.yaml").read_text() == content


# ------------------------------------------------------------------ another configuration


def test_a_configuration_under_which_nothing_was_trained_is_replaced(run):
    (run / "metrics.jsonl").touch()
    (run / "evaluations.jsonl").write_text(json.dumps({"stage": "base", "step": 0}) + "\n")
    assert claim.claim(run, config_of("phases.0.guard.max_skipped_in_row=9")) == []
    assert (run / "evaluations.jsonl").exists(), "a guard does not change what was evaluated"
    assert claim.claim(run, config_of("model.path=elsewhere")) == []
    assert stored(run).model.path == "elsewhere"
    assert not (run / "evaluations.jsonl").exists()


def test_a_logged_step_makes_it_a_run(run):
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"another configuration \(model.path: 'somewhere' != 'elsewhere'\)"):
        claim.claim(run, config_of("model.path=elsewhere"))
    assert stored(run) == config_of()


CHANGEABLE = [
    "guard.max_start_entropy_nats=0.3",
    "stop.steps=9",
    "optimizer.learning_rate=1e-7",
    "reward.on_shortage=fill",
    "reward.max_generation_batches=5",
    "rows_at_once=4",
    "micro_batches=2",
    "chunk_tokens=64",
]


@pytest.mark.parametrize("setting", CHANGEABLE)
def test_remedies_and_memory_settings_of_unfinished_phases_may_change(setting, run, reached):
    reached(1)
    changed = claim.claim(run, config_of(f"phases.1.{setting}"))
    assert [line.split(":")[0] for line in changed] == [f"phases.1.{setting.split('=')[0]}"]
    assert " -> " in changed[0]
    assert stored(run) == config_of(f"phases.1.{setting}")
    with pytest.raises(ValueError, match=rf"another configuration \(phases.0.{setting.split('=')[0]}: "):
        claim.claim(run, config_of(f"phases.1.{setting}", f"phases.0.{setting}"))
    assert stored(run) == config_of(f"phases.1.{setting}")


@pytest.mark.parametrize(
    "setting",
    ["seed=1", "phases.1.optimizer.warmup_steps=3", "phases.1.reward.surplus=keep", "phases.1.prompts_per_step=8"],
)
def test_what_makes_another_run_may_not_change(setting, run, reached):
    reached(0)
    with pytest.raises(ValueError, match="another configuration"):
        claim.claim(run, config_of(setting, "phases.1.micro_batches=2"))
    assert stored(run) == config_of()


def test_the_machines_settings_change_without_a_word(run, reached):
    reached(2)
    assert (
        claim.claim(run, config_of("checkpoint_every_steps=3", "keep_checkpoints=5", "tracker.wandb={project: p}"))
        == []
    )
    assert claim.claim(run, config_of("checkpoint_every_steps=3", "evaluation.rows_at_once=3")) == [
        "evaluation.rows_at_once: 512 -> 3"
    ]
    machine = ("mesh.data=2", "mesh.fsdp=4", "mesh.tensor=2")
    assert claim.claim(run, config_of("checkpoint_every_steps=3", "evaluation.rows_at_once=3", *machine)) == [
        "mesh.data: 1 -> 2",
        "mesh.fsdp: -1 -> 4",
        "mesh.tensor: 1 -> 2",
    ]
    assert stored(run).checkpoint_every_steps == 3
