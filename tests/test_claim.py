"""A run directory: who may write to it, which settings may change on resuming, what a failed start leaves."""

import fcntl
import json
from pathlib import Path

import pytest
import yaml

from tsopsd_jax.config import Config, claim, strict
from tsopsd_jax.data import Problem
from tsopsd_jax.rundir.run_state import RunProgress


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
        monkeypatch.setattr(claim, "read_progress", lambda _: RunProgress(phase=phase))

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


@pytest.mark.parametrize("name", ["p[1]", "a*", "what?"])
def test_a_path_in_which_checkpoints_could_not_be_read_again_is_refused(name, tmp_path, monkeypatch):
    for run in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(ValueError, match=r"expected a path without [*?\[], in which checkpoints .* choose another"):
            claim.held(run).__enter__()
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ValueError, match="expected a path without"):
        claim.held(Path("run")).__enter__()
    assert list((tmp_path / name).iterdir()) == []


# ------------------------------------------------------------------ a run that lost its checkpoints


def test_a_run_whose_checkpoints_were_removed_is_not_started_over(run):
    claim.claim(run, config_of())
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=rf"the log of a run whose checkpoints are gone.* remove {run}$"):
        claim.claim(run, config_of())
    (run / "checkpoints").mkdir()
    claim.claim(run, config_of())  # killed before its first checkpoint: it takes those steps again
    (run / "evaluations.jsonl").write_text('{"stage": "base", "step": 0}\n{"stage": "after rl", "step": 3}\n')
    with pytest.raises(ValueError, match="checkpoints are gone"):
        claim.claim(run, config_of())  # only what the folder held was removed
    (run / "checkpoints" / "3").mkdir()
    claim.claim(run, config_of())


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
    assert [line.split(":")[0] for line in changed] == [f"phases.again.{setting.split('=')[0]}"]
    assert " -> " in changed[0]
    assert stored(run) == config_of(f"phases.1.{setting}")
    key = f"phases.rl.{setting.split('=')[0]}"
    with pytest.raises(ValueError, match=rf"configuration \({key}: .* != .*, a phase that is over\); .* another phase"):
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


def test_phases_may_be_added_behind_the_last(run, reached):
    """A run that is done goes on from its last policy, with its optimizer, on a longer schedule."""
    more = strict.plain(config_of())
    more["phases"] += [more["phases"][0] | {"name": "third"}, more["phases"][0] | {"name": "fourth"}]
    longer = strict.build(Config, more)
    reached(2)
    assert claim.claim(run, longer) == ["phases: third, fourth added"]
    assert stored(run) == longer
    assert claim.claim(run, longer) == []
    with pytest.raises(ValueError, match=r"another configuration \(phases: "):
        claim.claim(run, config_of())  # none may be taken away
    in_front = [more["phases"][0] | {"name": "new"}, *more["phases"]]
    with pytest.raises(ValueError, match=r"another configuration \(phases.rl.name: "):
        claim.claim(run, strict.build(Config, more | {"phases": in_front}))


def test_the_machines_settings_change_without_a_word(run, reached):
    reached(2)
    assert (
        claim.claim(
            run,
            config_of("checkpoint_every_steps=3", "keep_checkpoints=5", "page_every_s=9", "tracker.wandb={project: p}"),
        )
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


# ------------------------------------------------------------------ other problems, other functions

PROBLEMS = [Problem("a", "1 + 1?", "2"), Problem("b", "2 + 2?", "4"), Problem("c", "3 + 3?", "6")]


def inputs(rows=PROBLEMS, evaluated=PROBLEMS, *assignments):
    named = {"training problems": rows, "evaluation problems": evaluated}
    return claim.inputs_of(config_of(*assignments), named)


CHANGES = {
    "another answer": [*PROBLEMS[:2], Problem("c", "3 + 3?", "7")],
    "another prompt": [*PROBLEMS[:2], Problem("c", "3 + 4?", "6")],
    "another order": PROBLEMS[::-1],
    "one less": PROBLEMS[:2],
    "a cut elsewhere": [Problem("a", "1 + 1?2", ""), *PROBLEMS[1:]],
}


@pytest.mark.parametrize("rows", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("which", [0, 1], ids=["training", "evaluation"])
def test_a_run_does_not_go_on_with_other_problems(rows, which, run, reached):
    claim.claim(run, config_of(), inputs())
    reached(0)
    assert claim.claim(run, config_of(), inputs()) == []
    renamed = [row._replace(id=row.id * 2) for row in PROBLEMS]
    assert claim.claim(run, config_of(), inputs(renamed)) == []  # nothing is learnt from a name
    other = inputs(*([rows, PROBLEMS] if which == 0 else [PROBLEMS, rows]))
    before = {file: file.read_bytes() for file in run.iterdir()}
    name = ("training", "evaluation")[which]
    with pytest.raises(ValueError, match=rf"{name} problems: 3, sha256 \w+ -> {len(rows)}, sha256 .*--accept-changed"):
        claim.claim(run, config_of(), other)
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    (told,) = claim.claim(run, config_of(), other, accept_changed=True)
    assert told.startswith(f"{name} problems: 3, sha256 ")
    assert claim.claim(run, config_of(), other) == []  # from here on these are the run's


def test_problems_may_change_where_nothing_was_trained(run):
    claim.claim(run, config_of(), inputs())
    (run / "evaluations.jsonl").write_text("{}\n")
    assert claim.claim(run, config_of(), inputs(PROBLEMS[:2])) == []
    assert not (run / "evaluations.jsonl").exists()


def test_a_run_of_an_earlier_version_goes_on(run, reached):
    reached(0)
    assert not (run / "inputs.json").exists()
    assert claim.claim(run, config_of(), inputs()) == []
    with pytest.raises(ValueError, match="training problems"):
        claim.claim(run, config_of(), inputs(PROBLEMS[:1]))
    for content in ("{", "[]"):
        (run / "inputs.json").write_text(content)
        with pytest.raises(ValueError, match=r"inputs.json: expected the digests of a run's inputs"):
            claim.claim(run, config_of(), inputs())


def test_a_run_does_not_go_on_with_another_function_of_ones_own(run, reached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "ideas" / "mine.py"
    mine.parent.mkdir()
    mine.write_text("clip = 0.2\nbonus = 0.1\n")
    chosen = ("phases.1.objective.name=ideas/mine.py:bonus",)

    def start(**options):
        return claim.claim(run, config_of(*chosen), inputs(PROBLEMS, PROBLEMS, *chosen), **options)

    start()
    reached(0)
    assert start() == []
    mine.write_text("clip = 0.2\nbonus = 0.3\n")
    words = r"ideas/mine.py: line 2: 'bonus = 0.1' -> 'bonus = 0.3'"
    with pytest.raises(ValueError, match=rf"began with something else \({words}\); .*--accept-changed"):
        start()
    (copy,) = (run / "functions").iterdir()
    assert copy.read_text() == "clip = 0.2\nbonus = 0.1\n"
    (told,) = start(accept_changed=True)
    assert told == words
    assert copy.read_text() == mine.read_text()
    mine.write_text("clip = 0.2\n")
    with pytest.raises(ValueError, match=r"mine.py: line 2: 'bonus = 0.3' -> None"):
        start()
