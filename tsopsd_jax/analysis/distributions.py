"""What reheating does to the distribution of the next token, at the positions of given responses (TS-OPSD, figure 5).

Two policies, `before` p and `after` q, see the same text. Of each response token: KL(p || q) and KL(q || p), the change
of the exact entropy, the share of the k likeliest tokens that both have in common, and the probability of those under
each.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tsopsd_jax import losses
from tsopsd_jax.analysis.batches import GivenBatch
from tsopsd_jax.distributed.sharding import put, replicated, row_sharding
from tsopsd_jax.head import Reference, batch_stats
from tsopsd_jax.model import Qwen3
from tsopsd_jax.types import Batch, PyTree

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SMALLEST_KL_NATS, LARGEST_KL_NATS, BINS_PER_DECADE = 1e-8, 1e2, 10
BINS = 100


class OnMesh(NamedTuple):
    """A policy where it is computed: its functions, and its parameters on their mesh."""

    model: Qwen3
    params: PyTree


def pair_stats(after: Float[Array, "*N V"], before: Float[Array, "*N V"], *, k: int) -> dict[str, Float[Array, "*N"]]:
    """Compare two distributions by their logits, position by position.  [..., V] x2 -> {name: [...]}

    Returns:
        forward_kl_nats, KL(before || after); reverse_kl_nats, KL(after || before); entropy_before_nats,
        entropy_after_nats; top_k_overlap, |the k likeliest of both| / k; top_k_mass_before and top_k_mass_after, the
        probability of these.
    """
    logp, logq = losses.log_softmax(before), losses.log_softmax(after)
    (top_p, at_p), (top_q, at_q) = jax.lax.top_k(logp, k), jax.lax.top_k(logq, k)
    same = at_p[..., :, None] == at_q[..., None, :]
    in_after, in_before = jnp.any(same, axis=-1), jnp.any(same, axis=-2)
    return {
        "forward_kl_nats": jnp.sum(losses.kl_terms(logp, logq), axis=-1),
        "reverse_kl_nats": jnp.sum(losses.kl_terms(logq, logp), axis=-1),
        "entropy_before_nats": losses.entropy(before),
        "entropy_after_nats": losses.entropy(after),
        "top_k_overlap": jnp.sum(in_after, axis=-1, dtype=jnp.float32) / k,
        "top_k_mass_before": jnp.sum(jnp.where(in_after, jnp.exp(top_p), 0.0), axis=-1),
        "top_k_mass_after": jnp.sum(jnp.where(in_before, jnp.exp(top_q), 0.0), axis=-1),
    }


def compare_tokens(
    before: OnMesh, after: OnMesh, parts: Iterable[GivenBatch], *, k: int, tile_tokens: int, mesh: Mesh
) -> Iterator[dict[str, np.ndarray]]:
    """Compare two policies at each response token of each batch: {name: [tokens]}, one dict a batch.

    Logits exist a tile of tokens at a time, of both policies side by side.
    """
    rows = row_sharding(mesh)

    def of(p: PyTree, q: PyTree, batch: Batch) -> dict[str, Array]:
        def stats(logits: Array, _tokens: Int[Array, "*N"], reference: Array) -> dict[str, Array]:
            return pair_stats(logits, reference, k=k)

        reference = Reference(before.model.hidden(p, batch.tokens), before.model.unembed(p))
        hidden, unembed = after.model.hidden(q, batch.tokens), after.model.unembed(q)
        return batch_stats(stats, hidden, unembed, batch, reference=reference, tile_tokens=tile_tokens, mesh=mesh)

    step = jax.jit(of, out_shardings=replicated(mesh))
    for part in parts:
        found = jax.device_get(step(before.params, after.params, put(part.batch, rows)))
        yield {name: values[np.asarray(part.batch.mask)] for name, values in found.items()}


def summary(values: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """The mean, quantiles and histogram of a measure; values beyond the edges are counted in the outer bins."""
    values = np.asarray(values, np.float64)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    quantiles = dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True))
    return {
        "mean": float(values.mean()),
        "quantiles": quantiles,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def summarise_tokens(found: dict[str, np.ndarray], *, k: int) -> dict[str, Any]:
    """Summarise the measures of `pair_stats` over all tokens."""
    decades = round(np.log10(LARGEST_KL_NATS / SMALLEST_KL_NATS))
    kl_edges = np.geomspace(SMALLEST_KL_NATS, LARGEST_KL_NATS, decades * BINS_PER_DECADE + 1)
    kl_edges = np.concatenate([[0.0], kl_edges])
    change = found["entropy_after_nats"].astype(np.float64) - found["entropy_before_nats"]
    widest = max(float(np.abs(change).max()), 1e-6)
    shares = (np.arange(k + 2) - 0.5) / k
    out = {
        "forward_kl_nats": summary(found["forward_kl_nats"], kl_edges),
        "reverse_kl_nats": summary(found["reverse_kl_nats"], kl_edges),
        "entropy_change_nats": summary(change, np.linspace(-widest, widest, BINS + 1)),
        "top_k_overlap": {"k": k, **summary(found["top_k_overlap"], shares)},
    }
    for name in ("top_k_mass_before", "top_k_mass_after"):
        out[name] = summary(found[name], np.linspace(0.0, 1.0, BINS + 1))
    for name in ("entropy_before_nats", "entropy_after_nats"):
        out[name] = float(found[name].astype(np.float64).mean())
    return out | {"tokens": len(change)}
