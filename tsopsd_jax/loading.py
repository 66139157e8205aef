"""Functions of one's own, named in a configuration as `path/to/file.py:function`."""

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def is_own(name: str) -> bool:
    """Whether a name is `path/to/file.py:function`, and not that of something in the library."""
    return ":" in name


def load_function(name: str, *, what: str) -> Callable[..., Any]:
    """Import the file that `path/to/file.py:function` names, relative to the working directory, and take the function.

    Args:
        name: of the file and the function.
        what: the function is for, such as `objective`; errors begin with it.

    Raises:
        ValueError: a file or function that is missing, or a file that cannot be imported.
    """
    path, _, function = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{what} file {file} does not exist (paths are relative to the working directory)")
    if file.suffix != ".py":
        raise ValueError(f"{what} file {file}: expected a Python file, path/to/file.py:function; rename it")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what} file {file}: importing it raised {type(error).__name__}: {error}") from error
    if not callable(vars(module).get(function)):
        raise ValueError(f"{what} file {file} has no function {function!r}")
    return vars(module)[function]


def check_keywords(function: Callable[..., Any], given: Iterable[str], *, where: str) -> None:
    """Check that a function takes the keyword arguments `given`.

    Raises:
        ValueError: naming the first that it does not take, and the nearest one that it does; `where` comes first.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
            raise ValueError(f"{where}: unknown hyperparameter {name!r}; {hint}")
