"""Objectives by name: the library's, and those of one's own as `path/to/file.py:function`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.objectives.dapo import dapo
from tsopsd_jax.objectives.ts_opsd import ts_opsd

OBJECTIVES: dict[str, Callable[..., Objective]] = {"dapo": dapo, "ts_opsd": ts_opsd}
"""Name in a configuration -> factory."""


def make_objective(name: str, hyperparameters: dict[str, Any]) -> Objective:
    """The objective called `name`: an entry of OBJECTIVES, or `path/to/file.py:function` for one of your own.

    Raises:
        ValueError: unknown name; a file or function that is missing or fails; hyperparameters that the factory does not
            take; a factory that returns something else.
    """
    if ":" in name:
        file, _, function = name.rpartition(":")
        factory = _function_of(Path(file), function)
    elif name in OBJECTIVES:
        factory = OBJECTIVES[name]
    else:
        raise ValueError(f"objective {name!r} is unknown; known: {', '.join(OBJECTIVES)}, or path/to/file.py:function")
    try:
        made = factory(**hyperparameters)
    except ValueError:
        raise
    except TypeError as error:
        raise ValueError(f"objective {name!r}: {error}") from error
    except Exception as error:
        raise ValueError(f"objective {name!r}: its function raised {type(error).__name__}: {error}") from error
    if not (isinstance(made, Objective) and callable(made.stats) and callable(made.loss)):
        raise ValueError(
            f"objective {name!r}: expected its function to return an Objective of two functions, got {made!r}; "
            "return tsopsd_jax.objectives.Objective(stats, loss)"
        )
    return made


def _function_of(file: Path, function: str) -> Callable[..., Objective]:
    if not file.is_file():
        raise ValueError(f"objective file {file} does not exist (paths are relative to the working directory)")
    if file.suffix != ".py":
        raise ValueError(f"objective file {file}: expected a Python file, path/to/file.py:function; rename it")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"objective file {file}: importing it raised {type(error).__name__}: {error}") from error
    if not callable(vars(module).get(function)):
        raise ValueError(f"objective file {file} has no function {function!r}")
    return vars(module)[function]
