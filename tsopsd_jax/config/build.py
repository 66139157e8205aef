"""From a configuration to a running trainer: checks everything that can be checked before anything is written."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tsopsd_jax.config.doubts import doubts, repetitions
from tsopsd_jax.config.needs import check_needs
from tsopsd_jax.config.places import datasets_folder, model_folder
from tsopsd_jax.config.references import find_references, reference_folders
from tsopsd_jax.config.schema import DTYPES, Config, DataSettings, PhaseSettings
from tsopsd_jax.data import Problem, Tokenizer, load_problems, make_template, selection
from tsopsd_jax.data.encode import encode_prompts
from tsopsd_jax.distributed import processes
from tsopsd_jax.distributed.sharding import AnyMesh, make_mesh, row_multiple, tree_shardings
from tsopsd_jax.huggingface import read_json
from tsopsd_jax.learn.reference import ReferenceSource
from tsopsd_jax.learn.update import make_optimizer, warm_up
from tsopsd_jax.model import Qwen3, load_pretrained
from tsopsd_jax.model.hf import INDEX, WEIGHTS
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.objectives import make_objective, with_start_kl
from tsopsd_jax.rewards import Rewards, make_checked_rewards, make_rewards, overlong_penalty
from tsopsd_jax.testing import objective_notes
from tsopsd_jax.train.controllers import RateController
from tsopsd_jax.train.phase import START, Phase
from tsopsd_jax.train.task import EvaluationPlan, Task
from tsopsd_jax.types import PyTree


def make_phase(phase: PhaseSettings) -> Phase:
    """Build the trainer's phase from its settings; errors name the phase."""
    try:
        return _phase(phase)
    except ValueError as error:
        raise ValueError(f"phase {phase.name!r}: {error}") from error


def make_phases(config: Config) -> list[Phase]:
    """Make the trainer's phases of a schedule."""
    return [make_phase(phase) for phase in config.phases]


def check_objectives(config: Config, phases: Sequence[Phase]) -> list[str]:
    """Hold every different objective of a schedule to its contract, once; nothing is sampled.

    Returns:
        Warnings, a line each.

    Raises:
        ValueError: naming the phase, the objective, its file and function, and what is broken.
    """
    notes: list[str] = []
    for i, (settings, phase) in enumerate(zip(config.phases, phases, strict=True)):
        if settings.objective in [earlier.objective for earlier in config.phases[:i]]:
            continue
        where = f"phase {settings.name!r}: objective {settings.objective.name!r}"
        try:
            notes += [f"warning: {where}: {note}" for note in objective_notes(phase.objective)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return notes


def _phase(phase: PhaseSettings) -> Phase:
    rate = phase.optimizer
    objective = make_objective(phase.objective.name, phase.objective.hyperparameters)
    check_needs(phase, objective)
    if phase.measure_start_kl:
        objective = with_start_kl(objective)
    if phase.reward is not None:
        overlong_penalty(
            phase.max_response_tokens,
            max_tokens=phase.max_response_tokens,
            buffer_tokens=phase.reward.overlong_buffer_tokens,
        )
    return Phase(
        name=phase.name,
        outcome=phase.outcome or f"after {phase.name}",
        objective=objective,
        optimizer=make_optimizer(**_fields(phase.optimizer)),
        reset_optimizer=phase.optimizer_state == "reset",
        sampling=phase.sampling,
        max_response_tokens=phase.max_response_tokens,
        prompts_per_step=phase.prompts_per_step,
        responses_per_prompt=phase.responses_per_prompt,
        updates_per_rollout=phase.updates_per_rollout,
        passes_per_rollout=phase.passes_per_rollout,
        rows_at_once=phase.rows_at_once,
        micro_batches=phase.micro_batches,
        tile_tokens=phase.chunk_tokens,
        pack=phase.pack,
        reward=phase.reward,
        stop=phase.stop,
        guard=phase.guard,
        learning_rate=warm_up(learning_rate=rate.learning_rate, warmup_steps=rate.warmup_steps),
        reference=START if phase.measure_start_kl else None if phase.reference == "none" else phase.reference,
        reference_every_steps=phase.reference_every_steps,
        rate_controller=_rate_controller(phase),
    )


def _rate_controller(phase: PhaseSettings) -> RateController | None:
    """The controller that a phase asks for, in factors of its optimizer's rate."""
    asked, rate = phase.learning_rate_control, phase.optimizer.learning_rate
    if asked is None:
        return None
    return RateController(
        gain_nats=asked.entropy_gain_nats_per_step,
        min_factor=asked.min_learning_rate / rate,
        max_factor=asked.max_learning_rate / rate,
    )


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: vars(value)[f.name] for f in dataclasses.fields(value)}


