"""Attention of one query per slot over the slot's pages.

| by | where | what it is |
|---|---|---|
| `Owners` | everywhere | XLA reads every page once, in place, for its one slot; partial softmaxes are joined |
| `Walk` | TPU | a kernel that walks the pages slot by slot; free ones are never read, shared ones once for each slot |
"""

import functools
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tsopsd_jax.distributed.sharding import ROW_AXES
from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.rollout.schedule import PageTable


class Owners(NamedTuple):
    """The slot of each page, which no two slots share; -1 for a free one."""

    slot: Int[Array, "S Q"]


PAGES_PER_STEP = 4
"""Pages of a slot that the kernel takes at once where they fit: a grid step costs about as long as reading a page."""
VMEM_BYTES = 12 * 2**20
"""Fast memory of a TPU core for the pages of a step; the compiler gives a kernel 16 MiB in all."""
LANES, BUFFERS = 128, 2
"""What the last axis of a block is padded to; a step's pages are fetched while those before it are read."""


class Walk(NamedTuple):
    """The steps of a walk through a shard's slots, of which `count` are taken: each a slot and some of its pages."""

    page: Int[Array, "E N"]  # where a step has fewer, that of the step before, which is not fetched again
    pages: Int[Array, " E"]  # how many of them are the step's
    slot: Int[Array, " E"]
    count: Int[Array, ""]
    paged: Bool[Array, " B"]  # the slots that have pages


def owners(table: PageTable, pages: int) -> Owners:
    """Turn the table around: the slot of each of `pages` pages a shard."""
    each = table.page.shape[1:]
    slot = jnp.broadcast_to(jnp.arange(each[0], dtype=jnp.int32)[:, None], each)
    page = jnp.where(jnp.arange(each[1])[None, None, :] < table.count[..., None], table.page, pages)
    free = jnp.full((pages,), -1, jnp.int32)
    return Owners(jax.vmap(lambda at: free.at[at].set(slot, mode="drop"))(page))


