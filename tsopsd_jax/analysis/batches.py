"""Given responses as batches of few shapes, for analyses that go through many of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tsopsd_jax.types import Batch

SHORTEST = 64
"""Tokens of the narrowest batch; widths are this times a power of two, so that few programs are compiled."""


class Answered(NamedTuple):
    """A prompt and a response to it, as token ids, the stop token included."""

    prompt: Sequence[int]
    response: Sequence[int]


class GivenBatch(NamedTuple):
    """Rows of one width, as host arrays; `which` [rows] are their places in the list, -1 for rows that only fill up."""

    batch: Batch
    which: np.ndarray


def batches_of(
    sequences: Sequence[Answered], *, tokens_at_once: int, multiple: int, limit: int
) -> Iterator[GivenBatch]:
    """Cut sequences into batches [R, L], shortest first.

    Args:
        tokens_at_once: R x L is at most this, unless R is the least that there can be.
        multiple: R is a multiple of this, the number of devices that rows are divided over.
        limit: positions of the model.

    Raises:
        ValueError: an empty prompt or response, or one that is longer than the limit.
    """
    lengths = np.asarray([len(s.prompt) + len(s.response) for s in sequences])
    for at, s in enumerate(sequences):
        if not s.prompt or not s.response or lengths[at] > limit:
            raise ValueError(
                f"response {at + 1}: expected a prompt and a response of at least a token each and {limit} together, "
                f"got {len(s.prompt)} and {len(s.response)}"
            )
    widths = np.minimum(SHORTEST << np.maximum(0, np.ceil(np.log2(lengths / SHORTEST))).astype(int), limit)
    for width in sorted(set(widths.tolist())):
        mine = np.flatnonzero(widths == width)
        rows = max(multiple, tokens_at_once // width // multiple * multiple)
        for start in range(0, len(mine), rows):
            which = mine[start : start + rows]
            yield _part(sequences, np.pad(which, (0, rows - len(which)), constant_values=-1), width)


def _part(sequences: Sequence[Answered], which: np.ndarray, width: int) -> GivenBatch:
    tokens, mask = np.zeros((len(which), width), np.int32), np.zeros((len(which), width), bool)
    for row, at in enumerate(which):
        if at >= 0:
            prompt, response = sequences[at]
            tokens[row, : len(prompt) + len(response)] = [*prompt, *response]
            mask[row, len(prompt) : len(prompt) + len(response)] = True
    zero = np.zeros(mask.shape, np.float32)
    return GivenBatch(Batch(tokens, mask, zero, zero), which)  # pyright: ignore[reportArgumentType] - to be placed on devices
