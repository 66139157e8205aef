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

from tsopsd_jax.distributed.sharding import ROW_AXES
from tsopsd_jax.head_tiles import (
    TILE_TOKENS,
    Tiling,
    by_block,
    is_divided,
    project,
    pull_back,
    put_back,
    take,
    tiles_of,
    tiling_for,
)
from tsopsd_jax.logit_stats import LibraryStats, VocabStats
from tsopsd_jax.metric_names import LOGP_GAP_MEAN, RATIO_OUTSIDE
from tsopsd_jax.types import Batch, LossOutput, Mean

TILES = "head_tiles"
"""Name of the loops over tiles in profiles and compiled programs."""

Stats = Callable[..., dict[str, Array]]
"""(logits [..., V] float32, tokens [...]) -> {name: [...]}: the only code that sees the vocabulary. Where the objective
has a reference, its logits [..., V] are a third argument; where its control has the knob `sampling_temperature`, that
scalar is a keyword argument."""

Loss = Callable[[dict[str, Array], Batch], LossOutput]
"""({name: [B, L]}, Batch) -> LossOutput."""


class Reference(NamedTuple):
    """The frozen reference at the positions of a batch: hidden states like the policy's, of its own width D', and its
    unembedding [D', V]. No gradient reaches it."""

    hidden: Array
    unembed: Array


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


def _reference_logits(reference: Reference | None, at: Array) -> Array | None:
    """The reference's logits of a tile's tokens; None where there is no reference."""
    if reference is None:
        return None
    return project(take(reference.hidden, at), reference.unembed.astype(reference.hidden.dtype))


def call_stats(
    stats: Stats, z: Array, tokens: Array, reference_z: Array | None, sampling_temperature: Array | None
) -> Any:
    """Call `stats` with what there is: a reference's logits, a sampling temperature that is a knob."""
    arguments = (z, tokens) if reference_z is None else (z, tokens, reference_z)
    if sampling_temperature is None:
        return stats(*arguments)
    return stats(*arguments, sampling_temperature=sampling_temperature)


class Measured(NamedTuple):
    """What an objective says of a batch, and the largest |sampler's - learner's log-probability| of its tokens,
    nats."""

    out: LossOutput
    gap: Float[Array, ""]

    def __add__(self, other: "Measured") -> "Measured":  # pyright: ignore[reportIncompatibleMethodOverride] - not a tuple's
        return Measured(jax.tree.map(jnp.add, self.out, other.out), jnp.maximum(self.gap, other.gap))

    def summed(self) -> "Measured":
        """Add up what was measured of the parts of a batch, which are stacked on a leading axis."""
        return Measured(jax.tree.map(lambda x: jnp.sum(x, axis=0), self.out), jnp.max(self.gap, axis=0))


RATIO_MARGIN = 0.1
"""Ratios of learner to sampler in 1 +- this are near."""


def measure(loss: Loss, stats: dict[str, Array], batch: Batch) -> Measured:
    """Evaluate the loss, and where there is a statistic `logp`, how far the sampler's log-probabilities are from it:
    with one code base that is a test, not a correction."""
    out, gap = loss(stats, batch), jnp.zeros((), jnp.float32)
    if "logp" in stats:
        apart = jnp.abs(stats["logp"] - batch.old_logp)
        gap = jnp.max(jnp.where(batch.mask, apart, 0.0))
        outside = jnp.abs(jnp.expm1(stats["logp"] - batch.old_logp)) > RATIO_MARGIN
        mean = {
            LOGP_GAP_MEAN: Mean.of(apart, batch.mask),
            RATIO_OUTSIDE: Mean.of(outside.astype(jnp.float32), batch.mask),
        }
        out = LossOutput(out.loss, out.metrics | mean)
    return Measured(out, gap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_stats(
    stats: Stats,
    tiling: Tiling,
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "D V"],
    tokens: Int[Array, " N"],
    wanted: Bool[Array, " N"],
    reference: Reference | None = None,
    sampling_temperature: Float[Array, ""] | None = None,
) -> dict[str, Float[Array, " N"]]:
    """Compute `stats` of every wanted token, 0 elsewhere; differentiable in `hidden` and `unembed`.

    These may be float32 masters: they are multiplied in the hidden states' dtype, and the gradient stays in theirs.
    """
    tiles, w = tiles_of(wanted, unembed.shape[1], tiling), unembed.astype(hidden.dtype)

    def block(z: Array, rest: tuple[Array, Array | None]) -> tuple[None, dict[str, Array]]:
        return None, call_stats(stats, z, rest[0], rest[1], sampling_temperature)

    def of(at: Array) -> dict[str, Array]:
        z, rest = project(take(hidden, at), w), (take(tokens, at), _reference_logits(reference, at))
        _, found = by_block(block, tiles.block, z, rest)
        return jax.tree.map(lambda x: x.reshape(-1), found)

    out = {name: jnp.zeros(tokens.shape, s.dtype) for name, s in jax.eval_shape(of, tiles.order[0]).items()}

    def tile(i: Array, out: dict[str, Array]) -> dict[str, Array]:
        at = tiles.order[i]
        return {name: put_back(out[name], at, x) for name, x in of(at).items()}

    with jax.named_scope(TILES):
        return jax.lax.fori_loop(0, tiles.count, tile, out)