def pages_per_step(page: tuple[int, int, int], item_bytes: int) -> int:
    """Return how many pages the kernel takes at once: a power of two, `PAGES_PER_STEP` at most; 0: not even one fits.

    Args:
        page: K, H, R of a device's page.
        item_bytes: of an element.
    """
    kv, h, r = page
    lanes_h, lanes_r = (-(-width // LANES) * LANES for width in (h, r))
    n = VMEM_BYTES // (BUFFERS * kv * (h * lanes_r + r * lanes_h) * item_bytes)
    return min(PAGES_PER_STEP, 1 << n.bit_length() >> 1)


def walk(table: PageTable, n: int) -> Walk:
    """List the pages of a shard's slots, slot by slot, n at a time."""
    most = table.page.shape[1]
    each = -(-most // n)
    mine = (jnp.arange(each)[None, :] * n < table.count[:, None]).reshape(-1)
    order = jnp.argsort(~mine, stable=True).astype(jnp.int32)
    slot, first = order // each, order % each * n
    pages = jnp.clip(table.count[slot] - first, 0, n)
    j = jnp.arange(n, dtype=jnp.int32)[None, :]
    here, at = j < pages[:, None], jnp.minimum(first[:, None] + j, most - 1)
    page = table.page[slot[:, None], at]
    # The last step before this one, or this one itself, that has a page in the same place.
    last = jax.lax.cummax(jnp.where(here, jnp.arange(len(order), dtype=jnp.int32)[:, None], -1))
    page = jnp.where(last < 0, 0, jnp.take_along_axis(page, jnp.maximum(last, 0), axis=0))
    return Walk(page, pages, slot, jnp.sum(mine, dtype=jnp.int32), jnp.asarray(table.count > 0))


class Partial(NamedTuple):
    """A softmax that can still be joined with another: exp(scores - top) summed, and the values weighted with it."""

    top: Float[Array, "B K G"]  # -inf for a slot without pages
    total: Float[Array, "B K G"]
    out: Float[Array, "B K G H"]


def pages_attention(
    q_BKGH: Array,
    pages: LayerCache,
    by: Owners | Walk,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Partial:
    """Compute the partial softmax of each slot's query over its pages.

    Args:
        q_BKGH: queries; scores are scaled by H^-0.5; slots are divided evenly over the S shards, in order.
        pages: keys [S, Q, K, H, R] and values [S, Q, K, R, H].
        by: the way in which they are read; a walk's arrays have a first axis S.
        mesh: over which the kernel is run, shards over data x fsdp and heads over tensor; None: one device.
        interpret: run the kernel without its device (tests).
    """
    q_SBKGH = einops.rearrange(q_BKGH, "(S B) K G H -> S B K G H", S=pages[0].shape[0])
    if isinstance(by, Owners):
        parts = jax.vmap(_xla)(q_SBKGH, *pages, by.slot)
    else:

        def local(*shards):
            part = _pallas(*jax.tree.map(lambda x: x[0], shards), interpret=interpret)
            return jax.tree.map(lambda x: x[None], part)

        run = local
        if mesh is not None:
            heads = P(ROW_AXES, None, "tensor")
            specs = (heads, heads, heads, P(ROW_AXES))
            run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
        parts = run(q_SBKGH, *pages, by)
    return Partial(*(einops.rearrange(x, "S B ... -> (S B) ...") for x in parts))


def _xla(q_BKGH: Array, keys_QKHR: Array, values_QKRH: Array, owner_Q: Array) -> Partial:
    b = q_BKGH.shape[0]
    mine_Q = jnp.where(owner_Q < 0, b, owner_Q)  # segment b is dropped
    near_Q = jnp.minimum(mine_Q, b - 1)
    live = (owner_Q >= 0)[:, None, None, None]
    scores = jnp.einsum("QKGH,QKHR->QKGR", q_BKGH[near_Q], keys_QKHR, preferred_element_type=jnp.float32)
    scores = jnp.where(live, scores * q_BKGH.shape[-1] ** -0.5, -jnp.inf)
    top_BKG = jax.ops.segment_max(jnp.max(scores, axis=-1), mine_Q, num_segments=b + 1)[:b]
    weight = jnp.where(live, jnp.exp(scores - top_BKG[near_Q][..., None]), 0.0)
    total_BKG = jax.ops.segment_sum(jnp.sum(weight, axis=-1), mine_Q, num_segments=b + 1)[:b]
    out = jnp.einsum(
        "QKGR,QKRH->QKGH", weight.astype(values_QKRH.dtype), values_QKRH, preferred_element_type=jnp.float32
    )
    return Partial(top_BKG, total_BKG, jax.ops.segment_sum(out, mine_Q, num_segments=b + 1)[:b])


def _pallas(q_BKGH: Array, keys_QKHR: Array, values_QKRH: Array, by: Walk, *, interpret: bool) -> Partial:
    """Take a grid step for each of the walk's; those of a slot follow each other, so that its query and its sums stay
    on the chip."""
    from jax.experimental.pallas import tpu as pltpu

    b, kv, g, h = q_BKGH.shape
    r, n = keys_QKHR.shape[-1], by.page.shape[1]

    def of_slot(i, page, pages, slot):
        del page, pages
        return slot[i], 0, 0, 0

    def of_page(j, i, page, pages, slot):
        del pages, slot
        return page[i * n + j], 0, 0, 0

    shapes = ((b, kv, g, 1), (b, kv, g, 1), (b, kv, g, h))
    top, total, out = pl.pallas_call(
        _page_kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(jnp.maximum(by.count, 1),),
            in_specs=[
                pl.BlockSpec((1, kv, g, h), of_slot),
                *(pl.BlockSpec((1, kv, h, r), functools.partial(of_page, j)) for j in range(n)),
                *(pl.BlockSpec((1, kv, r, h), functools.partial(of_page, j)) for j in range(n)),
            ],
            out_specs=[pl.BlockSpec((1, *shape[1:]), of_slot) for shape in shapes],
        ),
        interpret=interpret,
    )(by.page.reshape(-1), by.pages, by.slot, q_BKGH, *(keys_QKHR,) * n, *(values_QKRH,) * n)
    # A slot without pages was never visited: its sums hold anything.
    paged_B = by.paged[:, None, None]
    return Partial(
        jnp.where(paged_B, top[..., 0], -jnp.inf),
        jnp.where(paged_B, total[..., 0], 0.0),
        jnp.where(paged_B[..., None], out, 0.0),
    )


def _page_kernel(page, pages, slot, q_ref, *refs):
    """Join the pages of a step to the running softmax of its slot."""
    del page
    *paged, top_ref, total_ref, out_ref = refs
    n, i = len(paged) // 2, pl.program_id(0)
    all_keys, all_values = paged[:n], paged[n:]

    @pl.when((i == 0) | (slot[i] != slot[jnp.maximum(i - 1, 0)]))
    def _():
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    def scores_of(head, j):
        scores = jnp.dot(q_ref[0, head], all_keys[j][0, head], preferred_element_type=jnp.float32)
        return jnp.where(j < pages[i], scores * q_ref.shape[-1] ** -0.5, -jnp.inf)

    for head in range(q_ref.shape[1]):
        scores = [scores_of(head, j) for j in range(n)]
        before = top_ref[0, head]
        top = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores], before)
        scale, weight = jnp.exp(before - top), [jnp.exp(s - top) for s in scores]
        values = (values_ref[0, head] for values_ref in all_values)
        found = [
            # What stands in the place of an absent page may hold anything, also what is no number.
            jnp.where(j < pages[i], jnp.dot(w.astype(v.dtype), v, preferred_element_type=jnp.float32), 0.0)
            for j, (w, v) in enumerate(zip(weight, values, strict=True))
        ]
        top_ref[0, head] = top
        total_ref[0, head] = total_ref[0, head] * scale + sum(jnp.sum(w, axis=-1, keepdims=True) for w in weight)
        out_ref[0, head] = out_ref[0, head] * scale + sum(found)
