"""Device programs on the cache between two segments: they place prompts, turn segments into pages and change sizes."""

import functools

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.model.qwen3 import Qwen3


def empty_pages(model: Qwen3, *, shape: tuple[int, int], r: int) -> tuple[LayerCache, ...]:
    """Make zeroed pages of `r` tokens for every layer; `shape` is (shards, pages of a shard)."""
    c = model.config
    keys = jnp.zeros((*shape, c.num_key_value_heads, c.head_dim, r), model.compute_dtype)
    return ((keys, keys.swapaxes(3, 4)),) * c.num_hidden_layers


def place(tails, pages, carry, store, home_SB: Array, start_SB: Array, table: Array, keep_S: Array, *, home: int):
    """Copy prompts' cache into slots: whole pages into the pool, the rest into the tails; each shard copies its own.

    Args:
        carry, store: caches of prompts, one and A of them a shard, [S, K, H, W] and [S A, K, H, W] keys per layer and
            [., K, W, H] values; numbered together within a shard.
        home_SB, start_SB, table, keep_S: the fields of `admission.Placement`.
        home: places of a tail for the rest.
    """
    shards = keep_S.shape[0]

    def of_shard(tail, pool, carried, stored, home_B, start_B, table, keep, axis):
        every = jnp.concatenate([carried[None], stored])
        if home:
            rest = jax.vmap(lambda a, i: jax.lax.dynamic_slice_in_dim(every[a], i, home, axis - 1))(
                jnp.maximum(home_B, 0), start_B
            )
            old = jax.lax.slice_in_dim(tail, 0, home, axis=axis)
            rest = jnp.where((home_B >= 0)[:, None, None, None], rest, old)
            tail = jax.lax.dynamic_update_slice_in_dim(tail, rest, 0, axis)
        if pool is not None and table.shape[1]:
            r = pool.shape[axis]
            page, prompt, part = table
            new = jax.vmap(lambda a, j: jax.lax.dynamic_slice_in_dim(every[a], j * r, r, axis - 1))(prompt, part)
            pool = pool.at[page].set(new, mode="drop")
        return tail, pool, every[keep]

    def one(tail, pool, carried, stored, axis):
        tail_S, stored_S = (einops.rearrange(x, "(S B) ... -> S B ...", S=shards) for x in (tail, stored))
        function = jax.vmap(functools.partial(of_shard, axis=axis))
        tail_S, pool, carried = function(tail_S, pool, carried, stored_S, home_SB, start_SB, table, keep_S)
        return einops.rearrange(tail_S, "S B ... -> (S B) ..."), pool, carried

    out = []
    for i, (tail, carried, stored) in enumerate(zip(tails, carry, store, strict=True)):
        pair = [
            one(tail[j], None if pages is None else pages[i][j], carried[j], stored[j], axis)
            for j, axis in enumerate((3, 2))
        ]
        out.append(tuple(zip(*pair, strict=True)))
    tails, pages_, carry = (tuple(layer[j] for layer in out) for j in range(3))
    return tails, None if pages is None else pages_, carry


def commit(pages, tails, page_SB: Array):
    """Copy what each slot drew in the last segment to its page `page_SB`; a page beyond the pool keeps nothing."""

    def one(pool, tail, axis):
        r = pool.shape[axis + 1]
        drawn = jax.lax.slice_in_dim(tail, tail.shape[axis] - r, tail.shape[axis], axis=axis)
        drawn = einops.rearrange(drawn, "(S B) ... -> S B ...", S=page_SB.shape[0])
        return jax.vmap(lambda p, at, new: p.at[at].set(new, mode="drop"))(pool, page_SB, drawn)

    return tuple((one(k, tk, 3), one(v, tv, 2)) for (k, v), (tk, tv) in zip(pages, tails, strict=True))


def grow(pages: LayerCache, *, size: int) -> LayerCache:
    """Enlarge a layer's pool to `size` pages a shard; the new ones are zero."""
    return jax.tree.map(lambda p: jnp.pad(p, [(0, 0), (0, size - p.shape[1]), *[(0, 0)] * 3]), pages)


def shrink_pages(pages: LayerCache, source_SQ: Array) -> LayerCache:
    """Take page `source_SQ` of the old pool for each page of the new one."""
    return jax.tree.map(lambda p: jax.vmap(lambda x, at: x[at])(p, source_SQ), pages)


def shrink_tails(tails: LayerCache, source_SB: Array) -> LayerCache:
    """Take the tail of slot `source_SB` (within its shard) for each slot that stays."""

    def slots(tail):
        parts = einops.rearrange(tail, "(S B) ... -> S B ...", S=source_SB.shape[0])
        return einops.rearrange(jax.vmap(lambda x, at: x[at])(parts, source_SB), "S B ... -> (S B) ...")

    return jax.tree.map(slots, tails)