class Parts(NamedTuple):
    """Parts that a run is made of, built and checked."""

    model: Qwen3
    mesh: jax.sharding.Mesh
    phases: list[Phase]
    task: Task
    evaluation: EvaluationPlan | None
    load_params: Callable[[], PyTree]
    references: dict[str, ReferenceSource]
    """Other models that phases are compared with, by their directories."""
    notes: list[str]
    """Sentences on what was left out of the training problems."""
    warnings: list[str]
    """Sentences on settings that can be meant, and rarely are, and on objectives."""


def divide_cpu(devices: int | None) -> str | None:
    """Make this many devices of this process's CPU cores, before anything asks JAX for a device or a process.

    Returns:
        Why it has no effect, if JAX has started with another number of CPU devices; None otherwise.
    """
    if devices is None:
        return None
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # JAX has started
        there = jax.local_device_count()
        if jax.default_backend() == "cpu" and there != devices:
            return f"mesh.cpu_devices {devices} has no effect: JAX had started with {there} CPU devices"
    return None


def check_batches(config: Config, mesh: AnyMesh) -> None:
    """Check that rows split over the mesh.

    Raises:
        ValueError: naming the phase, the rows and the multiple.
    """
    multiple = row_multiple(mesh)
    for phase in config.phases:
        rows = phase.prompts_per_step * phase.responses_per_prompt
        each = rows // phase.updates_per_rollout
        parts = {"a step": rows, "an update": each, "a micro-batch": each // (phase.micro_batches or 1)}
        for what, count in parts.items():
            if count % multiple:
                raise ValueError(
                    f"phase {phase.name!r}: {count} rows of {what} do not split over {multiple} devices (mesh data x "
                    f"fsdp); choose a multiple of {multiple}"
                )


def chosen_problems(data: DataSettings, config: Config, tokenizer: Tokenizer, notes: list[str]) -> Sequence[Problem]:
    """Load the problems that a data section of a run chooses; what it leaves out is added to `notes`.

    Raises:
        ValueError: see `load_problems`; none are left, or fewer than the sample.
    """
    directory = datasets_folder(config.cache_dir)
    filtered = data.exclude or data.drop_longer
    problems = processes.first_then_others(
        lambda: load_problems(
            data.name,
            split=data.split,
            path=data.path,
            directory=directory,
            first=None if filtered else data.first,
            template=data.template,
            problem_field=data.problem_field,
            answer_field=data.answer_field,
        )
    )
    if data.exclude:
        kept = selection.without(problems, [selection.fingerprints(name, directory) for name in data.exclude])
        notes.append(
            f"left out of {len(problems):,} problems: {len(problems) - len(kept):,} of {', '.join(data.exclude)}"
        )
        problems = kept
    if data.system_prompt is not None:
        problems = [problem.with_system(data.system_prompt) for problem in problems]
    if data.drop_longer:
        kept = [p for p in problems if len(tokenizer.encode(p.prompt, p.before)) <= data.max_prompt_tokens]
        fewer = len(problems) - len(kept)
        notes.append(f"left out of {len(problems):,} problems: {fewer:,} over {data.max_prompt_tokens} tokens")
        problems = kept
    if filtered and not problems:
        raise ValueError("data: exclude and drop_longer leave no problem")
    if data.sample is not None:
        notes.append(f"a sample of {data.sample:,} of {len(problems):,} problems")
        problems = selection.drawn(problems, data.sample, seed=config.seed)
    return problems[: data.first]


def check_weights(folder: Path, *, key: str = "model.path") -> None:
    """Check that the model directory named by a setting has its weight files (their content is read when the run
    starts).

    Raises:
        ValueError: naming what is missing.
    """
    files = [WEIGHTS]
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        files = sorted({str(shard) for shard in where.values()}) if isinstance(where, dict) else []
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{key}: expected weight files in {folder}, got no {missing[0]} ({len(missing)} missing in all); fetch them"
            f"{', or set model.random_init: true' if key == 'model.path' else ''}"
        )


