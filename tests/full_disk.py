"""Disks that are full, as tests need them: a small file system of one's own where the machine lets one be mounted,
and a limit of the size of files everywhere. (A test process's other writes must not be while the limit holds.)"""

import contextlib
import errno
import resource
import subprocess
from pathlib import Path

import pytest

KINDS = ("blocks", "inodes", "limit")
"""No block is free; no further file can be made; no file may grow (EFBIG, without a file system of one's own)."""


class Disk:
    """A folder on a disk that can be filled.

    Args:
        folder: empty.
        kind: what there will be none of.
        size_kib: of the file system.
    """

    def __init__(self, folder: Path, kind: str, size_kib: int):
        self.folder, self.kind, self._mounted = folder, kind, False
        self._filler, self._limits = folder / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)
        if kind != "limit":
            options = f"size={size_kib}k,nr_inodes=200"
            made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
            if made.returncode:
                pytest.skip("no file system can be mounted here")
            self._mounted = True

    def fill(self, left: int = 0) -> None:
        """Leave no more than so many bytes (whole pages of 4 KiB) or files."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, self._limits[1]))
            return
        self._filler.mkdir()
        with contextlib.suppress(OSError):
            if self.kind == "blocks":
                with (self._filler / "bytes").open("wb", buffering=0) as file:
                    while file.write(b"\0" * 4096):
                        pass
            for number in range(200 if self.kind == "inodes" else 0):
                (self._filler / str(number)).touch()
        if left and self.kind == "blocks":
            with (self._filler / "bytes").open("r+b") as file:
                file.truncate((self._filler / "bytes").stat().st_size - left)
        for number in range(left if self.kind == "inodes" else 0):
            (self._filler / str(number)).unlink()

    def room(self) -> None:
        """Make room again."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
            return
        for file in self._filler.iterdir() if self._filler.exists() else ():
            file.unlink()
        with contextlib.suppress(FileNotFoundError):
            self._filler.rmdir()

    def close(self) -> None:
        """Make room, and take the file system away."""
        self.room()
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    @property
    def words(self) -> str:
        """What the operating system says."""
        return "File too large" if self.kind == "limit" else "No space left on device"

    @property
    def error(self) -> int:
        """Its number."""
        return errno.EFBIG if self.kind == "limit" else errno.ENOSPC


def files_of(folder: Path) -> dict[str, bytes]:
    """{name: content} of all files below a folder but a disk's filler."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if not name.startswith("filler")}
