# pyright: strict, reportUnknownMemberType=false
"""What the library's objectives need of one position's logits, each from a few sums over the vocabulary.

With s = z - max z, u = s / T, Z = sum exp(s), p = exp(s) / Z, Q and q likewise of u, and E = E_p[-s]:

    log p(token) = s[token] - log Z                   d/dz = 1[token] - p
    H(p) = log Z + E                                  d/dz = -p (s + E)
    KL(q || p) = sum q f(d),  d = log q - log p       d/dz = p - q                 f(d) = d + exp(-d) - 1 >= 0
    KL(p || q) = sum p f(-d)                          d/dz = (1 - 1/T) p (s + E)

(TS-OPSD, equations 2 to 5.) Of a collapsed policy Z - 1, the sum without the largest entry, is all that there is to
know, and adding it to 1 loses it: the sums leave the largest entry out, and where a gradient cancels at that entry
(1 - p, p - q) it is formed from what was left out.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tsopsd_jax.losses import kl_terms


class VocabStats(NamedTuple):
    """Statistics of one position's distribution p = softmax(z) and of its self-teacher q = softmax(z / T); nats."""

    logp: Float[Array, "*N"]
    entropy: Float[Array, "*N"]
    forward_kl: Float[Array, "*N"]
    reverse_kl: Float[Array, "*N"]


def check_temperature(teacher_temperature: float) -> float:
    """Return the temperature.

    Raises:
        ValueError: if it is not a positive number.
    """
    if not 0.0 < teacher_temperature < float("inf"):
        raise ValueError(f"teacher_temperature must be positive and finite, got {teacher_temperature}")
    return teacher_temperature


@dataclasses.dataclass(frozen=True)
class LibraryStats:
    """Statistics function of the library's objectives: the named fields of `VocabStats`, at one teacher temperature.

    (logits [..., V], tokens [...]) -> {name: [...]}. No gradient passes through the teacher; the gradient into the
    logits is the formula above, from the logits and four numbers per token.

    Raises:
        ValueError: if the teacher's temperature is not positive.
    """

    fields: tuple[str, ...]
    teacher_temperature: float = 1.0

    def __post_init__(self):
        check_temperature(self.teacher_temperature)

    def __call__(self, logits: Float[Array, "*N V"], tokens: Int[Array, "*N"]) -> dict[str, Array]:
        return _stats(self, logits, tokens)


def logits_stats(logits: Float[Array, "*N V"], tokens: Int[Array, "*N"], *, teacher_temperature: float) -> VocabStats:
    """Compute log p(token), H(p), KL(q || p) and KL(p || q) with no gradient through q.  [..., V], [...] -> [...] each.

    Raises:
        ValueError: if the teacher's temperature is not positive.
    """
    return VocabStats(**LibraryStats(VocabStats._fields, teacher_temperature)(logits, tokens))


class _Sums(NamedTuple):
    """Sums over the vocabulary, [..., 1] each: max z, Z - 1 and E of p, and Q - 1 (0 where no teacher is asked for)."""

    top: Array
    rest: Array
    energy: Array
    teacher_rest: Array


def _shifted(logits: Array, sums: _Sums) -> tuple[Array, Array]:
    """Compute s, and which entries are the largest; -inf logits become very low ones, whose probability is 0."""
    s = jnp.maximum(logits.astype(jnp.float32) - sums.top, -1e30)
    return s, s == 0.0


def _has_teacher(asked: LibraryStats) -> bool:
    return "forward_kl" in asked.fields or "reverse_kl" in asked.fields


def _sums(asked: LibraryStats, logits: Array) -> _Sums:
    top = jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    zero = jnp.zeros_like(top)
    s, is_top = _shifted(logits, _Sums(top, zero, zero, zero))
    more = jnp.sum(is_top, axis=-1, keepdims=True, dtype=jnp.float32) - 1.0  # ties beyond the first

    def rest(x: Array) -> Array:
        return jnp.sum(jnp.where(is_top, 0.0, jnp.exp(x)), axis=-1, keepdims=True) + more

    r = rest(s)
    energy = jnp.sum(jnp.exp(s) * -s, axis=-1, keepdims=True) / (1.0 + r)
    return _Sums(top, r, energy, rest(s / asked.teacher_temperature) if _has_teacher(asked) else zero)


def _values(asked: LibraryStats, logits: Array, tokens: Array, sums: _Sums) -> dict[str, Array]:
    s, _ = _shifted(logits, sums)
    log_z, log_q = jnp.log1p(sums.rest), jnp.log1p(sums.teacher_rest)
    of_token = _index(logits) == tokens[..., None]
    out = {
        "logp": jnp.sum(jnp.where(of_token, s, 0.0), axis=-1) - log_z[..., 0],
        "entropy": (log_z + sums.energy)[..., 0],
    }
    if _has_teacher(asked):
        logp, logq = s - log_z, s / asked.teacher_temperature - log_q
        if "forward_kl" in asked.fields:
            out["forward_kl"] = jnp.sum(kl_terms(logq, logp), axis=-1)
        if "reverse_kl" in asked.fields:
            out["reverse_kl"] = jnp.sum(kl_terms(logp, logq), axis=-1)
    return {name: out[name] for name in asked.fields}


def _index(logits: Array) -> Array:
    """0 .. V - 1 along the last axis; comparing with it finds a token's entry without gathering a sharded axis."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(asked: LibraryStats, logits: Array, tokens: Array) -> dict[str, Array]:
    return _values(asked, logits, tokens, _sums(asked, logits))


_Kept = tuple[Array, Array, _Sums]
"""Logits, tokens and their sums."""


def _forward(asked: LibraryStats, logits: Array, tokens: Array) -> tuple[dict[str, Array], _Kept]:
    sums = _sums(asked, logits)
    return _values(asked, logits, tokens, sums), (logits, tokens, sums)


def _backward(asked: LibraryStats, kept: _Kept, g: dict[str, Array]) -> tuple[Array, None]:
    # `g` has every statistic that was asked for; of one that the loss did not use it is zero. `sums.rest`, Z - 1, holds
    # what ties with the top: each of those has the probability 1 / Z.
    logits, tokens, sums = kept
    s, is_top = _shifted(logits, sums)
    g = {name: x[..., None] for name, x in g.items()}
    t = asked.teacher_temperature
    z = 1.0 + sums.rest
    p = jnp.exp(s) / z
    dz = jnp.zeros_like(s)
    slope = 0.0  # of p (s + E)
    if "entropy" in g:
        slope = slope - g["entropy"]
    if "reverse_kl" in g:
        slope = slope + (1.0 - 1.0 / t) * g["reverse_kl"]
    if "entropy" in g or "reverse_kl" in g:
        dz = dz + slope * p * (s + sums.energy)
    if "logp" in g:
        of_token = _index(logits) == tokens[..., None]
        one_less_p = jnp.where(is_top, sums.rest / z, 1.0 - p)
        dz = dz + g["logp"] * jnp.where(of_token, one_less_p, -p)
    if "forward_kl" in g:
        q_sum = 1.0 + sums.teacher_rest
        q = jnp.exp(s / t) / q_sum
        dz = dz + g["forward_kl"] * jnp.where(is_top, sums.teacher_rest / q_sum - sums.rest / z, p - q)
    return dz.astype(logits.dtype), None


_stats.defvjp(_forward, _backward)