def check_functions(config: Config) -> None:
    """Load the functions of one's own that data sections name, and call none.

    Raises:
        ValueError: one that cannot be had, or takes something else.
    """
    for where, data in (("data", config.data), ("evaluation.data", config.evaluation.data)):
        if data is None:
            continue
        try:
            make_rewards(data.verifier, weights=data.reward_weights, accuracy=data.accuracy)
            make_template(data.template or "plain")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def rewards_of(data: DataSettings, problems: Sequence[Problem]) -> Rewards:
    """Make the rewards of a data section, and try functions of one's own on toy responses to its first problem."""
    return make_checked_rewards(
        data.verifier,
        weights=data.reward_weights,
        accuracy=data.accuracy,
        answer=problems[0].answer,
        row=problems[0].row,
    )


def evaluation_plan(config: Config, tokenizer: Tokenizer) -> EvaluationPlan | None:
    """Build the plan of a run's evaluations; None where it has none.

    Raises:
        ValueError: its data section is wrong; the message says that it is the evaluation's.
    """
    asked = config.evaluation
    if asked.data is None:
        return None
    try:
        problems = chosen_problems(asked.data, config, tokenizer, [])
        encode_prompts(problems, tokenizer, max_prompt_tokens=asked.data.max_prompt_tokens)
        rewards = rewards_of(asked.data, problems)
    except ValueError as error:
        raise ValueError(f"evaluation.data: {error}") from error
    return EvaluationPlan(
        benchmark=f"{asked.data.name} {asked.data.split or ''}".strip(),
        problems=problems,
        rewards=rewards,
        max_prompt_tokens=asked.data.max_prompt_tokens,
        samples=asked.samples,
        sampling=asked.sampling,
        max_response_tokens=asked.max_response_tokens,
        rows_at_once=asked.rows_at_once,
        every_steps=asked.every_steps,
    )


def _check_lengths(config: Config, positions: int) -> None:
    """Check that prompt and response fit the model's positions, in each phase and in the evaluation."""
    lengths = {
        f"phase {p.name!r}": ("data", config.data.max_prompt_tokens, f"phases.{p.name}", p.max_response_tokens)
        for p in config.phases
    }
    asked = config.evaluation
    if asked.data is not None:
        lengths["evaluation"] = (
            "evaluation.data",
            asked.data.max_prompt_tokens,
            "evaluation",
            asked.max_response_tokens,
        )
    for where, (data, prompt, of, response) in lengths.items():
        if prompt + response > positions:
            raise ValueError(
                f"{where}: prompt and response may take {prompt} + {response} tokens, more than the model's "
                f"{positions} positions; lower {data}.max_prompt_tokens or {of}.max_response_tokens"
            )


def prepare(config: Config) -> Parts:
    """Build and check everything but the parameters. Writes only prepared data sets, to the cache.

    Raises:
        ValueError: one line naming what is wrong and the remedy.
    """
    late = divide_cpu(config.mesh.cpu_devices)  # first: an objective's file may use JAX as it is imported
    phases = make_phases(config)
    folder = model_folder(config)
    if not folder.is_dir():
        raise ValueError(f"model.path: expected a Hugging Face model directory, got {folder}: no such directory")
    if not config.model.random_init:
        check_weights(folder)
    shape = read_config(folder / "config.json")
    dtype = DTYPES[config.model.compute_dtype]
    tokenizer = Tokenizer.load(folder, chat=config.data.chat)
    tokenizer.check_fits(shape.vocab_size)
    _check_lengths(config, shape.max_position_embeddings)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    model = Qwen3(shape, compute_dtype=dtype, remat=config.model.remat, mesh=mesh)
    check_batches(config, mesh)
    notes = check_objectives(config, phases)  # not before the mesh, which settles the devices
    shardings = tree_shardings(model.param_axes(), model.param_shapes(), mesh)
    problems = chosen_problems(config.data, config, tokenizer, notes)
    task = Task(
        problems=problems,
        tokenizer=tokenizer,
        rewards=rewards_of(config.data, problems),
        max_prompt_tokens=config.data.max_prompt_tokens,
        seed=config.seed,
    )
    _ = task.encoded  # a prompt that is too long is found here, not in the middle of a run
    evaluation = evaluation_plan(config, tokenizer)

    def load_params() -> PyTree:
        if config.model.random_init:
            return model.init(jax.random.key(config.seed), shardings=shardings)
        return load_pretrained(folder, mesh=mesh)[1]

    warnings = [*doubts(config), *repetitions(config, len(task.problems)), *([late] if late else [])]
    references = find_references(config, model, mesh, tokenizer)
    for other in reference_folders(config).values():
        check_weights(other, key="reference")
    return Parts(model, mesh, phases, task, evaluation, load_params, references, notes, warnings)
