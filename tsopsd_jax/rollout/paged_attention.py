"""Attention of one query per slot over the slot's pages.

| by | where | what it is |
|---|---|---|
| `Owners` | everywhere | XLA reads every page once, in place, for its one slot; partial softmaxes are joined |
| `Walk` | TPU | a kernel that walks the pages slot by slot; free ones are never read, shared ones once for each slot |
"""

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from tsopsd_jax.distributed.sharding import ROW_AXES
from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.rollout.schedule import PageTable


class Owners(NamedTuple):
    """The slot of each page, which no two slots share; -1 for a free one."""

    slot: Int[Array, "S Q"]


class Walk(NamedTuple):
    """The steps of a walk through a shard's slots: the page of each and its slot, from `count` on those of the last."""

    page: Int[Array, " E"]
    slot: Int[Array, " E"]
    count: Int[Array, ""]


def owners(table: PageTable, pages: int) -> Owners:
    """Turn the table around: the slot of each of `pages` pages a shard."""
    each = table.page.shape[1:]
    slot = jnp.broadcast_to(jnp.arange(each[0], dtype=jnp.int32)[:, None], each)
    page = jnp.where(jnp.arange(each[1])[None, None, :] < table.count[..., None], table.page, pages)
    free = jnp.full((pages,), -1, jnp.int32)
    return Owners(jax.vmap(lambda at: free.at[at].set(slot, mode="drop"))(page))


def walk(table: PageTable) -> Walk:
    """List the pages of a shard's slots, slot by slot."""
    slots, most = table.page.shape
    mine = (jnp.arange(most)[None, :] < table.count[:, None]).reshape(-1)
    count = jnp.sum(mine, dtype=jnp.int32)
    order = jnp.argsort(~mine, stable=True).astype(jnp.int32)
    order = order[jnp.minimum(jnp.arange(slots * most), jnp.maximum(count - 1, 0))]
    return Walk(table.page.reshape(-1)[order], order // most, count)


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
    """Walk over the pages with one grid step each.

    The pages of a slot follow each other, so that its query and its sums stay on the chip.
    """
    from jax.experimental.pallas import tpu as pltpu

    b, kv, g, h = q_BKGH.shape
    r = keys_QKHR.shape[-1]

    def of_slot(i, page, slot):
        del page
        return slot[i], 0, 0, 0

    def of_page(i, page, slot):
        del slot
        return page[i], 0, 0, 0

    shapes = ((b, kv, g, 1), (b, kv, g, 1), (b, kv, g, h))
    top, total, out = pl.pallas_call(
        _page_kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(jnp.maximum(by.count, 1),),
            in_specs=[
                pl.BlockSpec((1, kv, g, h), of_slot),
                pl.BlockSpec((1, kv, h, r), of_page),
                pl.BlockSpec((1, kv, r, h), of_page),
            ],
            out_specs=[pl.BlockSpec((1, *shape[1:]), of_slot) for shape in shapes],
        ),
        interpret=interpret,
    )(by.page, by.slot, q_BKGH, keys_QKHR, values_QKRH)
    # A slot without pages was never visited: its sums hold anything.
    step = jnp.arange(by.slot.shape[0], dtype=jnp.int32) < by.count
    paged_B = jnp.zeros(b, bool).at[by.slot].max(step)[:, None, None]
    return Partial(
        jnp.where(paged_B, top[..., 0], -jnp.inf),
        jnp.where(paged_B, total[..., 0], 0.0),
        jnp.where(paged_B[..., None], out, 0.0),
    )


def _page_kernel(page, slot, q_ref, keys_ref, values_ref, top_ref, total_ref, out_ref):
    """Join one page to the running softmax of its slot."""
    del page
    i = pl.program_id(0)

    @pl.when((i == 0) | (slot[i] != slot[jnp.maximum(i - 1, 0)]))
    def _():
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    for head in range(q_ref.shape[1]):
        scores = jnp.dot(q_ref[0, head], keys_ref[0, head], preferred_element_type=jnp.float32)
        scores = scores * q_ref.shape[-1] ** -0.5
        before = top_ref[0, head]
        top = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
        scale, weight = jnp.exp(before - top), jnp.exp(scores - top)
        value = jnp.dot(weight.astype(values_ref.dtype), values_ref[0, head], preferred_element_type=jnp.float32)
        top_ref[0, head] = top
        total_ref[0, head] = total_ref[0, head] * scale + jnp.sum(weight, axis=-1, keepdims=True)
        out_ref[0, head] = out_ref[0, head] * scale + value
