"""Checkpoints of a run with Orbax: asynchronous, atomic, the last N kept.

A checkpoint holds a `RunState`: the train state, the run's progress (phase, steps, data position,
windows of the stop rules), the groups that dynamic sampling left over, and the phase's start policy where there is one.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tsopsd_jax.distributed import processes
from tsopsd_jax.judge.groups import Groups
from tsopsd_jax.rundir import digests
from tsopsd_jax.rundir.run_state import RunProgress, RunState
from tsopsd_jax.types import PyTree, Rollout, TrainState
from tsopsd_jax.writing import WriteError

# Orbax logs the traceback of each error in each of its threads, besides raising it; here errors are told in one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the name of a checkpoint that is being written."""


class DamagedError(ValueError):
    """A checkpoint is not what was written; the message names the step and what is wrong."""


class SaveError(WriteError):
    """A checkpoint could not be written, or cannot be read; the message says why and what to do."""


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: absolute, or an address on an object store; made if absent. All processes see the same one.
        keep: how many of the latest to keep.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(directory, options=options)
        self._writing: int | None = None
        """Step of a save that was not yet seen to be whole."""
        self.whole_step = self.latest()
        """Step of the newest checkpoint that was seen to be whole, or None."""

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order, read from the directory:
        after a save that failed Orbax forgets some."""
        return sorted(self._manager.all_steps(read=True))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    # ------------------------------------------------------------------ saving

    def save(self, run: RunState) -> None:
        """Start saving at the state's step; returns before it is written.

        Raises:
            SaveError: it could not be begun, or the save before it failed.
        """
        self.settle()
        state, progress = _fields(run.state), dataclasses.asdict(run.progress)
        facts = digests.of_arrays(state, "state") | {"progress": digests.of_json(progress)}
        args: dict[str, Any] = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
        if run.leftover is not None:
            facts |= digests.of_host(_flat(run.leftover), "leftover")
            args["leftover"] = ocp.args.PyTreeSave(_flat(run.leftover))
        if run.start is not None:
            facts |= digests.of_arrays(run.start, "start")
            args["start"] = ocp.args.StandardSave(run.start)
        self._writing = run.step
        with self._failing():
            self._manager.save(run.step, args=ocp.args.Composite(digests=ocp.args.JsonSave(facts), **args))

    def check(self) -> None:
        """Look whether the last save, if it is over, left a checkpoint that can be read.

        Raises:
            SaveError: it did not.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.settle()

    def settle(self) -> None:
        """Wait for the last save, and see that it can be read.

        Raises:
            SaveError: it could not be written.
        """
        if self._writing is None:
            return
        with self._failing():
            self._manager.wait_until_finished()
            if processes.is_first():
                self._open(self._writing)
        self.whole_step, self._writing = self._writing, None

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            SaveError: it could not be written.
        """
        self.settle()
        self._manager.close()

    def _open(self, step: int) -> None:
        """Read what a checkpoint says of itself, down to where each part of an array lies."""
        path = self._manager.directory / str(step)
        facts, _ = _read_progress(path)
        for item in {"state", "start"} & {name.split("/")[0] for name in facts}:
            ocp.StandardCheckpointHandler().metadata(path / item)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What goes wrong while saving, as a SaveError."""
        try:
            yield
        except Exception as error:
            step, self._writing = self._writing, None
            before = max((s for s in self.steps() if s != step), default=0)
            raise SaveError(
                f"step {step} could not be saved to {self._manager.directory}: {_words(error)}; make room or mend it, "
                f"and the same command goes on from step {before}"
            ) from error

    # ----------------------------------------------------------------- reading

    def restore(self, like: TrainState, step: int, *, start_like: PyTree | None = None) -> RunState:
        """The checkpoint at `step`, placed like `like` (arrays or ShapeDtypeStructs), in the types that were saved.

        Args:
            start_like: placement of the start policy; None: it is not read.

        Raises:
            DamagedError: its content is not what was written; the same in all processes.
            ValueError: there is none, or its arrays are not those of `like`.
        """
        self._check_there(step)
        read, problem = None, None
        try:
            read = _read_run(self._manager.directory / str(step), _fields(like), start_like)
        except _OtherArrays as error:
            raise ValueError(f"checkpoint {step} of {self._manager.directory} {error}") from error
        except DamagedError as error:
            problem = str(error)
        except Exception as error:
            if _passes(error):
                raise
            problem = f"it cannot be read ({_words(error)})"
        # Each process read its part without waiting for the others; all of them go on with one answer.
        problem = next((each for each in processes.exchange(problem) if each is not None), None)
        if problem is None:
            assert read is not None
            run, facts = read
            problem = _difference(digests.of_arrays(_fields(run.state), "state"), facts)
            if problem is None and run.start is not None:
                problem = _difference(digests.of_arrays(run.start, "start"), facts)
            if problem is None:
                return run
        raise DamagedError(f"checkpoint {step} is damaged: {problem}")

    def _check_there(self, step: int) -> None:
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"{self._manager.directory} has no checkpoint of step {step}; it has: {have}")

    def fingerprint_of(self, step: int) -> str:
        """A digest of the parameters that were saved at `step`, from what stands beside them.

        Raises:
            DamagedError: it cannot be read.
            ValueError: there is no such checkpoint.
        """
        self._check_there(step)
        try:
            facts, _ = _read_progress(self._manager.directory / str(step))
        except DamagedError as error:
            raise DamagedError(f"checkpoint {step} is damaged: {error}") from error
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise DamagedError(f"checkpoint {step} is damaged: it cannot be read ({_words(error)})") from error
        return digests.of_json({name: sha for name, sha in facts.items() if name.startswith("state/params")})

    def restore_newest(
        self, like: TrainState, *, start_like: PyTree | None = None
    ) -> tuple[RunState | None, list[str]]:
        """The newest checkpoint that is not damaged, None where there is no checkpoint at all,
        and a line about each newer one.

        Args:
            like, start_like: see `restore`.

        Raises:
            ValueError: all of them are damaged; the message says how.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                return self.restore(like, step, start_like=start_like), damaged
            except DamagedError as error:
                damaged.append(str(error))
        if damaged:
            raise ValueError(
                f"{self._manager.directory} has no checkpoint that can be read: {'; '.join(damaged)}; "
                f"restore one from a copy, or begin anew in another --run-dir"
            )
        return None, []

    def remove_unfinished(self) -> None:
        """Remove what saves left behind that were killed: each takes the room of a checkpoint. For the run alone."""
        for path in list(self._manager.directory.iterdir()) if processes.is_first() else []:
            if UNFINISHED in path.name:
                path.rmtree(missing_ok=True)
        processes.exchange(None)

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints after that step to `STEP.damaged`,
        so that the run that goes on may take their place."""
        for step in [s for s in self.steps() if s > after] if processes.is_first() else []:
            path = self._manager.directory / str(step)
            names = (
                f"{step}.damaged{suffix}" for suffix in itertools.chain([""], map("-{}".format, itertools.count(2)))
            )
            path.rename(next(path.parent / name for name in names if not (path.parent / name).exists()))
        processes.exchange(None)
        self._manager.reload()
        self.whole_step = self.latest()


