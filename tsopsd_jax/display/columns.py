"""The columns of a run's metrics.jsonl, and the units that their names tell."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tsopsd_jax.display.numbers import finite, finite_or_nan
from tsopsd_jax.display.series import Stretch
from tsopsd_jax.rundir.log import read_metrics

PLACES = ("step", "phase_step")
"""Numbers of a line that say where it stands and measure nothing."""
METRIC_UNITS = (
    ("tokens_per_s", "tokens/s"),
    ("tokens_per_s_per_device", "tokens/s per device"),
    ("_nats", "nats"),
    ("_tokens", "tokens"),
    ("_fraction", "share"),
    ("_bytes", "MiB"),
    ("_s", "s"),
)
"""End of a metric's name -> the unit shown with it."""
MIB = 2**20


class Metrics(NamedTuple):
    """Numbers of metrics.jsonl by step; NaN where a step has no value."""

    step: np.ndarray
    columns: Mapping[str, np.ndarray]
    segments: Sequence[Stretch]

    def of(self, key: str) -> np.ndarray:
        """The column of that name, NaN throughout where no line has it."""
        return self.columns.get(key, np.full(len(self.step), np.nan))


def read_columns(run_dir: Path) -> Metrics:
    """Read the metrics of a run.

    Raises:
        ValueError: it has no step, no metrics.jsonl, or a broken line before its last.
    """
    records = [record for record in read_metrics(run_dir) if finite(record.get("step")) is not None]
    if not records:
        raise ValueError(f"expected at least one step, got none in {run_dir}: report a run after its first step")
    segments: list[Stretch] = []
    phase_step = math.inf
    for index, record in enumerate(records):
        phase = str(record.get("phase", "run"))
        before, phase_step = phase_step, finite_or_nan(record.get("phase_step"))
        # A cyclic schedule may come back to the same phase at once: then only its own count starts again.
        if segments and segments[-1].phase == phase and not phase_step < before:
            segments[-1] = segments[-1]._replace(end=index + 1)
        else:
            segments.append(Stretch(phase, index, index + 1))
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: np.asarray([finite_or_nan(record.get(name)) for record in records]) for name in names}
    measured = {name: column for name, column in columns.items() if np.isfinite(column).any()}
    return Metrics(columns["step"], measured, segments)


def unit_of(key: str) -> str:
    """The unit that a metric's name tells, or nothing."""
    return next((unit for end, unit in METRIC_UNITS if key.endswith(end)), "")
