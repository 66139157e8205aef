"""The log of a run: `metrics.jsonl` (a line per step), its mirrors (TensorBoard, W&B), and evaluations.

`metrics.jsonl` is the truth, the mirrors follow it. All of it is strict JSON: a number that is not finite is
written as null.
"""

import contextlib
import importlib
import json
import math
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tsopsd_jax.rundir import files

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
EVENTS_FOLDER = "events"
WANDB_ID_FILE = "wandb_id.txt"


class RunLog:
    """Appends to a run directory's log; one process of a run may hold it at a time.

    Opening it for a run that goes on at `last_step` (0: from the start) drops what was logged after it, since
    those steps will be taken again; the lines before stay as they are, byte for byte.

    Args:
        run_dir: the run directory; made if absent.
        last_step: the step of the state that the run goes on with, 0 for a new run.
        wandb_project: mirror to this Weights & Biases project too; None for no mirror.
        wandb_entity: the team or user that owns the project; None for the account's default.
        wandb_name: the run's name as Weights & Biases shows it; None for the run directory's name.
        wandb_mode: "online" or "offline" (kept in the run directory, to be synchronised later).

    Raises:
        ValueError: if a line before the last is not JSON, or wandb is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        last_step: int,
        wandb_project: str | None = None,
        wandb_entity: str | None = None,
        wandb_name: str | None = None,
        wandb_mode: str = "online",
    ):
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, EVALUATIONS_FILE):
            files.mend(run_dir / name, lambda record: record.get("step", 0) <= last_step)
        self._step = last_step
        self._wandb = None
        if wandb_project is not None:
            # First, because it is what can fail: nothing is open yet.
            self._wandb = _open_wandb(
                run_dir, project=wandb_project, entity=wandb_entity, name=wandb_name, mode=wandb_mode
            )
        self._tensorboard = _open_tensorboard(run_dir / EVENTS_FOLDER, purge_step=last_step + 1)
        self._file = (run_dir / METRICS_FILE).open("ab")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one step's line (`step` an integer above all before it; values scalars, strings or None).

        Raises:
            ValueError: if `step` is missing or not above the last one, or if a value is not a scalar.
        """
        record = {key: _plain(value) for key, value in line.items()}
        step = record.get("step")
        if type(step) is not int or step <= self._step:
            raise ValueError(
                f"a metrics line expects an integer `step` above {self._step}, got {step!r}: "
                "open the log with the last step that is to be kept"
            )
        for key, value in record.items():
            if isinstance(value, dict | list):
                raise ValueError(f"a metrics line holds scalars, got {type(value).__name__} under {key!r}")
        self._file.write(_encode(record))
        self._file.flush()
        self._step = step
        numbers = {
            key: float(value)
            for key, value in record.items()
            if isinstance(value, int | float) and key not in ("step", "time_s", "phase_step")
        }
        for key, value in numbers.items():
            self._tensorboard.add_scalar(key, value, global_step=step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step, "phase": record.get("phase")})

    def close(self) -> None:
        """Flush and close the file and its mirrors; a second call does nothing."""
        if self._file.closed:
            return
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, oldest first; a last line torn by a crash is left out.

    Raises:
        ValueError: if the file is absent or a line before the last is not JSON.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"expected a run directory with {METRICS_FILE}, got {run_dir}: no such file in it")
    return files.read(path)


def append_evaluation(run_dir: str | Path, record: Mapping[str, Any]) -> None:
    """Add one evaluated stage to `evaluations.jsonl`; it replaces an earlier record of the same evaluation.

    The same evaluation: equal `stage`, `step`, `benchmark`, `samples` and `sampling`. So a run that was
    stopped after an evaluation and evaluates again when it resumes lists it once.

    Raises:
        ValueError: if a line of the file before the last is not JSON.
    """
    path = Path(run_dir) / EVALUATIONS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _plain(record)
    kept = [old for old in read_evaluations(run_dir) if _identity(old) != _identity(new)]
    files.replace(path, (_encode(each) for each in [*kept, new]))


def read_evaluations(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `evaluations.jsonl` in the order of their making; none if the file is absent.

    Raises:
        ValueError: if a line before the last is not JSON.
    """
    return files.read(Path(run_dir) / EVALUATIONS_FILE)


def _identity(evaluation: Mapping[str, Any]) -> str:
    fields = ("stage", "step", "benchmark", "samples", "sampling")
    return json.dumps([evaluation.get(field) for field in fields], sort_keys=True)


def _plain(value: Any) -> Any:
    """`value` as strict JSON: NumPy and JAX scalars become Python's, non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if not isinstance(value, bool | int | float | str | None):
        value = np.asarray(value)
        if value.dtype == object:
            raise ValueError(f"a log holds numbers and text, got {value.item()!r}")
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _encode(record: Mapping[str, Any]) -> bytes:
    # ASCII: text may hold lone surrogates or U+2028, and a line must stay one line for every reader.
    return json.dumps(record, allow_nan=False, ensure_ascii=True).encode("ascii") + b"\n"


def _open_tensorboard(folder: Path, *, purge_step: int) -> Any:
    """A TensorBoard writer; events of an earlier process at `purge_step` and later are not shown any more."""
    with warnings.catch_warnings(), _without("torch"):
        # Its protobuf stubs warn about things that we cannot change.
        warnings.simplefilter("ignore")
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        # Its file names count whole seconds; a process that restarts within one would overwrite a file.
        suffix = f".{uuid.uuid4().hex[:8]}"
        return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10, filename_suffix=suffix)


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """The package as if it were not installed, unless it is imported already. (TensorBoard's writer imports torch where it can,
    which takes seconds at every start, to draw graphs of torch models.)"""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]


def _open_wandb(run_dir: Path, *, project: str, entity: str | None, name: str | None, mode: str) -> Any:
    """A Weights & Biases run that a later process can continue: its id is kept in the run directory."""
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"the log's mirror to the Weights & Biases project {project!r} expects the package wandb, "
            'got none: pip install "tsopsd-jax[wandb]"'
        ) from error
    id_file = run_dir / WANDB_ID_FILE
    if not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:12] + "\n")
    run = wandb.init(
        project=project,
        entity=entity,
        name=name or run_dir.resolve().name,
        mode=mode,
        dir=str(run_dir),
        id=id_file.read_text().strip(),
        resume="allow",
    )
    # Our own x axis: its internal counter refuses steps that a resumed run takes again.
    run.define_metric("*", step_metric="step")
    return run
