# pyright: strict, reportUnknownMemberType=false, reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
"""Hidden states x unembedding -> per-token vocabulary statistics, without [tokens, V] ever existing.

Wanted positions (response tokens) are put first and go through the head in tiles of `tile_tokens`; the others never
reach it, and how many tiles there are is found at run time. Two ways through the tiles:

`token_stats`  statistics of every wanted token, for a loss that sees whole sequences; the backward pass forms the
               tiles' logits again. Four matrix products: logits, logits again, and a gradient for each operand.
`token_loss`   where the loss treats every token by itself: a tile's loss and gradients are formed while its logits
               stand. Three products, one pass.

`_next_token` is the only function that shifts by one: the hidden state at position t - 1 predicts `tokens[:, t]`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tsopsd_jax.distributed.sharding import ROW_AXES, row_multiple
from tsopsd_jax.logit_stats import LibraryStats, VocabStats
from tsopsd_jax.types import Batch, LossOutput, Mean

TILE_TOKENS = 1024
"""Tokens whose logits exist at once, on each device."""

BLOCK_BYTES = 8 << 20
"""Size of a block on a CPU, whose caches hold that many logits while they are read again and again."""

TILES = "head_tiles"
"""Name of the loops over tiles in profiles and compiled programs."""

Stats = Callable[[Array, Array], dict[str, Array]]
"""(logits [..., V] float32, tokens [...]) -> {name: [...]}: the only code that sees the vocabulary."""

Loss = Callable[[dict[str, Array], Batch], LossOutput]
"""({name: [B, L]}, Batch) -> LossOutput."""


def vocab_stats(
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "D V"],
    tokens: Int[Array, " N"],
    *,
    teacher_temperature: float,
    tile_tokens: int = TILE_TOKENS,
) -> VocabStats:
    """Compute `logits_stats` of hidden @ unembed tile by tile; differentiable in hidden and unembed.

    Args:
        hidden: [N, D] final hidden states.
        unembed: [D, V] output matrix.
        tokens: [N] the token that each hidden state predicts.
        teacher_temperature: T of the self-teacher softmax(z / T).
        tile_tokens: tokens whose logits exist at once.

    Raises:
        ValueError: if the teacher's temperature is not positive.
    """
    stats = LibraryStats(VocabStats._fields, teacher_temperature)
    wanted = jnp.ones(tokens.shape, bool)
    found: Any = token_stats(stats, tiling_for(tile_tokens), hidden, unembed, tokens, wanted)
    return VocabStats(**found)


class Tiling(NamedTuple):
    """How tokens are cut into tiles and blocks.

    `tile_tokens`: tokens of a tile, whose logits exist at once. `block_bytes`: logits of a block, the part of a tile that
    `stats` sees at once; None: all of it. `axes`: mesh axes whose devices all go through equally many tiles.
    """

    tile_tokens: int
    block_bytes: int | None = None
    axes: tuple[str, ...] = ()


def tiling_for(tile_tokens: int, mesh: Mesh | None = None) -> Tiling:
    """Tiles of at most `tile_tokens` tokens, and blocks that suit the mesh's devices; no mesh: a device of the default
    backend."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return Tiling(tile_tokens, BLOCK_BYTES if platform == "cpu" else None, ROW_AXES if _divided(mesh) else ())


class _Tiles(NamedTuple):
    """Tokens in tiles, the wanted ones first: `order` [tiles, tile] of their indices (N: none), `count` of the tiles that
    hold a wanted one, tokens of a `block`."""

    order: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] - not a tuple's
    block: int


def _tiles(wanted_N: Array, vocabulary: int, tiling: Tiling) -> _Tiles:
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
    return _Tiles(order, jax.lax.pmax(count, tiling.axes) if tiling.axes else count, block)


def _by_block(function: Callable[[Array, Any], tuple[Any, Any]], block: int, z_NV: Array, rest: Any) -> tuple[Any, Any]:
    """`function(z, rest) -> (new z or None, found)` of each block of a tile's rows.

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


def _take(x: Array, at: Array) -> Array:
    """x[at], and zeros where `at` is no index."""
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


def _put(x: Array, at: Array, new: Array) -> Array:
    return x.at[at].set(new, mode="drop", unique_indices=True)


def _project(hidden_ND: Array, unembed_DV: Array) -> Array:
    """Float32 logits, accumulated in float32 from operands of the hidden states' dtype."""
    return jnp.einsum("ND,DV->NV", hidden_ND, unembed_DV, preferred_element_type=jnp.float32)


