"""Every setting does something: for each one, two values and what differs in the run that is built from them."""

import ast
import contextlib
import dataclasses
import io
import json
import types
import typing
from pathlib import Path

import byte_model
import jax
import jax.numpy as jnp
import pytest
from test_data import write_jsonl

from tsopsd_jax.commands import train
from tsopsd_jax.config import Config, strict
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.judge.groups import RewardRule
from tsopsd_jax.rollout import Sampling
from tsopsd_jax.train.phase import Guard, Phase, StopRule
from tsopsd_jax.train.task import EvaluationPlan, Task


def fields_of(cls: type, prefix: str = ""):
    """Every setting's key, through the nested groups; `[]` where there are several."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if inner is None:
            yield key
        else:
            yield from fields_of(inner, f"{key}{'[]' if typing.get_origin(hint) is tuple else ''}.")


# ------------------------------------------------------------------ what a run is built of


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Models and problems."""
    folder = tmp_path_factory.mktemp("fields")
    for name in ("model", "other"):
        byte_model.write(folder / name)
    shape = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(
        json.dumps(shape | {"num_hidden_layers": 2, "num_key_value_heads": 2})
    )
    rows = [{"problem": f"{'1 + ' * i}1?", "answer": str(i + 1), "q": f"q{i}", "gold": str(i)} for i in range(12)]
    write_jsonl(folder / "problems.jsonl", *rows)
    write_jsonl(folder / "others.jsonl", *rows[6:])
    return folder


def base(place: Path) -> dict:
    data = {"name": "jsonl", "path": str(place / "problems.jsonl"), "verifier": "math", "max_prompt_tokens": 300}
    phase = {
        "name": "rl",
        "objective": {"name": "dapo"},
        "optimizer": {"learning_rate": 1e-3},
        "stop": {"steps": 3},
        "prompts_per_step": 4,
        "responses_per_prompt": 4,
        "max_response_tokens": 16,
        "reward": {},
    }
    return strict.plain(
        {
            "model": {"path": str(place / "model"), "random_init": True},
            "data": data,
            "cache_dir": str(place / "cache"),
            "evaluation": {"data": data, "max_response_tokens": 16},
            "phases": [phase],
        }
    )


@pytest.fixture(scope="module")
def built(place):
    """built(assignments): what a run of the base with these settings consists of; an error's words if it is refused."""
    known = {}

    def build(*assignments: str):
        if assignments not in known:
            data = base(place)
            for assignment in assignments:
                strict.override(data, assignment.replace("PLACE", str(place)))
            screen = io.StringIO()
            made: dict[str, typing.Any] = {"caches": []}

            def trainer(shared, phases, **arguments):
                made.update(arguments, phases=phases, task=shared.task, mesh=shared.mesh, model=shared.model)
                made["key"] = jax.random.key_data(shared.key).tolist()
                return types.SimpleNamespace(told=contextlib.nullcontext)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "Trainer", trainer)
                patch.setattr(train, "use_compilation_cache", made["caches"].append)
                run_dir = place / f"run{len(known)}"
                try:
                    config = strict.build(Config, data)
                    with train.open_trainer(config, run_dir, LiveTable(stream=screen)):
                        pass
                except ValueError as error:
                    made["error"] = str(error)
            known[assignments] = types.SimpleNamespace(**made, said=screen.getvalue())
        return known[assignments]

    return build


def adam(run) -> dict[str, list]:
    """Updates of two steps by the phase's optimizer, and how its first moment is stored."""
    optimizer = run.phases[0].optimizer
    params = {"w": jnp.asarray([1.0, -2.0])}
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        updates = []
        for gradient in ([0.3, 1e-7], [1.2, -0.1]):
            update, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
            updates += update["w"].tolist()
    dtypes = sorted(str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.shape)
    return {"updates": updates, "dtypes": dtypes}


def phase(name: str):
    return lambda run: vars(run.phases[0])[name]


def rule(group: str, name: str):
    return lambda run: vars(vars(run.phases[0])[group])[name]


def evaluation(name: str):
    return lambda run: vars(run.evaluation)[name]


