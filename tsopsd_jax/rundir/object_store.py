"""Run directories on an object store, such as `gs://bucket/runs/x`.

Objects can be neither appended to nor locked. So the small files of such a run lie in a local folder, and whole files
are copied to the store: before each checkpoint, so that the log there is never behind it, after each evaluation, and at
the end. The store is the truth: a start takes its files from there, and what the folder held beyond them are lines
after the last checkpoint, which a run that goes on drops anyway. Checkpoints are written to the store directly, by all
processes.
"""

import atexit
import contextlib
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from tsopsd_jax.rundir import files
from tsopsd_jax.writing import WriteError, writes_to

FILES = (
    "config.yaml",
    "inputs.json",
    "functions/*",
    "metrics.jsonl",
    "evaluations.jsonl",
    "samples.jsonl",
    "status.json",
    "tracker.json",
    "report.html",
    "events/*",
    "nonfinite/*",
)
"""Files that are copied, as patterns."""
ATTEMPTS, PAUSE_S = 6, 0.5
"""Attempts to write an object, and the pause after the first; each pause is twice the one before: 15 s in all."""
ADDRESS_FILE = ".store"
"""A file in the local folder that holds the address of the run."""


class StoreError(WriteError):
    """A file could not be written to the store; the message says why and what to do."""


def folder_of(run_dir: str, cache: Path) -> Path:
    """Name the local folder of a run directory: itself, or for an address on a store a folder under `cache`.

    Raises:
        ValueError: a store that cannot be reached: no client installed, no network, no credentials.
    """
    if "://" not in run_dir:
        return Path(run_dir)
    try:
        epath.Path(run_dir).exists()
    except Exception as error:  # each store's client has errors of its own: no package, no network, no credentials
        raise ValueError(
            f"{run_dir}: expected a local directory or a store that can be reached, got {type(error).__name__}: "
            f"{' '.join(str(error).split())}; "
            'for gs:// pip install "tsopsd-jax[gcs]", and gcloud auth application-default login'
        ) from error
    folder = cache / "runs" / urllib.parse.quote(run_dir.rstrip("/"), safe="")
    with writes_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / ADDRESS_FILE, [run_dir.encode() + b"\n"])
    return folder


def address(folder: Path) -> epath.Path | None:
    """Return the address on a store of the run in a local folder; None: it lies in the folder itself.

    Raises:
        ValueError: what the folder says is none.
    """
    file = folder / ADDRESS_FILE
    if not file.is_file():
        return None
    text = file.read_text(errors="replace").strip()
    if "://" not in text:
        raise ValueError(f"{file}: expected the address of a run on a store, got {text!r:.80}; remove that file")
    return epath.Path(text)


def name_of(folder: Path) -> str:
    """Return what a person calls the run in a local folder: its address on a store, or the folder."""
    return str(address(folder) or folder)


def checkpoints_address(folder: Path) -> epath.Path:
    """Return the directory of a run's checkpoints, on the store or in the local folder."""
    return (address(folder) or epath.Path(folder.resolve())) / "checkpoints"


def fetch(folder: Path) -> None:
    """Replace the local files by those of the store, if the run lies on one.

    Raises:
        ValueError: the place on the store holds something that is no run.
    """
    far = address(folder)
    if far is None:
        return
    there = far.exists()  # a store that cannot be reached says so before anything is removed
    if there and not (far / FILES[0]).exists() and any(far.iterdir()):
        raise ValueError(f"{far} is not empty and holds no run; choose another --run-dir")
    for pattern in FILES:
        for file in folder.glob(pattern):
            file.unlink()
    for pattern in FILES if there else ():
        for file in far.glob(pattern):
            near = folder / file.relative_to(far)
            with writes_to(near):
                near.parent.mkdir(exist_ok=True)
            files.replace(near, [file.read_bytes()])


def push(folder: Path) -> None:
    """Copy the local files to the store, if the run lies on one.

    Raises:
        StoreError: a file could not be written, `ATTEMPTS` times.
    """
    far = address(folder)
    if far is None:
        return
    for pattern in FILES:
        for file in folder.glob(pattern):
            _write(far / file.relative_to(folder), file.read_bytes())


def _write(to: epath.Path, content: bytes) -> None:
    """Write an object; a write that fails is tried again, later each time."""
    for attempt in range(ATTEMPTS):
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(content)
            return
        except Exception as error:  # whatever its client raises
            if attempt == ATTEMPTS - 1:
                words = " ".join(str(error).split())[:300]
                raise StoreError(
                    f"{to} could not be written in {ATTEMPTS} attempts ({type(error).__name__}: {words}); "
                    "the same command goes on from the last checkpoint"
                ) from error
            time.sleep(PAUSE_S * 2**attempt)


@contextlib.contextmanager
def opened(run_dir: str) -> Iterator[Path]:
    """Open a run directory to be read: itself, or a copy of what a store holds.

    A local folder is left as it is, also one in which a run on a store keeps its files: that run may go on.
    """
    if "://" not in run_dir:
        yield Path(run_dir)
        return
    with tempfile.TemporaryDirectory() as cache:
        folder = folder_of(run_dir, Path(cache))
        fetch(folder)
        yield folder


def copied(run_dir: str) -> Path:
    """Open a run directory to be read for as long as the process lives: itself, or a copy as of now."""
    stack = contextlib.ExitStack()
    folder = stack.enter_context(opened(run_dir))
    atexit.register(stack.close)
    return folder
