"""What a long computation has found so far, in one file from which the same command goes on."""

import contextlib
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsopsd_jax.distributed import processes
from tsopsd_jax.rundir import files

_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What reading raises of a file that is absent or not as it was written: it is found out again."""
SAVE_EVERY_S = 120.0
"""Seconds between two savings; what was found since is worked out again."""


class Unfinished:
    """The file of an unfinished computation.

    Args:
        file: an .npz file; it is there only while the computation is unfinished.
        settings: all that the result depends on. A file of other settings is not gone on from.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self._file = file
        self._settings = json.dumps(settings, sort_keys=True)
        self._saved_s = time.monotonic()

    def load(self) -> dict[str, np.ndarray]:
        """Read what was saved; nothing if there is no such file, or a damaged one. Of several processes all read the
        same, or none."""
        found, saved = dict[str, np.ndarray](), 0.0
        with contextlib.suppress(*_DAMAGE), self._file.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["settings"]) == self._settings:
                read = {name: stored[name] for name in stored.files if name not in ("settings", "saved")}
                found, saved = read, float(stored["saved"])
        return found if len(set(processes.exchange(saved))) == 1 else {}

    def save(self, found: Callable[[], Mapping[str, Any]]) -> None:
        """Save what `found` returns, arrays by name, if `SAVE_EVERY_S` have gone by; the first process does."""
        if not processes.is_first() or time.monotonic() - self._saved_s < SAVE_EVERY_S:
            return
        aside = files.partial(self._file)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                np.savez(file, settings=self._settings, saved=time.time(), **found())
            aside.replace(self._file)
        except OSError as error:  # it saves time where the command is interrupted, no more
            aside.unlink(missing_ok=True)
            print(f"warning: {self._file} could not be written ({error}); the computation goes on", file=sys.stderr)
        self._saved_s = time.monotonic()

    def finish(self) -> None:
        """Remove the file: the result is there."""
        if processes.is_first():
            self._file.unlink(missing_ok=True)
