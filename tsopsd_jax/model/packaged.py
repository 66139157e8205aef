"""The pretrained model that the package carries."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
"""Files that the package carries."""
PACKAGED_MODEL = "countdown-tiny"
"""Its name: 0.3 M parameters that know the game of countdown."""


def model_directory(path: str | Path) -> Path:
    """Name the Hugging Face directory of a model: the packaged model is known by its name, any other by its path."""
    return ASSETS / PACKAGED_MODEL if str(path) == PACKAGED_MODEL else Path(path).expanduser()
