"""Several sequences in one row: a batch without padding, for objectives that treat every token by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tsopsd_jax.model.attention import MOST_SEGMENTS
from tsopsd_jax.types import Batch

LEAST_WIDTH = 256
"""Rows of fewer tokens stay as they are inside a program: short responses fill most of their rows."""


def fill_rows(length: np.ndarray, width: int) -> np.ndarray:
    """Choose the row of each sequence: longest first, each into the first row that has room for it, at most
    `attention.MOST_SEGMENTS` in a row.

    Raises:
        ValueError: for a sequence longer than a row.
    """
    if length.size and length.max() > width:
        raise ValueError(f"packing: a sequence of {length.max()} tokens is longer than a row of {width}")
    room, row = np.full(length.size, width), np.empty(length.size, np.int64)
    held = np.zeros(length.size, np.int64)
    for i in np.argsort(-length, kind="stable"):
        row[i] = np.argmax((room >= length[i]) & (held < MOST_SEGMENTS))
        room[row[i]] -= length[i]
        held[row[i]] += 1
    return row


def pack(batch: Batch, length: np.ndarray, *, micro_batches: int) -> Batch:
    """Put a batch's sequences into as few rows as they fit in, on the host; the others are empty, the shape stays [B,
    L].

    Rows are filled micro-batch by micro-batch (micro-batch i has the rows i, i + micro_batches, ...), so that the last
    ones are empty and need not be computed.

    Args:
        batch: one sequence a row.
        length: [B] tokens of each, prompt and response.
        micro_batches: of the update, a divisor of the rows.
    """
    batch = jax.tree.map(np.asarray, batch.bare)
    b, width = batch.tokens.shape
    row = fill_rows(np.asarray(length), width)
    each = b // micro_batches
    row = (row % each) * micro_batches + row // each
    # Token j of sequence i goes to place[i] + j of row[i].
    order = np.argsort(row, kind="stable")
    before = np.concatenate([[0], np.cumsum(length[order])[:-1]])
    first = np.concatenate([[True], row[order][1:] != row[order][:-1]])
    place, number = np.empty(b, np.int64), np.empty(b, np.int32)
    starts = np.maximum.accumulate(np.where(first, np.arange(b), 0))
    place[order], number[order] = before - before[starts], np.arange(b) - starts + 1
    i = np.repeat(np.arange(b), length)
    j = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)

    def move(x: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        out[row[i], place[i] + j] = x[i, j]
        return out

    segment = np.zeros((b, width), np.int32)
    segment[row[i], place[i] + j] = number[i]
    return dataclasses.replace(jax.tree.map(move, batch), segment=segment)


def fill_rows_in_program(length: Int[Array, " B"], width: int) -> Int[Array, " B"]:
    """Choose the row of each sequence as `fill_rows` does, under jit: a loop over the sequences. None may be longer
    than a row."""
    rows = jnp.arange(length.shape[0], dtype=length.dtype)

    def one(carry, n):
        room, held = carry
        row = jnp.argmax((room >= n) & (held < MOST_SEGMENTS)).astype(length.dtype)
        taken = rows == row
        return (room - jnp.where(taken, n, 0), held + taken.astype(length.dtype)), row

    longest = jnp.argsort(-length, stable=True)
    full = jnp.full(length.shape, width, length.dtype)
    _, row = jax.lax.scan(one, (full, jnp.zeros_like(length)), length[longest])
    return jnp.zeros_like(length).at[longest].set(row)


def pack_in_program(batch: Batch, length: Int[Array, " B"], *, micro_batches: int) -> Batch:
    """Do what `pack` does, under jit: the same rows in the same places, whatever the lengths."""
    b, width = batch.tokens.shape
    row = fill_rows_in_program(length, width)
    row = (row % (b // micro_batches)) * micro_batches + row // (b // micro_batches)
    before = (row[:, None] == row[None, :]) & (jnp.arange(b)[None, :] < jnp.arange(b)[:, None])
    place = jnp.sum(jnp.where(before, length[None, :], 0), axis=1)
    at = jnp.arange(width, dtype=length.dtype)[None, :]
    to = jnp.broadcast_to(row[:, None], (b, width)), jnp.where(at < length[:, None], place[:, None] + at, width)

    def move(x: Array) -> Array:
        return jnp.zeros_like(x).at[to].set(x, mode="drop")

    number = jnp.broadcast_to(1 + jnp.sum(before, axis=1, dtype=jnp.int32)[:, None], (b, width))
    return dataclasses.replace(jax.tree.map(move, batch.bare), segment=move(number), knobs=batch.knobs)


def useful_fraction(batch: Batch, length: np.ndarray, *, micro_batches: int) -> float:
    """Share of the positions that an update of the batch computes which hold a token of a sequence."""
    b, width = batch.tokens.shape
    holds = np.asarray(batch.mask).reshape(-1, micro_batches, width).any(axis=(0, 2))
    used = int(np.flatnonzero(holds).max(initial=0)) + 1
    return float(np.sum(length)) / (used * (b // micro_batches) * width)
