"""Attention of a decoding step: one query a slot over the slot's tail and its pages.

| name | where | what it is |
|---|---|---|
| `xla` | everywhere | the pool read once in place, partial softmaxes joined by slot; no page is shared |
| `pallas` | TPU | the tail by XLA; a kernel that walks the pages slot by slot; `xla` for pages too large for it |
| `triton` | GPU | one kernel for both; `xla` for the shapes that `triton_attention.refuses` names |
"""

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tsopsd_jax.distributed.sharding import ROW_AXES
from tsopsd_jax.model.decoding import LayerCache
from tsopsd_jax.rollout import triton_attention
from tsopsd_jax.rollout.paged_attention import Owners, Walk, owners, pages_attention, pages_per_step, walk
from tsopsd_jax.rollout.schedule import PageTable
from tsopsd_jax.types import AnyArray

IMPLEMENTATIONS = ("xla", "pallas", "triton")


class Seen(NamedTuple):
    """The places of the tails that hold a token: below `rest_B`, and from `home` to `newest`."""

    rest_B: Int[AnyArray, " B"]
    newest: Int[Array, ""]
    mask_BC: Bool[Array, "B C"]


class SlotAttention(NamedTuple):
    """An implementation, on a mesh: shards of slots over data x fsdp, heads over tensor; None: one device."""

    implementation: str = "xla"
    mesh: Mesh | None = None
    interpret: bool = False

    def shares(self, page: tuple[int, int, int], places: int, item_bytes: int) -> bool:
        """Return whether a page may belong to several slots: kernels read a slot's pages one by one. XLA reads the pool
        in place, each page for one slot; for several it would copy the pages, which is what sharing saves.

        Args:
            page: K, H, R of a page, its heads on all devices.
            places: C, of a tail.
            item_bytes: of an element of the pages.
        """
        if self.implementation == "pallas":
            return self._pages_per_step(page, item_bytes) > 0
        return not self._refuses(page[1], places, (1, 1, *page[1:]))

    def _pages_per_step(self, page: tuple[int, int, int], item_bytes: int) -> int:
        """What the kernel for TPUs takes at once; `page`: K, H, R, its heads on all devices."""
        return pages_per_step((self._heads_on_a_device(page[0]), *page[1:]), item_bytes)

    def _heads_on_a_device(self, heads: int) -> int:
        return heads if self.mesh is None else -(-heads // self.mesh.shape["tensor"])

    def prepare(self, table: PageTable, pages: LayerCache, places: int) -> Owners | Walk | PageTable:
        """Derive from the table what every step of a segment needs.

        Args:
            table: the pages of each slot.
            pages: as `attend` takes them.
            places: C, of a tail.

        Raises:
            ValueError: where the pool is too large for a kernel that alone reads pages of several slots.
        """
        table, shape = PageTable(*map(jnp.asarray, table)), pages[0].shape[1:]
        item_bytes = pages[0].dtype.itemsize
        page = shape[1], shape[2], shape[3]
        if self.implementation == "pallas" and (n := self._pages_per_step(page, item_bytes)):
            return jax.vmap(functools.partial(walk, n=n))(table)
        refused = self._refuses(shape[-2], places, shape)
        if refused and self.shares(page, places, item_bytes):
            raise ValueError(f"attention of slots: {refused}; decode fewer rows at once, or on more devices")
        return owners(table, shape[0]) if refused else table

    def _refuses(self, head_dim: int, places: int, page: tuple[int, ...] | None) -> str:
        """Say why the kernel for GPUs is not taken; empty where it is. `page`: of a shard, its heads on all devices."""
        if self.implementation != "triton":
            return f"the implementation is {self.implementation}"
        if page is not None:
            page = (page[0], self._heads_on_a_device(page[1]), *page[2:])
        return triton_attention.refuses(head_dim, places, page)

    def attend(
        self, q_BNH: Array, tail: LayerCache, seen: Seen, home: int, pages: LayerCache | None, prepared: Any
    ) -> Float[Array, "B N H"]:
        """Attend with one query a slot; softmax in float32.

        Args:
            q_BNH: queries; scores are scaled by H^-0.5.
            tail: keys [B, K, H, C] and values [B, K, C, H].
            seen: the tails' places that hold a token.
            home: places of a tail before the segment's.
            pages: keys [S, Q, K, H, R] and values [S, Q, K, R, H]; None: no slot has any.
            prepared: what `prepare` made of the table of pages; None without pages.

        Raises:
            ValueError: for an implementation that is unknown.
        """
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attention of slots: expected one of {', '.join(IMPLEMENTATIONS)}, got {self.implementation!r}"
            )
        q_BKGH = einops.rearrange(q_BNH, "B (K G) H -> B K G H", K=tail[0].shape[1])
        of_shard = None if pages is None else pages[0].shape[1:]
        if not self._refuses(q_BNH.shape[-1], len(seen.mask_BC[0]), of_shard):
            out_BKGH = self._triton(q_BKGH, tail, seen, home, pages, prepared)
        else:
            out_BKGH = self._joined(q_BKGH, tail, seen.mask_BC, pages, prepared)
        return einops.rearrange(out_BKGH, "B K G H -> B (K G) H")

    def _joined(
        self, q_BKGH: Array, tail: LayerCache, seen_BC: Array, pages: LayerCache | None, prepared: Any
    ) -> Array:
        """The softmax over the tail, by XLA, joined with that over the pages."""
        keys_BKHC, values_BKCH = tail
        scores = jnp.einsum("BKGH,BKHC->BKGC", q_BKGH, keys_BKHC, preferred_element_type=jnp.float32)
        scores = jnp.where(seen_BC[:, None, None, :], scores * q_BKGH.shape[-1] ** -0.5, -jnp.inf)
        top, part = jnp.max(scores, axis=-1), None
        if pages is not None:
            part = pages_attention(q_BKGH, pages, prepared, mesh=self.mesh, interpret=self.interpret)
            top = jnp.maximum(top, part.top)
        weight = jnp.exp(scores - top[..., None])
        total = jnp.sum(weight, axis=-1)
        out = jnp.einsum(
            "BKGC,BKCH->BKGH", weight.astype(values_BKCH.dtype), values_BKCH, preferred_element_type=jnp.float32
        )
        if part is not None:
            scale = jnp.exp(part.top - top)
            total, out = total + part.total * scale, out + part.out * scale[..., None]
        return (out / total[..., None]).astype(q_BKGH.dtype)

    def _triton(
        self, q_BKGH: Array, tail: LayerCache, seen: Seen, home: int, pages: LayerCache | None, prepared: Any
    ) -> Array:
        """The kernel on each device's own slots and heads."""

        def local(q_BKGH, tail, rest_B, newest, pages, table):
            pages, table = jax.tree.map(lambda x: x[0], (pages, table))  # a device has one shard
            return triton_attention.attend(
                q_BKGH, tail, rest_B, newest, pages, table, home=home, interpret=self.interpret
            )

        if self.mesh is not None:
            heads, rows = P(ROW_AXES, "tensor"), P(ROW_AXES)
            specs = (heads, heads, rows, P(), P(ROW_AXES, None, "tensor"), rows)
            local = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=heads, check_vma=False)
        return local(q_BKGH, tail, jnp.asarray(seen.rest_B, jnp.int32), seen.newest, pages, prepared)


BY_XLA = SlotAttention()
"""The implementation that runs everywhere, on one device or under `jit` on any mesh."""
