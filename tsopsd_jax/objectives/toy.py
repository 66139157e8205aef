# pyright: strict, reportUnknownMemberType=false, reportUnknownLambdaType=false, reportUnknownArgumentType=false
"""A toy batch on which an objective's contract is checked."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tsopsd_jax.head import call_stats
from tsopsd_jax.objectives.base import Objective
from tsopsd_jax.types import Batch, LossOutput

PROMPT, RESPONSE = (2, 1, 3, 1, 2, 1), (5, 1, 3, 4, 2, 6)
"""Tokens of the toy batch's rows: ragged, so that no two parts of the batch count the same."""

WIDTH, VOCABULARY = 8, 512
"""Positions and entries of the toy batch: enough entries for a top-k of one's own."""


class Toy(NamedTuple):
    """Logits [B, L, V] and the batch to which they belong (numpy): the logits at [b, t] predict `tokens[b, t]`.

    `reference_z`: the reference's logits, of the same shape; None: the objective has no reference.
    """

    z: np.ndarray
    batch: Batch
    reference_z: np.ndarray | None = None

    def mapped(self, function: Any) -> "Toy":
        """The toy with `function` of its arrays."""
        z = None if self.reference_z is None else function(self.reference_z)
        return Toy(function(self.z), mapped(function, self.batch), z)


def flat_stats(objective: Objective, z: Any, batch: Batch, reference_z: Any) -> Any:
    """The statistics of all tokens, [B x L], asked for as the head asks."""
    flat = None if reference_z is None else reference_z.reshape(-1, z.shape[-1])
    tokens = batch.tokens.reshape(-1)
    return call_stats(objective.stats, z.reshape(-1, z.shape[-1]), tokens, flat, batch.sampling_temperature)


def mapped(function: Any, batch: Batch) -> Batch:
    """A batch with `function` of its arrays; knobs stay as they are."""
    return dataclasses.replace(jax.tree.map(function, batch.bare), knobs=batch.knobs)


def make_toy(objective: Objective) -> Toy:
    """Make the toy batch of an objective, with the knobs of its control."""
    rng = np.random.default_rng(0)
    shape = len(PROMPT), WIDTH
    at, prompt = np.arange(WIDTH)[None, :], np.array(PROMPT)[:, None]
    end = prompt + np.array(RESPONSE)[:, None]
    mask = (at >= prompt) & (at < end)
    z = 1.5 * rng.normal(size=(*shape, VOCABULARY))
    tokens = rng.integers(0, VOCABULARY, shape)
    logp = np.take_along_axis(z, tokens[..., None], -1)[..., 0] - np.log(np.exp(z).sum(-1))
    fields: dict[str, Any] = {
        "tokens": np.where(at < end, tokens, 0).astype(np.int32),
        "mask": mask,
        "advantage": np.where(mask, rng.normal(size=(shape[0], 1)), 0).astype(np.float32),
        "old_logp": np.where(mask, np.minimum(logp + 0.2 * rng.normal(size=shape), -0.01), 0).astype(np.float32),
    }
    knobs: Any = {} if objective.control is None else {k: np.float32(v) for k, v in objective.control.init.items()}
    near = (0.8 * z + 0.5 * rng.normal(size=z.shape)).astype(np.float32) if objective.reference else None
    return Toy(z.astype(np.float32), Batch(**fields, knobs=knobs), near)


def take_rows(toy: Toy, which: Any) -> Toy:
    """The chosen rows of the toy."""
    return toy.mapped(lambda x: x[which])


def padded(toy: Toy) -> Toy:
    """The toy with three more positions in every row, whose logits are ones."""

    def longer(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, 3), *[(0, 0)] * (x.ndim - 2)), constant_values=x.ndim == 3)

    return toy.mapped(longer)


def packed(toy: Toy) -> Toy:
    """The toy with two sequences in a row."""
    width, n = 2 * WIDTH, len(PROMPT) // 2
    segment = np.broadcast_to(np.arange(1, len(PROMPT) + 1, dtype=np.int32)[:, None], toy.batch.mask.shape)
    whole = toy._replace(batch=dataclasses.replace(toy.batch, segment=segment))
    return whole.mapped(lambda x: x.reshape(n, width, *x.shape[2:]))


class Found(NamedTuple):
    """What an objective makes of a batch (numpy): statistics [B, L], loss and metrics, gradient into the logits."""

    stats: dict[str, np.ndarray]
    out: LossOutput
    gradient: np.ndarray


def join_found(parts: Sequence[Found], at: Any) -> Found:
    """Join what was found of a batch's parts into that of the batch: sums added, what is per token (at `at`) side by
    side."""
    return Found(
        {name: np.concatenate([part.stats[name][at] for part in parts]) for name in parts[0].stats},
        jax.tree.map(lambda *xs: np.sum(xs, axis=0), *(part.out for part in parts)),
        np.concatenate([part.gradient[at] for part in parts]),
    )