class Measured(NamedTuple):
    """What an objective says of a batch, and the largest |sampler's - learner's log-probability| of its tokens, nats."""

    out: LossOutput
    gap: Float[Array, ""]

    def __add__(self, other: "Measured") -> "Measured":  # pyright: ignore[reportIncompatibleMethodOverride] - not a tuple's
        return Measured(jax.tree.map(jnp.add, self.out, other.out), jnp.maximum(self.gap, other.gap))

    def summed(self) -> "Measured":
        """Add up what was measured of the parts of a batch, which are stacked on a leading axis."""
        return Measured(jax.tree.map(lambda x: jnp.sum(x, axis=0), self.out), jnp.max(self.gap, axis=0))


def measure(loss: Loss, stats: dict[str, Array], batch: Batch) -> Measured:
    """Evaluate the loss, and where there is a statistic `logp`, how far the sampler's log-probabilities are from it: with
    one code base that is a test, not a correction."""
    out, gap = loss(stats, batch), jnp.zeros((), jnp.float32)
    if "logp" in stats:
        apart = jnp.abs(stats["logp"] - batch.old_logp)
        gap = jnp.max(jnp.where(batch.mask, apart, 0.0))
        mean = {"rollout/logp_gap_mean_nats": Mean.of(apart, batch.mask)}
        out = LossOutput(out.loss, out.metrics | mean)
    return Measured(out, gap)


def _pull(dz_NV: Array, hidden_ND: Array, unembed_DV: Array, d_unembed_DV: Array) -> tuple[Array, Array]:
    """Gradients of a tile's logits into its hidden states, and added to those of the unembedding (float32)."""
    dz_NV = dz_NV.astype(hidden_ND.dtype)
    # One product after the other: side by side they fight for a CPU's cache.
    d_hidden, dz_NV = jax.lax.optimization_barrier((jnp.einsum("NV,DV->ND", dz_NV, unembed_DV), dz_NV))
    return d_hidden, d_unembed_DV + jnp.einsum("ND,NV->DV", hidden_ND, dz_NV, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_stats(
    stats: Stats,
    tiling: Tiling,
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "D V"],
    tokens: Int[Array, " N"],
    wanted: Bool[Array, " N"],
) -> dict[str, Float[Array, " N"]]:
    """Compute `stats` of every wanted token, 0 elsewhere; differentiable in `hidden` and `unembed`.

    These may be float32 masters: they are multiplied in the hidden states' dtype, and the gradient stays in theirs.
    """
    tiles, w = _tiles(wanted, unembed.shape[1], tiling), unembed.astype(hidden.dtype)

    def of(at: Array) -> dict[str, Array]:
        z, t = _project(_take(hidden, at), w), _take(tokens, at)
        _, found = _by_block(lambda z, t: (None, stats(z, t)), tiles.block, z, t)
        return jax.tree.map(lambda x: x.reshape(-1), found)

    out = {name: jnp.zeros(tokens.shape, s.dtype) for name, s in jax.eval_shape(of, tiles.order[0]).items()}

    def tile(i: Array, out: dict[str, Array]) -> dict[str, Array]:
        at = tiles.order[i]
        return {name: _put(out[name], at, x) for name, x in of(at).items()}

    with jax.named_scope(TILES):
        return jax.lax.fori_loop(0, tiles.count, tile, out)


def _token_stats_forward(
    stats: Stats, tiling: Tiling, hidden: Array, unembed: Array, tokens: Array, wanted: Array
) -> tuple[dict[str, Array], tuple[Array, Array, Array, Array]]:
    return token_stats(stats, tiling, hidden, unembed, tokens, wanted), (hidden, unembed, tokens, wanted)


