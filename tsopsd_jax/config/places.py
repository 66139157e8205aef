"""Where things lie: the package's own files, the cache, prepared data sets, compiled programs, model directories."""

import os
from pathlib import Path

import jax

from tsopsd_jax.config.schema import Config

ASSETS = Path(__file__).resolve().parents[1] / "assets"
"""Files that the package carries."""
DEMO_CONFIG = ASSETS / "demo.yaml"
PACKAGED_MODEL = "countdown-tiny"
"""`model.path` of the pretrained model that the package carries."""


def cache_folder(config: Config) -> Path:
    """Where prepared data sets and compiled programs live."""
    return _cache(config.cache_dir)


def datasets_folder(cache_dir: str | None) -> Path:
    """Where prepared data sets live, for a `cache_dir` that may be unset."""
    return _cache(cache_dir) / "datasets"


def digests_file(cache_dir: str | None = None) -> Path:
    """Where digests of large weight files are remembered."""
    return _cache(cache_dir) / "digests.json"


def _cache(cache_dir: str | None) -> Path:
    named = cache_dir or os.environ.get("TSOPSD_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "tsopsd_jax"


def model_folder(config: Config) -> Path:
    """The model's directory; the packaged one by its name."""
    if config.model.path == PACKAGED_MODEL:
        return ASSETS / PACKAGED_MODEL
    return Path(config.model.path)


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs between runs, unless the environment names another cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs are seconds too
