# pyright: strict, reportUnknownMemberType=false, reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
"""Tokens in tiles: which of them stand side by side, and the matrix products of a tile. The head goes through them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from tsopsd_jax.distributed.sharding import ROW_AXES, row_multiple

TILE_TOKENS = 1024
"""Tokens whose logits exist at once, on each device."""

BLOCK_BYTES = 8 << 20
"""Size of a block on a CPU, whose caches hold that many logits while they are read again and again."""


class Tiling(NamedTuple):
    """How tokens are cut into tiles and blocks.

    `tile_tokens`: tokens of a tile, whose logits exist at once. `block_bytes`: logits of a block, the part of a tile
    that `stats` sees at once; None: all of it. `axes`: mesh axes whose devices all go through equally many tiles.
    """

    tile_tokens: int
    block_bytes: int | None = None
    axes: tuple[str, ...] = ()


def tiling_for(tile_tokens: int, mesh: Mesh | None = None) -> Tiling:
    """Tiles of at most `tile_tokens` tokens, and blocks that suit the mesh's devices; no mesh: a device of the default
    backend."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return Tiling(tile_tokens, BLOCK_BYTES if platform == "cpu" else None, ROW_AXES if is_divided(mesh) else ())


class Tiles(NamedTuple):
    """Tokens in tiles, the wanted ones first: `order` [tiles, tile] of their indices (N: none), `count` of the tiles
    that hold a wanted one, tokens of a `block`."""

    order: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] - not a tuple's
    block: int


def tiles_of(wanted_N: Array, vocabulary: int, tiling: Tiling) -> Tiles:
    """Cut tokens into tiles; on a CPU a tile holds whole blocks."""
    n = wanted_N.shape[0]
    tile = block = max(1, min(tiling.tile_tokens, n))
    if tiling.block_bytes is not None:
        fit = max(1, tiling.block_bytes // (4 * vocabulary))
        block = min(tile, 1 << (fit.bit_length() - 1))
        tile = tile // block * block
    order = jnp.argsort(~wanted_N, stable=True).astype(jnp.int32)
    order = jnp.where(jnp.arange(n, dtype=jnp.int32) < jnp.sum(wanted_N, dtype=jnp.int32), order, n)
    order = jnp.pad(order, (0, -n % tile), constant_values=n).reshape(-1, tile)
    count = -(-jnp.sum(wanted_N, dtype=jnp.int32) // tile)
    return Tiles(order, jax.lax.pmax(count, tiling.axes) if tiling.axes else count, block)


def by_block(function: Callable[[Array, Any], tuple[Any, Any]], block: int, z_NV: Array, rest: Any) -> tuple[Any, Any]:
    """Apply `function(z, rest) -> (new z or None, found)` to each block of a tile's rows.

    Returns:
        The new z, in the old one's place, and what was found in each block, stacked.
    """
    if block == z_NV.shape[0]:
        z, found = function(z_NV, rest)
        return z, jax.tree.map(lambda x: x[None], found)

    def one(z: Array, part: tuple[Array, Any]) -> tuple[Array, Any]:
        i, rest = part
        new, found = function(z[i], rest)
        return z if new is None else jax.lax.dynamic_update_index_in_dim(z, new, i, 0), found

    z, rest = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (z_NV, rest))
    z, found = jax.lax.scan(one, z, (jnp.arange(z.shape[0]), rest))
    return z.reshape(z_NV.shape), found


def take(x: Array, at: Array) -> Array:
    """Take x[at], and zeros where `at` is no index."""
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


def put_back(x: Array, at: Array, new: Array) -> Array:
    """`x` with `new` at the places `at`; what `at` holds that is no index is dropped."""
    return x.at[at].set(new, mode="drop", unique_indices=True)


def project(hidden_ND: Array, unembed_DV: Array) -> Array:
    """Float32 logits, accumulated in float32 from operands of the hidden states' dtype."""
    return jnp.einsum("ND,DV->NV", hidden_ND, unembed_DV, preferred_element_type=jnp.float32)


def pull_back(dz_NV: Array, hidden_ND: Array, unembed_DV: Array, d_unembed_DV: Array) -> tuple[Array, Array]:
    """Gradients of a tile's logits into its hidden states, and added to those of the unembedding (float32)."""
    dz_NV = dz_NV.astype(hidden_ND.dtype)
    # One product after the other: side by side they fight for a CPU's cache.
    d_hidden, dz_NV = jax.lax.optimization_barrier((jnp.einsum("NV,DV->ND", dz_NV, unembed_DV), dz_NV))
    return d_hidden, d_unembed_DV + jnp.einsum("ND,NV->DV", hidden_ND, dz_NV, preferred_element_type=jnp.float32)


def is_divided(mesh: Mesh | None) -> bool:
    """Whether rows lie on several devices."""
    return mesh is not None and row_multiple(mesh) > 1
