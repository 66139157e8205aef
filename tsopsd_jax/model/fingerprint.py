"""Digests of a model directory: results belong to the weights, the configuration and the tokenizer that made them."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PARTS = {
    "weights": ("*.safetensors",),
    "config": ("config.json",),
    "generation_config": ("generation_config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "template": ("chat_template.jinja", "chat_template.json"),
}
"""Name -> the files that make it up. (The index of sharded weights says nothing that their headers do not.)"""
READ_BYTES = 64 << 20
"""What a thread reads at once: a file's digest is that of its blocks' digests,
so that one large file uses all cores."""


def fingerprint(folder: Path, *, cache: Path | None = None, weights: bool = True) -> dict[str, str]:
    """SHA-256 of each part of a model directory, {name of the part: 16 hexadecimal digits}; a part without files is "".

    Args:
        folder: a Hugging Face model directory.
        weights: whether to read the weights too; False: their digest is "".
        cache: a JSON file that remembers the digests of weight files by path, size and time of change; None: hash anew.

    Raises:
        ValueError: a file that cannot be read.
    """
    found = {
        name: sorted(f for p in patterns for f in folder.glob(p) if f.is_file()) for name, patterns in PARTS.items()
    }
    if not weights:
        found["weights"] = []
    known = _read(cache)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            return {name: _joined(files, known, threads) for name, files in found.items()}
        except OSError as error:
            raise ValueError(f"{folder}: expected files to read, got {error.strerror}: {error.filename}") from error
        finally:
            _write(cache, known)


def difference(then: dict[str, str], now: dict[str, str]) -> str | None:
    """The parts that differ, such as `weights, tokenizer`; None if none does."""
    return ", ".join(name for name in PARTS if then.get(name) != now.get(name)) or None


def _joined(files: list[Path], known: dict[str, list], threads: ThreadPoolExecutor) -> str:
    if not files:
        return ""
    whole = hashlib.sha256()
    for file in files:
        stat = file.stat()
        mark, key = [stat.st_size, stat.st_mtime_ns, stat.st_ino], str(file.resolve())
        if stat.st_size < READ_BYTES or known.get(key, [])[:3] != mark:
            known[key] = [*mark, _digest(file, stat.st_size, threads)]
        whole.update(f"{file.name} {known[key][3]}\n".encode())
    return whole.hexdigest()[:16]


def _digest(file: Path, size: int, threads: ThreadPoolExecutor) -> str:
    def block(start: int) -> bytes:
        with file.open("rb") as stream:
            stream.seek(start)
            return hashlib.sha256(stream.read(READ_BYTES)).digest()

    return hashlib.sha256(b"".join(threads.map(block, range(0, size, READ_BYTES)))).hexdigest()


def _read(cache: Path | None) -> dict[str, list]:
    try:
        found = json.loads(cache.read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError, RecursionError):  # absent or torn: everything is hashed again
        return {}
    return {k: v for k, v in found.items() if isinstance(v, list) and len(v) == 4} if isinstance(found, dict) else {}


def _write(cache: Path | None, known: dict[str, list]) -> None:
    """Remember the large files; a cache that cannot be written costs time, nothing else."""
    if cache is None:
        return
    large = {key: mark for key, mark in known.items() if mark[0] >= READ_BYTES}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        partial.write_text(json.dumps(large), encoding="utf-8")
        partial.replace(cache)
    except OSError:
        pass
