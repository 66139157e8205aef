"""Frozen policies beside the one that learns: a copy of it as it stands, or another model's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tsopsd_jax.distributed.sharding import AnyMesh, tree_shardings
from tsopsd_jax.model import Qwen3
from tsopsd_jax.types import PyTree


class ReferenceSource(NamedTuple):
    """Another model as a reference: its functions, and what loads its parameters in the compute dtype."""

    model: Qwen3
    load: Callable[[], PyTree]


def start_policy(model: Qwen3, params: PyTree) -> PyTree:
    """A copy of `params` in the compute dtype, laid out as they are; it outlives the state that updates donate."""
    dtype = jnp.dtype(model.compute_dtype)
    layout = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(lambda p: jax.tree.map(lambda x: jnp.copy(x).astype(dtype), p), out_shardings=layout)(params)


def abstract_reference(model: Qwen3, mesh: AnyMesh) -> PyTree:
    """Describe a reference's parameters by ShapeDtypeStructs: the compute dtype, laid out as those of a policy."""
    shapes = model.param_shapes()

    def struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(model.compute_dtype), sharding=sharding)

    return jax.tree.map(struct, shapes, tree_shardings(model.param_axes(), shapes, mesh))
