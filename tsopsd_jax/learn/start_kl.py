"""How far a phase has moved the policy: the KL to the policy that the phase began with, estimated on its own responses."""

import jax
import jax.numpy as jnp
import numpy as np

from tsopsd_jax import losses
from tsopsd_jax.distributed.sharding import put, row_sharding
from tsopsd_jax.head import batch_stats
from tsopsd_jax.head_tiles import TILE_TOKENS
from tsopsd_jax.learn.update import distillation_batch
from tsopsd_jax.model import Qwen3
from tsopsd_jax.types import PyTree, Rollout


def start_policy(model: Qwen3, params: PyTree) -> PyTree:
    """A copy of `params` in the compute dtype, laid out as they are; it outlives the state that updates donate."""
    dtype = jnp.dtype(model.compute_dtype)
    layout = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(lambda p: jax.tree.map(lambda x: jnp.copy(x).astype(dtype), p), out_shardings=layout)(params)


class StartKL:
    """KL(policy || start policy) in nats per token.

    Args:
        model: the policy's functions; its mesh divides the rows.
        pieces: strided pieces of a rollout's rows that go through the model one after the other.
        tile_tokens: tokens whose logits exist at once, on each device.
    """

    def __init__(self, model: Qwen3, *, pieces: int, tile_tokens: int = TILE_TOKENS):
        self.pieces = pieces

        def total(start: PyTree, rollout: Rollout):
            batch = distillation_batch(rollout)
            stats = batch_stats(
                lambda logits, tokens: {"logp": losses.token_logp(logits, tokens)},
                model.hidden(start, batch.tokens),
                model.unembed(start),
                batch,
                tile_tokens=tile_tokens,
                mesh=model.mesh,
            )
            gained = jnp.where(batch.mask, stats["logp"] - batch.old_logp, 0.0)
            return jnp.sum(jnp.expm1(gained) - gained)

        self.mesh, self._total = model.mesh, jax.jit(total)

    def nats(self, start: PyTree, rollout: Rollout) -> float:
        """The mean over response tokens of r - 1 - log r, r = start(token) / policy(token): unbiased where the rollout was drawn
        from the policy at temperature 1, never negative, and of low variance (Schulman 2020, "Approximating KL divergence", k3).

        Args:
            start: from `start_policy`.
            rollout: host arrays; `logp` is the policy's.
        """
        found = []
        for i in range(self.pieces):
            piece = jax.tree.map(lambda x, i=i: x[i :: self.pieces], rollout)
            found.append(self._total(start, piece if self.mesh is None else put(piece, row_sharding(self.mesh))))
        return float(np.sum(jax.device_get(found))) / max(int(np.sum(rollout.mask)), 1)
