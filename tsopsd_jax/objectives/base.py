# pyright: strict, reportUnknownMemberType=false
"""What a phase optimises: an `Objective` is a pair of pure functions that declares its needs itself.

To write your own, return an `Objective` from a function of keyword-only hyperparameters and name it in the YAML as
`path/to/file.py:function`; it runs sharded, tiled and micro-batched like the library's. `testing.check_objective` holds
it to what is said here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

from tsopsd_jax.head import Loss, Stats
from tsopsd_jax.types import Batch

Knobs = Mapping[str, float]
"""Numbers that change between updates, by name."""


class Control(NamedTuple):
    """Numbers that an objective turns between updates, on the host: changing one compiles nothing.

    init: their values at the phase's start. They stand in `batch.knobs` as scalars, and in the log as `control/NAME`.
        The knob `sampling_temperature` is an input of the sampler too: each rollout is drawn at its value.
    update: (knobs, metrics) -> knobs of the next update. The metrics are those that the loss returned, means of the
        update, and `loss/total` and `optim/grad_norm`. Pure: a run that resumes goes the same way.
    """

    init: Knobs
    update: Callable[[Knobs, Mapping[str, float]], Knobs]


class Objective(NamedTuple):
    """A loss as two pure functions, and what it needs.

    stats: (logits [..., V], tokens [...]) -> {name: [...]}, the only code that sees the vocabulary. With `reference` it
        takes a third argument, the frozen reference's logits [..., V] at the same tokens. Where `control` has the knob
        `sampling_temperature`, it is a keyword argument, that of the policy in the ratio.
    loss: ({name: [B, L]}, Batch) -> LossOutput, sees whole sequences and no vocabulary.

    tokenwise: the loss of a token follows from the statistics and the batch at that token alone. Then it may be asked
        about any tokens in any arrangement, [1, n] at a time: the head forms gradients in one pass, and rows are
        packed. A loss that is not tokenwise sees one response a row. If it is a mean over responses, it counts the rows
        that have a token.
    uses_advantage: the loss reads `batch.advantage`, so its phase needs a reward.
    policy_temperature: of the policy in its ratio, which must be the sampling temperature; None: right at any. Where
        that is a knob: its first value.
    select: ({name: [B, L]}, Batch) -> Batch sees the whole update's batch once, before the gradient, whatever the
        micro-batches: for weights or advantages that depend on a quantile, a covariance or a mean over all tokens. It
        sets `weight` or `advantage`, or adds scalars to `knobs`; never the mask. It may not depend on how sequences lie
        in rows. A random choice hashes the token, its position and `old_logp` (`objectives.base.token_hash`).
    select_reads: names of the statistics that `select` is given; None: all. Where it is `logp` alone, and one update
        follows a rollout, the sampler's takes the place of a forward pass (`train.phase.Phase.sampler_selects`).
    control: numbers that change between updates.
    reference: `stats` compares the policy with a frozen reference, which its phase's setting `reference` names. No
        gradient reaches the reference.

    A statistic called `logp` (log-probability of the token) lets the learner measure the sampler against itself.
    """

    stats: Stats
    loss: Loss
    tokenwise: bool = False
    select: Callable[[dict[str, Array], Batch], Batch] | None = None
    control: Control | None = None
    uses_advantage: bool = True
    policy_temperature: float | None = 1.0
    reference: bool = False
    select_reads: tuple[str, ...] | None = None

    def read(self, stats: dict[str, Array]) -> dict[str, Array]:
        """The statistics that `select` is given."""
        return stats if self.select_reads is None else {name: stats[name] for name in self.select_reads}


def positions(batch: Batch) -> Int[Array, "B L"]:
    """Index of each token in its own sequence, wherever it lies in a packed row."""
    at = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None, :]
    if batch.segment is None:
        return jnp.broadcast_to(at, batch.tokens.shape)
    begins = jnp.pad(batch.segment[:, 1:] != batch.segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return at - jax.lax.cummax(jnp.where(begins, at, 0), axis=1)


def token_hash(batch: Batch) -> UInt[Array, "B L"]:
    """A number of 32 random-looking bits for each token, from the token, its position and `old_logp`: the same whatever
    the rows, the micro-batches or the devices."""
    bits = jax.lax.bitcast_convert_type(batch.old_logp, jnp.uint32)
    hashed = jnp.zeros_like(bits)
    for part in (batch.tokens.astype(jnp.uint32), positions(batch).astype(jnp.uint32), bits):
        # The golden ratio's bits; a shift and another odd number then spread the high ones.
        hashed = (hashed ^ part) * jnp.uint32(0x9E3779B1)
        hashed = hashed ^ (hashed >> 15)
        hashed = hashed * jnp.uint32(0x85EBCA77)
        hashed = hashed ^ (hashed >> 13)
    return hashed


def first(order_by: tuple[Array, ...], count: Int[Array, ""]) -> Bool[Array, "B L"]:
    """True at the `count` tokens that come first by the arrays of [B, L], the first array deciding first, ties by the
    next."""
    flat = [x.reshape(-1) for x in order_by]
    order = jnp.lexsort(tuple(reversed(flat)))
    rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    return (rank < count).reshape(order_by[0].shape)


def share(batch: Batch, fraction: float) -> Int[Array, ""]:
    """max(1, int(fraction x response tokens)): how many tokens a sparse method touches."""
    tokens = jnp.sum(batch.mask, dtype=jnp.float32)
    return jnp.maximum(jnp.floor(tokens * fraction), 1.0).astype(jnp.int32)
