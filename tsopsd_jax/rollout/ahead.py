"""The engine's programs for shapes, ready to be compiled: nothing is sampled and no array exists."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from tsopsd_jax.distributed.sharding import DECODE_RULES, replicated, row_sharding, tree_shardings
from tsopsd_jax.model.decoding import view_axes
from tsopsd_jax.rollout.engine import Engine
from tsopsd_jax.rollout.segment import Pool, Slots
from tsopsd_jax.types import PyTree


def _like(tree: PyTree, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def abstract_view(engine: Engine, params: PyTree) -> Any:
    """The rollout view of abstract parameters, each array with its sharding."""
    view = jax.eval_shape(engine._view, params)
    layout = tree_shardings(view_axes(engine.model), view, engine.mesh, DECODE_RULES)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), view, layout)


def pool_sizes(engine: Engine) -> list[int]:
    """Pages that the pool of a shard may have with all slots in use, rising."""
    return engine.geometry.pool_sizes(engine.slots // engine.shards)


def abstract_cache(engine: Engine, size: int | None = None) -> tuple[Any, Pool | None]:
    """(tails, pool) of all slots, the pool of `size`, by default at its largest: every row at its full length."""
    tails = _like(jax.eval_shape(lambda: engine._tails(slots=engine.slots)), engine._heads)
    size = pool_sizes(engine)[-1] if size is None else size
    if not size:
        return tails, None
    shape = (engine.shards, size)
    pages = _like(jax.eval_shape(lambda: engine._pages(shape=shape)), engine._paged)
    owner: Any = jax.ShapeDtypeStruct(shape, np.int32, sharding=row_sharding(engine.mesh))
    return tails, Pool(pages, owner)


def prefill_shape(engine: Engine, prompts: int) -> tuple[int, int]:
    """(prompts of one piece, positions): the largest that a step with so many prompts asks for."""
    width = engine.geometry.prefill_width(engine.geometry.max_prompt_tokens - 1)
    return engine.geometry.prefill_rows(prompts, width), width


def lower_view(engine: Engine, params: PyTree) -> Any:
    """Master weights -> rollout view."""
    return engine._view.lower(params)


def lower_prefill(engine: Engine, params: PyTree, shape: tuple[int, int]) -> Any:
    """A piece of prompts -> their cache."""
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=row_sharding(engine.mesh))
    return engine._prefill.lower(abstract_view(engine, params), tokens)


def lower_segment(engine: Engine, params: PyTree, size: int | None = None) -> Any:
    """A segment of all slots over a pool of `size`, by default the largest."""
    rows = row_sharding(engine.mesh)
    tails, pool = abstract_cache(engine, size)
    integers: dict[str, Any] = dict.fromkeys(
        Slots._fields, jax.ShapeDtypeStruct((engine.slots,), np.int32, sharding=rows)
    )
    integers["row_id"] = jax.ShapeDtypeStruct((engine.slots,), np.uint32, sharding=rows)
    key = _like(jax.eval_shape(lambda: jax.random.key(0)), replicated(engine.mesh))
    return engine._segment.lower(abstract_view(engine, params), tails, pool, Slots(**integers), key)
