"""Hidden states x unembedding -> per-token vocabulary statistics, without [B, L, V] ever existing.

`next_token_stats` is the only function that shifts by one: the hidden state at position t - 1 predicts `tokens[:, t]`.
Positions go through the head in chunks that are recomputed in the backward pass, so any function of the logits is
cheap enough to try.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tsopsd_jax import losses

Stats = Callable[[Array, Array], dict[str, Array]]
"""(logits [..., V] float32, tokens [...]) -> {name: [...]}: the only code that sees the vocabulary."""


class VocabStats(NamedTuple):
    """Statistics of one position's distribution p = softmax(z) and of its self-teacher q = softmax(z / T); nats."""

    logp: Float[Array, "*N"]
    entropy: Float[Array, "*N"]
    forward_kl: Float[Array, "*N"]
    reverse_kl: Float[Array, "*N"]


def logits_stats(logits: Float[Array, "*N V"], tokens: Int[Array, "*N"], *, teacher_temperature: float) -> VocabStats:
    """log p(token), H(p), KL(q || p) and KL(p || q) with no gradient through q.  [..., V], [...] -> [...] each.

    Raises:
        ValueError: if the teacher's temperature is not positive.
    """
    teacher = jax.lax.stop_gradient(logits) / check_temperature(teacher_temperature)
    return VocabStats(
        logp=losses.token_logp(logits, tokens),
        entropy=losses.entropy(logits),
        forward_kl=losses.forward_kl(teacher, logits),
        reverse_kl=losses.reverse_kl(teacher, logits),
    )


def check_temperature(teacher_temperature: float) -> float:
    """The temperature itself, or a ValueError if it is not a positive number."""
    if not 0.0 < teacher_temperature < float("inf"):
        raise ValueError(f"teacher_temperature must be positive and finite, got {teacher_temperature}")
    return teacher_temperature


@dataclasses.dataclass(frozen=True)
class LibraryStats:
    """The `stats` of the library's own objectives: the named fields of `VocabStats`, at one teacher temperature.

    An object rather than a closure, so that the head can recognise it and answer from one fused pass.
    """

    fields: tuple[str, ...]
    teacher_temperature: float = 1.0

    def __call__(self, logits: Array, tokens: Array) -> dict[str, Array]:
        stats = logits_stats(logits, tokens, teacher_temperature=self.teacher_temperature)
        return {name: value for name, value in stats._asdict().items() if name in self.fields}


def _project(hidden: Array, unembed: Array) -> Array:
    return jnp.einsum("...D,DV->...V", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)


def vocab_stats(
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "D V"],
    tokens: Int[Array, " N"],
    *,
    teacher_temperature: float,
    chunk_tokens: int = 1024,
) -> VocabStats:
    """`logits_stats` of hidden @ unembed in rematerialised chunks; differentiable in hidden and unembed.

    Args:
        hidden: [N, D] final hidden states.
        unembed: [D, V] output matrix.
        tokens: [N] the token that each hidden state predicts.
        teacher_temperature: T of the self-teacher softmax(z / T).
        chunk_tokens: positions whose logits exist at once.
    """
    stats = LibraryStats(VocabStats._fields, teacher_temperature)
    return VocabStats(**_in_chunks(stats, hidden[None], unembed, tokens[None], chunk_tokens, squeeze=True))


def _in_chunks(stats: Stats, hidden, unembed, tokens, chunk, *, squeeze=False) -> dict[str, Array]:
    """stats of [B, L, D] hidden states, `chunk` positions (of every row) at a time: rows stay on their devices."""
    b, length, d = hidden.shape
    chunk = min(chunk, length)
    pieces = -(-length // chunk)
    pad = pieces * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(b, pieces, chunk, d)
    tokens = jnp.pad(tokens, ((0, 0), (0, pad))).reshape(b, pieces, chunk)

    @jax.checkpoint
    def one(piece):
        return stats(_project(piece[0], unembed), piece[1])

    out = jax.lax.map(one, (hidden.swapaxes(0, 1), tokens.swapaxes(0, 1)))

    def join(x):
        x = x.swapaxes(0, 1).reshape(b, pieces * chunk)[:, :length]
        return x[0] if squeeze else x

    return {name: join(x) for name, x in out.items()}


def next_token_stats(
    stats: Stats,
    hidden: Float[Array, "B L D"],
    unembed: Float[Array, "D V"],
    tokens: Int[Array, "B L"],
    *,
    chunk_positions: int,
) -> dict[str, Float[Array, "B L"]]:
    """The statistics of every token given what precedes it: index t refers to `tokens[:, t]`; 0 at t = 0.

    Args:
        stats: the objective's function of logits and tokens.
        hidden: [B, L, D]; `hidden[:, t - 1]` predicts `tokens[:, t]`.
        unembed: [D, V].
        tokens: [B, L].
        chunk_positions: positions per row whose logits exist at once.
    """
    out = _in_chunks(stats, hidden[:, :-1], unembed, tokens[:, 1:], chunk_positions)
    return {name: jnp.pad(x, ((0, 0), (1, 0))) for name, x in out.items()}
