"""Mirrors of a run's log: TensorBoard's event files, and Weights & Biases or a module with its interface.

W&B's history can only grow, and a run that resumes keeps its id there. So a step that an earlier process has
sent is not sent again: it stands there as it was first taken, once.
"""

import contextlib
import importlib
import inspect
import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from tsopsd_jax.rundir import files, sample_texts

EVENTS_FOLDER = "events"
SAMPLES_TAG = "samples"
"""Under which mirrors show the responses that a run keeps."""
TRACKER_FILE = "tracker.json"
"""The tracked run's id, and up to which step each file of the log was sent."""
FLUSH_S = 10.0
"""TensorBoard's events are written to disk at least this often, as long as steps are logged."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """A run on Weights & Biases. For a field that is None W&B's own environment variables decide."""

    project: str
    entity: str | None = None
    name: str | None = None
    mode: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        if self.mode not in (None, "online", "offline", "disabled"):
            raise ValueError(f"mode: expected online, offline, disabled or null, got {self.mode!r}")


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """Programs that show the log. `module` is imported for the section `wandb`: W&B,
    or another with its interface (trackio)."""

    tensorboard: bool = True
    wandb: Wandb | None = None
    module: str = "wandb"


class Mirror(Protocol):
    """A place to which a log is copied."""

    def show(self, file: str, step: int, values: Mapping[str, Any], /) -> None:
        """Copy a step's numbers and texts; `file` is the one of the log that holds them."""
        ...

    def show_samples(self, file: str, step: int, records: Sequence[Mapping[str, Any]], /) -> None:
        """Show responses of a step, records of samples.jsonl."""
        ...

    def flush(self) -> None:
        """Put on disk what was shown."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


def open_mirrors(run_dir: Path, tracker: Tracker, *, last_step: int, logged: Mapping[str, int]) -> list[Mirror]:
    """Open the mirrors of a run that begins or resumes after `last_step`.

    Args:
        run_dir: a run directory, whose config.yaml is sent too if it is there.
        tracker: which.
        last_step: what comes after it is taken again, or for the first time.
        logged: up to which step earlier processes have logged, for each file of the log; -1: nothing.

    Raises:
        ValueError: the tracker's module is not installed, does not know a setting, or does not start.
    """
    # The tracked run first, because it is what can fail: nothing is open yet.
    mirrors: list[Mirror] = [] if tracker.wandb is None else [_TrackedRun(run_dir, tracker, tracker.wandb, logged)]
    if tracker.tensorboard:
        mirrors.append(_TensorBoard(run_dir / EVENTS_FOLDER, purge_step=last_step + 1))
    return mirrors


class _TensorBoard:
    """An event file of TensorBoard. Events of earlier processes from `purge_step` on are not shown any more.

    tensorboardX's own SummaryWriter hands events to a thread: its flush leaves out what still waits there, and a full
    disk ends the thread and then blocks the run. Here they are written in turn. What cannot be written is said once and
    is not worth the run: metrics.jsonl has all of it.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        with warnings.catch_warnings(), _without("torch"):
            # Its protobuf stubs warn about things that we cannot change.
            warnings.simplefilter("ignore")
            from tensorboardX.event_file_writer import EventsWriter

            proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")
            from tensorboardX.summary import scalar, text

        self._event, self._scalar, self._text = proto.Event, scalar, text
        self._folder = folder
        self._writer: Any = None
        self._flushed = time.monotonic()
        with self._failing():
            folder.mkdir(parents=True, exist_ok=True)
            # Its file names count whole seconds; a process that restarts within one would overwrite a file.
            self._writer = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._writer.write_event(proto.Event(wall_time=time.time(), step=purge_step, session_log=start))

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What cannot be written inside the block ends the events, not the run."""
        try:
            yield
        except OSError as error:
            print(f"warning: events in {self._folder} could not be written ({error}); the run goes on", file=sys.stderr)
            if self._writer is not None:  # what it holds back would be tried again, and fail, when it is collected
                self._writer._py_recordio_writer._writer.raw.close()
            self._writer = None

    def show(self, _file: str, step: int, values: Mapping[str, Any], /) -> None:
        for name, value in values.items():
            if not isinstance(value, str):
                self._write(step, self._scalar(name, float(value)))

    def show_samples(self, _file: str, step: int, records: Sequence[Mapping[str, Any]], /) -> None:
        self._write(step, self._text(SAMPLES_TAG, sample_texts.samples_as_markdown(records)))

    def _write(self, step: int, summary: Any) -> None:
        if self._writer is None:
            return
        with self._failing():
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self._writer is not None:
            with self._failing():
                self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        if self._writer is not None:
            with self._failing():
                self._writer.close()


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Hide a package as if it were not installed, unless it is imported already.

    tensorboardX imports torch where it can, to draw graphs of torch models; that takes seconds at every start.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]


class _TrackedRun:
    """A run of W&B, or of a module with its interface, that a later process can continue."""

    def __init__(self, run_dir: Path, tracker: Tracker, wandb: Wandb, logged: Mapping[str, int]):
        self._name = tracker.module
        module = _module(tracker.module)
        self._table = vars(module).get("Table")
        file = run_dir / TRACKER_FILE
        if file.is_file():
            known = _known(file)
            self._sent = {name: max(step, known["sent"].get(name, -1)) for name, step in logged.items()}
        else:
            known = {"id": os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]}
            self._sent = dict.fromkeys(logged, -1)
        try:
            self._run = module.init(**_arguments(module, wandb, run_dir, known["id"]))
        except Exception as error:
            raise ValueError(
                f"tracker: {tracker.module} did not start ({type(error).__name__}: {' '.join(str(error).split())}); "
                f"mend that, set tracker.wandb.mode to offline, or leave tracker.wandb out"
            ) from error
        files.replace(file, [json.dumps(known | {"sent": self._sent}).encode()])

    def show(self, file: str, step: int, values: Mapping[str, Any], /) -> None:
        late = {} if self._row(step) == step else {"evaluation/step": step}
        self._log(file, step, lambda: {**values, **late})

    def show_samples(self, file: str, step: int, records: Sequence[Mapping[str, Any]], /) -> None:
        table = self._table
        if table is not None:  # a module without tables shows no texts
            columns, data = list(sample_texts.SAMPLE_COLUMNS), sample_texts.sample_rows(records)
            self._log(file, step, lambda: {SAMPLES_TAG: table(columns=columns, data=data)})

    def _row(self, step: int) -> int:
        """The row of a step. Rows that were sent are closed: what was interrupted, and belongs to one, goes into the
        next."""
        return max(step, 1 + max(self._sent.values()))

    def _log(self, file: str, step: int, values: Callable[[], dict[str, Any]]) -> None:
        if self._run is None or step <= self._sent[file]:
            return
        try:
            self._run.log(values(), step=self._row(step))
        except Exception as error:  # whatever it is, it is not worth the run
            print(f"warning: {self._name}: {error}; the run goes on without it", file=sys.stderr)
            self._run = None

    def flush(self) -> None:
        pass  # it sends by itself

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _known(file: Path) -> dict[str, Any]:
    """The tracked run's id, and what it was sent.

    Raises:
        ValueError: the file holds something else.
    """
    what, remedy = "a tracked run's id and what it was sent", "remove it, and another run begins there"
    found = files.read_object(file, what=what, remedy=remedy)
    sent = found.get("sent")
    if not isinstance(found.get("id"), str) or not isinstance(sent, dict):
        raise ValueError(f"{file}: expected {what}, got {', '.join(found) or 'nothing'}; {remedy}")
    if not all(type(step) is int for step in sent.values()):
        raise ValueError(f"{file}: expected numbers of steps, got {sent!r:.80}; {remedy}")
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        install = '"tsopsd-jax[wandb]"' if name == "wandb" else name
        raise ValueError(f"tracker: expected the package {name}, got none: pip install {install}") from error


def _arguments(module: Any, wandb: Wandb, run_dir: Path, run_id: str) -> dict[str, Any]:
    """Choose the arguments of `module.init`: it must know those that were asked for;
    of the others it gets those that it knows."""
    parameters = inspect.signature(module.init).parameters
    asked = {name: vars(wandb)[name] for name in ("entity", "name", "mode", "group", "tags") if vars(wandb)[name]}
    for name in asked:
        if name not in parameters:
            raise ValueError(f"tracker.wandb.{name}: {module.__name__}.init takes no {name}; leave it out")
    # Where there is no id, a run is continued by its name, which then must be this run's alone.
    name = run_dir.resolve().name + ("" if "id" in parameters else f"-{run_id}")
    ours = {"id": run_id, "allow_val_change": True}
    ours |= {
        key: value for key, value in (("name", name), ("dir", str(run_dir))) if f"WANDB_{key.upper()}" not in os.environ
    }
    ours = {key: value for key, value in ours.items() if key in parameters}
    return {"project": wandb.project, "config": _settings(run_dir), "resume": "allow"} | ours | asked


def _settings(run_dir: Path) -> dict[str, Any]:
    """Read the resolved settings in the run directory; none if it holds none."""
    file = run_dir / "config.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
