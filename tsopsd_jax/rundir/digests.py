"""Digests of a checkpoint's content: they show that what is read is what was written.

An array's digest is a checksum of its words, each mixed with its position, summed modulo 2^32. It is worked out where
the array lies, at the speed of the devices' memory and without a copy to the host, and it does not depend on the mesh:
a sum of integers has no order. One changed word always changes it; any other damage goes unseen once in 4e9 times.
It is no defence against malice.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tsopsd_jax.types import PyTree

_POSITION = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
"""Odd multipliers of the positions along each axis."""
_MIX = 0x85EBCA6B
"""An odd multiplier of the words."""


def describe(x: Any) -> str:
    """An array's (or ShapeDtypeStruct's) type, such as `float32[3,4]`."""
    return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def of_arrays(tree: PyTree, prefix: str) -> dict[str, str]:
    """{path of a leaf: its type and digest} of jax arrays, which may lie on the devices of several processes."""
    leaves = named(tree, prefix)
    sums = jax.device_get(_checksums(leaves))
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


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(x) for name, x in leaves.items()}


def _checksum(x: jax.Array) -> jax.Array:
    """A uint32: the sum over the words of a bijection of each, another one at each position."""
    assert x.dtype.itemsize <= 4, describe(x)
    assert x.ndim <= len(_POSITION), describe(x)
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    words = bits.astype(jnp.uint32)
    for axis, multiplier in zip(range(x.ndim), _POSITION, strict=False):
        words = words ^ (lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(multiplier))
    words = (words ^ (words >> jnp.uint32(15))) * jnp.uint32(_MIX)
    return jnp.sum(words ^ (words >> jnp.uint32(13)), dtype=jnp.uint32)
