"""Run directories on an object store, such as `gs://bucket/runs/x`.

Objects can be neither appended to nor locked. So the small files of such a run lie in a local folder, and whole files are
copied to the store: before each checkpoint, so that the log there is never behind it, after each evaluation, and at the
end. The store is the truth: a start takes its files from there, and what the folder held beyond them are lines after the
last checkpoint, which a run that goes on drops anyway. Checkpoints are written to the store directly, by all processes.
"""

import contextlib
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from etils import epath

FILES = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "status.json", "tracker.json", "report.html", "events/*")
"""What is copied."""
ADDRESS_FILE = ".store"
"""In the local folder: the address of the run."""


def folder_of(run_dir: str, cache: Path) -> Path:
    """The local folder of a run directory: that directory, or for an address on a store a folder under `cache`.

    Raises:
        ValueError: a store that the installed libraries cannot reach.
    """
    if "://" not in run_dir:
        return Path(run_dir)
    try:
        epath.Path(run_dir).exists()
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"{run_dir}: expected a local directory or a store that can be reached, got {type(error).__name__}: {error}; "
            'for gs:// pip install "tsopsd-jax[gcs]"'
        ) from error
    folder = cache / "runs" / urllib.parse.quote(run_dir.rstrip("/"), safe="")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADDRESS_FILE).write_text(run_dir + "\n")
    return folder


def address(folder: Path) -> epath.Path | None:
    """Where the run of a local folder lies; None: in the folder itself."""
    file = folder / ADDRESS_FILE
    return epath.Path(file.read_text().strip()) if file.is_file() else None


def checkpoints_of(folder: Path) -> epath.Path:
    """Where a run's checkpoints lie."""
    return (address(folder) or epath.Path(folder.resolve())) / "checkpoints"


def fetch(folder: Path) -> None:
    """Make the local files those of the store, if the run lies on one.

    Raises:
        ValueError: something else lies there.
    """
    far = address(folder)
    if far is None:
        return
    for pattern in FILES:
        for file in folder.glob(pattern):
            file.unlink()
    if not far.exists():
        return
    if not (far / FILES[0]).exists() and any(far.iterdir()):
        raise ValueError(f"{far} is not empty and holds no run; choose another --run-dir")
    for pattern in FILES:
        for file in far.glob(pattern):
            near = folder / file.relative_to(far)
            near.parent.mkdir(exist_ok=True)
            near.write_bytes(file.read_bytes())


def push(folder: Path) -> None:
    """Copy the local files to the store, if the run lies on one."""
    far = address(folder)
    if far is None:
        return
    for pattern in FILES:
        for file in folder.glob(pattern):
            to = far / file.relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())


@contextlib.contextmanager
def opened(run_dir: str) -> Iterator[Path]:
    """A run directory to read: itself, or a copy of what a store holds."""
    with tempfile.TemporaryDirectory() as cache:
        folder = folder_of(run_dir, Path(cache))
        fetch(folder)
        yield folder