def _token_stats_backward(
    stats: Stats, tiling: Tiling, kept: tuple[Array, Array, Array, Array], g: dict[str, Array]
) -> tuple[Array, Array, None, None]:
    hidden, unembed, tokens, wanted = kept
    tiles, w = _tiles(wanted, unembed.shape[1], tiling), unembed.astype(hidden.dtype)

    def pull(z: Array, rest: tuple[Array, dict[str, Array]]) -> tuple[Array, tuple[()]]:
        t, g = rest
        return *jax.vjp(lambda z: stats(z, t), z)[1](g), ()

    def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        at = tiles.order[i]
        h = _take(hidden, at)
        rest = _take(tokens, at), {name: _take(x, at) for name, x in g.items()}
        dz, _ = _by_block(pull, tiles.block, _project(h, w), rest)
        d_h, d_unembed = _pull(dz, h, w, carry[1])
        return _put(carry[0], at, d_h), d_unembed

    zero = jnp.zeros_like(hidden), jnp.zeros(unembed.shape, jnp.float32)
    with jax.named_scope(TILES):
        d_hidden, d_unembed = jax.lax.fori_loop(0, tiles.count, tile, zero)
    return d_hidden, d_unembed.astype(unembed.dtype), None, None


token_stats.defvjp(_token_stats_forward, _token_stats_backward)


def _loss_of_tiles(
    stats: Stats, loss: Loss, tiling: Tiling, hidden: Array, unembed: Array, batch: Batch
) -> tuple[Measured, tuple[Array, Array]]:
    """(`measure` of all tiles together, gradients into the hidden states and the unembedding)."""
    tiles, w = _tiles(batch.mask[0], unembed.shape[1], tiling), unembed.astype(hidden.dtype)

    def of(z: Array, block: Batch) -> tuple[Array, Measured]:
        block = dataclasses.replace(jax.tree.map(lambda x: x[None], block), knobs=batch.knobs)
        found = measure(loss, {name: x[None] for name, x in stats(z, block.tokens[0]).items()}, block)
        return found.out.loss.total, found

    def one(i: Array, carry: tuple[Measured, Array, Array]) -> tuple[Measured, Array, Array]:
        total, d_hidden, d_unembed = carry
        at = tiles.order[i]
        h, rest = _take(hidden, at), jax.tree.map(lambda x: _take(x[0], at), batch.bare)
        dz, found = _by_block(jax.grad(of, has_aux=True), tiles.block, _project(h, w), rest)
        d_h, d_unembed = _pull(dz, h, w, d_unembed)
        return total + found.summed(), _put(d_hidden, at, d_h), d_unembed

    z_like = jax.ShapeDtypeStruct((tiles.block, unembed.shape[1]), jnp.float32)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((tiles.block,), x.dtype), batch.bare)
    _, shapes = jax.eval_shape(of, z_like, like)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = zero, jnp.zeros_like(hidden), jnp.zeros(unembed.shape, jnp.float32)
    with jax.named_scope(TILES):
        total, d_hidden, d_unembed = jax.lax.fori_loop(0, tiles.count, one, start)
    return total, (d_hidden, d_unembed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def token_loss(
    stats: Stats,
    loss: Loss,
    tiling: Tiling,
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "D V"],
    batch: Batch,
) -> Measured:
    """Evaluate a loss that treats every token by itself, on a batch of one row of N tokens and the N states that predict
    them. `loss.total` can be differentiated, in `hidden` and `unembed`; the rest is given no gradient."""
    found: Any = token_stats(stats, tiling, hidden, unembed, batch.tokens[0], batch.mask[0])
    return measure(loss, {name: x[None] for name, x in found.items()}, batch)


def _token_loss_forward(
    stats: Stats, loss: Loss, tiling: Tiling, hidden: Array, unembed: Array, batch: Batch
) -> tuple[Measured, tuple[Array, Array, Array]]:
    out, grads = _loss_of_tiles(stats, loss, tiling, hidden, unembed, batch)
    return out, (*grads, jnp.zeros((0,), unembed.dtype))


def _token_loss_backward(
    _stats: Stats, _loss: Loss, _tiling: Tiling, kept: tuple[Array, Array, Array], g: Measured
) -> tuple[Array, Array, None]:
    d_hidden, d_unembed, like = kept
    scale = g.out.loss.total
    return d_hidden * scale.astype(d_hidden.dtype), (d_unembed * scale).astype(like.dtype), None


