"""What analyses of run directories share: their option, their logs, and which phases reheat."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tsopsd_jax.analysis.trajectories import Span, Trajectory, read_trajectory
from tsopsd_jax.config import claim
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.log import read_evaluations, read_metrics
from tsopsd_jax.train.cycle import without_round


def add_runs(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Add the run directories."""
    parser.add_argument("run_dirs", nargs="+" if several else 1, metavar="RUN_DIR")


def trajectory_of(run_dir: str | Path) -> Trajectory:
    """Read the log of a run directory, which may lie on an object store; it is named after the directory."""
    with object_store.opened(str(run_dir)) as folder:
        return read_trajectory(Path(run_dir).resolve().name, read_metrics(folder))


def evaluations_of(run_dir: str | Path) -> Sequence[dict]:
    """Read the evaluations of a run directory."""
    with object_store.opened(str(run_dir)) as folder:
        return read_evaluations(folder)


def reheating_phases(run_dir: str | Path) -> list[str]:
    """Names of the phases without a reward, which reheat or cool; none where the log alone was kept."""
    with object_store.opened(str(run_dir)) as folder:
        # As it stands in the file: the settings of an older version may lack what this one wants.
        settings = claim.settings_of(folder) or {}
    return [str(phase["name"]) for phase in settings.get("phases", []) if phase.get("reward") is None]


def chosen_span(run: Trajectory, run_dir: Path, phase: str | None) -> Span:
    """The first span of a phase, by default of the first phase without a reward.

    Raises:
        ValueError: the log has none.
    """
    wanted = [phase] if phase is not None else reheating_phases(run_dir)
    # In a cycle `reheat` is the first of `reheat#1`, `reheat#2`, ...; each can be asked for by itself.
    span = next((span for span in run.spans if {span.phase, without_round(span.phase)} & {*wanted}), None)
    if span is None:
        have = ", ".join(dict.fromkeys(span.phase for span in run.spans))
        raise ValueError(
            f"{run_dir}: expected steps of {' or '.join(wanted) or 'a reheating phase'}, its log has: {have}"
        )
    return span


def shades(run: Trajectory) -> list[tuple[str, float, float]]:
    """The phases of a run as spans of a chart; neighbours meet half way between their steps."""
    return [(span.phase, span.first - 0.5, span.last + 0.5) for span in run.spans]