_Asked = tuple[Array, Array, Array, Array, Reference | None, Array | None]


def _token_stats_forward(
    stats: Stats,
    tiling: Tiling,
    hidden: Array,
    unembed: Array,
    tokens: Array,
    wanted: Array,
    reference: Reference | None,
    sampling_temperature: Array | None,
) -> tuple[dict[str, Array], _Asked]:
    asked = hidden, unembed, tokens, wanted, reference, sampling_temperature
    return token_stats(stats, tiling, *asked), asked


def _token_stats_backward(
    stats: Stats, tiling: Tiling, kept: _Asked, g: dict[str, Array]
) -> tuple[Array, Array, None, None, None, None]:
    hidden, unembed, tokens, wanted, reference, sampling_temperature = kept
    tiles, w = tiles_of(wanted, unembed.shape[1], tiling), unembed.astype(hidden.dtype)

    def pull(z: Array, rest: tuple[Array, Array | None, dict[str, Array]]) -> tuple[Array, tuple[()]]:
        t, reference_z, g = rest
        return *jax.vjp(lambda z: call_stats(stats, z, t, reference_z, sampling_temperature), z)[1](g), ()

    def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        at = tiles.order[i]
        h = take(hidden, at)
        rest = take(tokens, at), _reference_logits(reference, at), {name: take(x, at) for name, x in g.items()}
        dz, _ = by_block(pull, tiles.block, project(h, w), rest)
        d_h, d_unembed = pull_back(dz, h, w, carry[1])
        return put_back(carry[0], at, d_h), d_unembed

    zero = jnp.zeros_like(hidden), jnp.zeros(unembed.shape, jnp.float32)
    with jax.named_scope(TILES):
        d_hidden, d_unembed = jax.lax.fori_loop(0, tiles.count, tile, zero)
    return d_hidden, d_unembed.astype(unembed.dtype), None, None, None, None


token_stats.defvjp(_token_stats_forward, _token_stats_backward)


def _loss_of_tiles(
    stats: Stats,
    loss: Loss,
    tiling: Tiling,
    hidden: Array,
    unembed: Array,
    batch: Batch,
    reference: Reference | None,
) -> tuple[Measured, tuple[Array, Array]]:
    """(`measure` of all tiles together, gradients into the hidden states and the unembedding)."""
    tiles, w = tiles_of(batch.mask[0], unembed.shape[1], tiling), unembed.astype(hidden.dtype)

    def of(z: Array, rest: tuple[Batch, Array | None]) -> tuple[Array, Measured]:
        block, reference_z = rest
        block = dataclasses.replace(jax.tree.map(lambda x: x[None], block), knobs=batch.knobs)
        asked = call_stats(stats, z, block.tokens[0], reference_z, batch.sampling_temperature)
        found = measure(loss, {name: x[None] for name, x in asked.items()}, block)
        return found.out.loss.total, found

    def one(i: Array, carry: tuple[Measured, Array, Array]) -> tuple[Measured, Array, Array]:
        total, d_hidden, d_unembed = carry
        at = tiles.order[i]
        h = take(hidden, at)
        rest = jax.tree.map(lambda x: take(x[0], at), batch.bare), _reference_logits(reference, at)
        dz, found = by_block(jax.grad(of, has_aux=True), tiles.block, project(h, w), rest)
        d_h, d_unembed = pull_back(dz, h, w, d_unembed)
        return total + found.summed(), put_back(d_hidden, at, d_h), d_unembed

    z_like = jax.ShapeDtypeStruct((tiles.block, unembed.shape[1]), jnp.float32)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((tiles.block,), x.dtype), batch.bare)
    _, shapes = jax.eval_shape(of, z_like, (like, None if reference is None else z_like))
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
    reference: Reference | None = None,
) -> Measured:
    """Evaluate a loss that treats every token by itself, on a batch of one row of N tokens and the N states that
    predict them. `loss.total` can be differentiated, in `hidden` and `unembed`; the rest is given no gradient."""
    tokens, wanted = batch.tokens[0], batch.mask[0]
    found: Any = token_stats(stats, tiling, hidden, unembed, tokens, wanted, reference, batch.sampling_temperature)
    return measure(loss, {name: x[None] for name, x in found.items()}, batch)


