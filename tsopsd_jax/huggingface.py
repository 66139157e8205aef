"""Hugging Face model directories, read by transformers itself: local files only, none of their code,
and without torch."""

import contextlib
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a Hugging Face model directory that has it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested thousands of levels deep
        raise ValueError(f"{path}: expected JSON, got {error}: fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


@contextlib.contextmanager
def reading(what: str) -> Iterator[ModuleType]:
    """Lend the transformers package to read files with: silent, without importing torch, its errors in one line.

    It is imported here, and its classes where the block names them: who reads no model waits for neither.

    Args:
        what: the beginning of an error's message, such as "tokenizer: cannot read DIRECTORY".

    Raises:
        ValueError: for whatever the block raises: a file that transformers refuses is the directory's fault.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # among others the advice, at import, to install torch
    try:
        with _torch_later():
            import transformers

            yield transformers
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise ValueError(f"{what} ({type(error).__name__}: {text})") from error
    finally:
        logging.disable(disabled)


class _Later(ModuleType):
    """Stands for a module while another one is imported that names it, and imports it once something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # `import torch.nn` shall not find a second copy of it
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)

    def leave(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


@contextlib.contextmanager
def _torch_later() -> Iterator[None]:
    """Keep `import torch` from importing it in the block.

    Where torch is installed, transformers imports it to define functions on tensors, which readers of files never call:
    1 to 3 s and 300 MB. Nothing else changes, so its models of torch work afterwards (in a reward of one's own, say).
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None:
        yield
        return
    torch, activations = _Later("torch"), _Later("transformers.activations")
    torch.__spec__ = spec
    # What transformers has in its place without torch; only names of activation functions are checked by it.
    vars(activations)["ACT2FN"] = {}
    for stand_in in (torch, activations):
        sys.modules.setdefault(stand_in.__name__, stand_in)
    try:
        yield
    finally:
        torch.leave()
        activations.leave()
