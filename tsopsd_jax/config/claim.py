"""The run directory: whose it is, the configuration it was made with, and which settings may change on resuming."""

import contextlib
import errno
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tsopsd_jax.config import Config, strict
from tsopsd_jax.rundir import files, object_store
from tsopsd_jax.rundir.checkpoints import read_progress
from tsopsd_jax.rundir.log import EVALUATIONS_FILE, METRICS_FILE

CONFIG_FILE, LOCK_FILE = "config.yaml", ".lock"
RUNTIME = r"checkpoint_every_steps|keep_checkpoints|tracker(\..+)?|cache_dir"
"""Settings that may change between two starts of the same run, without a word."""
CHANGEABLE = r"evaluation\.(rows_at_once|every_steps)|mesh\.(data|fsdp|tensor|cpu_devices)"
"""Settings that may change too, and are told: memory, machine, and when to look."""
CHANGEABLE_IN_PHASE = (
    r"phases\.(\d+)\.((guard|stop)\.\w+|optimizer\.learning_rate|reward\.(on_shortage|max_generation_batches)"
    r"|rows_at_once|micro_batches|chunk_tokens|pack)"
)
"""... as long as their phase is not finished: what guards and shortages ask to change, and what memory asks for."""


def read_settings(file: Path) -> dict[str, Any]:
    """The mapping in a run's config.yaml.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: expected a run's configuration, got invalid YAML ({' '.join(str(error).split())}); "
            "restore the file or choose another run directory"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a configuration; restore the file or choose another run directory")
    return found


def _check_ours(run_dir: Path) -> None:
    """A run directory is absent, empty or a run's."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: expected a run directory, got a file; choose another --run-dir")
    if not run_dir.exists() or (run_dir / CONFIG_FILE).is_file():
        return
    ours = {LOCK_FILE, files.partial(run_dir / CONFIG_FILE).name, object_store.ADDRESS_FILE}
    if {each.name for each in run_dir.iterdir()} - ours:
        raise ValueError(f"{run_dir} is not empty and holds no run; choose another --run-dir")


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of `run_dir`, which is made if absent.

    Raises:
        ValueError: it holds something else, cannot be made, or another process runs in it.
    """
    _check_ours(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("a")
    except OSError as error:
        raise ValueError(
            f"{run_dir}: expected a directory to write to, got {error.strerror}; choose another --run-dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process runs in {run_dir}; wait for it or choose another --run-dir") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise
        yield


def _phase_reached(run_dir: Path) -> int | None:
    """Index of the phase that the run goes on with; None if it has neither a checkpoint nor a logged step."""
    if (progress := read_progress(object_store.checkpoints_of(run_dir))) is not None:
        return progress.phase
    metrics = run_dir / METRICS_FILE
    return 0 if metrics.is_file() and metrics.stat().st_size else None


def _may_change(key: str, phase: int) -> bool:
    if match := re.fullmatch(CHANGEABLE_IN_PHASE, key):
        return int(match[1]) >= phase
    return re.fullmatch(CHANGEABLE, key) is not None


def claim(run_dir: Path, config: Config) -> list[str]:
    """Write config.yaml into a run directory that is held, if it is new or its run may go on with `config`.

    Returns:
        What changed for a run that goes on, `key: old -> new`.

    Raises:
        ValueError: the run there is another configuration's; nothing is changed then.
    """
    _check_ours(run_dir)
    file, resolved = run_dir / CONFIG_FILE, strict.plain(config)
    changed = []
    if file.is_file():
        differences = [d for d in strict.differences(read_settings(file), resolved) if not re.fullmatch(RUNTIME, d.key)]
        reached = _phase_reached(run_dir) if differences else None
        refused = [d for d in differences if not _may_change(d.key, reached or 0)]
        if refused and reached is not None:
            raise ValueError(
                f"{run_dir} holds a run of another configuration ({refused[0].words('!=')}); choose another --run-dir, "
                "or the old settings"
            )
        if refused:  # nothing was trained: the old configuration is replaced, and what was evaluated under it goes
            (run_dir / EVALUATIONS_FILE).unlink(missing_ok=True)
        changed = [d.words("->") for d in differences if reached is not None]
    files.replace(file, [yaml.safe_dump(resolved, sort_keys=False).encode()])
    return changed
