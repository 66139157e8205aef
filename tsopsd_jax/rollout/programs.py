"""The engine's programs: jitted functions, the layouts of their arrays, and their lowering for shapes alone.

Lowered programs can be compiled before any array exists: ahead of a phase, or for devices that are not there.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from tsopsd_jax.distributed.sharding import DECODE_RULES, put, replicated, row_sharding, tree_shardings
from tsopsd_jax.model.attention import causal_attention
from tsopsd_jax.model.decoding import LayerCache, prefill, rollout_view, view_axes
from tsopsd_jax.model.qwen3 import Qwen3
from tsopsd_jax.rollout.cache import commit, empty_pages, grow, place, shrink_pages, shrink_tails
from tsopsd_jax.rollout.distribution import Sampling
from tsopsd_jax.rollout.schedule import Geometry, PageTable
from tsopsd_jax.rollout.segment import Pool, Slots, decode_segment, empty_tails
from tsopsd_jax.rollout.slot_attention import SlotAttention
from tsopsd_jax.types import AnyArray, PyTree


class Programs:
    """The jitted functions of an engine, each compiled once a shape and kept.

    Rows and pages are divided over data x fsdp, heads over tensor.

    Args:
        model: the policy's functions.
        mesh: the devices.
        geometry: sizes.
        slots: rows decoded together, over all shards.
        sampling, stop_ids, entropy: what `segment.decode_segment` takes.
        attention: `auto`, the best implementations of the mesh's backend; or `xla`.

    Attributes:
        view: parameters -> rollout view.
        prefill: view, tokens [A, W] -> their cache.
        place, commit, grow, shrink_tails, shrink_pages: what `cache` does between segments.
        decode_segment: view, tails, pool, slots, key, sampling temperature -> (Segment, tails); consumes the tails. The
            temperature is None where the settings' own holds.
        gather: a Segment -> the same on every device, so that every host sees every row.
        shares: whether a page may belong to several slots.
    """

    def __init__(
        self,
        model: Qwen3,
        mesh: Mesh,
        *,
        geometry: Geometry,
        slots: int,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        attention: str,
        entropy: bool,
    ):
        self._model, self._mesh, self._geometry, self._slots = model, mesh, geometry, slots
        self._rows = row_sharding(mesh)
        self._heads = NamedSharding(mesh, P(DECODE_RULES["rows"], DECODE_RULES["kv_heads"]))
        self._paged = NamedSharding(mesh, P(DECODE_RULES["rows"], None, DECODE_RULES["kv_heads"]))
        shapes = jax.eval_shape(functools.partial(rollout_view, model), model.param_shapes())
        self._view_layout = tree_shardings(view_axes(model), shapes, mesh, DECODE_RULES)
        self.view = jax.jit(functools.partial(rollout_view, model), out_shardings=self._view_layout)
        causal = functools.partial(causal_attention, implementation=attention, mesh=mesh)
        self.prefill = jax.jit(functools.partial(prefill, model, attention=causal), out_shardings=self._heads)
        best = {"tpu": "pallas", "gpu": "triton", "cuda": "triton"}.get(mesh.devices.flat[0].platform, "xla")
        of_slots = SlotAttention(best if attention == "auto" else "xla", mesh)
        page = model.config.num_key_value_heads, model.config.head_dim, geometry.segment_tokens
        places, item_bytes = geometry.home + geometry.segment_tokens, np.dtype(model.compute_dtype).itemsize
        self.shares = of_slots.shares(page, places, item_bytes)
        self.decode_segment = jax.jit(
            functools.partial(
                decode_segment,
                model,
                sampling=sampling,
                steps=geometry.segment_tokens,
                stop_ids=stop_ids,
                attention=of_slots,
                entropy=entropy,
            ),
            donate_argnums=1,
            out_shardings=(None, self._heads),
        )
        self.gather = jax.jit(lambda drawn: drawn, out_shardings=replicated(mesh))
        self._empty_tails = jax.jit(
            functools.partial(empty_tails, model), static_argnames=("slots", "places"), out_shardings=self._heads
        )
        self._empty_pages = jax.jit(
            functools.partial(empty_pages, model, r=geometry.segment_tokens),
            static_argnames="shape",
            out_shardings=self._paged,
        )
        self.place = jax.jit(
            functools.partial(place, home=geometry.home),
            donate_argnums=(0, 1),
            out_shardings=(self._heads, self._paged, self._heads),
        )
        self.commit = jax.jit(commit, donate_argnums=0, out_shardings=self._paged)
        self.grow = jax.jit(grow, static_argnames="size", out_shardings=self._paged)
        self.shrink_tails = jax.jit(shrink_tails, out_shardings=self._heads)
        self.shrink_pages = jax.jit(shrink_pages, out_shardings=self._paged)

    def put(self, x: AnyArray) -> Array:
        """Put a host array whose first axis is slots or shards on its devices."""
        return put(x, self._rows)

    def empty_tails(self, slots: int) -> tuple[LayerCache, ...]:
        """Make tails for a prompt's rest and a segment."""
        return self._empty_tails(slots=slots, places=self._geometry.home + self._geometry.segment_tokens)

    def empty_prompts(self, width: int) -> tuple[LayerCache, ...]:
        """Make the cache of one prompt on each shard."""
        return self._empty_tails(slots=self._geometry.shards, places=width)

    def empty_pages(self, size: int) -> tuple[LayerCache, ...] | None:
        """Make a pool of `size` pages on each shard; None where no row ever fills a page."""
        return self._empty_pages(shape=(self._geometry.shards, size)) if self._geometry.row_pages else None

    @property
    def compiled(self) -> int:
        """The number of programs compiled so far (those that only make zeros aside)."""
        between = (self.place, self.commit, self.grow, self.shrink_tails, self.shrink_pages)
        jits: tuple[Any, ...] = (self.view, self.prefill, self.decode_segment, *between)
        return sum(f._cache_size() for f in jits)

    # ---------------------------------------------------- for shapes: nothing is sampled and no array exists

    def pool_sizes(self) -> list[int]:
        """List the sizes, in pages and rising, that the pool of a shard may have with all slots in use."""
        return self._geometry.pool_sizes(self._slots // self._geometry.shards)

    def prefill_shape(self, prompts: int) -> tuple[int, int]:
        """Return (prompts of one piece, positions), the largest that a step with this many prompts asks for."""
        width = self._geometry.prefill_width(self._geometry.max_prompt_tokens - 1)
        return self._geometry.prefill_rows(prompts, width), width

    def lower_view(self, params: PyTree) -> Any:
        """Lower the program master weights -> rollout view; `params` may be abstract."""
        return self.view.lower(params)

    def lower_prefill(self, params: PyTree, shape: tuple[int, int]) -> Any:
        """Lower the program that prefills a piece of prompts of `shape`; `params` may be abstract."""
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self._rows)
        return self.prefill.lower(self._abstract_view(params), tokens)

    def lower_segment(
        self, params: PyTree, size: int | None = None, *, sampling_temperature: jax.ShapeDtypeStruct | None = None
    ) -> Any:
        """Lower a segment of all slots; `params` may be abstract.

        Args:
            size: pages of a shard, by default the most.
            sampling_temperature: the scalar that a segment takes where a control turns it.
        """
        tails, pool = self._abstract_cache(self.pool_sizes()[-1] if size is None else size)
        integers: dict[str, Any] = dict.fromkeys(
            Slots._fields, jax.ShapeDtypeStruct((self._slots,), np.int32, sharding=self._rows)
        )
        integers["row_id"] = jax.ShapeDtypeStruct((self._slots,), np.uint32, sharding=self._rows)
        key = _abstract(jax.eval_shape(lambda: jax.random.key(0)), replicated(self._mesh))
        view, slots = self._abstract_view(params), Slots(**integers)
        return self.decode_segment.lower(view, tails, pool, slots, key, sampling_temperature)

    def _abstract_view(self, params: PyTree) -> Any:
        view = jax.eval_shape(self.view, params)
        return jax.tree.map(_abstract, view, self._view_layout)

    def _abstract_cache(self, size: int) -> tuple[Any, Pool | None]:
        """Return abstract (tails, pool) of all slots, the pool of `size` pages a shard."""
        tails = _abstract(jax.eval_shape(lambda: self.empty_tails(self._slots)), self._heads)
        if not size:
            return tails, None
        pages = _abstract(jax.eval_shape(lambda: self.empty_pages(size)), self._paged)
        slots = (self._geometry.shards, self._slots // self._geometry.shards)
        table: Any = PageTable(np.zeros((*slots, self._geometry.row_pages), np.int32), np.zeros(slots, np.int32))
        return tails, Pool(pages, _abstract(table, self._rows))


def _abstract(tree: PyTree, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
