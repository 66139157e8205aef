"""Attention of one query per slot over the pages that the slot owns.

| name | where | what it is |
|---|---|---|
| `xla` | everywhere | every page of the pool is read once, in place; partial softmaxes are joined by slot |
| `pallas` | TPU | a kernel that walks pages in the order of their owners; free ones are never read |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from tsopsd_jax.distributed.sharding import ROW_AXES
from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.types import AnyArray

PAGED_ATTENTION = ("xla", "pallas")


class Partial(NamedTuple):
    """A softmax that can still be joined with another: exp(scores - top) summed, and the values weighted with it."""

    top: Float[Array, "B K G"]  # -inf for a slot without pages
    total: Float[Array, "B K G"]
    out: Float[Array, "B K G H"]


def pages_attention(
    q_BKGH: Array,
    pages: LayerCache,
    owner: Int[AnyArray, "S Q"],
    *,
    implementation: str = "xla",
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Partial:
    """Compute the partial softmax of each slot's query over its pages.

    Args:
        q_BKGH: queries; scores are scaled by H^-0.5; slots are divided evenly over the S shards, in order.
        pages: keys [S, Q, K, H, R] and values [S, Q, K, R, H].
        owner: slot within the shard, -1 for a free page.
        implementation: `xla` or `pallas`.
        mesh: over which the kernel is run, shards over data x fsdp and heads over tensor; None: one device.
        interpret: run the kernel without its device (tests).

    Raises:
        ValueError: for an implementation that is unknown.
    """
    if implementation not in PAGED_ATTENTION:
        raise ValueError(f"paged attention: expected one of {', '.join(PAGED_ATTENTION)}, got {implementation!r}")
    owner = jnp.asarray(owner)
    shard: Callable[..., Any] = functools.partial(_pallas, interpret=interpret) if implementation == "pallas" else _xla
    q_SBKGH = einops.rearrange(q_BKGH, "(S B) K G H -> S B K G H", S=owner.shape[0])
    if implementation == "xla":
        parts = jax.vmap(shard)(q_SBKGH, *pages, owner)
    else:

        def local(*shards):
            return jax.tree.map(lambda x: x[None], shard(*(x[0] for x in shards)))

        run = local
        if mesh is not None:
            heads = P(ROW_AXES, None, "tensor")
            specs = (heads, heads, heads, P(ROW_AXES))
            run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
        parts = run(q_SBKGH, *pages, owner)
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


def _pallas(q_BKGH: Array, keys_QKHR: Array, values_QKRH: Array, owner_Q: Array, *, interpret: bool) -> Partial:
    """Walk over the pages with one grid step each.

    The pages of a slot follow each other, so that its query and its sums stay on the chip; the free ones come last and
    name the page before them, which is then not fetched again.
    """
    from jax.experimental.pallas import tpu as pltpu

    b, kv, g, h = q_BKGH.shape
    pages, _, _, r = keys_QKHR.shape
    mine_Q = jnp.where(owner_Q < 0, b, owner_Q).astype(jnp.int32)
    order_Q = jnp.argsort(mine_Q, stable=True).astype(jnp.int32)
    sorted_Q = mine_Q[order_Q]
    last = jnp.maximum(jnp.sum(owner_Q >= 0, dtype=jnp.int32) - 1, 0)
    order_Q = jnp.where(sorted_Q == b, order_Q[last], order_Q)
    q = jnp.pad(q_BKGH, ((0, 1), (0, 0), (0, 0), (0, 0)))  # slot b takes what free pages give

    def of_slot(i, order, slot):
        del order
        return slot[i], 0, 0, 0

    def of_page(i, order, slot):
        del slot
        return order[i], 0, 0, 0

    shapes = ((b + 1, kv, g, 1), (b + 1, kv, g, 1), (b + 1, kv, g, h))
    top, total, out = pl.pallas_call(
        _page_kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pages,),
            in_specs=[
                pl.BlockSpec((1, kv, g, h), of_slot),
                pl.BlockSpec((1, kv, h, r), of_page),
                pl.BlockSpec((1, kv, r, h), of_page),
            ],
            out_specs=[pl.BlockSpec((1, *shape[1:]), of_slot) for shape in shapes],
        ),
        interpret=interpret,
    )(order_Q, sorted_Q, q, keys_QKHR, values_QKRH)
    # A slot without pages was never visited: its sums hold anything.
    paged_B = jnp.any(mine_Q[None, :] == jnp.arange(b, dtype=jnp.int32)[:, None], axis=1)[:, None, None]
    return Partial(
        jnp.where(paged_B, top[:b, ..., 0], -jnp.inf),
        jnp.where(paged_B, total[:b, ..., 0], 0.0),
        jnp.where(paged_B[..., None], out[:b], 0.0),
    )


def _page_kernel(order, slot, q_ref, keys_ref, values_ref, top_ref, total_ref, out_ref):
    """Join one page to the running softmax of its slot."""
    del order
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
