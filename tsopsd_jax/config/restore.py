"""Readers of a run directory: its configuration, its checkpoints, the policy of one."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from tsopsd_jax.config import claim, strict
from tsopsd_jax.config.build import make_phase
from tsopsd_jax.config.places import model_folder
from tsopsd_jax.config.schema import DTYPES, Config
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.checkpoints import Checkpoints, DamagedError
from tsopsd_jax.types import TrainState


def resolved_config(run_dir: Path) -> Config:
    """Read the configuration that a run directory was made with.

    Raises:
        ValueError: if there is none.
    """
    file = run_dir / claim.CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{object_store.name_of(run_dir)} is not a run directory: it has no {claim.CONFIG_FILE}")
    return strict.build(Config, claim.read_settings(file))


def restore_run(
    run_dir: Path, *, step: int | None, mesh: jax.sharding.Mesh, compute_dtype: str
) -> tuple[Qwen3, TrainState]:
    """Restore the model and train state of a checkpoint (default: the newest undamaged;
    newer ones are named on stderr).

    Raises:
        ValueError: no run, no such checkpoint, or it is damaged.
    """
    config = resolved_config(run_dir)
    model = Qwen3(read_config(model_folder(config) / "config.json"), compute_dtype=DTYPES[compute_dtype])
    like = abstract_state(model, make_phase(config.phases[0]).optimizer, mesh)
    with checkpoints_of(run_dir) as checkpoints:
        if step is None:
            run, damaged = checkpoints.restore_newest(like)
            if run is None:
                raise ValueError(f"{object_store.name_of(run_dir)} has no checkpoints")
            for line in damaged:
                print(f"{line}; step {run.step} is read instead", file=sys.stderr)
            return model, run.state
        try:
            return model, checkpoints.restore(like, step).state
        except DamagedError as error:
            others = ", ".join(str(s) for s in checkpoints.steps() if s != step) or "none"
            raise ValueError(f"{error}; other checkpoints of {run_dir}: {others}") from error


@contextlib.contextmanager
def checkpoints_of(run_dir: Path) -> Iterator[Checkpoints]:
    """Open a run's checkpoints for reading.

    Raises:
        ValueError: no run, or it has none.
    """
    config = resolved_config(run_dir)
    where = object_store.checkpoints_address(run_dir)
    if not where.exists():
        raise ValueError(f"{object_store.name_of(run_dir)} has no checkpoints")
    checkpoints = Checkpoints(where, keep=config.keep_checkpoints)
    try:
        yield checkpoints
    finally:
        checkpoints.close()
