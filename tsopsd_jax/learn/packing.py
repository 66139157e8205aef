"""Several sequences in one row: a batch without padding, for objectives that treat every token by itself."""

import dataclasses

import jax
import numpy as np

from tsopsd_jax.model.attention import MOST_SEGMENTS
from tsopsd_jax.types import Batch


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


def useful_fraction(batch: Batch, length: np.ndarray, *, micro_batches: int) -> float:
    """Share of the positions that an update of the batch computes which hold a token of a sequence."""
    b, width = batch.tokens.shape
    holds = np.asarray(batch.mask).reshape(-1, micro_batches, width).any(axis=(0, 2))
    used = int(np.flatnonzero(holds).max(initial=0)) + 1
    return float(np.sum(length)) / (used * (b // micro_batches) * width)
