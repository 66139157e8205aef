"""Checkpoints of a run with Orbax: asynchronous, atomic, the last N kept.

A checkpoint holds a `RunState`: the train state, the run's progress (phase, steps, data position, windows of the stop rules),
the groups that dynamic sampling left over, and the phase's start policy where there is one.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tsopsd_jax.judge.groups import Groups
from tsopsd_jax.rundir.run_state import Progress, RunState
from tsopsd_jax.types import PyTree, Rollout, TrainState


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: absolute, or an address on an object store; made if absent. All processes see the same one.
        keep: how many of the latest to keep.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(directory, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, run: RunState) -> None:
        """Start saving at the state's step; returns before it is written."""
        step = run.step
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(_fields(run.state)),
            "progress": ocp.args.JsonSave(dataclasses.asdict(run.progress)),
        }
        if run.leftover is not None:
            items["leftover"] = ocp.args.PyTreeSave(_flat(run.leftover))
        if run.start is not None:
            items["start"] = ocp.args.StandardSave(run.start)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState, step: int | None = None, *, start_like: PyTree | None = None) -> RunState:
        """The checkpoint at `step` (default: the latest), placed like `like` (arrays or ShapeDtypeStructs).

        Args:
            start_like: placement of the start policy; None: it is not read.

        Raises:
            ValueError: if there is none, or its arrays are not those of `like`.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            have = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise ValueError(f"{self._manager.directory} has no checkpoint of step {step}; it has: {have}")
        has_leftover, has_start = (
            (self._manager.directory / str(step) / name).exists() for name in ("leftover", "start")
        )
        items: dict[str, Any] = {
            "state": ocp.args.StandardRestore(_fields(like)),
            "progress": ocp.args.JsonRestore(),
        }
        if has_leftover:
            items["leftover"] = ocp.args.PyTreeRestore()
        if has_start and start_like is not None:
            items["start"] = ocp.args.StandardRestore(start_like)
        got = self._manager.restore(step, args=ocp.args.Composite(**items))
        leftover = _groups(got["leftover"]) if has_leftover else None
        return RunState(TrainState(**got["state"]), _progress(got["progress"]), leftover, got.get("start"))

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def read_progress(directory: epath.PathLike) -> Progress | None:
    """Where the newest checkpoint in a directory stands; None if there is none. Process 0 reads it by itself."""
    if not epath.Path(directory).exists():
        return None
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="read_progress"
    )
    options = ocp.CheckpointManagerOptions(create=False, read_only=True, multiprocessing_options=alone)
    with ocp.CheckpointManager(directory, options=options) as manager:
        if (step := manager.latest_step()) is None:
            return None
        return _progress(manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"])


def _fields(state: TrainState) -> dict[str, Any]:
    return {f.name: vars(state)[f.name] for f in dataclasses.fields(TrainState)}


def _progress(stored: dict[str, Any]) -> Progress:
    values = dict(stored)
    values["entropies_nats"] = tuple(values["entropies_nats"])
    return Progress(**values)


def _flat(groups: Groups) -> dict[str, np.ndarray]:
    fields = {f.name: np.asarray(vars(groups.rollout)[f.name]) for f in dataclasses.fields(Rollout)}
    return fields | {"accuracy": groups.accuracy, "reward": groups.reward}


def _groups(flat: dict[str, Any]) -> Groups:
    arrays = jax.tree.map(np.asarray, dict(flat))
    accuracy, reward = arrays.pop("accuracy"), arrays.pop("reward")
    return Groups(Rollout(**arrays), accuracy, reward)
