# pyright: strict, reportUnknownMemberType=false
"""The data that flows through the loop, and the glossary of axes and units.

    sample : params, prompts -> Rollout      judge : Rollout -> Batch      update : TrainState, Batch -> TrainState

Axes (capital letters in shape comments; suffixes such as `q_BTNH` inside `model/` and `rollout/`):

    B  rows: one row is one prompt with one response       P  prompts of a step
    G  responses per prompt (the "group")                  L  positions of a row: prompt ++ response ++ padding
    V  vocabulary entries                                  D  hidden size
    T  positions handled at once (1 while decoding)        S  slots of the key-value cache
    N  query heads     K  key-value heads                  H  head dimension      F  feed-forward width

Index `t` of a per-token array always refers to `tokens[:, t]`; the shift between a hidden state and the token
that it predicts happens in exactly one function, `head._next_token`.

Units are part of the names: `_tokens`, `_nats`, `_s`, `_fraction`. Temperatures say whose they are:
`sampling_temperature`, `teacher_temperature`.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

AnyArray = jax.Array | np.ndarray
"""On a device, or on the host (numpy)."""

PyTree = Any
"""A nested container of arrays, such as the parameters."""

SAMPLING_TEMPERATURE = "sampling_temperature"
"""The knob of a control that the sampler takes as an input."""


_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def _pytree_dataclass(cls: type[_T]) -> type[_T]:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree_dataclass
class Mean:
    """A weighted mean that can still be added: over micro-batches, devices and logging windows.

    `total` is the sum of the values and `count` the sum of their weights (scalars). Only the learner and the
    logger divide, so a mean of means cannot happen.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, values: Float[Array, "..."], mask: Bool[Array, "..."]) -> "Mean":
        """Add up `values` where `mask`, and count those; what stands outside the mask is never read.

        Raises:
            ValueError: if the shapes differ.
        """
        if jnp.shape(values) != jnp.shape(mask):
            raise ValueError(
                f"Mean.of expects values and mask of one shape, got values {jnp.shape(values)} and mask "
                f"{jnp.shape(mask)}"
            )
        total = jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)
        return cls(total, jnp.sum(mask, dtype=jnp.float32))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Float[Array, ""]:
        """`total / count`, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


@_pytree_dataclass
class Prompts:
    """Prompts to be continued: `tokens[b, :length[b]]` is prompt b, the rest padding of any content.

    `row_id` identifies the row within its step (unsigned, unique): with the step's key it is all that the row's
    randomness depends on.
    """

    tokens: Int[AnyArray, "B P"]
    length: Int[AnyArray, " B"]
    row_id: Int[AnyArray, " B"]


@_pytree_dataclass
class Rollout:
    """Sampled responses: facts only, no judgement.

    Row b is `tokens[b, :length[b]]`: its prompt (`prompt_length[b]` tokens) directly followed by its response, the
    stop token included; zeros after it. `logp` (nats) is the log-probability of each response token under the
    distribution that was sampled (temperature, top-p and top-k applied), 0 elsewhere. `stopped[b]` says that a stop
    token ended the row, not the length limit.
    """

    tokens: Int[AnyArray, "B L"]
    prompt_length: Int[AnyArray, " B"]
    length: Int[AnyArray, " B"]
    logp: Float[AnyArray, "B L"]
    stopped: Bool[AnyArray, " B"]

    @property
    def mask(self) -> Bool[AnyArray, "B L"]:
        """bool [B, L], True at response tokens (numpy for a rollout on the host). Derived from the lengths, never from
        token ids: Qwen3 base has pad == eos."""
        xp = np if isinstance(self.tokens, np.ndarray) else jnp
        at = xp.arange(self.tokens.shape[1], dtype=self.length.dtype)[None, :]
        return (at >= self.prompt_length[:, None]) & (at < self.length[:, None])

    @property
    def response_length(self) -> Int[AnyArray, " B"]:
        """Response tokens per row, the stop token included."""
        return self.length - self.prompt_length


@_pytree_dataclass
class Batch:
    """What one update consumes. Build it with `Batch.of`; all arrays are [B, L], zero outside the response.

    A row holds one sequence, or several one after the other: `segment` then numbers them 1, 2, ... with 0 for padding.
    `weight` is what an objective's `select` says of each token, for its `loss` to read: a token without weight still
    counts in the mean, since the count follows from `mask` alone. `knobs` are the numbers that its `control` turns
    between updates: scalars, by name.
    """

    tokens: Int[Array, "B L"]
    mask: Bool[Array, "B L"]
    advantage: Float[Array, "B L"]
    old_logp: Float[Array, "B L"]
    segment: Int[Array, "B L"] | None = None
    weight: Float[Array, "B L"] | None = None
    knobs: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict[str, Float[Array, ""]])

    @property
    def sampling_temperature(self) -> Float[Array, ""] | None:
        """The knob of that name: the temperature at which the rollout was sampled; None where no control turns it."""
        return self.knobs.get(SAMPLING_TEMPERATURE)

    @property
    def bare(self) -> "Batch":
        """The batch without its knobs: nothing but arrays of [B, L]."""
        return dataclasses.replace(self, knobs={})

    @classmethod
    def of(cls, *, tokens: ArrayLike, mask: ArrayLike, advantage: ArrayLike, old_logp: ArrayLike) -> "Batch":
        """Zero whatever padding holds, once, so that no junk (not even NaN) can reach a loss.

        Args:
            tokens: [B, L] integers; kept up to each row's last response token, zero after it.
            mask: [B, L], true (or nonzero) at response tokens.
            advantage: [B, L] float, kept where `mask`.
            old_logp: [B, L] float, nats, log-probability under the policy that sampled; kept where `mask`.

        Raises:
            ValueError: if the shapes differ.
        """
        shapes = {
            "tokens": jnp.shape(tokens),
            "mask": jnp.shape(mask),
            "advantage": jnp.shape(advantage),
            "old_logp": jnp.shape(old_logp),
        }
        if len(set(shapes.values())) != 1 or len(shapes["tokens"]) != 2:
            raise ValueError(f"Batch.of expects tokens, mask, advantage and old_logp of one shape [B, L], got {shapes}")
        mask = jnp.asarray(mask).astype(bool)
        # True up to the last response token of the row: a reversed running "or".
        live = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=1), axis=1, dtype=jnp.int32), axis=1) > 0
        return cls(
            tokens=jnp.where(live, jnp.asarray(tokens, jnp.int32), 0),
            mask=mask,
            advantage=jnp.where(mask, jnp.asarray(advantage, jnp.float32), 0.0),
            old_logp=jnp.where(mask, jnp.asarray(old_logp, jnp.float32), 0.0),
        )


@_pytree_dataclass
class LossOutput:
    """What an objective returns: the loss to differentiate, and metrics (`group/name_unit` -> Mean)."""

    loss: Mean
    metrics: dict[str, Mean]


@_pytree_dataclass
class TrainState:
    """Everything that learning changes: the step counter, float32 master weights, the optimizer's state."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
