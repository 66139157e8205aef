"""From a configuration to a running trainer: checks everything that can be checked before anything is written."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from tsopsd_jax import hosts, rundir, settings, store
from tsopsd_jax.card import base_licence, model_card
from tsopsd_jax.checkpoint import Checkpoints
from tsopsd_jax.config import (
    DTYPES,
    Config,
    DataSettings,
    cache_folder,
    datasets_folder,
    make_phase,
    model_folder,
)
from tsopsd_jax.console import LiveTable
from tsopsd_jax.data import Problem, Tokenizer, load_problems, selection
from tsopsd_jax.learner import abstract_state
from tsopsd_jax.model import Qwen3, load_pretrained, save_pretrained
from tsopsd_jax.model.hf import INDEX, WEIGHTS
from tsopsd_jax.model.hf_config import read_config, read_json
from tsopsd_jax.phases import Phase
from tsopsd_jax.rewards import VERIFIERS
from tsopsd_jax.runlog import read_evaluations, read_metrics
from tsopsd_jax.sharding import AnyMesh, make_mesh, row_multiple, tree_shardings
from tsopsd_jax.task import EvaluationPlan, Task, encode_prompts
from tsopsd_jax.trainer import Trainer
from tsopsd_jax.types import PyTree, TrainState


class Parts(NamedTuple):
    """What a run is made of, built and checked."""

    model: Qwen3
    mesh: jax.sharding.Mesh
    phases: list[Phase]
    task: Task
    evaluation: EvaluationPlan | None
    load_params: Callable[[], PyTree]
    notes: list[str]
    """What was left out of the training problems."""


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs between runs, unless the environment names another cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs are seconds too


def divide_cpu(devices: int | None) -> None:
    """Make so many devices of this process's CPU cores. Too late, and without effect, once JAX has started."""
    if devices is not None:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)