token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def _next_token(hidden_BLD: Array, batch: Batch) -> tuple[Array, Batch]:
    """Pair N = B (L - 1) hidden states with what they predict, as a batch of one row: the state
    at position t - 1 predicts `tokens[:, t]`. The only place where anything is shifted."""
    flat = jax.tree.map(lambda x: x[:, 1:].reshape(1, -1), batch.bare)
    return hidden_BLD[:, :-1].reshape(-1, hidden_BLD.shape[-1]), dataclasses.replace(flat, knobs=batch.knobs)


def batch_stats(
    stats: Stats,
    hidden: Float[Array, "B L D"],
    unembed: Float[Array, "D V"],
    batch: Batch,
    *,
    tile_tokens: int = TILE_TOKENS,
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, "B L"]]:
    """Compute the statistics of every response token given what precedes it.

    Index t refers to `tokens[:, t]`; 0 outside `mask`.

    Args:
        stats: the objective's function of logits and tokens.
        hidden: [B, L, D]; `hidden[:, t - 1]` predicts `tokens[:, t]`.
        unembed: [D, V].
        batch: its tokens and mask.
        tile_tokens: tokens whose logits exist at once, on each device.
        mesh: over which rows are divided; None: one device.
    """

    tiling = tiling_for(tile_tokens, mesh)

    def local(hidden: Array, unembed: Array, batch: Batch) -> dict[str, Array]:
        states, flat = _next_token(hidden, batch)
        out: Any = token_stats(stats, tiling, states, unembed, flat.tokens[0], flat.mask[0])
        return {name: jnp.pad(x.reshape(batch.tokens.shape[0], -1), ((0, 0), (1, 0))) for name, x in out.items()}

    return _by_rows(local, mesh)(hidden, unembed, batch)


def batch_loss(
    stats: Stats,
    loss: Loss,
    hidden: Float[Array, "B L D"],
    unembed: Float[Array, "D V"],
    batch: Batch,
    *,
    tokenwise: bool,
    tile_tokens: int = TILE_TOKENS,
    mesh: Mesh | None = None,
) -> Measured:
    """Evaluate an objective on a batch: loss, metrics, and the gap between sampler and learner.

    Args:
        stats, loss: the objective's.
        hidden: [B, L, D].
        unembed: [D, V].
        batch: [B, L].
        tokenwise: whether the loss treats every token by itself; then gradients are formed in the forward pass.
        tile_tokens: tokens whose logits exist at once, on each device.
        mesh: over which rows are divided; None: one device.
    """
    if not tokenwise:
        return measure(loss, batch_stats(stats, hidden, unembed, batch, tile_tokens=tile_tokens, mesh=mesh), batch)

    tiling = tiling_for(tile_tokens, mesh)

    def local(hidden: Array, unembed: Array, batch: Batch) -> Measured:
        states, flat = _next_token(hidden, batch)
        return jax.tree.map(lambda x: x[None], token_loss(stats, loss, tiling, states, unembed, flat))

    return _by_rows(local, mesh)(hidden, unembed, batch).summed()


def _divided(mesh: Mesh | None) -> bool:
    return mesh is not None and row_multiple(mesh) > 1


def _by_rows(local: Any, mesh: Mesh | None) -> Any:
    """Apply `local(hidden, unembed, batch)` to each device's own rows: tiles are cut and gradients of the unembedding summed
    without a word to the others; what stays automatic is the vocabulary over the tensor axis."""
    if not _divided(mesh):
        return local
    rows = P(ROW_AXES)

    def divided(hidden: Array, unembed: Array, batch: Batch) -> Any:
        specs = dataclasses.replace(jax.tree.map(lambda _: rows, batch.bare), knobs=dict.fromkeys(batch.knobs, P()))
        return jax.shard_map(
            local, mesh=mesh, in_specs=(rows, P(), specs), out_specs=rows, axis_names=set(ROW_AXES), check_vma=False
        )(hidden, unembed, batch)

    return divided
