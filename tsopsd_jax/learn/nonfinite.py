"""Where an update was not finite: which weights, which rows, which gradients; and those rows, for study."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsopsd_jax.distributed.sharding import replicated
from tsopsd_jax.types import Batch, PyTree

MAX_SUSPECTS = 8
"""Rows that are kept for study."""
MAX_NAMED = 6
"""Parts that are named in a line."""


class NonFinite(NamedTuple):
    """What was found."""

    words: str
    """In a line: parameters with their layers, statistics with their rows, gradients with their layers."""
    rows: dict[str, np.ndarray]
    """The suspected rows of the batch, `MAX_SUSPECTS` at most: row, and its fields and statistics."""


def locate(
    params: PyTree,
    batch: Batch,
    *,
    axes: PyTree,
    stats: Callable[[PyTree, Batch], dict[str, Any]],
    gradient: Callable[[PyTree, Batch], PyTree],
    mesh: jax.sharding.Mesh,
) -> NonFinite:
    """Find what is not finite of an update, from its causes to its effects. All processes of a run must call it.

    Args:
        params: the policy that was to be updated.
        batch: all rows of the update, on the devices.
        axes: logical names of the parameters' dimensions (`Qwen3.param_axes`): those of `layers` are told one by one.
        stats: the objective's statistics of every token, {name: [B, L]}, 0 where there is no response token.
        gradient: the gradient of the loss.
        mesh: of the devices.
    """
    everywhere = replicated(mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def forward(params: PyTree, batch: Batch) -> Any:
        fields = {"advantage": batch.advantage, "old_logp": batch.old_logp} | stats(params, batch)
        return _counts(params, axes), fields, {"tokens": batch.tokens, "mask": batch.mask}

    @functools.partial(jax.jit, out_shardings=everywhere)
    def backward(params: PyTree, batch: Batch) -> Any:
        return _counts(gradient(params, batch), axes)

    weights, fields, given = jax.device_get(forward(params, batch))
    gradients = jax.device_get(backward(params, batch))
    bad = {name: ~np.isfinite(values).all(axis=1) for name, values in fields.items()}
    words = [
        *_named("weight", weights),
        *(_rows_in_words(name, fields[name], rows) for name, rows in bad.items() if rows.any()),
        *_named("gradient of", gradients),
    ]
    suspects = np.flatnonzero(np.any(list(bad.values()), axis=0))[:MAX_SUSPECTS]
    kept = {name: np.asarray(values)[suspects] for name, values in (given | fields).items()}
    return NonFinite("; ".join(words) or "nothing: the loss or a sum over rows overflows", kept | {"row": suspects})


def _counts(tree: PyTree, axes: PyTree) -> dict[str, jax.Array]:
    """{name of a leaf: how many of its values are not finite}, one number for each layer where layers are stacked."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    counts = {}
    for (path, leaf), dims in zip(leaves, names, strict=True):
        odd = ~jnp.isfinite(leaf)
        stacked = bool(dims) and dims[0] == "layers"
        counts[jax.tree_util.keystr(path, simple=True, separator=".")] = jnp.sum(
            odd, axis=tuple(range(1 if stacked else 0, leaf.ndim)), dtype=jnp.int32
        )
    return counts


def _named(what: str, counts: dict[str, np.ndarray]) -> list[str]:
    """The leaves that hold values that are not finite, with their layers."""
    found = []
    for name, count in counts.items():
        if np.any(count):
            layers = f" of layers {_listed(np.flatnonzero(count))}" if np.ndim(count) else ""
            found.append(f"{what} {name}{layers}: {int(np.sum(count)):,} values")
    more = [f"{len(found) - MAX_NAMED} more"] if len(found) > MAX_NAMED else []
    return found[:MAX_NAMED] + more


def _rows_in_words(name: str, values: np.ndarray, rows: np.ndarray) -> str:
    first = int(np.flatnonzero(rows)[0])
    at = int(np.flatnonzero(~np.isfinite(values[first]))[0])
    return f"{name} of rows {_listed(np.flatnonzero(rows))}, first at token {at} of row {first}"


def _listed(numbers: np.ndarray) -> str:
    shown = ", ".join(str(number) for number in numbers[:MAX_NAMED])
    return shown + (", ..." if len(numbers) > MAX_NAMED else "")
