"""From a YAML file and overrides to a configuration."""

from pathlib import Path

from tsopsd_jax.config import overlay, strict
from tsopsd_jax.config.schema import Config

RENAMED = {"wandb_project": "tracker.wandb.project"}


def load_config(path: str | Path, overrides: list[str]) -> Config:
    """Read a YAML file, with what it extends, and apply `a.b=value` overrides.

    Raises:
        ValueError: as `overlay.read` raises, or anything that `strict.build` rejects.
    """
    data, sources = overlay.read(Path(path))
    try:
        for assignment in overrides:
            strict.override(data, assignment)
        for old in RENAMED.keys() & (data if isinstance(data, dict) else {}):
            raise ValueError(f"{old}: expected under its new name {RENAMED[old]}")
        return strict.build(Config, data)
    except ValueError as error:
        words = overlay.located(str(error), data, sources, overrides)
        raise ValueError(f"configuration {path}: {words}") from error