def _token_loss_forward(
    stats: Stats,
    loss: Loss,
    tiling: Tiling,
    hidden: Array,
    unembed: Array,
    batch: Batch,
    reference: Reference | None,
) -> tuple[Measured, tuple[Array, Array, Array]]:
    out, grads = _loss_of_tiles(stats, loss, tiling, hidden, unembed, batch, reference)
    return out, (*grads, jnp.zeros((0,), unembed.dtype))


def _token_loss_backward(
    _stats: Stats, _loss: Loss, _tiling: Tiling, kept: tuple[Array, Array, Array], g: Measured
) -> tuple[Array, Array, None, None]:
    d_hidden, d_unembed, like = kept
    scale = g.out.loss.total
    return d_hidden * scale.astype(d_hidden.dtype), (d_unembed * scale).astype(like.dtype), None, None


token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def _next_token(hidden_BLD: Array, batch: Batch, reference: Reference | None) -> tuple[Array, Batch, Reference | None]:
    """Pair N = B (L - 1) hidden states, the policy's and the reference's, with what they predict, as a batch of one
    row: the state at position t - 1 predicts `tokens[:, t]`. The only place where anything is shifted."""

    def states(hidden_BLD: Array) -> Array:
        return hidden_BLD[:, :-1].reshape(-1, hidden_BLD.shape[-1])

    flat = dataclasses.replace(jax.tree.map(lambda x: x[:, 1:].reshape(1, -1), batch.bare), knobs=batch.knobs)
    return states(hidden_BLD), flat, reference and Reference(states(reference.hidden), reference.unembed)


def batch_stats(
    stats: Stats,
    hidden: Float[Array, "B L D"],
    unembed: Float[Array, "D V"],
    batch: Batch,
    *,
    reference: Reference | None = None,
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
        reference: hidden [B, L, D']; None: `stats` takes two arguments.
        tile_tokens: tokens whose logits exist at once, on each device.
        mesh: over which rows are divided; None: one device.
    """

    tiling = tiling_for(tile_tokens, mesh)

    def local(hidden: Array, unembed: Array, batch: Batch, reference: Reference | None = None) -> dict[str, Array]:
        states, flat, reference = _next_token(hidden, batch, reference)
        tokens, wanted = flat.tokens[0], flat.mask[0]
        out: Any = token_stats(stats, tiling, states, unembed, tokens, wanted, reference, batch.sampling_temperature)
        return {name: jnp.pad(x.reshape(batch.tokens.shape[0], -1), ((0, 0), (1, 0))) for name, x in out.items()}

    return _by_rows(local, mesh)(hidden, unembed, batch, reference)


def batch_loss(
    stats: Stats,
    loss: Loss,
    hidden: Float[Array, "B L D"],
    unembed: Float[Array, "D V"],
    batch: Batch,
    *,
    tokenwise: bool,
    reference: Reference | None = None,
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
        reference: hidden [B, L, D']; None: `stats` takes two arguments.
        tile_tokens: tokens whose logits exist at once, on each device.
        mesh: over which rows are divided; None: one device.
    """
    if not tokenwise:
        found = batch_stats(stats, hidden, unembed, batch, reference=reference, tile_tokens=tile_tokens, mesh=mesh)
        return measure(loss, found, batch)

    tiling = tiling_for(tile_tokens, mesh)

    def local(hidden: Array, unembed: Array, batch: Batch, reference: Reference | None = None) -> Measured:
        states, flat, reference = _next_token(hidden, batch, reference)
        return jax.tree.map(lambda x: x[None], token_loss(stats, loss, tiling, states, unembed, flat, reference))

    return _by_rows(local, mesh)(hidden, unembed, batch, reference).summed()


def _by_rows(local: Any, mesh: Mesh | None) -> Any:
    """Apply `local(hidden, unembed, batch, reference)` to each device's own rows: tiles are cut and gradients of the
    unembedding summed without a word to the others; what stays automatic is the vocabulary over the tensor axis."""
    if not is_divided(mesh):
        return local
    rows = P(ROW_AXES)

    def divided(hidden: Array, unembed: Array, batch: Batch, reference: Reference | None) -> Any:
        of_batch = dataclasses.replace(jax.tree.map(lambda _: rows, batch.bare), knobs=dict.fromkeys(batch.knobs, P()))
        specs, arguments = (rows, P(), of_batch), (hidden, unembed, batch)
        if reference is not None:
            specs, arguments = (*specs, Reference(rows, P())), (*arguments, reference)  # pyright: ignore[reportArgumentType]
        return jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=rows, axis_names=set(ROW_AXES), check_vma=False
        )(*arguments)

    return divided
