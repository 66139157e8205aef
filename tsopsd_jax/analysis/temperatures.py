"""Where teachers of several temperatures pull one policy: gradients of both KLs, and of the entropy.

At the point where the self-teacher is built the reverse KL's gradient into the logits is -(1 - 1/T) dH/dz (TS-OPSD,
equation 5), so its cosine with entropy ascent is 1 at every T and its norm is in proportion to 1 - 1/T. The forward
KL's is p - q, whose direction depends on T; the paper's claim (section 4.5, figure 8) is that it hardly does where the
policy has collapsed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from tsopsd_jax.analysis.batches import GivenBatch
from tsopsd_jax.analysis.distributions import OnMesh
from tsopsd_jax.distributed.sharding import put, replicated, row_sharding, tree_shardings
from tsopsd_jax.learn.update import make_gradient
from tsopsd_jax.logit_stats import LibraryStats
from tsopsd_jax.objectives import Objective, ts_opsd
from tsopsd_jax.types import Batch, LossOutput, Mean, PyTree

ASCENT = "entropy ascent"


def entropy_ascent() -> Objective:
    """Minus the mean entropy: the direction that the others are compared with."""

    def loss(stats: dict[str, Array], batch: Batch) -> LossOutput:
        return LossOutput(Mean.of(-stats["entropy"], batch.mask), {})

    return Objective(LibraryStats(("entropy",)), loss, tokenwise=True, uses_advantage=False, policy_temperature=None)


def sweep_of(temperatures: Iterable[float]) -> dict[str, Objective]:
    """Entropy ascent, then both directions at each temperature, by names such as `forward, T 1.2`."""
    found = {ASCENT: entropy_ascent()}
    for direction in ("forward", "reverse"):
        for t in temperatures:
            found[f"{direction}, T {t:g}"] = ts_opsd(direction=direction, teacher_temperature=t)
    return found


class Pulls(NamedTuple):
    """Losses [G] (nats per token), and products of the gradients [G, G] in the space of parameters."""

    loss_nats: np.ndarray
    product: np.ndarray

    @property
    def norm(self) -> np.ndarray:
        return np.sqrt(np.diagonal(self.product))

    @property
    def cosine(self) -> np.ndarray:
        """[G, G]; NaN beside a gradient that is zero (T = 1)."""
        norm = self.norm
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.product / (norm[:, None] * norm[None, :])


def measure_pulls(
    policy: OnMesh,
    objectives: Mapping[str, Objective],
    parts: Callable[[str], Iterable[GivenBatch]],
    *,
    mesh: Mesh,
    tile_tokens: int,
) -> Pulls:
    """Compute every objective's gradient on the same responses, averaged over all their tokens, and their products.

    All gradients are kept, each as large as the parameters and laid out as they are.

    Args:
        policy: on the mesh.
        objectives: by name.
        parts: the batches, from the start, for the objective of that name.
    """
    model = dataclasses.replace(policy.model, remat="full")
    layout = tree_shardings(model.param_axes(), model.param_shapes(), mesh)
    add = jax.jit(lambda total, more: jax.tree.map(jnp.add, total, more), donate_argnums=0, out_shardings=layout)
    gradients, losses = list[PyTree](), []
    for name, objective in objectives.items():
        one = make_gradient(model, objective, tile_tokens=tile_tokens)

        def weighed(params: PyTree, batch: Batch, one=one) -> tuple[PyTree, Array, Array]:
            gradient, out, _ = one(params, batch)
            return (
                jax.tree.map(lambda g: g.astype(jnp.float32) * out.loss.count, gradient),
                out.loss.total,
                out.loss.count,
            )

        step = jax.jit(weighed, out_shardings=(layout, replicated(mesh), replicated(mesh)))
        total, sums = None, np.zeros(2)
        for part in parts(name):
            more, *scalars = step(policy.params, put(part.batch, row_sharding(mesh)))
            total = more if total is None else add(total, more)
            sums += [float(x) for x in jax.device_get(scalars)]
        gradients.append(total)
        losses.append(sums)
    value, count = np.asarray(losses).T
    return Pulls(value / count, _products(gradients, mesh) / np.square(count[0]))


def _products(gradients: list[PyTree], mesh: Mesh) -> np.ndarray:
    def dot(a: PyTree, b: PyTree) -> list[Array]:
        return [jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]

    dot = jax.jit(dot, out_shardings=replicated(mesh))
    n = len(gradients)
    found = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            found[i, j] = found[j, i] = np.sum(np.asarray(jax.device_get(dot(gradients[i], gradients[j])), np.float64))
    return found