def read_progress(directory: epath.PathLike) -> RunProgress | None:
    """Where the newest checkpoint whose progress can be read stands; None if there is none.
    A process reads it by itself."""
    if not epath.Path(directory).exists():
        return None
    options = ocp.CheckpointManagerOptions(create=False, read_only=True, multiprocessing_options=_alone())
    with ocp.CheckpointManager(directory, options=options) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        with contextlib.suppress(ValueError, KeyError, FileNotFoundError):  # damaged: named when it is restored
            return _read_progress(epath.Path(directory) / str(step))[1]
    return None


class _OtherArrays(Exception):
    """A checkpoint is of another model or optimizer."""


def _alone() -> ocp.options.MultiprocessingOptions:
    """For what a process does without the others: it waits for none, so one that fails keeps none waiting."""
    mine = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"alone{mine}"
    )


def _read(path: epath.Path, **items: Any) -> Any:
    """Items of a checkpoint; this process's part of its arrays."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_alone()) as reader:
        return reader.restore(path, args=ocp.args.Composite(**items))


def _read_progress(path: epath.Path) -> tuple[dict[str, str], RunProgress]:
    """A checkpoint's digests, and its progress, which is what was written."""
    got = _read(path, digests=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
    if problem := _difference({"progress": digests.of_json(got["progress"])}, got["digests"]):
        raise DamagedError(problem)
    return got["digests"], _progress(got["progress"])


def _read_run(path: epath.Path, like: dict[str, Any], start_like: PyTree | None) -> tuple[RunState, dict[str, str]]:
    """A checkpoint's content and its digests; those of `state` and `start` are not compared yet."""
    facts, progress = _read_progress(path)
    items = {name.split("/")[0] for name in facts}
    args: dict[str, Any] = {"state": ocp.args.StandardRestore(_as_saved(like, "state", facts))}
    if start_like is not None and "start" in items:
        args["start"] = ocp.args.StandardRestore(_as_saved(start_like, "start", facts))
    if "leftover" in items:
        args["leftover"] = ocp.args.PyTreeRestore()
    got = _read(path, **args)
    leftover = _groups(got["leftover"]) if "leftover" in items else None
    if leftover is not None and (problem := _difference(digests.of_host(_flat(leftover), "leftover"), facts)):
        raise DamagedError(problem)
    return RunState(TrainState(**got["state"]), progress, leftover, got.get("start")), facts


def _difference(found: dict[str, str], written: dict[str, str]) -> str | None:
    """The first digest that is not the one that was written, in words."""
    odd = next((name for name, digest in found.items() if digest != written.get(name)), None)
    return odd and f"digest of {odd} is {found[odd]}, {written.get(odd)} was written"


def _as_saved(like: PyTree, prefix: str, facts: dict[str, str]) -> PyTree:
    """The arrays of `like` in the types that were saved.

    Raises:
        _OtherArrays: they have other names or shapes.
    """
    saved = {name: fact.split()[0] for name, fact in facts.items() if name.startswith(f"{prefix}/")}
    wanted = digests.named(like, prefix)
    for name in sorted(saved.keys() ^ wanted.keys()):
        raise _OtherArrays(f"{'has' if name in saved else 'lacks'} {name}: it is another model's or optimizer's")

    def struct(name: str, x: Any) -> jax.ShapeDtypeStruct:
        dtype, bracket, shape = saved[name].partition("[")
        if bracket + shape != f"[{','.join(map(str, x.shape))}]":
            raise _OtherArrays(f"holds {name} as {saved[name]}, expected {digests.describe(x)}")
        return jax.ShapeDtypeStruct(x.shape, np.dtype(dtype), sharding=x.sharding)

    return jax.tree.unflatten(jax.tree.structure(like), [struct(name, x) for name, x in wanted.items()])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")


def _passes(error: Exception) -> bool:
    """Whether reading failed for a reason that says nothing of the checkpoint: memory, rights, a store out of reach."""
    kinds = (MemoryError, PermissionError, ConnectionError, TimeoutError, RuntimeError)
    return any(isinstance(e, kinds) or any(word in str(e) for word in _PASSING) for e in _causes(error))


def _words(error: Exception) -> str:
    """What went wrong first, in one line of at most 300 characters, without TensorStore's specifications."""
    first = list(_causes(error))[-1]
    text = f"{type(first).__name__}: {' '.join(str(first).split())}".split(" [tensorstore_spec")[0]
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-195:]}"


def _fields(state: TrainState) -> dict[str, Any]:
    return {f.name: vars(state)[f.name] for f in dataclasses.fields(TrainState)}


def _progress(stored: dict[str, Any]) -> RunProgress:
    values = dict(stored)
    for name in ("entropies_nats", "early_entropies_nats"):
        values[name] = tuple(values.get(name, ()))  # JSON has lists; early checkpoints have no early entropies
    return RunProgress(**values)


def _flat(groups: Groups) -> dict[str, np.ndarray]:
    fields = {f.name: np.asarray(vars(groups.rollout)[f.name]) for f in dataclasses.fields(Rollout)}
    return fields | {"accuracy": groups.accuracy, "reward": groups.reward}


def _groups(flat: dict[str, Any]) -> Groups:
    arrays = jax.tree.map(np.asarray, dict(flat))
    accuracy, reward = arrays.pop("accuracy"), arrays.pop("reward")
    return Groups(Rollout(**arrays), accuracy, reward)
