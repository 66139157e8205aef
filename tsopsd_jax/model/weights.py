"""The weights of a policy tensor by tensor, by their Hugging Face names: for what compares models too large to lie side
by side."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from tsopsd_jax.model.hf import check_tensors, fetch_tensor, open_tensors
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.model.hf_layout import check_finite, stored_tensors
from tsopsd_jax.model.qwen3 import Qwen3
from tsopsd_jax.types import PyTree

Weights = Mapping[str, Callable[[], np.ndarray]]
"""Name of a stored tensor -> a function that reads it, in the dtype in which it is kept."""


@contextlib.contextmanager
def stored_weights(folder: Path) -> Iterator[Weights]:
    """Open the weights of a Hugging Face directory; a tensor is read when its function is called.

    Raises:
        ValueError: a config or weight file that is absent, damaged, or at odds with the other.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; expected a local Hugging Face model directory")
    model = Qwen3(read_config(folder / "config.json"))
    with contextlib.ExitStack() as stack:
        stored = open_tensors(folder, stack)
        check_tensors(model, stored, folder)

        def read(name: str) -> np.ndarray:
            values = stored[name][:]
            check_finite(values, f"{folder}: {name}")
            return values

        yield {t.layout.name: lambda name=t.layout.name: read(name) for t in stored_tensors(model)}


def held_weights(model: Qwen3, params: PyTree) -> Weights:
    """The weights of a parameter tree, brought to the host one at a time. All processes must read them in one order."""
    return {
        t.layout.name: lambda tensor=t: tensor.layout.to_stored(fetch_tensor(tensor, params))
        for t in stored_tensors(model)
    }
