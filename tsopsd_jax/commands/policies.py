"""Policies that commands take: a Hugging Face directory, or a run's checkpoint."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tsopsd_jax.config import DTYPES, Config
from tsopsd_jax.config.places import digests_file, model_folder
from tsopsd_jax.config.restore import checkpoints_of, resolved_config, restore_run
from tsopsd_jax.model import Qwen3, load_pretrained
from tsopsd_jax.model.fingerprint import fingerprint
from tsopsd_jax.model.weights import Weights, held_weights, stored_weights
from tsopsd_jax.rundir import object_store
from tsopsd_jax.types import PyTree


class PolicySource(NamedTuple):
    """What is evaluated: its name in the tables, the directory of its config and tokenizer, and how it is loaded."""

    name: str
    source: dict[str, Any]
    folder: Path
    chat: str
    dtype: str
    load: Callable[[jax.sharding.Mesh], tuple[Qwen3, PyTree]]
    config: Config | None = None
    """The run's whose checkpoint it is; None: a model directory's policy."""


def model_facts(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """Digests of a model directory, as settings of a file: a directory may be replaced by another of the same name.

    Args:
        weights: whether those of the directory are the model's; False: its other parts alone.
    """
    found = fingerprint(folder, cache=digests_file(), weights=weights)
    return {f"model_{part}": sha for part, sha in found.items()}


def of_directory(folder: Path, *, name: str | None, chat: str | None, dtype: str | None) -> PolicySource:
    """The policy of a Hugging Face directory, by default under the directory's name."""
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    source = {"model": str(folder.resolve()), "step": None, **model_facts(folder)}
    return PolicySource(
        name or folder.resolve().name,
        source,
        folder,
        chat or "none",
        dtype,
        lambda mesh: load_pretrained(folder, dtype=DTYPES[dtype], mesh=mesh),
    )


def of_run(run: str, *, step: int | None, name: str | None, chat: str | None, dtype: str | None) -> PolicySource:
    """The policy of a run's checkpoint (default: the latest), by default under the run's name and the step.

    Args:
        run: the run's directory, or its address on a store, whose small files are then copied.

    Raises:
        ValueError: no run, or it has no checkpoint.
    """
    run_dir = object_store.copied(run)
    called = run.rstrip("/") if object_store.address(run_dir) else str(run_dir.resolve())
    config = resolved_config(run_dir)
    with checkpoints_of(run_dir) as checkpoints:
        if step is None:
            step = checkpoints.latest()
        if step is None:
            raise ValueError(f"{called} has no checkpoints yet")
        weights = checkpoints.fingerprint_of(step)
    dtype = dtype or config.model.compute_dtype

    def load(mesh: jax.sharding.Mesh) -> tuple[Qwen3, PyTree]:
        model, state = restore_run(run_dir, step=step, mesh=mesh, compute_dtype=dtype)
        return model, state.params

    return PolicySource(
        name or f"{called.rpartition('/')[2]}-{step}",
        {
            "model": called,
            "step": step,
            **model_facts(model_folder(config), weights=False),
            "model_weights": weights,
        },
        model_folder(config),
        chat or config.data.chat,
        dtype,
        load,
        config,
    )


def add_policy(parser: argparse.ArgumentParser, option: str, help: str) -> None:
    """Add an option that names a policy."""
    parser.add_argument(option, required=True, metavar="POLICY", help=f"{help}: a model directory, or RUN_DIR@STEP")


def add_policies(parser: argparse.ArgumentParser) -> None:
    """Add `--before` and `--after`."""
    add_policy(parser, "--before", "the policy before reheating")
    add_policy(parser, "--after", "the policy after it")


def split_step(text: str) -> tuple[str, int | None]:
    """Take RUN_DIR@STEP apart; without a step, or where a directory is called so, the step is None."""
    folder, at, step = text.rpartition("@")
    if at and step.isdigit() and not Path(text).exists():
        return folder, int(step)
    return text, None


def policy_of(text: str, *, dtype: str | None, chat: str | None) -> PolicySource:
    """The policy that a text names: a model directory, RUN_DIR@STEP, or RUN_DIR for its latest checkpoint.

    Raises:
        ValueError: there is no such thing.
    """
    run_dir, step = split_step(text)
    if step is not None or "://" in text:
        return of_run(run_dir, step=step, name=None, chat=chat, dtype=dtype)
    if (Path(text) / "config.json").is_file():
        return of_directory(Path(text), name=None, chat=chat, dtype=dtype)
    if (Path(text) / "config.yaml").is_file():
        return of_run(text, step=None, name=None, chat=chat, dtype=dtype)
    raise ValueError(f"expected a Hugging Face model directory or RUN_DIR@STEP, got {text}: neither is there")


@contextlib.contextmanager
def weights_of(policy: PolicySource, mesh: jax.sharding.Mesh) -> Iterator[Weights]:
    """The policy's weights tensor by tensor: a directory's are read as they are asked for, a checkpoint's lie on the
    mesh."""
    if policy.source["step"] is None:
        with stored_weights(policy.folder) as weights:
            yield weights
    else:
        yield held_weights(*policy.load(mesh))
