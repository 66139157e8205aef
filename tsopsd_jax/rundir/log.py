"""The log of a run: `metrics.jsonl` (a line per step), its mirrors (`rundir.trackers`), evaluations, and samples.

`metrics.jsonl` is the truth, the mirrors follow it. All of it is strict JSON: a number that is not finite is
written as null.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tsopsd_jax.rundir import files, object_store
from tsopsd_jax.rundir.status import Status
from tsopsd_jax.rundir.trackers import Tracker, open_mirrors
from tsopsd_jax.writing import WriteError, writes_to

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SAMPLES_FILE = "samples.jsonl"
NONFINITE_FOLDER, MAX_NONFINITE = "nonfinite", 3
MEASURED = ("avg_at_k", "pass_at_k", "length_mean_tokens", "truncated_fraction", "entropy_nats")
"""Measurements of an evaluation that mirrors show."""
NOT_MIRRORED = ("step", "time_s", "phase_step")
TENSORBOARD = Tracker()


class RunLog:
    """Appends to a run directory's log; one process of a run may hold it at a time.

    Opening it for a run that resumes at `last_step` (0: from the start) drops what was logged after it, since
    those steps will be taken again; the lines before stay as they are, byte for byte.

    Args:
        run_dir: the run directory; made if absent.
        last_step: the step of the state that the run resumes with, 0 for a new run.
        tracker: where the log is mirrored.

    Raises:
        ValueError: if a line before the last is not JSON, a record has no step, or a tracker does not start.
    """

    def __init__(self, run_dir: str | Path, *, last_step: int, tracker: Tracker = TENSORBOARD):
        self.run_dir, self._step = Path(run_dir), last_step
        self.run_dir.mkdir(parents=True, exist_ok=True)
        logged = {}
        for name in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE):
            path = self.run_dir / name
            logged[name] = max((_step(record, path) for record in files.objects(path)), default=-1)
            files.mend(path, lambda record: record.get("step", 0) <= last_step)
        self._path = self.run_dir / METRICS_FILE
        self.status = Status(self.run_dir, last_step=last_step, lines=files.objects(self._path))
        self.missing_steps = max(0, last_step - sum(1 for _ in files.objects(self._path)))
        """Steps before the first one to come that have no line."""
        self._mirrors = open_mirrors(self.run_dir, tracker, last_step=last_step, logged=logged)
        with writes_to(self._path):
            self._file = self._path.open("ab", buffering=0)
        self._end = self._file.tell()
        """Where the file ends, if nobody else writes it."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one step's line (`step` an integer above all before it; values scalars, strings or None).

        Raises:
            ValueError: if `step` is missing or not above the last one, or if a value is not a scalar.
            WriteError: it could not be written, or somebody removed or replaced the file.
        """
        record = {key: strict_json(value) for key, value in line.items()}
        step = record.get("step")
        if type(step) is not int or step <= self._step:
            raise ValueError(
                f"a metrics line expects an integer `step` above {self._step}, got {step!r}: "
                "open the log with the last step that is to be kept"
            )
        for key, value in record.items():
            if isinstance(value, dict | list):
                raise ValueError(f"a metrics line holds scalars, got {type(value).__name__} under {key!r}")
        data = _encode(record)
        files.append_bytes(self._file, data)
        self._end += len(data)
        self._check_ours()
        self._step = step
        self.status.count(record)
        self._show(METRICS_FILE, step, record)

    def write_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append responses of one step that are kept for people to read, each with its `step`, and mirror them."""
        if not records:
            return
        plain = [strict_json(record) for record in records]
        path = self.run_dir / SAMPLES_FILE
        with writes_to(path), path.open("ab", buffering=0) as file:
            files.append_bytes(file, b"".join(map(_encode, plain)))
        for mirror in self._mirrors:
            mirror.show_samples(SAMPLES_FILE, plain[0]["step"], plain)

    def write_nonfinite(self, step: int, words: str, rows: Mapping[str, np.ndarray]) -> None:
        """Keep the suspected rows of an update that was not finite in `nonfinite/step-N.npz`, with what was found; the
        first `MAX_NONFINITE` of a run."""
        folder = self.run_dir / NONFINITE_FOLDER
        folder.mkdir(exist_ok=True)
        if len(list(folder.glob("*.npz"))) < MAX_NONFINITE:
            content = io.BytesIO()
            np.savez_compressed(content, found=np.array(words), **rows)  # pyright: ignore[reportArgumentType] - names
            files.replace(folder / f"step-{step}.npz", [content.getvalue()])

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Add an evaluated stage, as `append_evaluation` does, and mirror what was measured as `evaluation/NAME`."""
        append_evaluation(self.run_dir, record)
        measured = {f"evaluation/{name}": strict_json(record.get(name)) for name in MEASURED}
        self._show(EVALUATIONS_FILE, record["step"], measured | {"evaluation/stage": record.get("stage")})

    def _show(self, file: str, step: int, record: Mapping[str, Any]) -> None:
        values = {key: value for key, value in record.items() if value is not None and key not in NOT_MIRRORED}
        for mirror in self._mirrors:
            mirror.show(file, step, values)

    def _check_ours(self) -> None:
        """Lines that are written to a file without a name are lost; and where another process writes the file, whose
        lock somebody removed, there are two runs in one directory."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            size = -1
        if size < self._end or self._file.tell() != self._end:
            raise WriteError(
                f"{self._path} was removed, replaced or written by another process while the run went on; the same "
                "command goes on from the last checkpoint, if that is still there"
            )

    def flush(self) -> None:
        """Put on disk the lines, what the mirrors hold back, and the status."""
        with writes_to(self._path):
            os.fsync(self._file.fileno())
        self.status.write()
        for mirror in self._mirrors:
            mirror.flush()

    def push(self) -> None:
        """Flush, and copy the run directory's files to the store that it lies on, if any."""
        self.flush()
        object_store.push(self.run_dir)

    def close(self) -> None:
        """Flush and close the file and its mirrors; a second call does nothing."""
        if self._file.closed:
            return
        self._file.close()
        for mirror in self._mirrors:
            mirror.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _step(record: Mapping[str, Any], path: Path) -> int:
    """The step that a record of the log belongs to; an evaluation of none belongs to step 0."""
    step = record.get("step", None if path.name == METRICS_FILE else 0)
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError(
            f"{path}: expected the number of a step in each record, got {step!r:.80}; remove that line to go on"
        )
    return step


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`, oldest first; a last line torn by a crash is left out.

    Raises:
        ValueError: if the file is absent or a line before the last is not JSON.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"expected a run directory with {METRICS_FILE}, got {run_dir}: no such file in it")
    return files.read_objects(path)


def append_evaluation(run_dir: str | Path, record: Mapping[str, Any]) -> None:
    """Add one evaluated stage to `evaluations.jsonl`; it replaces an earlier record of the same evaluation.

    The same evaluation: equal `stage`, `step`, `benchmark`, `samples` and `sampling`. So a run that was
    stopped after an evaluation and evaluates again when it resumes lists it once.

    Raises:
        ValueError: if a line of the file before the last is not JSON.
    """
    path = Path(run_dir) / EVALUATIONS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    new = strict_json(record)
    kept = [old for old in read_evaluations(run_dir) if _identity(old) != _identity(new)]
    files.replace(path, (_encode(each) for each in [*kept, new]))


def read_evaluations(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the records of `evaluations.jsonl` in the order of their making; none if the file is absent.

    Raises:
        ValueError: if a line before the last is not JSON.
    """
    return files.read_objects(Path(run_dir) / EVALUATIONS_FILE)


def read_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the responses that a run kept, oldest first; none if the file is absent.

    Raises:
        ValueError: if a line before the last is not JSON.
    """
    return files.read_objects(Path(run_dir) / SAMPLES_FILE)


def _identity(evaluation: Mapping[str, Any]) -> str:
    fields = ("stage", "step", "benchmark", "samples", "sampling")
    return json.dumps([evaluation.get(field) for field in fields], sort_keys=True)


def strict_json(value: Any) -> Any:
    """Turn `value` into strict JSON: NumPy and JAX scalars become Python's, non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): strict_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(each) for each in value]
    if not isinstance(value, bool | int | float | str | None):
        value = np.asarray(value)
        if value.dtype == object:
            raise ValueError(f"a log holds numbers and text, got {value.item()!r}")
        return strict_json(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _encode(record: Mapping[str, Any]) -> bytes:
    # ASCII: text may hold lone surrogates or U+2028, and a line must stay one line for every reader.
    return json.dumps(record, allow_nan=False, ensure_ascii=True).encode("ascii") + b"\n"
