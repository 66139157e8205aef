"""Attention of one query per slot over the pages that the slot owns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.types import AnyArray


class Partial(NamedTuple):
    """A softmax that can still be joined with another: exp(scores - top) summed, and the values weighted with it."""

    top: Float[Array, "B K G"]  # -inf for a slot without pages
    total: Float[Array, "B K G"]
    out: Float[Array, "B K G H"]


def pages_attention(q_BKGH: Array, pages: LayerCache, owner: Int[AnyArray, "S Q"]) -> Partial:
    """Reads every page of the pool once, in the order in which they lie, whoever owns them.

    Args:
        q_BKGH: scaled queries; slots are divided evenly over the S shards, in order.
        pages: keys [S, Q, K, H, R] and values [S, Q, K, R, H].
        owner: slot within the shard, -1 for a free page.
    """
    s = owner.shape[0]
    q_SBKGH = q_BKGH.reshape(s, -1, *q_BKGH.shape[1:])
    parts = jax.vmap(_xla)(q_SBKGH, *pages, owner)
    return Partial(*(x.reshape(-1, *x.shape[2:]) for x in parts))


def _xla(q_BKGH: Array, keys_QKHR: Array, values_QKRH: Array, owner_Q: AnyArray) -> Partial:
    b = q_BKGH.shape[0]
    mine_Q = jnp.where(owner_Q < 0, b, owner_Q)  # segment b is dropped
    near_Q = jnp.minimum(mine_Q, b - 1)
    live = (owner_Q >= 0)[:, None, None, None]
    scores = jnp.einsum("QKGH,QKHR->QKGR", q_BKGH[near_Q], keys_QKHR, preferred_element_type=jnp.float32)
    scores = jnp.where(live, scores, -jnp.inf)
    top_BKG = jax.ops.segment_max(jnp.max(scores, axis=-1), mine_Q, num_segments=b + 1)[:b]
    weight = jnp.where(live, jnp.exp(scores - top_BKG[near_Q][..., None]), 0.0)
    total_BKG = jax.ops.segment_sum(jnp.sum(weight, axis=-1), mine_Q, num_segments=b + 1)[:b]
    out = jnp.einsum(
        "QKGR,QKRH->QKGH", weight.astype(values_QKRH.dtype), values_QKRH, preferred_element_type=jnp.float32
    )
    return Partial(top_BKG, total_BKG, jax.ops.segment_sum(out, mine_Q, num_segments=b + 1)[:b])
