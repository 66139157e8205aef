"""Places of things: the package's own files, the cache, prepared data sets, compiled programs, model directories."""

import os
from pathlib import Path

import jax

from tsopsd_jax.config import strict
from tsopsd_jax.config.schema import Config
from tsopsd_jax.model.packaged import ASSETS, model_directory

DEMO_CONFIG = ASSETS / "demo.yaml"


def cache_folder(config: Config) -> Path:
    """Name the folder of prepared data sets and compiled programs."""
    return _cache(config.cache_dir)


def datasets_folder(cache_dir: str | None) -> Path:
    """Name the folder of prepared data sets, for a `cache_dir` that may be unset."""
    return _cache(cache_dir) / "datasets"


def digests_file(cache_dir: str | None = None) -> Path:
    """Where digests of large weight files are remembered."""
    return _cache(cache_dir) / "digests.json"


def _cache(cache_dir: str | None) -> Path:
    return Path(strict.at_home(cache_dir or os.environ.get("TSOPSD_CACHE_DIR") or "~/.cache/tsopsd_jax"))


def model_folder(config: Config) -> Path:
    """Name the model's directory; the packaged model is known by its name."""
    return model_directory(config.model.path)


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs between runs, unless the environment names another cache or the folder is read-only.

    Raises:
        ValueError: the folder does not exist and cannot be made.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cache {folder}: expected a folder that can be made, got {error.strerror}; name another with cache_dir or "
            "TSOPSD_CACHE_DIR"
        ) from error
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs are seconds too
