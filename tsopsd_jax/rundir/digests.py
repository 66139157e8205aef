"""Digests of a checkpoint's content: they show that what is read is what was written.

An array's digest is a checksum of its words, each mixed with its position, summed modulo 2^32. It is worked out where
the array lies, at the speed of the devices' memory and without a copy to the host, and it does not depend on the mesh:
a sum of integers has no order. One changed word always changes it; any other damage goes unseen once in 4e9 times.
It is no defence against malice.
"""

import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsopsd_jax.types import PyTree

_POSITION = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
"""Odd multipliers of the positions along each axis."""
_MIX = 0x85EBCA6B
"""An odd multiplier of the words."""

_BLOCK_BYTES = 8 << 20
"""Size of what is summed at once on a CPU."""


def describe(x: Any) -> str:
    """An array's (or ShapeDtypeStruct's) type, such as `float32[3,4]`."""
    return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def of_arrays(tree: PyTree, prefix: str) -> dict[str, str]:
    """{path of a leaf: its type and digest} of jax arrays, which may lie on the devices of several processes."""
    leaves = named(tree, prefix)
    sums = jax.device_get(_checksums(leaves, tuple((name, x.sharding) for name, x in leaves.items())))
    return {name: f"{describe(x)} {int(sums[name]):08x}" for name, x in leaves.items()}


def of_host(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, str]:
    """{path of a leaf: its type and CRC-32} of numpy arrays: their shapes change, and nothing is compiled for them."""
    return {f"{prefix}/{name}": f"{describe(x)} {zlib.crc32(x.tobytes()):08x}" for name, x in arrays.items()}


def of_json(value: Any) -> str:
    """The digest of plain JSON."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def named(tree: PyTree, prefix: str) -> dict[str, Any]:
    """{path such as `state/params/embed`: leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf for path, leaf in leaves}


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: dict[str, jax.Array], where: tuple[tuple[str, Any], ...]) -> dict[str, jax.Array]:
    return {name: _checksum(leaves[name], sharding) for name, sharding in where}


def _checksum(x: jax.Array, sharding: Any) -> jax.Array:
    """A uint32: the sum over the words of a bijection of each, another one at each position."""
    assert x.dtype.itemsize <= 4, describe(x)
    assert x.ndim <= len(_POSITION), describe(x)
    if x.nbytes <= _BLOCK_BYTES or next(iter(sharding.device_set)).platform != "cpu":
        return _sum(x, (0,) * x.ndim)
    # XLA on a CPU writes the words down before it sums them: a second copy of the whole state. So each device takes its
    # own part block by block.
    if not isinstance(sharding, NamedSharding):
        return _sum_of_blocks(x, (0,) * x.ndim)
    spec = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
    over = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]

    def part(x: jax.Array) -> jax.Array:
        start = (lax.axis_index(axes) * n if axes else 0 for axes, n in zip(over, x.shape, strict=True))
        return lax.psum(_sum_of_blocks(x, tuple(start)), tuple(axis for axes in over for axis in axes))

    return jax.shard_map(part, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=P(), check_vma=False)(x)


def _sum_of_blocks(x: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """`_sum` of an array whose first axis is cut into blocks of at most _BLOCK_BYTES, if that divides."""
    rows = max(1, min(len(x), _BLOCK_BYTES * len(x) // x.nbytes))
    rows = next(n for n in range(rows, 0, -1) if len(x) % n == 0)

    def more(i: jax.Array, total: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(x, i * rows, rows)
        return total + _sum(block, (start[0] + i * rows, *start[1:]))

    return lax.fori_loop(0, len(x) // rows, more, jnp.zeros((), jnp.uint32))


def _sum(x: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """The sum over the words of a part of an array, whose positions begin at `start`."""
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    words = bits.astype(jnp.uint32)
    for axis, first, multiplier in zip(range(x.ndim), start, _POSITION, strict=False):
        at = lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.asarray(first, jnp.uint32)
        words = words ^ (at * jnp.uint32(multiplier))
    words = (words ^ (words >> jnp.uint32(15))) * jnp.uint32(_MIX)
    return jnp.sum(words ^ (words >> jnp.uint32(13)), dtype=jnp.uint32)
