"""A decoding step's attention on a GPU as one kernel: a slot's query over its pages and its tail.

XLA's own way takes some fifteen kernels a layer and adds up the sums of pages with atomics. Here a program of the grid
takes a slot, a head of keys and a share of the slot's pages; it reads nothing but what the slot's table names, and
no sum depends on the order in which programs run.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.rollout.schedule import PageTable
from tsopsd_jax.types import AnyArray

TILE_ROWS = 16
"""The least number of rows of a tensor core's product: a group's queries are padded to it."""
TILE_PLACES = 64
"""Places of a tail that are read at a time, at most."""
PROGRAMS = 256
"""Programs that fill a GPU: about two for each of the 108 to 148 multiprocessors of an A100, H100, B200."""
MOST_SPLITS = 16
LARGEST = 2**31
"""Elements of an array whose places a 32-bit integer can count."""


def refuses(head_dim: int, places: int, page: tuple[int, ...] | None) -> str:
    """Say why the kernel does not take a shape; empty where it does.

    Args:
        head_dim: H.
        places: C, of a tail.
        page: shape of the keys' pool of a shard [Q, K, H, R]; None: no pages.
    """
    if head_dim < TILE_ROWS or head_dim & (head_dim - 1):
        return f"head_dim {head_dim} is not a power of two from {TILE_ROWS} on"
    if places % TILE_ROWS:
        return f"a tail of {places} places is not a multiple of {TILE_ROWS}"
    if page is not None and (page[-1] < TILE_ROWS or page[-1] & (page[-1] - 1)):
        return f"a page of {page[-1]} tokens is not a power of two from {TILE_ROWS} on"
    if page is not None and math.prod(page) >= LARGEST:
        return f"a pool of {math.prod(page)} elements is too large for 32-bit offsets"
    return ""


def splits_of(slots: int, heads: int, pages: int) -> int:
    """Choose among how many programs a slot's pages are divided: a power of two, so that few slots fill a GPU too."""
    wanted = max(1, min(PROGRAMS // max(slots * heads, 1), MOST_SPLITS, pages))
    return 1 << (wanted.bit_length() - 1)


def attend(
    q_BKGH: Float[AnyArray, "B K G H"],
    tail: LayerCache,
    rest_B: Int[AnyArray, " B"],
    newest: Int[AnyArray, ""],
    pages: LayerCache | None,
    table: PageTable | None,
    *,
    home: int,
    interpret: bool = False,
) -> Float[Array, "B K G H"]:
    """Attend with one query a slot to its tail and its pages, on one device; softmax in float32.

    Args:
        q_BKGH: queries; scores are scaled by H^-0.5.
        tail: keys [B, K, H, C] and values [B, K, C, H].
        rest_B: places of the tail from 0 on that hold the prompt's rest.
        newest: the place of the newest token; from `home` to there the places hold the segment's tokens.
        pages: keys [Q, K, H, R] and values [Q, K, R, H]; None: no slot has any.
        table: of the slots [B, P], [B].
        home: places of a tail before the segment's.
        interpret: run without a GPU (tests).

    Returns:
        Values weighted with the softmax, in the type of the queries.
    """
    from jax.experimental.pallas import triton as plgpu

    b, k, g, h = q_BKGH.shape
    rows = max(TILE_ROWS, 1 << (g - 1).bit_length())
    q = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, rows - g), (0, 0)))
    splits = 1 if pages is None else splits_of(b, k, pages[0].shape[0])
    paged: tuple[Any, ...] = () if pages is None or table is None else (*pages, *table)
    shapes = ((b, k, splits, rows), (b, k, splits, rows), (b, k, splits, rows, h))
    top, total, out = pl.pallas_call(
        functools.partial(_kernel, home=home, splits=splits),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(b, k, splits),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="slot_attention",
    )(q, *tail, rest_B.astype(jnp.int32), jnp.reshape(newest, (1,)).astype(jnp.int32), *paged)
    # The splits of a slot, joined in order. Each slot has its newest token, so that the largest top is finite.
    scale = jnp.exp(top - jnp.max(top, axis=2, keepdims=True))
    value = jnp.sum(out * scale[..., None], axis=2) / jnp.sum(total * scale, axis=2)[..., None]
    return value[:, :, :g].astype(q_BKGH.dtype)


def _kernel(q_ref, tail_keys, tail_values, rest_ref, newest_ref, *refs, home: int, splits: int):
    """Join a share of a slot's pages, and in the first share its tail, to a softmax: its top, total and values."""
    *paged, top_ref, total_ref, out_ref = refs
    slot, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    q = q_ref[slot, head]
    rows, h = q.shape
    sums = (
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, h), jnp.float32),
    )

    if paged:
        keys_ref, values_ref, page_ref, count_ref = paged
        count = count_ref[slot]
        share = (count + splits - 1) // splits

        def page(i, sums):
            at = page_ref[slot, i]
            return _join(q, keys_ref[at, head], values_ref[at, head], None, sums)

        sums = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, count), page, sums)

    places = tail_keys.shape[-1]
    size = math.gcd(places, TILE_PLACES)
    rest, newest = rest_ref[slot], newest_ref[0]

    def tile(i, sums):
        place = i * size + jnp.arange(size, dtype=jnp.int32)
        seen = ((place < rest) & (place < home)) | ((place >= home) & (place <= newest))
        here = pl.ds(i * size, size)
        return _join(q, tail_keys[slot, head, :, here], tail_values[slot, head, here, :], seen, sums)

    tiles = jnp.where(split == 0, newest // size + 1, 0)
    top, total, out = jax.lax.fori_loop(0, tiles, tile, sums)
    top_ref[slot, head, split] = top
    total_ref[slot, head, split] = total
    out_ref[slot, head, split] = out


def _join(q, keys, values, seen, sums):
    """Join keys [H, c] and values [c, H] to a running softmax; `seen` [c]: which of them count, None: all."""
    top, total, out = sums
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    scores = dot(q, keys) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = jnp.where(seen[None, :], scores, -jnp.inf)
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    shift = jnp.where(higher == -jnp.inf, 0.0, higher)  # a tile of which nothing is seen
    scale, weight = jnp.exp(top - shift), jnp.exp(scores - shift[:, None])
    value = dot(weight.astype(values.dtype), values)
    return higher, total * scale + jnp.sum(weight, axis=1), out * scale[:, None] + value