def prompts(run) -> list:
    return [(problem.prompt, problem.answer) for problem in run.task.problems]


def evaluated(run) -> list:
    return [(problem.prompt, problem.answer) for problem in run.evaluation.problems]


def weights(run) -> float:
    return float(jax.tree.leaves(run.load_params())[0].sum())


def refused(run) -> str | None:
    with contextlib.suppress(AttributeError):
        return run.error
    return None


# ------------------------------------------------------------------ setting -> a value, what it changes

LIMITS = "min_learning_rate: 1e-4, max_learning_rate: 1e-2"
RATE = f"phases.0.learning_rate_control={{entropy_gain_nats_per_step: 0.01, {LIMITS}}}"
PULLED = "phases.0.objective.hyperparameters={kl_coefficient: 0.1}"

EFFECTS: dict[str, tuple] = {
    "model.path": ("PLACE/other", lambda run: run.model.config.num_hidden_layers),
    "model.random_init": ("false", refused),  # weight files are asked for then
    "model.compute_dtype": ("bfloat16", lambda run: run.model.compute_dtype),
    "model.remat": ("full", lambda run: run.model.remat),
    "data.name": ("math_500", lambda run: run.task.problems[0].id),
    "data.verifier": ("last_number", lambda run: run.task.rewards("It is 5", "5", {}).accuracy),
    "data.reward_weights": ("{accuracy: 2.0}", lambda run: run.task.rewards("Answer: 5", "5", {}).reward),
    "data.accuracy": ("right", refused),
    "data.system_prompt": (
        "Be brief.",
        lambda run: run.task.tokenizer.encode(run.task.problems[0].prompt, run.task.problems[0].before),
        "data.chat=direct",
        "evaluation.data=null",
    ),
    "data.split": ("train", refused),
    "data.path": ("PLACE/others.jsonl", prompts),
    "data.problem_field": ("q", prompts),
    "data.answer_field": ("gold", prompts),
    "data.template": ("boxed", prompts),
    "data.chat": ("direct", lambda run: run.task.tokenizer.encode("2?"), "evaluation.data=null"),
    "data.exclude": ("[PLACE/others.jsonl]", prompts),
    "data.drop_longer": ("true", refused, "data.max_prompt_tokens=30", "evaluation.data=null"),
    "data.first": ("3", prompts),
    "data.sample": ("3", prompts),
    "data.max_prompt_tokens": ("200", lambda run: run.task.encoded.max_prompt_tokens, "evaluation.data=null"),
    "seed": ("1", lambda run: (run.key, run.task.seed, weights(run))),
    "mesh.data": ("2", lambda run: dict(run.mesh.shape)),
    "mesh.fsdp": ("3", refused),  # of eight devices
    "mesh.tensor": ("2", lambda run: dict(run.mesh.shape), "model.path=PLACE/other"),
    "mesh.cpu_devices": ("3", lambda run: run.said),  # here it comes too late, and says so
    "evaluation.samples": ("3", evaluation("samples")),
    "evaluation.sampling.sampling_temperature": ("0.7", evaluation("sampling")),
    "evaluation.sampling.top_p": ("0.9", evaluation("sampling")),
    "evaluation.sampling.top_k": ("7", evaluation("sampling")),
    "evaluation.sampling.edt_theta": ("0.5", evaluation("sampling")),
    "evaluation.max_response_tokens": ("9", evaluation("max_response_tokens")),
    "evaluation.rows_at_once": ("9", evaluation("rows_at_once")),
    "evaluation.every_steps": ("2", evaluation("every_steps")),
    "evaluation.data.name": ("math_500", lambda run: run.evaluation.problems[0].id),
    "evaluation.data.verifier": ("last_number", lambda run: run.evaluation.rewards("It is 5", "5", {}).accuracy),
    "evaluation.data.reward_weights": (
        "{accuracy: 2.0}",
        lambda run: run.evaluation.rewards("Answer: 5", "5", {}).reward,
    ),
    "evaluation.data.accuracy": ("right", refused),
    "evaluation.data.system_prompt": ("Be brief.", refused),  # without a chat
    "evaluation.data.split": ("train", refused),
    "evaluation.data.path": ("PLACE/others.jsonl", evaluated),
    "evaluation.data.problem_field": ("q", evaluated),
    "evaluation.data.answer_field": ("gold", evaluated),
    "evaluation.data.template": ("boxed", evaluated),
    "evaluation.data.chat": ("direct", refused),
    "evaluation.data.exclude": ("[PLACE/others.jsonl]", refused),
    "evaluation.data.drop_longer": ("true", refused),
    "evaluation.data.first": ("3", evaluated),
    "evaluation.data.sample": ("3", evaluated),
    "evaluation.data.max_prompt_tokens": ("200", evaluation("max_prompt_tokens")),
    "phases[].name": ("other", phase("name")),
    "phases[].objective.name": ("ts_opsd", lambda run: run.phases[0].objective.stats.fields),
    "phases[].objective.hyperparameters": (
        "{teacher_temperature: 3.0}",
        lambda run: run.phases[0].objective.stats.teacher_temperature,
        "phases.0.objective.name=ts_opsd",
    ),
    "phases[].optimizer.learning_rate": ("2e-3", adam),
    "phases[].optimizer.warmup_steps": ("5", adam),
    "phases[].optimizer.weight_decay": ("0.1", adam),
    "phases[].optimizer.clip_norm": ("0.1", adam),
    "phases[].optimizer.beta1": ("0.5", adam),
    "phases[].optimizer.beta2": ("0.5", adam),
    "phases[].optimizer.epsilon": ("1e-3", adam),
    "phases[].optimizer.momentum_dtype": ("bfloat16", adam),
    "phases[].stop.steps": ("4", rule("stop", "steps")),
    "phases[].stop.epochs": ("4", rule("stop", "epochs")),
    "phases[].stop.collapsed_below_nats": ("0.1", rule("stop", "collapsed_below_nats")),
    "phases[].stop.recovered_above_nats": ("0.1", rule("stop", "recovered_above_nats")),
    "phases[].stop.collapsed_below_fraction": ("0.2", rule("stop", "collapsed_below_fraction")),
    "phases[].stop.recovered_above_fraction": ("0.5", rule("stop", "recovered_above_fraction")),
    "phases[].stop.window_steps": ("4", rule("stop", "window_steps")),
    "phases[].stop.min_steps": ("2", rule("stop", "min_steps")),
    "phases[].stop.look_ahead": ("true", rule("stop", "look_ahead"), "phases.0.stop.recovered_above_nats=9"),
    "phases[].learning_rate_control.entropy_gain_nats_per_step": ("0.02", phase("rate_controller"), RATE),
    "phases[].learning_rate_control.min_learning_rate": ("5e-4", phase("rate_controller"), RATE),
    "phases[].learning_rate_control.max_learning_rate": ("5e-2", phase("rate_controller"), RATE),
    "phases[].prompts_per_step": ("8", phase("prompts_per_step")),
    "phases[].responses_per_prompt": ("8", phase("responses_per_prompt")),
    "phases[].updates_per_rollout": ("2", phase("updates_per_rollout")),
    "phases[].passes_per_rollout": ("3", phase("passes_per_rollout")),
    "phases[].max_response_tokens": ("8", lambda run: (run.phases[0].max_response_tokens, run.phases[0].reward)),
    "phases[].outcome": ("collapsed", phase("outcome")),
    "phases[].sampling.sampling_temperature": ("0.7", phase("sampling"), "phases.0.objective.name=ts_opsd"),
    "phases[].sampling.top_p": ("0.9", phase("sampling"), "phases.0.objective.name=ts_opsd"),
    "phases[].sampling.top_k": ("7", phase("sampling"), "phases.0.objective.name=ts_opsd"),
    "phases[].sampling.edt_theta": ("0.5", phase("sampling"), "phases.0.objective.name=ts_opsd"),
    "phases[].reward.overlong_buffer_tokens": ("4", rule("reward", "overlong_buffer_tokens")),
    "phases[].reward.overlong_factor": ("0.5", rule("reward", "overlong_factor")),
    "phases[].reward.normalize_std": ("false", rule("reward", "normalize_std")),
    "phases[].reward.max_generation_batches": ("2", rule("reward", "max_generation_batches")),
    "phases[].reward.surplus": ("keep", rule("reward", "surplus")),
    "phases[].reward.on_shortage": ("fill", rule("reward", "on_shortage")),
    "phases[].optimizer_state": ("keep", phase("reset_optimizer")),
    "phases[].rows_at_once": ("8", phase("rows_at_once")),
    "phases[].micro_batches": ("2", phase("micro_batches")),
    "phases[].chunk_tokens": ("64", phase("tile_tokens")),
    "phases[].pack": ("false", phase("pack")),
    "phases[].measure_start_kl": ("true", phase("reference")),
    "phases[].reference": ("start", refused),  # the base's objective compares with none
    "phases[].reference_every_steps": ("3", phase("reference_every_steps"), "phases.0.reference=start", PULLED),
    "phases[].guard.max_start_entropy_nats": ("3", rule("guard", "max_start_entropy_nats")),
    "phases[].guard.runaway_entropy_nats": ("3", rule("guard", "runaway_entropy_nats")),
    "phases[].guard.max_skipped_in_row": ("5", rule("guard", "max_skipped_in_row")),
    "phases[].guard.max_reward_failed_fraction": ("0.1", rule("guard", "max_reward_failed_fraction")),
    "phases[].guard.max_truncated_fraction": ("0.5", rule("guard", "max_truncated_fraction")),
    "baseline_steps": ("3", lambda run: run.baseline_steps),
    "cycle.phases": ("[none]", refused, "cycle={phases: [rl], times: 2}"),
    "cycle.times": ("3", lambda run: run.cycle, "cycle={phases: [rl], times: 2}"),
    "checkpoint_every_steps": ("7", lambda run: run.checkpoint_every_steps),
    "keep_checkpoints": ("7", lambda run: run.keep_checkpoints),
    "samples.every_steps": ("7", lambda run: run.samples),
    "samples.groups": ("7", lambda run: run.samples),
    "page_every_s": ("7", lambda run: run.after_step.every_s),
    "tracker.tensorboard": ("false", lambda run: run.tracker),
    "tracker.module": ("trackio", lambda run: run.tracker),
    "tracker.wandb.project": ("other", lambda run: run.tracker, "tracker.wandb.project=mine"),
    "tracker.wandb.entity": ("team", lambda run: run.tracker, "tracker.wandb.project=mine"),
    "tracker.wandb.name": ("mine", lambda run: run.tracker, "tracker.wandb.project=mine"),
    "tracker.wandb.mode": ("offline", lambda run: run.tracker, "tracker.wandb.project=mine"),
    "tracker.wandb.group": ("mine", lambda run: run.tracker, "tracker.wandb.project=mine"),
    "tracker.wandb.tags": ("[a]", lambda run: run.tracker, "tracker.wandb.project=mine"),
    "cache_dir": ("PLACE/elsewhere", lambda run: run.caches),
}
"""Key -> (another value than the default or the base's, what to look at, settings that stand on both sides)."""


def test_every_setting_has_an_entry():
    assert set(EFFECTS) == set(fields_of(Config))


@pytest.mark.parametrize("key", EFFECTS)
def test_a_setting_changes_something(key, built):
    value, look, *beside = EFFECTS[key]
    before, after = built(*beside), built(*beside, f"{key.replace('[]', '.0')}={value}")
    if look is not refused:
        assert refused(before) is None
        assert refused(after) is None
    assert look(before) == look(before)
    assert look(before) != look(after), f"{key}={value} changes nothing of it"


def test_what_settings_become_is_read():
    """... by something else than the code that builds it."""
    package = Path(train.__file__).parents[1]
    read = set()
    for file in package.rglob("*.py"):
        if "config" not in file.relative_to(package).parts:
            nodes = ast.walk(ast.parse(file.read_text()))
            read |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    for cls in (Phase, StopRule, Guard, RewardRule, Sampling, EvaluationPlan, Task):
        unread = {field.name for field in dataclasses.fields(cls)} - read
        assert not unread, f"{cls.__name__}: nothing reads {unread}"