def check_batches(config: Config, mesh: AnyMesh) -> None:
    """Rows must split over the mesh.

    Raises:
        ValueError: naming the phase, the rows and the multiple.
    """
    multiple = row_multiple(mesh)
    for phase in config.phases:
        rows = phase.prompts_per_step * phase.responses_per_prompt
        for what, count in (
            ("rows of a step", rows),
            ("rows of a micro-batch", rows // (phase.micro_batches or 1)),
        ):
            if count % multiple:
                raise ValueError(
                    f"phase {phase.name!r}: {count} {what} do not split over {multiple} devices (mesh data x fsdp); "
                    f"choose a multiple of {multiple}"
                )


def _problems(data: DataSettings, config: Config, tokenizer: Tokenizer, notes: list[str]) -> Sequence[Problem]:
    """The problems that the settings choose; what they leave out is added to `notes`."""
    directory = datasets_folder(config.cache_dir)
    filtered = data.exclude or data.drop_longer
    problems = hosts.first_then_others(
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
    if data.drop_longer:
        kept = [p for p in problems if len(tokenizer.encode(p.prompt)) <= data.max_prompt_tokens]
        notes.append(
            f"left out of {len(problems):,} problems: {len(problems) - len(kept):,} over {data.max_prompt_tokens} tokens"
        )
        problems = kept
    if filtered and not problems:
        raise ValueError("data: exclude and drop_longer leave no problem")
    if data.sample is not None:
        notes.append(f"a sample of {data.sample:,} of {len(problems):,} problems")
        problems = selection.sample(problems, data.sample, seed=config.seed)
    return problems[: data.first]


def check_weights(folder: Path) -> None:
    """The weight files of a model directory are there (their content is read when the run starts).

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
            f"model.path: expected weight files in {folder}, got no {missing[0]} ({len(missing)} missing in all); "
            "fetch them, or set model.random_init: true"
        )


def _check_prompts(evaluation: EvaluationPlan, task: Task) -> None:
    try:
        encode_prompts(evaluation.problems, task.tokenizer, max_prompt_tokens=task.max_prompt_tokens)
    except ValueError as error:
        raise ValueError(f"evaluation.data: {error}") from error


def prepare(config: Config) -> Parts:
    """Build and check everything but the parameters. Writes only prepared data sets, to the cache.

    Raises:
        ValueError: one line naming what is wrong and the remedy.
    """
    phases = [make_phase(phase) for phase in config.phases]
    folder = model_folder(config)
    if not folder.is_dir():
        raise ValueError(f"model.path: expected a Hugging Face model directory, got {folder}: no such directory")
    if not config.model.random_init:
        check_weights(folder)
    shape = read_config(folder / "config.json")
    dtype = DTYPES[config.model.compute_dtype]
    tokenizer = Tokenizer.load(folder, chat=config.data.chat)
    tokenizer.check_fits(shape.vocab_size)
    responses = [p.max_response_tokens for p in config.phases]
    if config.evaluation.data is not None:
        responses.append(config.evaluation.max_response_tokens)
    longest = max(responses) + config.data.max_prompt_tokens
    if longest > shape.max_position_embeddings:
        raise ValueError(
            f"prompt and response may take {longest} tokens, more than the model's {shape.max_position_embeddings} "
            "positions; lower max_prompt_tokens or max_response_tokens"
        )
    divide_cpu(config.mesh.cpu_devices)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    model = Qwen3(shape, compute_dtype=dtype, remat=config.model.remat, mesh=mesh)
    check_batches(config, mesh)
    shardings = tree_shardings(model.param_axes(), model.param_shapes(), mesh)
    notes: list[str] = []
    task = Task(
        problems=_problems(config.data, config, tokenizer, notes),
        tokenizer=tokenizer,
        verify=VERIFIERS[config.data.verifier],
        max_prompt_tokens=config.data.max_prompt_tokens,
        seed=config.seed,
    )
    _ = task.encoded  # a prompt that is too long is found here, not in the middle of a run
    evaluation, asked = None, config.evaluation
    if asked.data is not None:
        evaluation = EvaluationPlan(
            benchmark=f"{asked.data.name} {asked.data.split or ''}".strip(),
            problems=_problems(asked.data, config, tokenizer, []),
            samples=asked.samples,
            sampling=asked.sampling,
            max_response_tokens=asked.max_response_tokens,
            rows_at_once=asked.rows_at_once,
            every_steps=asked.every_steps,
        )
        _check_prompts(evaluation, task)

    def load_params() -> PyTree:
        if config.model.random_init:
            return model.init(jax.random.key(config.seed), shardings=shardings)
        return load_pretrained(folder, mesh=mesh)[1]

    return Parts(model, mesh, phases, task, evaluation, load_params, notes)


def _check_same(config: Config) -> None:
    """All processes of a run were started with one configuration."""
    mine = settings.plain(config)
    odd = settings.first_difference(hosts.from_first(mine), mine)
    if odd is not None:
        raise ValueError(
            f"process {jax.process_index()} has another configuration than process 0 ({odd}); start all with the same one"
        )


@contextlib.contextmanager
def _claimed(config: Config, run_dir: Path) -> Iterator[list[str]]:
    """The run directory held and claimed by process 0, for all; what changed in its settings."""
    with contextlib.ExitStack() as stack:
        changed = []
        if hosts.is_first():
            stack.enter_context(rundir.held(run_dir))
            store.fetch(run_dir)
            changed = rundir.claim(run_dir, config)
        changed = hosts.from_first(changed)
        if store.address(run_dir) is None and not (run_dir / rundir.CONFIG_FILE).is_file():
            raise ValueError(
                f"process {jax.process_index()} expected the {rundir.CONFIG_FILE} that process 0 wrote to {run_dir}, got no "
                "such file; choose a --run-dir that all hosts share (a network file system, gs://...)"
            )
        yield changed


@contextlib.contextmanager
def open_trainer(config: Config, run_dir: Path, table: LiveTable) -> Iterator[Trainer]:
    """A trainer in `run_dir`, resuming what stands there; no other process may run there meanwhile."""
    use_compilation_cache(cache_folder(config))
    _check_same(config)
    parts = prepare(config)
    with _claimed(config, run_dir) as changed:
        trainer = Trainer(
            model=parts.model,
            load_params=parts.load_params,
            phases=parts.phases,
            task=parts.task,
            evaluation=parts.evaluation,
            mesh=parts.mesh,
            seed=config.seed,
            run_dir=run_dir,
            checkpoint_every_steps=config.checkpoint_every_steps,
            keep_checkpoints=config.keep_checkpoints,
            wandb_project=config.wandb_project,
            table=table,
        )
        with table:
            for note in parts.notes:
                table.note(note)
            if changed:
                table.note(f"goes on with changed settings: {'; '.join(changed)}")
            yield trainer


def resolved_config(run_dir: Path) -> Config:
    """The configuration that a run directory was made with.

    Raises:
        ValueError: if there is none.
    """
    file = run_dir / rundir.CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no {rundir.CONFIG_FILE}")
    return settings.build(Config, rundir.read_settings(file))


def restore_run(
    run_dir: Path, *, step: int | None, mesh: jax.sharding.Mesh, compute_dtype: str
) -> tuple[Qwen3, TrainState]:
    """The model and train state of a checkpoint (default: the latest).

    Raises:
        ValueError: no run, or no such checkpoint.
    """
    config = resolved_config(run_dir)
    model = Qwen3(read_config(model_folder(config) / "config.json"), compute_dtype=DTYPES[compute_dtype])
    like = abstract_state(model, make_phase(config.phases[0]).optimizer, mesh)
    with checkpoints_of(run_dir) as checkpoints:
        return model, checkpoints.restore(like, step).state


@contextlib.contextmanager
def checkpoints_of(run_dir: Path) -> Iterator[Checkpoints]:
    """A run's checkpoints, to be read.

    Raises:
        ValueError: no run, or it has none.
    """
    config = resolved_config(run_dir)
    where = store.checkpoints_of(run_dir)
    if not where.exists():
        raise ValueError(f"{run_dir} has no checkpoints")
    checkpoints = Checkpoints(where, keep=config.keep_checkpoints)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def export(run_dir: Path, out: Path, *, step: int | None, dtype: str) -> Path:
    """Write the policy of a checkpoint (default: the latest) as a Hugging Face directory with a model card; returns it.

    Raises:
        ValueError: no run, no such checkpoint, or a directory that holds something else.
    """
    config = resolved_config(run_dir)
    folder = model_folder(config)
    model, state = restore_run(run_dir, step=step, mesh=make_mesh(), compute_dtype="float32")
    card = model_card(
        config,
        base=folder.resolve().name,
        licence=base_licence(folder),
        step=int(state.step),
        dtype=dtype,
        metrics=read_metrics(run_dir),
        evaluations=read_evaluations(run_dir),
    )
    stop_ids = Tokenizer.load(folder, chat=config.data.chat).stop_ids
    save_pretrained(out, model, state.params, dtype=DTYPES[dtype], tokenizer_from=folder, stop_ids=stop_ids, card=card)
    return out
